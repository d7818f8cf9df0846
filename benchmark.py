"""Time the project's training epoch beside one written by the book.

    python benchmark.py                               # batch 16, on a GPU where there is one
    python benchmark.py --batch-size 4 16 64 --json benchmark.json

Two processes, one for each, run their epochs in turn. "By the book" is the same mathematics as
papers' code is mostly written: float32, default layout, windows cut by NumPy and copied over every
epoch, R_M frame by frame, a backward pass for each term, the discriminators' gradients computed
and thrown away in the generators' step, an Adam for each network, four losses fetched every epoch.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
from data import ClipDataset
from gallery import Page
from main import (
    CHECKPOINT_EVERY,
    CHECKPOINT_MINUTES,
    EPOCHS,
    SAMPLE_EVERY,
    pick_precision,
)
from models import DIM_CONTENT, DIM_MOTION, DIM_NOISE
from trainer import FAKE, PAGE_EVERY, REAL, SHOW_EVERY, Trainer, show_samples
from utils import (
    FIGURES,
    LossLog,
    Parser,
    UserError,
    number,
    one_line_errors,
    pick_device,
    set_up_machine,
    whole_file,
)

READY = "ready"  # what a process says by itself, once it is warm
NAMES = "project", "by the book"
# Frames of the 93 Weizmann clips: the clips that are made up where --data is not given.
LENGTHS = [28 + round(118 * (i / 92) ** 2) for i in range(93)]


# ---------------------------------------------------------------- the two epochs


class ByTheBook:
    """The four networks of `trainer`, from its weights on, trained by the book on `device`.

    Shares no code with the trainer but the networks.
    """

    def __init__(self, trainer, device="cpu"):
        self.clips, self.batch_size = trainer.clips, trainer.batch_size
        self.device = device
        self.networks = {n: contiguous(net).to(device) for n, net in trainer.networks.items()}
        self.adams = {
            name: torch.optim.Adam(
                net.parameters(), lr=0.0002, betas=(0.5, 0.999), foreach=False, fused=False
            )
            for name, net in self.networks.items()
        }
        self.rng = np.random.default_rng(0)

    def draw(self):
        """What `update` takes: windows and frames cut on the host, and noise."""
        B, T, size = self.batch_size, self.clips.frames, self.clips.size
        windows = np.empty((B, 3, T, size, size), np.float32)
        frames = np.empty((B, 3, size, size), np.float32)
        for i, c in enumerate(self.rng.integers(len(self.clips), size=B)):
            clip = self.clips.clip(c)
            start = self.rng.integers(len(clip) - T + 1)
            window = clip[start : start + T].astype(np.float32) / 127.5 - 1
            windows[i] = window.transpose(3, 0, 1, 2)
            frame = clip[self.rng.integers(len(clip))].astype(np.float32) / 127.5 - 1
            frames[i] = frame.transpose(2, 0, 1)
        lengths = self.clips.lengths.cpu().numpy()[self.rng.integers(len(self.clips), size=B)]
        start = self.rng.integers(lengths - T + 1)
        looked_at = np.column_stack([start[:, None] + np.arange(T), self.rng.integers(lengths)])
        noise = (
            torch.randn(B, DIM_CONTENT, device=self.device),
            torch.randn(B, int(lengths.max()), DIM_NOISE, device=self.device),
            torch.randn(B, DIM_MOTION, device=self.device),
        )
        windows, frames, looked_at = (torch.from_numpy(x) for x in (windows, frames, looked_at))
        return windows.to(self.device), frames.to(self.device), noise, looked_at.to(self.device)

    def update(self, real_window, real_frame, noise, looked_at):
        """The update of the paper, section 3.2. Returns the losses D_I, D_V, G_I, G_V: floats."""
        R_M, G_I, D_I, D_V = (self.networks[name] for name in ("R_M", "G_I", "D_I", "D_V"))
        z_content, e, h0 = noise
        B, T = len(e), real_window.shape[2]
        state, points = h0, []
        for k in range(e.shape[1]):
            state = R_M(e[:, k : k + 1], state)[:, 0]
            points.append(torch.cat([z_content, state], dim=1))
        path = torch.stack(points, dim=1)
        looked_at = looked_at[:, :, None].expand(-1, -1, path.shape[2])
        points = path.gather(1, looked_at).reshape(B * (T + 1), -1, 1, 1)
        frames = G_I(points)
        frames = frames.reshape(B, T + 1, *frames.shape[1:])
        fake_window = frames[:, :T].transpose(1, 2).contiguous()
        fake_frame = frames[:, T].contiguous()

        bce = nn.BCELoss()
        real, fake = e.new_full((B,), REAL), e.new_full((B,), FAKE)
        losses = []
        for name, v, w in (("D_I", real_frame, fake_frame), ("D_V", real_window, fake_window)):
            D = self.networks[name]
            self.adams[name].zero_grad()
            on_real = bce(D(v), real)
            on_real.backward()
            on_fake = bce(D(w.detach()), fake)
            on_fake.backward()
            self.adams[name].step()
            losses.append((on_real + on_fake).item())
        self.adams["G_I"].zero_grad()
        self.adams["R_M"].zero_grad()
        for D, w in ((D_I, fake_frame), (D_V, fake_window)):
            loss = bce(D(w), real)
            loss.backward(retain_graph=True)
            losses.append(loss.item())
        self.adams["G_I"].step()
        self.adams["R_M"].step()
        return losses

    def train_epoch(self):
        """Draw and update once. Returns the losses D_I, D_V, G_I, G_V: floats."""
        return self.update(*self.draw())


def contiguous(network):
    """A copy of `network` in PyTorch's default layout."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for weight in network.parameters():
        weight.data = weight.data.contiguous()
    return network


