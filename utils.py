"""The small rest: pixels and floats, files written whole, the loss log, errors for people."""

import argparse
import contextlib
import csv
import ctypes
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LOSSES = "D_I", "D_V", "G_I", "G_V"  # the four terms, in the order that every part keeps


# ---------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """Something that the person at the command line can mend: one line, what and what to do."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows the defaults and says what is wrong in one line (status 2)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Defaults, **kwargs)
        for stream in (sys.stdout, sys.stderr):  # a console without × or → shows ? and goes on
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextlib.contextmanager
def one_line_errors(parser):
    """Turn a UserError, or a file that can't be read or written, into `parser.error`.

    Ctrl-C ends in one line too, with status 130.
    """
    try:
        yield
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped\n")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or a float (`kind`) from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            whole = "a whole number" if kind is int else "a number"
            upto = "" if high == float("inf") else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {low}{upto}")
        return value

    return parse


def set_up_machine(device):
    """Settings of the whole process that only its speed, memory and last digits depend on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which takes no "cuda" without an index
        torch.backends.cudnn.benchmark = True  # shapes stay the same: time kernels, take the best
        torch.backends.cudnn.allow_tf32 = True  # as by default: float32 on TF32 matrix units
    elif sys.platform == "linux":
        # glibc returns large blocks to the system when they are freed, and each epoch takes them
        # anew, page by page, which costs a tenth of its time. Let it keep them.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # not in other C libraries
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the old glibc's most
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------- pixels


def to_float(pixels):
    """Bytes 0..255 to float32 -1..1, the range of G_I's Tanh. Any shape."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(frames):
    """Float -1..1 to bytes 0..255, rounded; the inverse of `to_float`. Any shape."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def video_grid(videos, columns=4):
    """Videos side by side: (B, 3, K, S, S) float in [-1, 1] to (K, H, W, 3) uint8."""
    frames = to_uint8(videos).cpu().unbind(dim=2)
    grids = [make_grid(f, nrow=columns, padding=2, pad_value=255) for f in frames]
    return torch.stack(grids).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------- files


def files_below(folder):
    """Yield the paths of all files below `folder`, sorted, through links to folders, too.

    Hidden files and folders, whose names begin with a dot, are passed over.
    """
    seen = set()  # so that a link that leads back ends
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(f for f in folders if real not in seen and not f.startswith("."))
        if real not in seen:
            yield from (Path(place, n) for n in sorted(names) if not n.startswith("."))
        seen.add(real)


def open_array(path):
    """Memory-map a .npy file. Raises ValueError if `path` does not hold a plain array."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises a dozen kinds for a damaged header
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot be read ({reason})") from None
    if not isinstance(array, np.memmap):
        raise ValueError("cannot be read (not a single array)")
    return array


