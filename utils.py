"""The small rest: pixels and floats, files written whole, the loss log, errors for people."""

import argparse
import builtins
import contextlib
import ctypes
import errno
import io
import os
import shutil
import signal
import sys
import threading
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

IN_IPYTHON = hasattr(builtins, "__IPYTHON__")  # Jupyter and Colab, too
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# The figures of an epoch, in the order that every part keeps: the losses, and D's mean answers.
LOSSES = "D_I", "D_V", "G_I", "G_V"
ANSWERS = "D_I on real", "D_V on real", "D_I on fake", "D_V on fake"
FIGURES = LOSSES + ANSWERS
LOOKS_AT = {"frames": (1, 3), "videos": (2, 4)}  # columns of losses.csv


# ---------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """Something that the person at the command line can mend: one line, what and what to do."""

    status = 2  # what the process then ends with


class TrainingError(UserError):
    """Something that ended a training which had begun: no fault of the command line."""

    status = 1


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
    """Turn a UserError, or a file that can't be read or written, into a line as of `parser.error`.

    Ctrl-C ends in one line too, with status 130. Nothing fails for want of a place to print to.
    """
    with prints_without_fail():
        try:
            yield
        except UserError as error:
            end(error.status, f"{parser.prog}: error: {error}")
        except OSError as error:
            end(2, f"{parser.prog}: error: {what_failed(error)}")
        except KeyboardInterrupt as stop:
            end(130, f"\n{parser.prog}: {str(stop) or 'stopped'}")


class Unfailing:
    """A text stream whose reader may go away; what is written then is lost.

    stream: None where there never was one.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (for good)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # and what it still holds goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def prints_without_fail():
    """No pipe that breaks, terminal that closes or log whose disk is full may end a training."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Unfailing, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def end(status, line):
    """Print `line` and end the process with `status`.

    In a notebook only print: there an exit shows as an error of the program, and ends nothing.
    """
    print(line, file=sys.stderr)
    if not IN_IPYTHON:
        sys.exit(status)


def is_out_of_memory(error):
    """Whether `error` says that memory, the host's or a device's, was not enough."""
    said = "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def what_failed(error):
    """What an OSError says, and what a person can do about it."""
    what = f"{error.filename}: {error.strerror or error}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}; free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}; see to its permissions, or name another folder"
    return what


@contextlib.contextmanager
def signals_noted():
    """Note Ctrl-C, SIGTERM and SIGHUP, of a terminal that closes, in the list that this yields.

    So what is in hand can be ended. A second Ctrl-C raises KeyboardInterrupt. Signals that are
    ignored stay ignored, and outside the main thread, where Python takes none, nothing is noted.
    """
    noted = []

    def note(number, _):
        if number == signal.SIGINT and noted:
            raise KeyboardInterrupt
        noted.append(number)
        what = "ending after this epoch, and saving (Ctrl-C again: at once, unsaved)"
        with contextlib.suppress(RuntimeError):  # it came in the middle of printing
            print(f"\n{what}", file=sys.stderr, flush=True)

    before = {}
    names = "SIGINT", "SIGTERM", "SIGHUP"  # Windows has no SIGHUP
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def folder(text):
    """An argparse type: the path of a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no folder")
    return Path(text)


def progress_bar(*iterable, **options):
    """A tqdm bar, one line that moves: on stderr, or in a notebook's cell, where that is red."""
    stream = sys.stdout if IN_IPYTHON else sys.stderr
    return tqdm(*iterable, file=stream, mininterval=0.5, dynamic_ncols=True, **options)


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