# ---------------------------------------------------------------- floating-point operations


def epoch_flops(batch_size, size=96, frames=16, by_the_book=False):
    """Floating-point operations of an epoch, by hand: two for each multiplication and addition.

    A convolution multiplies each of its weights once at each position of its output (of its input,
    if transposed), padding counted; its backward pass does as much for the gradient of the weights
    and as much for that of the input. R_M is left out: it is a thousandth of a percent.
    """
    s, T, B = size // 16, frames, batch_size
    channels = 3, 64, 128, 256, 512
    pairs = list(pairwise(channels))
    G_I = (DIM_CONTENT + DIM_MOTION) * 512 * s**2
    G_I += sum(a * b * 4**2 * (size >> i + 1) ** 2 for i, (a, b) in enumerate(pairs))
    image = [a * b * 4**2 * (size >> i + 1) ** 2 for i, (a, b) in enumerate(pairs)] + [512 * s**2]
    video = [a * b * 4**3 * (size >> i + 1) ** 2 * (T >> i + 1) for i, (a, b) in enumerate(pairs)]
    video += [512 * s**2 * (T >> 4)]
    D = sum(image) + sum(video)
    # Forward, the weights' gradients, the input's: not of the first layers, where pixels end it.
    discriminators_step = 2 * B * (3 * D - image[0] - video[0])  # on real and on generated videos
    if by_the_book:  # two backward passes through G_I, and the discriminators' gradients
        generators_step = B * (T + 1) * 5 * G_I + B * 3 * D
    else:
        generators_step = B * (T + 1) * 3 * G_I + B * 2 * D
    return 2 * (discriminators_step + generators_step)


def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product, the median of five."""
    n = 8192 if device.type == "cuda" else 4096
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        with stopwatch(device, seconds):
            a @ b
    return 2 * n**3 / statistics.median(seconds[1:])


# ---------------------------------------------------------------- measuring


@contextlib.contextmanager
def stopwatch(device, seconds):
    """Append to `seconds` what the block takes, until the device is done with it."""
    synchronize = getattr(torch, device.type).synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds.append(time.perf_counter() - start)


def peak_memory(device):
    """Bytes, at most, so far: of the device, or on a CPU of the whole process, PyTorch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cost_of_showing(trainer):
    """Seconds that a run spends beside training, on the disk that holds temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        folder, seconds = Path(folder), []
        log = LossLog(folder)
        figures = torch.rand(EPOCHS, len(FIGURES))
        page = Page(folder, trainer, EPOCHS, log, {})
        for _ in range(2):  # the first time opens files and loads libraries
            with stopwatch(trainer.device, seconds):
                show_samples(trainer, log, folder)
            with stopwatch(trainer.device, seconds):
                checkpoint.write(folder / "checkpoint.pt", trainer.state())
                checkpoint.write(folder / "generator.pt", trainer.generator_state())
            with stopwatch(trainer.device, seconds):
                log.add(1, figures[:1], 1)
            log.add(EPOCHS, figures[: EPOCHS - len(log.rows)], 1)
            with stopwatch(trainer.device, seconds):
                log.plot()
                page.write()
        log.close()
    return dict(zip(("sample", "checkpoint", "log line", "page"), seconds[4:]))


def receive(pipe):
    """The next question; the process ends where the one that asked is gone."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        sys.exit(1)