@contextlib.contextmanager
def whole_file(path):
    """Open `path` for writing bytes so that it appears whole or not at all.

    What is written goes to `<path>.part`, which takes the name of `path` once it is on the disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_gif(path, frames, fps=25):
    """Write frames, (K, H, W, 3) uint8, as a GIF that loops for ever.

    All frames share one palette of 256 colours: with one each, as imageio would write them, colours
    flicker that do not in the video.
    """
    every_colour = Image.fromarray(np.concatenate(frames))
    palette = every_colour.quantize(256, method=Image.Quantize.FASTOCTREE)
    images = [
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
    ]
    with whole_file(path) as file:
        images[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
        )


def move_old_run(models, videos):
    """Move what an earlier run left in its two folders into dated folders in them.

    The date is that of the run's newest file. Files that no run writes stay where they are.
    Returns the dated folders, an empty list where there was nothing to move.
    """
    old = {models: [], videos: []}  # the two may be one
    for name in ("checkpoint.pt", "losses.csv", "losses.png", "events.out.tfevents.*"):
        old[models] += models.glob(name)
    for name in ("real.gif", "epoch-*.gif"):
        old[videos] += videos.glob(name)
    newest = max((p.stat().st_mtime for paths in old.values() for p in paths), default=None)
    if newest is None:
        return []
    date = stamp = datetime.fromtimestamp(newest).strftime("%Y-%m-%d_%H-%M-%S")
    again = 1
    while any((folder / stamp).exists() for folder in old):
        again += 1
        stamp = f"{date}_{again}"
    for folder, paths in old.items():
        for path in paths:
            (folder / stamp).mkdir(exist_ok=True)
            shutil.move(path, folder / stamp / path.name)
    return [folder / stamp for folder, paths in old.items() if paths]


# ---------------------------------------------------------------- losses


class LossLog:
    """The losses of every epoch, in `folder`: losses.csv, losses.png and TensorBoard events.

    epoch: the epoch the run stands at; rows of later ones (of a run that was cut off after its
    checkpoint) are dropped.
    """

    def __init__(self, folder, epoch=0):
        self.path = folder / "losses.csv"
        self.rows = [row for row in self._read() if row[0] <= epoch]
        with whole_file(self.path) as file:
            lines = [("epoch", *LOSSES, "seconds"), *self.rows]
            file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        self.file = open(self.path, "a", newline="")  # noqa: SIM115 (closed by close)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=epoch + 1)
        except ImportError:
            print("tensorboard is not installed: losses go to losses.csv and losses.png only")
            self.board = None

    def _read(self):
        if not self.path.exists():
            return
        with open(self.path, newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # a damaged line
                    values = [np.float32(row[name]) for name in LOSSES]
                    yield int(row["epoch"]), *values, float(row["seconds"])

    def add(self, epoch, losses, seconds):
        """Log epochs `epoch` - n + 1 ... `epoch`, (n, 4) losses, which took `seconds` in all.

        losses.csv has a line for each. TensorBoard, slower, gets their mean: one point a call.
        """
        losses = losses.float().cpu().numpy()
        each = round(seconds / len(losses), 6)
        rows = [(i, *row, each) for i, row in enumerate(losses, start=epoch - len(losses) + 1)]
        self.rows += rows
        self.file.write("".join(",".join(map(str, row)) + "\n" for row in rows))
        self.file.flush()
        if self.board:
            for name, value in zip(LOSSES, losses.mean(axis=0)):
                self.board.add_scalar(f"loss/{name}", value, epoch)
            self.board.add_scalar("seconds an epoch", each, epoch)

    def add_image(self, name, image, epoch):
        """Show an image, (H, W, 3) uint8, in TensorBoard."""
        if self.board:
            self.board.add_image(name, image, epoch, dataformats="HWC")
            self.board.flush()

    def plot(self):
        """Draw losses.png: each loss of each epoch faintly, and its running mean."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        table = np.array(self.rows, dtype=np.float64).reshape(-1, len(LOSSES) + 2)
        width = max(1, len(table) // 50)
        step = max(1, len(table) // 2000)  # more points than pixels would only take time
        for axes, looks_at, pair in zip(
            figure.subplots(1, 2), ("frames", "videos"), ((1, 3), (2, 4))
        ):
            for column, colour in zip(pair, ("tab:blue", "tab:orange")):
                values = table[:, column]
                axes.plot(table[::step, 0], values[::step], color=colour, alpha=0.25, linewidth=0.5)
                if len(values):
                    mean = np.convolve(values, np.ones(width) / width, mode="valid")
                    epochs = table[width - 1 :, 0]
                    axes.plot(epochs[::step], mean[::step], color=colour)
                axes.plot([], [], color=colour, label=LOSSES[column - 1])
            axes.set(xlabel="epoch", ylabel="binary cross-entropy", title=f"losses on {looks_at}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left")
        with whole_file(self.path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=100)

    def close(self):
        self.plot()
        self.file.close()
        if self.board:
            self.board.close()
