"""Time the training epoch beside a naive one: milliseconds, memory, operations.

    python benchmark.py                               # batch 16, on a GPU where there is one
    python benchmark.py --batch-size 4 16 64

The naive epoch is that of tests/naive.py. Each runs in a process of its own; they take turns.
"""

import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("tests")))

import torch
from naive import NaiveTrainer
from torch.utils.flop_counter import FlopCounterMode

import utils
from data import ClipDataset
from trainer import Trainer
from utils import Parser, UserError, number


def set_up(args, batch_size, naive):
    """Make the trainer of this process and warm it up."""
    global trainer
    device = torch.device(args.device)
    if not naive:
        utils.set_up_device(device)
    options = {"lr": 2e-4, "seed": 0, "ema": 0, "noise_sigma": 0, "augment": False}
    clips = ClipDataset(args.data)
    trainer = Trainer(clips, batch_size, device=device, precision=args.precision, **options)
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
    """Measure both epochs, in turn. Returns milliseconds, bytes and operations of each."""
    options = [1, multiprocessing.get_context("spawn"), set_up]
    with (
        ProcessPoolExecutor(*options, (args, batch_size, False)) as project,
        ProcessPoolExecutor(*options, (args, batch_size, True)) as naive,
    ):
        times = {project: [], naive: []}
        try:
            for pool in args.turns * (project, naive):
                times[pool].append(pool.submit(time_epochs, args.epochs).result())
            memory_and_flops = [pool.submit(measure_memory_and_flops).result() for pool in times]
        except BrokenProcessPool:
            message = f"batch {batch_size}: a process ended; is there enough memory?"
            raise UserError(message) from None
    return [(statistics.median(ms), *rest) for ms, rest in zip(times.values(), memory_and_flops)]


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
            for name, (ms, memory, flops) in zip(("project", "naive"), results):
                print(
                    f"{batch_size:5}  {name:7} {ms:11.1f} {memory / 1e9:10.2f} {flops / 1e9:8.1f} "
                    f"{flops / ms / 1e6:8.0f} {ms / results[0][0]:14.2f}"
                )


if __name__ == "__main__":
    main()
