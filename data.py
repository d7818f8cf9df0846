"""The real clips: uint8 frame arrays on disk, served as random windows of frames.

`resize.py` writes one array a clip, (n_frames, S, S, 3), uint8, RGB. They are memory-mapped, so a
data set larger than memory works, or lie on a GPU as the bytes they are; only the frames of a batch
are ever turned into floats.
"""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from utils import TrainingError, UserError, files_below, open_array, to_float


class ClipDataset:
    """All clips of a folder, and the paper's two ways of looking at them, S_T and S_1.

    folder: searched for `*.npy`, with its subfolders; those directly below it are the actions.
    frames: T, the frames of a window; shorter clips are left out.

    After loading: `names` (paths below the folder, sorted), `lengths` (frames of each clip, int64),
    `size` (S), `actions` (sorted) and `skipped` (a line for each array left out, with the reason).
    Raises UserError if the folder is missing or holds no usable clip, OSError if it cannot be read.
    """

    def __init__(self, folder, frames=16):
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it with resize.py")
        self.frames = frames
        self.skipped = []
        shapes = {}
        for path in files_below(folder):
            if path.suffix != ".npy":
                continue
            try:
                shapes[path] = self._check(open_array(path))
            except ValueError as reason:
                self.skipped.append(f"{path}: {reason}")
        if shapes:  # the size that most clips have is the size of the data
            self.size = Counter(shape[1] for shape in shapes.values()).most_common(1)[0][0]
        for path, shape in list(shapes.items()):
            if shape[1] != self.size:
                self.skipped.append(f"{path}: {shape[1]} pixels wide, most are {self.size}")
                del shapes[path]
        if not shapes:
            left_out = f" ({len(self.skipped)} left out; {self.skipped[0]})" if self.skipped else ""
            raise UserError(
                f"{folder}: no usable clips{left_out}; make some with resize.py, "
                "from videos of your own or with --download or --synthetic"
            )
        self.paths = list(shapes)
        self.names = [path.relative_to(folder) for path in shapes]
        self.lengths = torch.tensor([shape[0] for shape in shapes.values()])
        self.first = self.lengths.cumsum(0) - self.lengths  # where a clip begins among all frames
        self.number_of_frames = int(self.lengths.sum())
        self.bytes = self.number_of_frames * self.size**2 * 3
        self.lengths_on = lru_cache(maxsize=None)(self.lengths.to)  # a copy on each device used
        self.pixels = None  # every frame, once `to` has put them on a device
        # Each open map holds a file, and a process may hold only so many.
        self.open = lru_cache(maxsize=128)(open_array)
        self.actions = sorted({name.parts[0] for name in self.names if len(name.parts) > 1})

    def _check(self, array):
        """The shape of `array`; raises ValueError if it is no clip."""
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{array.dtype} {array.shape}, not uint8 (n_frames, S, S, 3)")
        length, height, width, _ = array.shape
        if height != width or width % 16 or not 32 <= width <= 256:
            raise ValueError(f"frames of {width}×{height}, not square, of 32, 48, ... or 256")
        if length < self.frames:
            raise ValueError(f"{length} frames, shorter than a window of {self.frames}")
        return array.shape

    def __len__(self):
        return len(self.paths)

    def fingerprint(self):
        """What tells this data set from another: a dict of plain values.

        The numbers of its clips and frames, and the SHA-256 of every clip's name, length, first and
        last frame.
        """
        sha256 = hashlib.sha256()
        for i, name in enumerate(self.names):
            clip = self.clip(i)
            sha256.update(f"{name.as_posix()}\0{len(clip)}\0".encode(errors="surrogateescape"))
            sha256.update(clip[[0, -1]].tobytes())
        sha256 = sha256.hexdigest()
        return {"clips": len(self), "frames": self.number_of_frames, "sha256": sha256}

    def clip(self, i):
        """The frames of clip `i`: (n_frames, S, S, 3) uint8, memory-mapped.

        Raises TrainingError if the file is no longer what it was when this data set was made.
        """
        path, shape = self.paths[i], (int(self.lengths[i]), self.size, self.size, 3)
        try:
            array = self.open(path)
            if array.dtype != np.uint8 or array.shape != shape:
                raise ValueError(f"{array.dtype} {array.shape}")
        except ValueError as reason:
            raise TrainingError(f"{path} is not what it was: {reason}") from None
        return array

    def to(self, device):
        """Put every frame into the memory of `device`, as bytes: `read` then works there."""
        if self.pixels is not None and self.pixels.device == torch.empty(0, device=device).device:
            return  # a recorded CUDA graph knows where they are
        shape = self.number_of_frames, self.size, self.size, 3
        pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        for i, (first, length) in enumerate(zip(self.first.tolist(), self.lengths.tolist())):
            pixels[first : first + length] = torch.from_numpy(np.array(self.clip(i)))
        self.pixels, self.first = pixels, self.first.to(device)

    def draw(self, batch_size, rng):
        """Draw a clip for each item of a batch, and where S_T and S_1 look at it.

        Uniform over the clips; then, in a clip of K frames, `start` is uniform over 0 ... K - T
        (S_T: where the window of T frames begins) and, independently, `frame` over 0 ... K - 1
        (S_1; paper, section 3.2). Returns clip, start and frame, each (B,) int64, drawn from
        `rng`, a torch.Generator, on its device.
        """
        on = {"generator": rng, "device": rng.device}
        clip = torch.randint(len(self), (batch_size,), **on)
        u = torch.rand(2, batch_size, dtype=torch.float64, **on)  # in [0, 1)
        lengths = self.lengths_on(rng.device)[clip]
        return clip, (u[0] * (lengths - self.frames + 1)).long(), (u[1] * lengths).long()

    def read(self, clip, start, frame, pin=False):
        """Read what `draw` drew: the B windows S_T(v), then the B frames S_1(v), of real clips.

        Returns (B * T + B, S, S, 3) uint8, RGB, where the clips are: on the device after `to`, else
        in host memory, which `pin` makes a GPU able to fetch by itself.
        """
        if self.pixels is not None:
            clip, start, frame = (x.to(self.pixels.device) for x in (clip, start, frame))
            first = self.first[clip]
            window = (first + start)[:, None] + torch.arange(self.frames, device=first.device)
            return self.pixels[torch.cat([window.flatten(), first + frame])]
        shape = len(clip) * (self.frames + 1), self.size, self.size, 3
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        windows, frames = pixels.numpy()[: -len(clip)], pixels.numpy()[-len(clip) :]
        for i, (c, s, f) in enumerate(zip(clip.tolist(), start.tolist(), frame.tolist())):
            array = self.clip(c)
            windows[i * self.frames : (i + 1) * self.frames] = array[s : s + self.frames]
            frames[i] = array[f]
        return pixels