def contestant(pipe, name, batch_size, args):
    """What each of the two processes does: one epoch or figure after another, as asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the one that started it, and it this
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    if name == "project":
        set_up_machine(device)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        trainer = Trainer(
            ClipDataset(args.data),
            batch_size,
            device=device,
            precision=args.precision,
            graph=not args.no_graph,
        )
        if args.compile:
            trainer.generator.render = torch.compile(trainer.generator.render)
            for D in (trainer.image_discriminator, trainer.video_discriminator):
                D.logits = torch.compile(D.logits)
    else:
        dtype = torch.float32
        trainer = ByTheBook(Trainer(ClipDataset(args.data), batch_size), device)
    for _ in range(5 if device.type == "cuda" else 2):  # what is compiled, chosen, recorded
        trainer.train_epoch()
    seconds = []
    pipe.send(READY)
    while (epochs := receive(pipe)) is not None:
        with stopwatch(device, seconds):
            for _ in range(epochs):
                trainer.train_epoch()
        seconds[-1] /= epochs
        pipe.send("done")
    peak = peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        trainer.update(*trainer.draw())
    pipe.send(
        {
            "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
            "seconds": seconds,
            "peak_memory": peak,
            "counted_flops": counter.get_total_flops(),
            "matmul_rate": matmul_rate(device, dtype),
            "showing": cost_of_showing(trainer) if name == "project" else {},
        }
    )


def ask(pipe, question, name, batch_size):
    """Send `question`, if there is one, to the process of `name`. Returns what it answers."""
    try:
        if question is not READY:
            pipe.send(question)
        return pipe.recv()
    except (EOFError, OSError):
        raise UserError(
            f"the process that trained {name} at batch {batch_size} ended; is there enough memory?"
        ) from None


def compare(clips, batch_size, args):
    """Time both epochs, in turn, in a process each. Returns their figures, by name."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in NAMES:
        pipes[name], other = context.Pipe()
        process = context.Process(
            target=contestant, args=(other, name, batch_size, args), daemon=True
        )
        process.start()
        other.close()
        processes.append(process)
        ask(pipes[name], READY, name, batch_size)
    turns = min(args.epochs, 10)
    for turn in range(turns):
        for name in NAMES if turn % 2 else reversed(NAMES):
            part = args.epochs // turns + (turn < args.epochs % turns)
            ask(pipes[name], part, name, batch_size)
    results = {}
    for name in NAMES:
        result = ask(pipes[name], None, name, batch_size)
        median = statistics.median(result["seconds"])
        flops = epoch_flops(batch_size, clips.size, clips.frames, name == "by the book")
        results[name] = result | {
            "median": median,
            "frames_a_second": batch_size * (clips.frames + 1) / median,
            "flops": flops,
            "rate": flops / median,
            "share_of_matmul": flops / median / result["matmul_rate"],
            "all_epochs": median * EPOCHS,
        }
    for process in processes:
        process.join()
    return results


# ---------------------------------------------------------------- the command line


def make_up_clips(folder):
    """Clips of noise, as many and about as long as the Weizmann ones: it takes the same time."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        clip = rng.integers(0, 256, (length, 96, 96, 3), np.uint8)
        np.save(Path(folder) / f"{i}.npy", clip)


def machine(device):
    """The device, and what computes on it, in one line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    return f"{device.type} ({name}, {torch.get_num_threads()} threads)"


