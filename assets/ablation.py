"""Time the epoch without one of its measures: the table in the README, section Speed.

    python assets/ablation.py            # on a CPU; five minutes on two cores

Each runs in a process of its own, twice in turn; the figure is the median of all its epochs.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import trainer as trainer_module
from benchmark import make_up_clips, peak_memory
from data import ClipDataset
from utils import set_up_machine

WITHOUT = {
    "anything undone": "bf16",
    "bf16": "fp32",
    "one backward pass (a pass a term)": "bf16",
    "channels-last layout": "bf16",
    "freed memory kept": "bf16",
    "discriminators fixed in the generators' step": "bf16",
    "Adam in one operation": "bf16",
}


def default_layout(function):
    """`function`, with the two tensors that it returns in the default layout."""
    return lambda *args: tuple(x.contiguous() for x in function(*args))


def measure(without, folder):
    """Print the seconds of seven epochs of batch 16, then the peak memory in GB."""
    if without == "one backward pass (a pass a term)":
        source = Path(trainer_module.__file__).read_text()
        one, two = "(G_I + G_V).backward()", "G_I.backward(retain_graph=True); G_V.backward()"
        assert source.count(one) == 1
        exec(source.replace(one, two), trainer_module.__dict__)
    if without != "freed memory kept":
        set_up_machine(torch.device("cpu"))
    trainer = trainer_module.Trainer(ClipDataset(folder), 16, precision=WITHOUT[without])
    if without == "channels-last layout":
        for network in trainer.networks.values():
            for weight in network.parameters():
                weight.data = weight.data.contiguous()
        trainer_module.look = default_layout(trainer_module.look)
        trainer_module.split = default_layout(trainer_module.split)
    if without == "discriminators fixed in the generators' step":
        trainer.discriminator_weights = []
    if without == "Adam in one operation":
        for optimizer in (trainer.optimizer_d, trainer.optimizer_g):
            optimizer.param_groups[0].update(fused=False, foreach=False)
    for epoch in range(10):
        start = time.perf_counter()
        trainer.train_epoch()
        if epoch >= 3:
            print(time.perf_counter() - start)
    print(peak_memory(torch.device("cpu")) / 1e9)


def main():
    seconds, memory = {without: [] for without in WITHOUT}, {}
    with tempfile.TemporaryDirectory() as folder:
        make_up_clips(folder)
        for without in list(WITHOUT) * 2:
            command = [sys.executable, __file__, without, folder]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            *epochs, memory[without] = map(float, printed.split())
            seconds[without] += epochs
    for without, epochs in seconds.items():
        median = statistics.median(epochs)
        slower = median / statistics.median(seconds["anything undone"]) - 1
        print(f"{without:52} {median:.3f} s {slower:+6.1%} {memory[without]:6.2f} GB")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[1:] else main()
