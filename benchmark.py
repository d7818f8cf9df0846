"""Time the training epoch beside a naive one: milliseconds, memory, operations.

    python benchmark.py                               # batch 16, on a GPU where there is one
    python benchmark.py --batch-size 4 16 64

The naive epoch is the same mathematics as papers' code is mostly written: float32, default layout,
R_M frame by frame, a backward pass for each term, the discriminators' gradients computed and thrown
away in the generator's step, an Adam for each network, losses fetched every epoch. The tests hold
the update against it. Each runs in a process of its own; they take turns.
"""

import copy
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import utils
from data import ClipDataset
from trainer import BETAS, FAKE_LABEL, REAL_LABEL, Trainer
from utils import Parser, UserError, number


class NaiveTrainer:
    """The four networks of a Trainer, from its weights on, trained in the naive way.

    It shares with the Trainer the networks and the sampling of batches, and no other code.
    """

    def __init__(self, trainer, lr=2e-4):
        self.device, self.sample_batch = trainer.device, trainer.sample_batch
        self.networks = {name: copy.deepcopy(net) for name, net in trainer.networks.items()}
        for network in self.networks.values():
            for param in network.requires_grad_(True).parameters():
                param.data = param.data.contiguous()
        self.adams = {
            name: torch.optim.Adam(net.parameters(), lr, BETAS, foreach=False, fused=False)
            for name, net in self.networks.items()
        }

    def update(self, real, noise, frame_idx, _=None):
        """The update of the paper, section 3.2. Returns the four losses: a dict of floats."""
        R_M, G_I, D_I, D_V = (self.networks[name] for name in ("R_M", "G_I", "D_I", "D_V"))
        z_content, e, h0 = noise
        real_windows, real_frames = (
            (x.to(e.dtype) / 127.5 - 1).contiguous() for x in (real.windows, real.frames)
        )
        state, points = h0, []
        for k in range(e.shape[1]):
            state = R_M(e[:, k : k + 1], state)[:, 0]
            points.append(torch.cat([z_content, state], dim=1))
        path = torch.stack(points, dim=1)
        z = path.gather(1, frame_idx[:, :, None].expand(-1, -1, path.shape[2]))
        generated = G_I(z.reshape(-1, z.shape[2], 1, 1))
        generated = generated.reshape(*frame_idx.shape, *generated.shape[1:])
        fake_windows = generated[:, :-1].transpose(1, 2).contiguous()
        fake_frames = generated[:, -1].contiguous()

        bce = nn.BCELoss()
        real_label = e.new_full((len(e),), REAL_LABEL)
        fake_label = e.new_full((len(e),), FAKE_LABEL)
        losses = {}
        for kind, name, D, x, x_fake in (
            ("image", "D_I", D_I, real_frames, fake_frames),
            ("video", "D_V", D_V, real_windows, fake_windows),
        ):
            self.adams[name].zero_grad()
            on_real = bce(D(x), real_label)
            on_real.backward()
            on_fake = bce(D(x_fake.detach()), fake_label)
            on_fake.backward()
            self.adams[name].step()
            losses[f"loss_d_{kind}"] = (on_real + on_fake).item()
        self.adams["G_I"].zero_grad()
        self.adams["R_M"].zero_grad()
        for kind, D, x_fake in (("image", D_I, fake_frames), ("video", D_V, fake_windows)):
            loss = bce(D(x_fake), real_label)
            loss.backward(retain_graph=True)
            losses[f"loss_g_{kind}"] = loss.item()
        self.adams["G_I"].step()
        self.adams["R_M"].step()
        return losses


def set_up(args, batch_size, naive):
    """Make the trainer of this process and warm it up."""
    global trainer
    device = torch.device(args.device)
    if not naive:
        utils.set_up_device(device)
    trainer = Trainer(ClipDataset(args.data), batch_size, device=device, precision=args.precision)
    if naive:
        trainer = NaiveTrainer(trainer)
    time_epochs(2)


def time_epochs(n):
    """Milliseconds an epoch, the mean of `n`, until the device has finished them."""
    start = time.perf_counter()
    for _ in range(n):
        trainer.update(*trainer.sample_batch())
    if trainer.device.type != "cpu":
        getattr(torch, trainer.device.type).synchronize()
    return 1000 * (time.perf_counter() - start) / n


def measure_memory_and_flops():
    """Peak memory in bytes (of the GPU, or of the whole process), and operations an epoch."""
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counter:
        trainer.update(*trainer.sample_batch())
    return memory, counter.get_total_flops()


def compare(args, batch_size):
    """Measure both epochs, in turn. Returns a dict of metrics for each."""
    spawn = multiprocessing.get_context("spawn")
    pools = {
        name: ProcessPoolExecutor(1, spawn, set_up, (args, batch_size, name == "naive"))
        for name in ("project", "naive")
    }
    times, results = {name: [] for name in pools}, {}
    try:
        for _ in range(args.turns):
            for name, pool in pools.items():
                times[name].append(pool.submit(time_epochs, args.epochs).result())
        for name, pool in pools.items():
            memory, flops = pool.submit(measure_memory_and_flops).result()
            ms = statistics.median(times[name])
            results[name] = {"ms": ms, "memory_gb": memory / 1e9, "gflop": flops / 1e9}
    except BrokenProcessPool:
        raise UserError(f"batch {batch_size}: a process ended; is there enough memory?") from None
    finally:
        for pool in pools.values():
            pool.shutdown()
    return results


def main(argv=None):
    parser = Parser(prog="benchmark.py", description="Time the training epoch beside a naive one.")
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=utils.PRECISIONS, default="auto", help="of the project's epoch")
    add("--batch-size", type=number(int, 1), nargs="+", default=[16], help="one or several")
    add("--turns", type=number(int, 1), default=10, help="measurements; the median is printed")
    add("--epochs", type=number(int, 1), default=1, help="epochs in a measurement; 20 on a GPU")
    add("--data", type=Path, default="resized_data", help="folder of clips, from resize.py")
    args = parser.parse_args(argv)
    with utils.one_line_errors("benchmark.py", "take a smaller --batch-size"):
        device = utils.pick_device(args.device)
        args.device, args.precision = str(device), utils.pick_precision(args.precision, device)
        ClipDataset(args.data)  # reports what is wrong with it
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(
            f"{device} ({name}, {torch.get_num_threads()} threads), project in {args.precision}, "
            f"naive in fp32, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        )
        print("batch  epoch    ms, median  memory GB    GFLOP  GFLOP/s  times as long")
        for batch_size in args.batch_size:
            results = compare(args, batch_size)
            for name, r in results.items():
                ratio, rate = r["ms"] / results["project"]["ms"], 1000 * r["gflop"] / r["ms"]
                print(
                    f"{batch_size:5}  {name:7} {r['ms']:11.1f} {r['memory_gb']:10.2f} "
                    f"{r['gflop']:8.1f} {rate:8.0f} {ratio:14.2f}"
                )


if __name__ == "__main__":
    main()
