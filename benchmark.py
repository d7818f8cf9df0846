"""Time the training epoch beside a naive one: milliseconds, memory, operations.

    python benchmark.py                               # batch 16, on a GPU where there is one
    python benchmark.py --batch-size 4 16 64 --json benchmark.json

The naive epoch is the same mathematics as papers' code is mostly written: float32, default layout,
windows cut by NumPy and copied over every epoch, R_M frame by frame, a backward pass for each term,
the discriminators' gradients computed and thrown away in the generator's step, an Adam for each
network. The tests hold the update against it. Each runs in a process of its own; they take turns.
"""

import copy
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import ClipDataset
from trainer import BETAS, FAKE_LABEL, REAL_LABEL, Trainer
from utils import (
    Parser,
    UserError,
    atomic_write,
    number,
    one_line_errors,
    pick_device,
    pick_precision,
    set_up_device,
)

NAMES = ("project", "naive")
# Frames of the 93 Weizmann clips, about, for the random clips that are used without --data.
LENGTHS = [28 + round(118 * (i / 92) ** 2) for i in range(93)]


class NaiveTrainer:
    """The four networks of a Trainer, from its weights on, trained in the naive way.

    It shares no code with the Trainer but the networks.
    """

    def __init__(self, trainer, lr=2e-4):
        self.clips, self.batch_size = trainer.clips, trainer.batch_size
        self.device = trainer.device
        self.networks = {}
        for name, network in trainer.networks.items():
            self.networks[name] = copy.deepcopy(network)
            for weight in self.networks[name].parameters():
                weight.data = weight.data.contiguous()
        self.adams = {
            name: torch.optim.Adam(net.parameters(), lr, BETAS, foreach=False, fused=False)
            for name, net in self.networks.items()
        }
        self.rng = np.random.default_rng(0)

    def sample_batch(self):
        """What `update` takes: windows (B, 3, T, S, S), frames (B, 3, S, S), noise, places."""
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
        lengths = self.clips.lengths.numpy()[self.rng.integers(len(self.clips), size=B)]
        start = self.rng.integers(lengths - T + 1)
        frame_idx = np.column_stack([start[:, None] + np.arange(T), self.rng.integers(lengths)])
        noise = tuple(
            torch.randn(shape, device=self.device)
            for shape in ((B, 50), (B, int(lengths.max()), 10), (B, 10))
        )
        windows, frames, frame_idx = (torch.from_numpy(x) for x in (windows, frames, frame_idx))
        return *(x.to(self.device) for x in (windows, frames)), noise, frame_idx.to(self.device)

    def update(self, windows, frames, noise, frame_idx):
        """The update of the paper, section 3.2. Returns the four losses: a dict of floats."""
        R_M, G_I, D_I, D_V = (self.networks[name] for name in ("R_M", "G_I", "D_I", "D_V"))
        z_content, e, h0 = noise
        B, T = len(e), windows.shape[2]
        state, points = h0, []
        for k in range(e.shape[1]):
            state = R_M(e[:, k : k + 1], state)[:, 0]
            points.append(torch.cat([z_content, state], dim=1))
        path = torch.stack(points, dim=1)
        idx = frame_idx[:, :, None].expand(-1, -1, path.shape[2])
        generated = G_I(path.gather(1, idx).reshape(B * (T + 1), -1, 1, 1))
        generated = generated.reshape(B, T + 1, *generated.shape[1:])
        fake_windows = generated[:, :T].transpose(1, 2).contiguous()
        fake_frames = generated[:, T].contiguous()

        bce = nn.BCELoss()
        real_label, fake_label = (e.new_full((B,), label) for label in (REAL_LABEL, FAKE_LABEL))
        losses = {}
        pairs = {"image": (D_I, frames, fake_frames), "video": (D_V, windows, fake_windows)}
        for kind, (D, real, fake) in pairs.items():
            adam = self.adams["D_I" if kind == "image" else "D_V"]
            adam.zero_grad()
            on_real = bce(D(real), real_label)
            on_real.backward()
            on_fake = bce(D(fake.detach()), fake_label)
            on_fake.backward()
            adam.step()
            losses[f"loss_d_{kind}"] = (on_real + on_fake).item()
        self.adams["G_I"].zero_grad()
        self.adams["R_M"].zero_grad()
        for kind, (D, _, fake) in pairs.items():
            loss = bce(D(fake), real_label)
            loss.backward(retain_graph=True)
            losses[f"loss_g_{kind}"] = loss.item()
        self.adams["G_I"].step()
        self.adams["R_M"].step()
        return losses


