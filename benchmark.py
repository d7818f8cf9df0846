"""Time the training epoch beside a naive one: milliseconds, memory, operations.

    python benchmark.py                               # batch 16, on a GPU where there is one
    python benchmark.py --batch-size 4 16 64

The naive epoch is that of tests/naive.py. The two take turns in one process.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("tests")))

import torch
from naive import NaiveTrainer
from torch.utils.flop_counter import FlopCounterMode

import utils
from data import ClipDataset
from trainer import Trainer
from utils import Parser, number


def time_epochs(trainer, n):
    """Milliseconds an epoch, the mean of `n`, until the device has finished them."""
    start = time.perf_counter()
    for _ in range(n):
        trainer.update(*trainer.sample_batch())
    if trainer.device.type != "cpu":
        getattr(torch, trainer.device.type).synchronize()
    return 1000 * (time.perf_counter() - start) / n


def peak_memory(device):
    """The most memory in use so far, in bytes: of the GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(trainers, args):
    """Measure both epochs, in turn. Returns milliseconds, bytes and operations of each, by name."""
    times, rest = {name: [] for name in trainers}, {}
    for name, trainer in trainers.items():
        time_epochs(trainer, 2)  # to warm up
        with FlopCounterMode(display=False) as counter:
            trainer.update(*trainer.sample_batch())
        rest[name] = peak_memory(trainer.device), counter.get_total_flops()
    for name in args.turns * [*trainers]:
        times[name].append(time_epochs(trainers[name], args.epochs))
    return {name: (statistics.median(times[name]), *rest[name]) for name in trainers}


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
        utils.set_up_device(device)
        precision, clips = utils.pick_precision(args.precision, device), ClipDataset(args.data)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(
            f"{device} ({name}, {torch.get_num_threads()} threads), project in {precision}, "
            f"naive in fp32, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        )
        print("batch  epoch    ms, median  memory GB    GFLOP  GFLOP/s  times as long")
        for batch_size in sorted(args.batch_size):  # memory is the peak so far
            options = {"lr": 2e-4, "seed": 0, "ema": 0, "noise_sigma": 0, "augment": False}
            project = Trainer(clips, batch_size, device=device, precision=precision, **options)
            results = compare({"project": project, "naive": NaiveTrainer(project)}, args)
            for name, (ms, memory, flops) in results.items():
                print(
                    f"{batch_size:5}  {name:7} {ms:11.1f} {memory / 1e9:10.2f} {flops / 1e9:8.1f} "
                    f"{flops / ms / 1e6:8.0f} {ms / results['project'][0]:14.2f}"
                )


if __name__ == "__main__":
    main()
