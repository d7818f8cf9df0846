"""Errors for people, the command line, the device, and files that several scripts need."""

import argparse
import builtins
import contextlib
import ctypes
import errno
import os
import signal
import sys
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

PRECISIONS = ("auto", "fp32", "bf16")
IN_IPYTHON = hasattr(builtins, "__IPYTHON__")  # Jupyter and Colab included
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a training run writes into its two folders.
RUN_FILES = ("checkpoint*.pt", "generator.pt", "best.pt", "losses.*", "evaluations.csv")
RUN_FILES += ("events.out.tfevents.*", "real.gif", "epoch-*.gif", "index.html")


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do."""

    status = 2  # the exit status


class TrainingError(UserError):
    """Something that ended a training run which had started well."""

    status = 1


@contextlib.contextmanager
def one_line_errors(program, less_memory="", advice=lambda: ""):
    """Turn an error that a user can act on, or Ctrl-C, into a line on stderr and an exit status.

    less_memory: what to do if memory is full; advice: called for what to add to the line.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a console without "×" shows "?", a log file is current
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        exit_with(error.status, f"{program}: error: {error}{advice() if error.status == 1 else ''}")
    except OSError as error:
        exit_with(1, f"{program}: error: {os_error_message(error)}{advice()}")
    except KeyboardInterrupt:
        exit_with(130, f"\n{program}: stopped at once{advice()}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with(1, f"{program}: error: not enough memory: {less_memory}{advice()}")


def exit_with(status, line):
    """Print `line` on stderr and exit; in a notebook, where an exit looks like an error, return."""
    try:
        print(line, file=sys.stderr, flush=True)
        print(end="", flush=True)
    except OSError:  # nobody reads it: send all further output nowhere
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    if not IN_IPYTHON:
        sys.exit(status)


def os_error_message(error):
    """What an OSError says, and what to do about it."""
    path = os.fsdecode(error.filename) if error.filename else None  # TensorBoard has bytes there
    message = f"{path}: {error.strerror or error}" if path else str(error)
    if error.errno in DISK_FULL:
        return f"{message}; free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{message}; change its permissions, or name another folder"
    return message


def is_out_of_memory(error):
    """Whether `error` says that the memory of the host or of a device is full."""
    phrases = "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and reports a bad flag in one line (exit status 2)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or a float (`kind`) from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < float("inf")):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def progress_bar(*iterable, **options):
    """A tqdm bar on stderr; in a notebook, where stderr is shown in red, on stdout."""
    stream = (sys.stdout if IN_IPYTHON else sys.stderr) or open(os.devnull, "w")  # noqa: SIM115
    return tqdm(*iterable, file=stream, mininterval=0.5, dynamic_ncols=True, **options)


@contextlib.contextmanager
def graceful_stop(message):
    """Catch SIGINT, SIGTERM and SIGHUP (not on Windows); yield the list of those that came.

    `message` is printed at each. Ctrl-C after any of them raises KeyboardInterrupt. Signals that
    are ignored (nohup) stay ignored.
    """
    received = []

    def handler(number, _):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        with contextlib.suppress(RuntimeError, OSError):  # it interrupted another print
            print(f"\n{message}", file=sys.stderr, flush=True)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def pick_device(name):
    """The torch device called `name`, with its index; "auto" takes CUDA, else MPS, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name}: {reason}; try auto, cpu, cuda, cuda:1, mps") from None


def pick_precision(name, device):
    """The precision called `name`; "auto" takes bf16 where `device` has it natively, else fp32."""
    if name != "auto":
        return name
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        checks = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        native = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return "bf16" if native else "fp32"


def set_up_device(device, deterministic=False):
    """Process-wide settings that change only speed, memory and the last digits.

    deterministic: on a GPU, allow only kernels that give the same bits every time; on the CPU all
    of ours do. Call it before the first use of cuBLAS, which reads its variable once.
    """
    deterministic = deterministic and device.type != "cpu"
    if deterministic != torch.are_deterministic_algorithms_enabled():  # it imports much: seconds
        torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic  # time the kernels, take the fastest
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif sys.platform == "linux":
        # glibc returns large blocks to the system when they are freed, and each epoch would fetch
        # them again page by page, for a tenth of its time. Let it keep them.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # absent in other C libraries
        trim_threshold, mmap_threshold = -1, -3  # from malloc.h
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the limit of old glibc
        mallopt(trim_threshold, 2**31 - 1)


def files_below(folder):
    """The paths of all files below `folder`, sorted, links followed, hidden names left out.

    Raises OSError if a folder cannot be read.
    """

    def fail(error):
        raise error

    paths = []
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(parent).resolve()
        loops = [name for name in folders if here.is_relative_to(Path(parent, name).resolve())]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in loops]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(paths)


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Atomically write bytes to `path`: to a temporary file, fsync, rename.

    Yields the open file, `<path>.part`. previous: a path under which to keep the file that was at
    `path`, if there was one. Raises OSError, which names `path`.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        with contextlib.suppress(OSError):  # not on Windows, nor on some network file systems
            parent = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(parent)  # so that the rename outlives a power cut
            finally:
                os.close(parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def lock_folders(*folders):
    """Make `folders` and hold a lock in each, until the block or the process ends.

    Some network file systems have no locks; there nothing is locked. Raises UserError if another
    process holds a lock, or if a folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
                stack.enter_context(lock)
            except Timeout:
                message = f"{folder}: another run is writing there; wait, or name another folder"
                raise UserError(message) from None
            except (NotImplementedError, OSError) as error:
                no_locks = (None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
                if getattr(error, "errno", None) not in no_locks:
                    error.filename = str(folder)
                    raise UserError(f"cannot write to {os_error_message(error)}") from None
        yield


def archive_run(*folders):
    """Move the files of an earlier run into a dated subfolder of each of its `folders`.

    The date is that of its newest file. Returns the subfolders; none if there was no run.
    """
    files = {path for f in folders for pattern in RUN_FILES for path in f.glob(pattern)}
    newest = max((path.stat().st_mtime for path in files), default=0)
    name = datetime.fromtimestamp(newest).strftime("%Y-%m-%d_%H-%M-%S")
    while any((folder / name).exists() for folder in folders):
        name += "_"
    for path in sorted(files):
        (path.parent / name).mkdir(exist_ok=True)
        path.rename(path.parent / name / path.name)
    return [folder / name for folder in dict.fromkeys(folders) if (folder / name).exists()]
