"""Augmentation of what D_I and D_V get: options of training that are off by default.

Instance noise (`--noise-sigma`; the authors' command has 0.1) is added to every pixel. `--augment`
is DiffAugment (Zhao et al., 2020, section 3.2) for videos: colour, flip and translation, with one
sample for all frames of a video. Real and generated videos are augmented alike, in both steps of
the update, and the gradient flows through. Neither is in the MoCoGAN paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import Batch


class Augmentation(NamedTuple):
    """How B videos are augmented. All on the CPU; None: that option is off."""

    colours: torch.Tensor | None  # (3, B): brightness, saturation, contrast
    flips: torch.Tensor | None  # (B,) bool: mirrored left to right or not
    shifts: torch.Tensor | None  # (B, 2) int64, 0 ... S / 4: down and to the right; S / 8 is none
    noise_seed: int | None


def sample_augmentation(batch_size, size, rng, noise_sigma=0.0, augment=False):
    """Sample an Augmentation of videos of S = `size` from `rng`, a torch.Generator on the CPU.

    None, and nothing is taken from `rng`, if both options are off.
    """
    colours = flips = shifts = noise_seed = None
    if augment:
        colours = torch.rand(3, batch_size, generator=rng) * torch.tensor([[1], [2], [1]])
        colours += torch.tensor([[-0.5], [0], [0.5]])
        flips = torch.rand(batch_size, generator=rng) < 0.5
        shifts = torch.randint(2 * (size // 8) + 1, (batch_size, 2), generator=rng)
    if noise_sigma:
        noise_seed = int(torch.randint(2**62, (), generator=rng))
    return Augmentation(colours, flips, shifts, noise_seed) if augment or noise_sigma else None


def augment(batch, augmentation, sigma=0.0):
    """Augment `batch`, a Batch in [-1, 1]; augmentation: an Augmentation, or None for none.

    The noise is sampled on the device of `batch`, all else on the CPU.
    """
    if augmentation is None:
        return batch
    inputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in batch[:2]]
    if augmentation.flips is not None:
        inputs = [diff_augment(x, augmentation) for x in inputs]
    if augmentation.noise_seed is not None:
        rng = torch.Generator(inputs[0].device).manual_seed(augmentation.noise_seed)
        inputs = [x + sigma * torch.randn(x.shape, generator=rng, device=x.device) for x in inputs]
    return Batch(*inputs, batch.labels)


def diff_augment(x, augmentation):
    """Colour, flip and translation of (B, 3, ..., S, S); what is shifted in is 0, grey."""
    per_video = len(x), *[1] * (x.dim() - 1)
    brightness, saturation, contrast = augmentation.colours.to(x).reshape(3, *per_video)
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = grey + saturation * (x - grey)
    mean = x.mean(tuple(range(1, x.dim())), keepdim=True)
    x = mean + contrast * (x - mean)
    x = torch.where(augmentation.flips.to(x.device).reshape(per_video), x.flip(-1), x)
    size, margin = x.shape[-1], x.shape[-1] // 8
    corners = (2 * margin - augmentation.shifts).tolist()
    padded = zip(F.pad(x, 4 * (margin,)), corners)
    return torch.stack([p[..., top : top + size, left : left + size] for p, (top, left) in padded])