# ---------------------------------------------------------------- measuring, in a process each


def set_up(name, args, batch_size):
    """Make the trainer of this process and warm it up."""
    global trainer
    device = torch.device(args.device)
    precision = args.precision if name == "project" else "fp32"
    if name == "project":
        set_up_device(device)
    trainer = Trainer(ClipDataset(args.data), batch_size, device=device, precision=precision)
    if name == "naive":
        trainer = NaiveTrainer(trainer)
    time_epochs(2)


def time_epochs(n):
    """Seconds an epoch, the mean of `n`, until the device is done with them."""
    start = time.perf_counter()
    for _ in range(n):
        trainer.update(*trainer.sample_batch())
    if trainer.device.type != "cpu":
        getattr(torch, trainer.device.type).synchronize()
    return (time.perf_counter() - start) / n


def measure_memory_and_flops():
    """Peak memory in bytes (of the device, or of the whole process), and operations an epoch."""
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with FlopCounterMode(display=False) as counter:
        trainer.update(*trainer.sample_batch())
    return memory, counter.get_total_flops()


def compare(args, batch_size):
    """Measure both epochs in turn. Returns a dict of metrics for each name."""
    spawn = multiprocessing.get_context("spawn")
    pools = {
        name: ProcessPoolExecutor(1, spawn, initializer=set_up, initargs=(name, args, batch_size))
        for name in NAMES
    }
    seconds = {name: [] for name in NAMES}
    results = {}
    try:
        for _ in range(args.turns):
            for name, pool in pools.items():
                seconds[name].append(pool.submit(time_epochs, args.epochs).result())
        for name, pool in pools.items():
            memory, flops = pool.submit(measure_memory_and_flops).result()
            results[name] = {
                "ms": 1000 * statistics.median(seconds[name]),
                "ms_min": 1000 * min(seconds[name]),
                "ms_max": 1000 * max(seconds[name]),
                "memory_gb": memory / 1e9,
                "gflop": flops / 1e9,
            }
    except BrokenProcessPool:
        raise UserError(f"batch {batch_size}: a process ended; is there enough memory?") from None
    finally:
        for pool in pools.values():
            pool.shutdown()
    return results


def random_clips(folder):
    """Write clips of noise, as many and about as long as Weizmann's: they take the same time."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        np.save(Path(folder, f"{i}.npy"), rng.integers(0, 256, (length, 96, 96, 3), np.uint8))


def main(argv=None):
    parser = Parser(prog="benchmark.py", description="Time the training epoch beside a naive one.")
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the project's")
    add("--batch-size", type=number(int, 1), nargs="+", default=[16], help="one or several")
    add("--turns", type=number(int, 1), default=10, help="each; the median is given")
    add("--epochs", type=number(int, 1), default=1, help="in a turn; take 20 on a GPU")
    add("--data", type=Path, help="folder of clips; without it they are noise")
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    with one_line_errors("benchmark.py"), tempfile.TemporaryDirectory() as folder:
        device = pick_device(args.device)
        args.device, args.precision = str(device), pick_precision(args.precision, device)
        if args.data is None:
            random_clips(folder)
            args.data = Path(folder)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        where = f"{gpu or platform.machine()}, {torch.get_num_threads()} threads"
        print(f"{device} ({where}), torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
        print(
            f"batch  epoch of the {'':<10} ms (fastest..slowest)  memory GB  GFLOP  GFLOP/s  ratio"
        )
        table = {}
        for batch_size in args.batch_size:
            table[batch_size] = results = compare(args, batch_size)
            for name, r in results.items():
                label = f"{name}, {args.precision if name == 'project' else 'fp32'}"
                rate, ratio = 1000 * r["gflop"] / r["ms"], r["ms"] / results["project"]["ms"]
                print(
                    f"{batch_size:5}  {label:<22} {r['ms']:8.1f} ({r['ms_min']:.1f}.."
                    f"{r['ms_max']:.1f}) {r['memory_gb']:9.2f} {r['gflop']:6.0f} {rate:8.0f} "
                    f"{ratio:6.2f}"
                )
        if args.json:
            with atomic_write(args.json) as file:
                file.write(json.dumps(table, indent=1).encode())


if __name__ == "__main__":
    main()
