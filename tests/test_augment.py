import numpy as np
import pytest
import torch

from augment import augment, sample_augmentation
from data import Batch

SIZE = 32


def batch(n=3):
    rng = torch.Generator().manual_seed(1)
    windows = torch.rand(n, 3, 16, SIZE, SIZE, generator=rng) * 2 - 1
    return Batch(windows, torch.rand(n, 3, SIZE, SIZE, generator=rng) * 2 - 1, torch.arange(n))


def reference(x, i, augmentation):
    """Item `i` of a batch, (3, ..., S, S), augmented step by step, in NumPy."""
    brightness, saturation, contrast = augmentation.colours[:, i].tolist()
    x = x[i].double().numpy() + brightness
    grey = x.mean(axis=0)
    x = grey + saturation * (x - grey)
    x = x.mean() + contrast * (x - x.mean())
    if augmentation.flips[i]:
        x = x[..., ::-1]
    down, right = (augmentation.shifts[i] - SIZE // 8).tolist()
    shifted = np.zeros_like(x)
    for row in range(SIZE):
        for column in range(SIZE):
            if 0 <= row - down < SIZE and 0 <= column - right < SIZE:
                shifted[..., row, column] = x[..., row - down, column - right]
    return shifted


def test_augment_treats_all_frames_of_a_video_alike():
    rng = torch.Generator().manual_seed(0)
    real = batch()
    for _ in range(3):
        augmentation = sample_augmentation(3, SIZE, rng, augment=True)
        augmented = augment(real, augmentation)
        for i in range(3):
            np.testing.assert_allclose(
                augmented.windows[i], reference(real.windows, i, augmentation), atol=1e-5
            )
            np.testing.assert_allclose(
                augmented.frames[i], reference(real.frames, i, augmentation), atol=1e-5
            )
        assert torch.equal(augmented.labels, real.labels)


def test_augment_samples_over_the_ranges_of_diffaugment():
    rng = torch.Generator().manual_seed(0)
    augmentation = sample_augmentation(4000, SIZE, rng, augment=True)
    for values, (low, high) in zip(augmentation.colours, [(-0.5, 0.5), (0, 2), (0.5, 1.5)]):
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() < high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03)
    assert augmentation.flips.float().mean() == pytest.approx(0.5, abs=0.03)
    shifts = augmentation.shifts - SIZE // 8  # by an eighth at most, in both directions
    assert all(set(s.tolist()) == set(range(-4, 5)) for s in shifts.T)
    assert torch.corrcoef(shifts.T.double())[0, 1].abs() < 0.05


@pytest.mark.parametrize("both", [False, True])
def test_noise_is_normal_and_fresh_for_every_pixel(both):
    rng = torch.Generator().manual_seed(0)
    real = batch()
    augmentations = [
        sample_augmentation(3, SIZE, rng, noise_sigma=0.1, augment=both) for _ in range(2)
    ]
    augmented = [augment(real, augmentation, 0.1) for augmentation in augmentations]
    for augmentation, noisy in zip(augmentations, augmented):
        clean = augment(real, augmentation._replace(noise_seed=None))
        noise = torch.cat([(a - b).flatten() for a, b in zip(noisy[:2], clean[:2])])
        assert noise.mean().abs() < 1e-3 and noise.std() == pytest.approx(0.1, rel=0.01)
        windows = noisy.windows - clean.windows
        assert torch.corrcoef(windows.transpose(0, 2).flatten(1))[0, 1].abs() < 0.05
    assert torch.equal(
        augment(real, augmentations[0], 0.1).windows, augmented[0].windows
    )  # an augmentation is all there is
    assert not torch.equal(augmented[0].windows, augmented[1].windows)


def test_gradients_flow_through_the_augmentation():
    augmentation = sample_augmentation(2, SIZE, torch.Generator().manual_seed(3), 0.1, augment=True)
    x = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    (augment(Batch(x[:, :, None], x, None), augmentation, 0.1).frames * weights).sum().backward()
    step = torch.rand_like(x)
    with torch.no_grad():
        high, low = (
            augment(Batch(y[:, :, None], y, None), augmentation, 0.1).frames for y in (x + step, x)
        )
    torch.testing.assert_close(
        (x.grad * step).sum(), ((high - low) * weights).sum()
    )  # it is affine


def test_nothing_is_sampled_or_changed_where_the_options_are_off():
    rng = torch.Generator().manual_seed(0)
    augmentation = sample_augmentation(3, SIZE, rng)
    assert torch.equal(rng.get_state(), torch.Generator().manual_seed(0).get_state())
    real = batch()
    assert all(a is b for a, b in zip(augment(real, augmentation), real))
