"""main.py with networks a sixteenth as wide, for tests that train many times over.

    python tests/small.py --data ...        # as main.py

Everything but the number of channels is the product's own code.
"""

import copy
import os
import signal
import sys
import time
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.utils.tensorboard  # so that it, too, is there before a fork

import main
import models
import trainer


def narrow(channels):
    return channels // 16 if channels >= 64 and channels % 16 == 0 else channels


def shrunk(layer):
    """`layer` with fewer channels; those of points, frames and answers stay."""
    if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)):
        channels = narrow(layer.in_channels), narrow(layer.out_channels)
        return type(layer)(*channels, layer.kernel_size, layer.stride, layer.padding, bias=False)
    if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
        return type(layer)(narrow(layer.num_features))
    return copy.deepcopy(layer)


def small(network):
    """The class `network` with a sixteenth of its channels."""

    class Small(network):
        def __init__(self, *args):
            super().__init__(*args)
            holder = getattr(self, "image_generator", self)
            holder.main = nn.Sequential(*map(shrunk, holder.main))
            if hasattr(self, "linear"):
                self.linear = nn.Linear(self.linear.in_features // 16, 1)

    return Small


def make_small():
    """Make the networks of this process small."""
    torch.set_num_threads(1)  # two that wait for each other are slower, at this size
    for name in ("VideoGenerator", "ImageDiscriminator", "VideoDiscriminator"):
        setattr(trainer, name, small(getattr(models, name)))


def make_slow():
    """Have an epoch take a fifth of a second."""
    update = trainer.Trainer.update

    def slow(*args):
        time.sleep(0.2)
        return update(*args)

    trainer.Trainer.update = slow


def heed_signals():
    """As a process in a terminal does; tests may be started where they are ignored (nohup, &)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def process(args, said, prepare=None):
    """What a forked process does: train as `args` say; what it prints goes to the file `said`.

    prepare: called with nothing before.
    """
    with open(said, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    heed_signals()
    make_small()
    if prepare:
        prepare()
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    main.main([str(arg) for arg in args])


if __name__ == "__main__":
    make_small()
    main.main()
