"""The real clips: uint8 frame arrays on disk, served as random windows of frames.

`resize.py` writes one array a clip, (n_frames, S, S, 3), uint8, RGB. They are memory-mapped, so a
data set larger than memory works, and only the frames of a batch are ever turned into floats.
"""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from utils import UserError, files_below, open_array, to_float


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
            clip = self.open(self.paths[c])
            windows[i], frames[i] = clip[s : s + n], clip[f]
        windows = to_float(torch.from_numpy(windows).to(device)).permute(0, 4, 1, 2, 3)
        frames = to_float(torch.from_numpy(frames).to(device)).permute(0, 3, 1, 2)
        return windows, frames
