"""The real clips: uint8 frame arrays on disk, served as random windows of frames.

`resize.py` writes one array a clip, (n_frames, S, S, 3), uint8, RGB. They are memory-mapped, so a
data set larger than memory works, and only the frames of a batch are ever turned into floats.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from utils import UserError, to_float


class ClipDataset:
    """All clips of a folder, and the paper's two ways of looking at them, S_T and S_1.

    folder: searched for `*.npy`, with its subfolders; those directly below it are the actions.
    frames: T, the frames of a window; shorter clips are left out.

    After loading: `names` (paths below the folder, sorted), `lengths` (frames of each clip, int64),
    `size` (S), `actions` (sorted) and `skipped` (a line for each array left out, with the reason).
    Raises UserError if the folder is missing or holds no usable clip.
    """

    def __init__(self, folder, frames=16):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it with resize.py")
        self.frames = frames
        self.skipped = []
        arrays = {}
        for path in sorted(folder.rglob("*.npy")):
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                self.skipped.append(f"{path}: cannot be read ({str(error).splitlines()[0]})")
                continue
            if reason := self._unusable(array):
                self.skipped.append(f"{path}: {reason}")
            else:
                arrays[path] = array
        if arrays:  # the size that most clips have is the size of the data
            self.size = Counter(array.shape[1] for array in arrays.values()).most_common(1)[0][0]
        for path, array in list(arrays.items()):
            if array.shape[1] != self.size:
                self.skipped.append(f"{path}: {array.shape[1]} pixels wide, most are {self.size}")
                del arrays[path]
        if not arrays:
            left_out = f" ({len(self.skipped)} left out; {self.skipped[0]})" if self.skipped else ""
            raise UserError(
                f"{folder}: no usable clips{left_out}; make some with resize.py, "
                "from videos of your own or with --download or --synthetic"
            )
        self.clips = list(arrays.values())
        self.names = [path.relative_to(folder) for path in arrays]
        self.lengths = torch.tensor([len(clip) for clip in self.clips])
        self.actions = sorted({name.parts[0] for name in self.names if len(name.parts) > 1})

    def _unusable(self, array):
        """Why `array` is no clip, or None."""
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            return f"{array.dtype} {array.shape}, not uint8 (n_frames, S, S, 3)"
        _, height, width, _ = array.shape
        if height != width or width % 16 or not 32 <= width <= 256:
            return f"frames of {width}×{height}, not square with a side of 32, 48, ... 256"
        if len(array) < self.frames:
            return f"{len(array)} frames, shorter than a window of {self.frames}"
        return None

    def __len__(self):
        return len(self.clips)

    def draw(self, batch_size, rng):
        """Draw a clip for each item of a batch, and where S_T and S_1 look at it.

        Uniform over the clips; then, in a clip of K frames, `start` is uniform over 0 ... K - T
        (S_T: where the window of T frames begins) and, independently, `frame` over 0 ... K - 1
        (S_1; paper, section 3.2). Returns clip, start and frame, each (B,) int64, drawn from
        `rng`, a torch.Generator on the CPU.
        """
        clip = torch.randint(len(self), (batch_size,), generator=rng)
        u = torch.rand(2, batch_size, generator=rng, dtype=torch.float64)  # in [0, 1)
        start = (u[0] * (self.lengths[clip] - self.frames + 1)).long()
        frame = (u[1] * self.lengths[clip]).long()
        return clip, start, frame

    def read(self, clip, start, frame, device="cpu"):
        """Read what `draw` drew: S_T(v) and S_1(v) of real clips, float32 in [-1, 1].

        Returns windows (B, 3, T, S, S) and frames (B, 3, S, S), on `device`. They travel there as
        bytes, and lie in memory channels last, as the arrays do.
        """
        size, n = self.size, self.frames
        windows = np.empty((len(clip), n, size, size, 3), np.uint8)
        frames = np.empty((len(clip), size, size, 3), np.uint8)
        for i, (c, s, f) in enumerate(zip(clip.tolist(), start.tolist(), frame.tolist())):
            windows[i] = self.clips[c][s : s + n]
            frames[i] = self.clips[c][f]
        windows = to_float(torch.from_numpy(windows).to(device)).permute(0, 4, 1, 2, 3)
        frames = to_float(torch.from_numpy(frames).to(device)).permute(0, 3, 1, 2)
        return windows, frames