class ReadAhead:
    """Batches of real clips from the memory maps; a thread reads one while the last one is used.

    rng: a torch.Generator on the CPU, for this alone. `state` is its state after the batch that
    `next` returned last, without those read ahead: what a checkpoint needs.
    """

    def __init__(self, clips, batch_size, rng, pin=False):
        self.clips, self.batch_size, self.rng, self.pin = clips, batch_size, rng, pin
        self.thread = ThreadPoolExecutor(1)
        self.go_on_from(rng.get_state())

    def go_on_from(self, state):
        """Return to a `state` of earlier; what was read ahead is forgotten."""
        self.thread.submit(self.rng.set_state, state).result()
        self.state, self.ahead = state, None

    def _read(self):
        pixels = self.clips.read(*self.clips.draw(self.batch_size, self.rng), self.pin)
        return pixels, self.rng.get_state()

    def next(self):
        """The next batch, as from `ClipDataset.read`. One that fails is read again."""
        ahead, self.ahead = self.ahead or self.thread.submit(self._read), None
        try:
            pixels, self.state = ahead.result()
        except BaseException:  # an array that is gone, or Ctrl-C: the draw is made again
            ahead.cancel()
            self.go_on_from(self.state)
            raise
        self.ahead = self.thread.submit(self._read)
        return pixels


def look(pixels, batch_size):
    """Frames as `ClipDataset.read` returns them, as float32 in [-1, 1]: S_T(v) and S_1(v)."""
    return split(to_float(pixels).permute(0, 3, 1, 2), batch_size)


def split(frames, batch_size):
    """B * T frames of windows, then B single ones, (B * T + B, 3, S, S), to S_T and S_1.

    Returns windows (B, 3, T, S, S) and frames (B, 3, S, S), which share the memory of `frames`;
    where that is channels last, so are they.
    """
    windows, single = frames[:-batch_size], frames[-batch_size:]
    return windows.unflatten(0, (batch_size, -1)).transpose(1, 2), single