def pick_device(name):
    """The torch device called `name`, with its index; "auto" takes CUDA, else MPS, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        if is_out_of_memory(error):
            raise UserError(
                f"--device {name}: its memory is full; end what else runs on it"
            ) from None
        raise UserError(f"--device {name}: there is no such device here; try auto") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: one of auto, cpu, cuda, cuda:1, mps")
    return device


def set_up_machine(device, deterministic=False):
    """Settings of the whole process that only its speed, memory and last digits depend on.

    deterministic: on a GPU, take only kernels that give the same bits every time. On the CPU all of
    ours do.
    """
    torch.use_deterministic_algorithms(deterministic and device.type != "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which takes no "cuda" without an index
        # Shapes stay the same: time the kernels and take the best, which may be another next time.
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = True  # as by default: float32 on TF32 matrix units
        if deterministic:  # cuBLAS asks for it, before its first use
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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


# ---------------------------------------------------------------- files


def files_below(folder):
    """Yield the paths of all files below `folder`, sorted, through links to folders, too.

    Hidden files and folders, whose names begin with a dot, are passed over. Raises OSError if a
    folder cannot be read.
    """

    def fail(error):
        if not isinstance(error, FileNotFoundError):  # one that is not there holds nothing
            raise error

    seen = set()  # so that a link that leads back ends
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
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
    Raises OSError, which names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)  # of a run that was killed
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder):
    """Have the names in `folder` on the disk, where the system has a way to ask for it."""
    with contextlib.suppress(OSError):  # Windows, some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- the folders of a run

OF_MODELS = (
    "checkpoint.pt",
    "checkpoint-previous.pt",
    "checkpoint-[0-9]*[0-9].pt",
    "generator.pt",
    "losses.csv",
    "losses-before-[0-9]*.csv",
    "losses.png",
    "events.out.tfevents.*",
)
NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK  # of some network file systems
OF_VIDEOS = "real.gif", "epoch-*.gif", "index.html"


@contextlib.contextmanager
def alone_in(*folders):
    """Make `folders` and hold them against a second run, which would write there, too.

    They are free again when the process ends, however it does. Raises UserError if another run
    holds one, or if one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
                stack.enter_context(lock)
            except Timeout:
                raise UserError(
                    f"{folder}: another run is writing there; wait until it ends, "
                    "or name another folder"
                ) from None
            except (NotImplementedError, OSError) as error:
                if getattr(error, "errno", None) not in (None, *NO_LOCKS):
                    error.filename = folder
                    raise UserError(f"cannot write to {what_failed(error)}") from None
                print(f"note: {folder} cannot be locked: let no second run write there")
        yield


def remove_parts(models, videos):
    """Remove what a run that was killed had half written."""
    for folder, patterns in ((models, OF_MODELS), (videos, OF_VIDEOS)):
        for pattern in patterns:
            for part in folder.glob(pattern + ".part"):
                part.unlink()


def move_old_run(models, videos):
    """Move what an earlier run left in its two folders into dated folders in them.

    The date is that of the run's newest file, which is moved last: if this is cut off, the next
    call moves the rest to the same place. Files that no run writes stay where they are.
    Returns the dated folders, an empty list where there was nothing to move.
    """
    old = {  # the two may be one
        path
        for folder, patterns in ((models, OF_MODELS), (videos, OF_VIDEOS))
        for pattern in patterns
        for path in folder.glob(pattern)
    }
    if not old:
        return []
    old = sorted(old, key=lambda path: (path.stat().st_mtime, path))
    date = stamp = datetime.fromtimestamp(old[-1].stat().st_mtime).strftime("%Y-%m-%d_%H-%M-%S")
    again = 1
    while any((path.parent / stamp / path.name).exists() for path in old):
        again += 1
        stamp = f"{date}_{again}"
    for path in old:
        (path.parent / stamp).mkdir(exist_ok=True)
        shutil.move(path, path.parent / stamp / path.name)
    return [
        folder / stamp for folder in dict.fromkeys((models, videos)) if (folder / stamp).is_dir()
    ]


# ---------------------------------------------------------------- losses


