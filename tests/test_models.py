import contextlib
import io

import pytest
import torch
from torchsummary import summary

from models import (
    ImageDiscriminator,
    ImageGenerator,
    MotionRNN,
    VideoDiscriminator,
    VideoGenerator,
)

# The published tables, as torchsummary prints them: layer, output shape, parameters.
GENERATOR = """
    ConvTranspose2d-1            [-1, 512, 6, 6]       1,105,920
        BatchNorm2d-2            [-1, 512, 6, 6]           1,024
               ReLU-3            [-1, 512, 6, 6]               0
    ConvTranspose2d-4          [-1, 256, 12, 12]       2,097,152
        BatchNorm2d-5          [-1, 256, 12, 12]             512
               ReLU-6          [-1, 256, 12, 12]               0
    ConvTranspose2d-7          [-1, 128, 24, 24]         524,288
        BatchNorm2d-8          [-1, 128, 24, 24]             256
               ReLU-9          [-1, 128, 24, 24]               0
   ConvTranspose2d-10           [-1, 64, 48, 48]         131,072
       BatchNorm2d-11           [-1, 64, 48, 48]             128
              ReLU-12           [-1, 64, 48, 48]               0
   ConvTranspose2d-13            [-1, 3, 96, 96]           3,072
              Tanh-14            [-1, 3, 96, 96]               0
Total params: 3,863,424
"""
IMAGE_DISCRIMINATOR = """
            Conv2d-1           [-1, 64, 48, 48]           3,072
         LeakyReLU-2           [-1, 64, 48, 48]               0
            Conv2d-3          [-1, 128, 24, 24]         131,072
         LeakyReLU-4          [-1, 128, 24, 24]               0
            Conv2d-5          [-1, 256, 12, 12]         524,288
         LeakyReLU-6          [-1, 256, 12, 12]               0
            Conv2d-7            [-1, 512, 6, 6]       2,097,152
         LeakyReLU-8            [-1, 512, 6, 6]               0
            Conv2d-9              [-1, 1, 1, 1]          18,432
          Sigmoid-10              [-1, 1, 1, 1]               0
Total params: 2,774,016
"""
VIDEO_DISCRIMINATOR = """
            Conv3d-1        [-1, 64, 8, 48, 48]          12,288
         LeakyReLU-2        [-1, 64, 8, 48, 48]               0
            Conv3d-3       [-1, 128, 4, 24, 24]         524,288
       BatchNorm3d-4       [-1, 128, 4, 24, 24]             256
         LeakyReLU-5       [-1, 128, 4, 24, 24]               0
            Conv3d-6       [-1, 256, 2, 12, 12]       2,097,152
       BatchNorm3d-7       [-1, 256, 2, 12, 12]             512
         LeakyReLU-8       [-1, 256, 2, 12, 12]               0
            Conv3d-9         [-1, 512, 1, 6, 6]       8,388,608
      BatchNorm3d-10         [-1, 512, 1, 6, 6]           1,024
        LeakyReLU-11         [-1, 512, 1, 6, 6]               0
           Linear-12                    [-1, 1]          18,433
          Sigmoid-13                    [-1, 1]               0
Total params: 11,042,561
"""


@pytest.mark.parametrize(
    "network, shape, table",
    [
        (ImageGenerator, (60, 1, 1), GENERATOR),
        (ImageDiscriminator, (3, 96, 96), IMAGE_DISCRIMINATOR),
        (VideoDiscriminator, (3, 16, 96, 96), VIDEO_DISCRIMINATOR),
    ],
)
def test_networks_match_the_published_layer_tables(network, shape, table):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary(network(), shape, device="cpu")
    lines = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
    layers = [line for line in lines if "[-1," in line]
    total = [line for line in lines if line.startswith("Total params")]
    assert layers + total == [" ".join(line.split()) for line in table.strip().splitlines()]


@pytest.mark.parametrize("size, frames", [(32, 16), (64, 16), (96, 32), (112, 17), (256, 16)])
def test_networks_follow_size_and_window_length(size, frames):
    with torch.device("meta"):  # shapes only
        assert ImageGenerator(size)(torch.randn(2, 60, 1, 1)).shape == (2, 3, size, size)
        assert ImageDiscriminator(size)(torch.randn(2, 3, size, size)).shape == (2,)
        window = torch.randn(1, 3, frames, size, size)
        assert VideoDiscriminator(size, frames)(window).shape == (1,)


def test_motion_rnn_is_a_gru_whose_state_is_the_code():
    rnn = MotionRNN()
    e, state = torch.randn(3, 7, 10), torch.randn(3, 10)
    z_motion = rnn(e, state)
    weights = dict(rnn.gru.named_parameters())
    for k in range(7):  # the equations of a GRU (Cho et al., 2014, as in PyTorch)
        from_e = e[:, k] @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        from_state = state @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        reset = torch.sigmoid(from_e[:, :10] + from_state[:, :10])
        keep = torch.sigmoid(from_e[:, 10:20] + from_state[:, 10:20])
        new = torch.tanh(from_e[:, 20:] + reset * from_state[:, 20:])
        state = keep * state + (1 - keep) * new
        torch.testing.assert_close(z_motion[:, k], state)


def test_path_holds_the_content_and_each_noise_acts_from_its_frame_on():
    generator = VideoGenerator(32)
    z_content, e, h0 = generator.sample_noise(4, 20, torch.Generator().manual_seed(0))
    assert z_content.shape == (4, 50) and e.shape == (4, 20, 10) and h0.shape == (4, 10)
    path = generator.path(z_content, e, h0)
    assert path.shape == (4, 20, 60)
    assert (path[:, :, :50] == z_content[:, None]).all()
    other = e.clone()
    other[:, 12] += 1  # another e(13): the codes before it stay, the others change
    changed = (generator.path(z_content, other, h0) != path)[:, :, 50:].any(dim=2)
    assert not changed[:, :12].any() and changed[:, 12:].all()


def test_sample_noise_is_standard_normal():
    samples = VideoGenerator(32).sample_noise(100, 100, torch.Generator().manual_seed(0))
    for sample in samples:
        assert abs(sample.mean()) < 5 / sample.numel() ** 0.5
        assert abs(sample.std() - 1) < 5 / sample.numel() ** 0.5
        assert len(sample.unique()) > 0.9 * sample.numel()  # fresh for every video and frame


@pytest.mark.parametrize("length", [1, 16, 45])
def test_generator_renders_videos_of_any_length(length):
    generator = VideoGenerator(32).eval()
    noise = generator.sample_noise(2, length, torch.Generator().manual_seed(0))
    with torch.no_grad():
        video = generator(*noise)
        assert video.shape == (2, 3, length, 32, 32) and video.abs().max() <= 1
        points = generator.path(*noise)[1, :, :, None, None]  # each frame of the second video alone
        frames = generator.image_generator(points)
    torch.testing.assert_close(video[1], frames.transpose(0, 1))
