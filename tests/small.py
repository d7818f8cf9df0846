"""main.py with networks a sixteenth as wide: `python tests/small.py --data ...`, like main.py.

All else is the product's own code. The last three functions are for forked processes.
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
import torch._inductor  # these two, so that they are imported before a fork
import torch.utils.tensorboard

import logger
import main
import models
import trainer


def narrow(channels):
    return channels // 16 if channels >= 64 and channels % 16 == 0 else channels


def narrow_layer(layer):
    """`layer` with fewer channels; the dimensions of codes, RGB and log-odds stay."""
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
            holder.main = nn.Sequential(*map(narrow_layer, holder.main))
            if hasattr(self, "linear"):
                self.linear = nn.Linear(self.linear.in_features // 16, 1)

    return Small


def make_small(set_attribute=setattr):
    """Make the networks of this process small."""
    for name in ("VideoGenerator", "ImageDiscriminator", "VideoDiscriminator"):
        set_attribute(trainer, name, small(getattr(models, name)))


def new_trainer(clips, **options):
    """A Trainer of batches of two, or with other `options`."""
    defaults = {"batch_size": 2, "lr": 2e-4, "seed": 0, "device": "cpu", "precision": "fp32"}
    defaults |= {"ema": 0.999, "noise_sigma": 0.0, "augment": False}
    return trainer.Trainer(clips, **{**defaults, **options})


def train(argv=None):
    """main.main, small, on one thread, and without plots, which would take most of the time."""
    torch.set_num_threads(1)
    logger.Logger.plot = lambda *_: b""
    make_small()
    main.main(argv)


def heed_signals():
    """Undo nohup or a shell's `&`: tests may be started where signals are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def at_epoch(epoch, action, *args):
    """Have this process call `action` just before the update of `epoch`."""
    update = trainer.Trainer.update

    def patched(self, *batch):
        if self.epoch + 1 == epoch:
            action(*args)
        return update(self, *batch)

    trainer.Trainer.update = patched


def wait(folder):
    """Create `folder`/waiting and wait until `folder`/released exists, five minutes at most."""
    (folder / "waiting").touch()
    end = time.monotonic() + 300
    while not (folder / "released").exists() and time.monotonic() < end:
        time.sleep(0.01)


def process(args, output, prepare):
    """Call `prepare`, if not None, and train; all output goes to the file `output`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    heed_signals()
    if prepare:
        prepare()
    train(args)


if __name__ == "__main__":
    train()
