"""What D_I and D_V see of videos under the recipe options, which are off by default.

Instance noise (`--noise-sigma`; the authors' command has 0.1) is added to every pixel. `--augment`
is DiffAugment (Zhao et al., 2020, section 3.2) for videos: colour, flip and translation, with one
sample for all frames of a video. Real and generated videos are treated alike, in both steps of the
update, and the gradient flows through. Neither is in the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import Batch


class View(NamedTuple):
    """How B videos are seen. All on the CPU; None: that option is off."""

    colours: torch.Tensor | None  # (3, B): brightness, saturation, contrast
    flips: torch.Tensor | None  # (B,) bool: mirrored left to right or not
    shifts: torch.Tensor | None  # (B, 2) int64, 0 ... S / 4: down and to the right; S / 8 is none
    noise_seed: int | None


def sample_view(batch_size, size, rng, noise_sigma=0.0, augment=False):
    """Sample a View of videos of S = `size` from `rng`, a torch.Generator on the CPU.

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
    return View(colours, flips, shifts, noise_seed) if augment or noise_sigma else None


def see(batch, view, noise_sigma=0.0):
    """`batch`, a Batch in [-1, 1], as D_I and D_V see it: under `view`, a View or None.

    The noise is sampled on the device of `batch`, all else on the CPU.
    """
    if view is None:
        return batch
    seen = [x.float() if x.dtype == torch.bfloat16 else x for x in batch[:2]]
    if view.flips is not None:
        seen = [augmented(x, view) for x in seen]
    if view.noise_seed is not None:
        rng = torch.Generator(seen[0].device).manual_seed(view.noise_seed)
        noise = (torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype) for x in seen)
        seen = [x + noise_sigma * n for x, n in zip(seen, noise)]
    return Batch(*seen, batch.labels)


def augmented(x, view):
    """Colour, flip and translation of (B, 3, ..., S, S); what is shifted in is 0, grey."""
    per_video = len(x), *[1] * (x.dim() - 1)
    brightness, saturation, contrast = view.colours.to(x).reshape(3, *per_video)
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = grey + saturation * (x - grey)
    mean = x.mean(tuple(range(1, x.dim())), keepdim=True)
    x = mean + contrast * (x - mean)
    x = torch.where(view.flips.to(x.device).reshape(per_video), x.flip(-1), x)
    size, margin = x.shape[-1], x.shape[-1] // 8
    padded = F.pad(x, 4 * (margin,))
    corners = (margin * 2 - view.shifts).tolist()
    return torch.stack([p[..., y : y + size, x : x + size] for p, (y, x) in zip(padded, corners)])
