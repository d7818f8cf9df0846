"""Time the epoch with one of its measures undone: the table in the README, section Speed.

    python assets/ablation.py            # on a CPU, ten minutes on two cores

Each runs in a process of its own, twice in turn; the figure is the median of all its epochs.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import trainer as trainer_module
from benchmark import make_up_clips
from data import ClipDataset
from utils import set_up_machine

UNDONE = {
    "nothing": "bf16",
    "memory given back to the system": "bf16",
    "discriminators learn along in the generators' step": "bf16",
    "default layout": "bf16",
    "an Adam operation after another": "bf16",
    "bfloat16": "fp32",
}


def default_layout(function):
    """`function`, with the two tensors that it returns in the default layout."""
    return lambda *args: tuple(x.contiguous() for x in function(*args))


def measure(undone, folder):
    """Print the seconds of seven epochs of batch 16, then the peak memory in GB."""
    if undone != "memory given back to the system":
        set_up_machine(torch.device("cpu"))
    trainer = trainer_module.Trainer(ClipDataset(folder), 16, precision=UNDONE[undone])
    if undone == "default layout":
        for network in trainer.networks.values():
            for weight in network.parameters():
                weight.data = weight.data.contiguous()
        trainer_module.look = default_layout(trainer_module.look)
        trainer_module.split = default_layout(trainer_module.split)
    if undone == "discriminators learn along in the generators' step":
        trainer.discriminator_weights = []
    if undone == "an Adam operation after another":
        for optimizer in (trainer.optimizer_d, trainer.optimizer_g):
            optimizer.param_groups[0].update(fused=False, foreach=False)
    for epoch in range(10):
        start = time.perf_counter()
        trainer.train_epoch()
        if epoch >= 3:
            print(time.perf_counter() - start)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main():
    seconds, memory = {undone: [] for undone in UNDONE}, {}
    with tempfile.TemporaryDirectory() as folder:
        make_up_clips(folder)
        for undone in list(UNDONE) * 2:
            command = [sys.executable, __file__, undone, folder]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            *epochs, memory[undone] = map(float, printed.split())
            seconds[undone] += epochs
    for undone, epochs in seconds.items():
        median = statistics.median(epochs)
        slower = median / statistics.median(seconds["nothing"]) - 1
        print(f"{undone:52} {median:.3f} s {slower:+6.1%} {memory[undone]:6.2f} GB")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[1:] else main()
