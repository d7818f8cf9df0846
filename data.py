"""The real clips: uint8 arrays on disk, sampled as random windows and frames.

resize.py writes an array for each clip, (n_frames, S, S, 3), uint8, RGB. The arrays are
memory-mapped, so the data may be larger than memory, or they lie in a GPU's memory; only the frames
of a batch become floats.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import TrainingError, UserError, files_below


class Batch(NamedTuple):
    """What the discriminators see of B videos, real or generated (paper, section 3.2)."""

    windows: torch.Tensor  # S_T: (B, 3, T, S, S), T consecutive frames of each video
    frames: torch.Tensor  # S_1: (B, 3, S, S), one frame of each video
    labels: torch.Tensor | None  # (B,) int64, indices of `ClipDataset.actions`; -1: no action


def to_float(pixels):
    """uint8 0..255 to float32 -1..1, the range of G_I's Tanh. Any shape."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(frames):
    """Float -1..1 to uint8 0..255, rounded and clipped; the inverse of `to_float`. Any shape."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ClipDataset:
    """All clips of a folder, and the paper's two ways of sampling them, S_T and S_1.

    folder: searched for *.npy, with its subfolders; those directly below it are the actions.
    frames: T, the length of a window; shorter clips are skipped.

    Attributes: `names` (paths below the folder, sorted), `lengths` (frames of each clip, int64),
    `labels` (the action of each clip, int64), `actions` (names, sorted), `size` (S) and `skipped`
    (a line for each array that is no clip). Raises UserError if the folder is missing or holds no
    usable clip, OSError if it cannot be read.
    """

    def __init__(self, folder, frames=16):
        self.folder, self.frames, self.skipped = Path(folder), frames, []
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it with resize.py")
        shapes = {}
        for path in files_below(self.folder):
            if path.suffix == ".npy":
                try:
                    shapes[path] = load_clip(path, frames).shape
                except ValueError as reason:
                    self.skipped.append(f"{path}: {reason}")
        sizes = Counter(shape[1] for shape in shapes.values())
        self.size = sizes.most_common(1)[0][0] if sizes else None
        for path, shape in list(shapes.items()):
            if shape[1] != self.size:
                self.skipped.append(f"{path}: {shape[1]} pixels wide, most are {self.size}")
                del shapes[path]
        if not shapes:
            skipped = f" ({len(self.skipped)} skipped; {self.skipped[0]})" if self.skipped else ""
            raise UserError(f"{folder}: no usable clips{skipped}; make some with resize.py")
        self.paths = list(shapes)
        self.names = [path.relative_to(self.folder) for path in self.paths]
        self.lengths = torch.tensor([shape[0] for shape in shapes.values()])
        actions = [name.parts[0] if len(name.parts) > 1 else None for name in self.names]
        self.actions = sorted(set(actions) - {None})
        self.labels = torch.tensor([self.actions.index(a) if a else -1 for a in actions])
        self.num_frames = int(self.lengths.sum())
        self.pixels = None  # all frames, on the device of `to`

    def __len__(self):
        return len(self.paths)

    def clip(self, i):
        """The frames of clip `i`, memory-mapped: (n_frames, S, S, 3) uint8.

        Raises TrainingError if the file has changed since the data set was made.
        """
        try:
            clip = load_clip(self.paths[i], self.frames)
            if clip.shape[:2] != (self.lengths[i], self.size):
                raise ValueError(f"it is {clip.shape} now")
        except ValueError as reason:
            raise TrainingError(f"{self.paths[i]} has changed: {reason}") from None
        return clip

    def windows(self, clip, start, length=None):
        """Windows of clips (B,) from frames (B,), T or `length` long: (B, T, S, S, 3) uint8."""
        length = length or self.frames
        if self.pixels is None:
            pairs = zip(clip.tolist(), start.tolist())
            return torch.from_numpy(np.stack([self.clip(c)[s : s + length] for c, s in pairs]))
        first = (self.lengths.cumsum(0) - self.lengths)[clip] + start
        return self.pixels[(first[:, None] + torch.arange(length)).to(self.pixels.device)]

    def fingerprint(self):
        """Numbers of clips and frames, and a SHA-256 of names, lengths, first and last frames."""
        sha256 = hashlib.sha256()
        for i, name in enumerate(self.names):
            clip = self.clip(i)
            sha256.update(f"{name.as_posix()}\0{len(clip)}\0".encode(errors="surrogateescape"))
            sha256.update(clip[[0, -1]].tobytes())
        return {"clips": len(self), "frames": self.num_frames, "sha256": sha256.hexdigest()}

    def to(self, device):
        """Copy all frames to `device`, as uint8: `windows` then reads them there."""
        clips = [torch.from_numpy(np.array(self.clip(i))) for i in range(len(self))]
        self.pixels = torch.cat(clips).to(device)

    def sample_indices(self, batch_size, rng):
        """Sample a clip for each item of a batch, and the places of S_T and S_1 in it.

        Clips are uniform. In a clip of K frames `start`, the first frame of the window, is uniform
        over 0 ... K - T and `frame`, independently, over 0 ... K - 1 (paper, section 3.2).
        rng: a torch.Generator on the CPU. Returns clip, start and frame: (B,) int64 each.
        """
        clip = torch.randint(len(self), (batch_size,), generator=rng)
        u = torch.rand(2, batch_size, generator=rng, dtype=torch.float64)  # in [0, 1)
        lengths = self.lengths[clip]
        return clip, (u[0] * (lengths - self.frames + 1)).long(), (u[1] * lengths).long()

    def sample(self, batch_size, rng):
        """Sample S_T and S_1 of `batch_size` real clips: a Batch of uint8 pixels.

        It is on the device of `to`, else on the CPU; channels lie last in memory.
        """
        clip, start, frame = self.sample_indices(batch_size, rng)
        windows, frames = self.windows(clip, start), self.windows(clip, frame, length=1)[:, 0]
        return Batch(windows.permute(0, 4, 1, 2, 3), frames.permute(0, 3, 1, 2), self.labels[clip])


def load_clip(path, frames):
    """Memory-map a .npy file. Raises ValueError if it is no clip of at least `frames` frames."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises a dozen kinds for a damaged header
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot be read ({reason})") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{array.dtype} {array.shape}, not uint8 (n_frames, S, S, 3)")
    length, height, width, _ = array.shape
    if height != width or width % 16 or not 32 <= width <= 256:
        raise ValueError(f"frames of {width}×{height}, not square, of 32, 48, ... or 256")
    if length < frames:
        raise ValueError(f"{length} frames, shorter than a window of {frames}")
    return array