def duration(seconds):
    """Seconds, minutes or hours, with two or three digits."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def ms(seconds):
    """Milliseconds, with three digits or more."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def show(batch_size, results):
    """Print the figures of one batch size."""

    def line(what, figure):
        print(f"{what:<34}" + "".join(f"{figure(r):>22}" for r in results.values()))

    def memory(result):
        return (
            "not known"
            if result["peak_memory"] is None
            else f"{result['peak_memory'] / 1e9:.2f} GB"
        )

    def spread(result):
        return f"{ms(min(result['seconds']))} .. {ms(max(result['seconds']))}"

    print(
        f"\nbatch {batch_size:<28}"
        + "".join(f"{n} ({r['precision']})".rjust(22) for n, r in results.items())
    )
    line("ms an epoch, median", lambda r: ms(r["median"]))
    line("  fastest .. slowest turn", spread)
    line("real frames a second", lambda r: f"{r['frames_a_second']:.4g}")
    line("peak memory", memory)
    line("operations an epoch, by hand", lambda r: f"{r['flops'] / 1e9:.5g} GFLOP")
    line("  counted by PyTorch", lambda r: f"{r['counted_flops'] / 1e9:.5g} GFLOP")
    line("rate", lambda r: f"{r['rate'] / 1e9:.4g} GFLOP/s")
    line("  of a large matrix product", lambda r: f"{r['matmul_rate'] / 1e9:.4g} GFLOP/s")
    line("  the epoch beside it", lambda r: f"{r['share_of_matmul']:.0%}")
    line(f"{EPOCHS:,} epochs", lambda r: duration(r["all_epochs"]))
    project, book = results.values()
    epoch = project["median"]
    every = {
        "sample": SAMPLE_EVERY * epoch,
        "checkpoint": min(CHECKPOINT_EVERY * epoch, CHECKPOINT_MINUTES * 60),
        "log line": max(epoch, SHOW_EVERY),
        "page": PAGE_EVERY,
    }
    shares = (f"{what} {s / every[what]:.2%}" for what, s in project["showing"].items())
    print(f"beside training, of the project's run: {', '.join(shares)}")
    if any(max(r["seconds"]) > 1.5 * min(r["seconds"]) for r in results.values()):
        print("note: the turns differ by more than half; is other work running?")
    print(f"the project's epoch is {book['median'] / project['median']:.2f} times as fast", end="")
    if project["peak_memory"] is not None:
        less = (book["peak_memory"] - project["peak_memory"]) / 1e9
        print(f", in {abs(less):.2f} GB {'less' if less >= 0 else 'more'}", end="")
    print()


def run(args):
    device = pick_device(args.device)
    if args.json:  # before the measuring, not after
        if not args.json.parent.is_dir():
            raise UserError(f"--json {args.json.parent}: no such folder")
        if args.json.is_dir() or not os.access(args.json.parent, os.W_OK):
            raise UserError(f"--json {args.json}: cannot be written; name a file")
    args.device, args.precision = str(device), pick_precision(args.precision, device)
    args.epochs = args.epochs or (200 if device.type == "cuda" else 10)
    head = {
        "machine": machine(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "epochs": args.epochs,
        "compile": args.compile,
        "graph": device.type == "cuda" and not args.no_graph,
    }
    with tempfile.TemporaryDirectory() as made_up:
        kind = f"of {args.data}" if args.data else "(noise)"
        if args.data is None:
            make_up_clips(made_up)
            args.data = Path(made_up)
        clips = ClipDataset(args.data)
        print(
            f"{head['machine']}, torch {head['torch']}, {head['date']}\n"
            f"{args.epochs} epochs each, in turn\n"
            f"{len(clips)} clips {kind}, {clips.size}×{clips.size}, T = {clips.frames}"
        )
        rows = {}
        for batch_size in args.batch_size:
            rows[batch_size] = compare(clips, batch_size, args)
            show(batch_size, rows[batch_size])
    if len(rows) > 1:
        print("\nbatch  project, ms  by the book, ms  ratio  project, ms a video")
        for batch_size, results in rows.items():
            project, book = (r["median"] for r in results.values())
            print(
                f"{batch_size:5} {ms(project):>12} {ms(book):>16} {book / project:6.2f} "
                f"{ms(project / batch_size):>20}"
            )
    if args.json:
        with whole_file(args.json) as file:
            file.write(json.dumps(head | {"batches": rows}, indent=1).encode())


def main(argv=None):
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the project's epoch",
    )
    add("--batch-size", type=number(int, 1), nargs="+", default=[16], help="one or several")
    add("--epochs", type=number(int, 1), help="to time of each: 10, on a GPU 200")
    add("--no-graph", action="store_true", help="on CUDA, kernel by kernel")
    add("--compile", action="store_true", help="torch.compile the project's networks")
    add("--data", type=Path, help="folder of clips; without it they are made up, of noise")
    add("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        run(args)


if __name__ == "__main__":
    main()