class LossLog:
    """The losses of every epoch, in `folder`: losses.csv, losses.png and TensorBoard events.

    epoch: the epoch the run stands at; rows of later ones (of a run that was cut off after its
    checkpoint) are dropped. Use it in a `with` block, which draws losses.png at its end.
    """

    def __init__(self, folder, epoch=0):
        self.path = folder / "losses.csv"
        rows = {row[0]: row for row in self._read()}
        self.rows = [rows[i] for i in range(1, epoch + 1) if i in rows]
        if missing := epoch - len(self.rows):
            kept = self._keep_aside(epoch)
            print(f"note: {self.path} lacks {missing} of the {epoch} epochs so far{kept}")
        with whole_file(self.path) as file:
            lines = [("epoch", *LOSSES, "seconds"), *self.rows]
            file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        self.file = open(self.path, "a", newline="")  # noqa: SIM115 (closed by close)
        # What fails in TensorBoard's thread fails in the next call to it, too, and is said there.
        self.hook, threading.excepthook = threading.excepthook, self._in_a_thread
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=epoch + 1)
        except ImportError:
            print("tensorboard is not installed: losses go to losses.csv and losses.png only")
            self.board = None
        except Exception as error:
            self._no_board(error)

    def _read(self):
        """Yield the rows that can be read, whatever else is in the file."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the first line, and damaged ones
                epoch, *losses, seconds = line.split(",")
                if len(losses) == len(LOSSES):
                    yield int(epoch), *map(np.float32, losses), float(seconds)

    def _keep_aside(self, epoch):
        """Copy a losses.csv that is not what it was, before it is written anew."""
        aside = self.path.with_name(f"losses-before-{epoch}.csv")
        if not self.path.exists() or aside.exists():
            return ""
        with whole_file(aside) as file:
            file.write(self.path.read_bytes())
        return f"; as it was, it is kept as {aside.name}"

    def add(self, epoch, figures, seconds):
        """Log epochs `epoch` - n + 1 ... `epoch`, (n, 8) figures, which took `seconds` in all.

        losses.csv has the four losses of each. TensorBoard, slower, gets the mean of every figure:
        one point a call.
        """
        figures = figures.float().cpu().numpy()
        losses = figures[:, : len(LOSSES)]
        each = round(seconds / len(losses), 6)
        rows = [(i, *row, each) for i, row in enumerate(losses, start=epoch - len(losses) + 1)]
        self.rows += rows
        self.file.write("".join(",".join(map(str, row)) + "\n" for row in rows))
        self.file.flush()
        for name, value in zip(FIGURES, figures.mean(axis=0)):
            group = "loss" if name in LOSSES else "mean answer"
            self._to_board("add_scalar", f"{group}/{name}", value, epoch)
        self._to_board("add_scalar", "seconds an epoch", each, epoch)

    def add_image(self, name, image, epoch):
        """Show an image, (H, W, 3) uint8, in TensorBoard."""
        self._to_board("add_image", name, image, epoch, dataformats="HWC")
        self._to_board("flush")

    def _in_a_thread(self, args):
        if not issubclass(args.exc_type, OSError):
            self.hook(args)

    def _to_board(self, method, *args, **options):
        if self.board:
            try:
                getattr(self.board, method)(*args, **options)
            except Exception as error:
                self._no_board(error)

    def _no_board(self, error):
        """TensorBoard is for looking only: training goes on without."""
        print(f"note: no more goes to TensorBoard ({error!r})")
        self.board = None

    def plot(self):
        """Draw losses.png: each loss of each epoch faintly, and its running mean."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, looks_at in zip(figure.subplots(1, 2), LOOKS_AT):
            self._draw(axes, looks_at, points=2000)  # more, than pixels, would only take time
        with whole_file(self.path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=100)

    def curves(self, looks_at):
        """One of the two halves of `plot`, on "frames" or on "videos", as SVG: bytes."""
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        self._draw(figure.subplots(), looks_at, points=400)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    def _draw(self, axes, looks_at, points):
        table = np.array(self.rows, dtype=np.float64).reshape(-1, len(LOSSES) + 2)
        width = max(1, min(10, len(table) // 5), len(table) // 50)
        step = max(1, len(table) // points)
        for column, colour in zip(LOOKS_AT[looks_at], ("tab:blue", "tab:orange")):
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
        axes.legend(loc="best")

    def sync(self):
        """Have all that was logged on the disk: a checkpoint must not be ahead of its losses."""
        os.fsync(self.file.fileno())

    def close(self):
        with contextlib.ExitStack() as stack:  # all of it, whichever fails
            stack.callback(setattr, threading, "excepthook", self.hook)
            stack.callback(self._to_board, "close")
            stack.callback(self.file.close)
            self.plot()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with contextlib.suppress(*[OSError] if kind else []):  # what ended the run is said instead
            self.close()
