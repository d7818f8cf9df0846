"""The four networks of MoCoGAN (Tulyakov et al., 2017), and what joins two of them into video.

A video of K frames is a path of K points z(k) = [z_C ; z_M(k)] in an image latent space (paper,
section 3.1). z_C, the content, is sampled once a video; z_M(1) ... z_M(K), the motion, comes
from the recurrent network R_M, fed with fresh noise e(k) at every frame. The image generator G_I
turns each point into a frame. D_I judges one frame of a video, D_V judges T frames in a row.

Shapes: B videos, K or T frames, frames of S x S pixels, S a multiple of 16 (96 gives the
published layer tables). Frames are float, RGB, in [-1, 1].
"""

import torch
from torch import nn

DIM_CONTENT = 50  # z_C, d_C in the paper
DIM_MOTION = 10  # z_M(k), d_M
DIM_NOISE = 10  # e(k), d_E; written as a Greek epsilon in the paper


class MotionRNN(nn.Module):
    """R_M: maps a path of noise to a path of motion codes, with a GRU whose state is the code."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(DIM_NOISE, DIM_MOTION, batch_first=True)

    def forward(self, e, h0):
        """Run the GRU over a whole path, of any length K (paper, section 3.1).

        e: (B, K, 10), N(0, I), fresh for every frame; h0: (B, 10), N(0, I), the first state.
        Returns z_M: (B, K, 10), in [-1, 1] but for what is left of h0.
        """
        z_motion, _ = self.gru(e, h0[None])
        return z_motion


class ImageGenerator(nn.Module):
    """G_I: maps one point of the image latent space to one frame."""

    def __init__(self, size=96):
        super().__init__()
        z = DIM_CONTENT + DIM_MOTION
        self.main = nn.Sequential(
            nn.ConvTranspose2d(z, 512, size // 16, 1, 0, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(512, 256, 4, 2, 1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z):
        """z: (N, 60, 1, 1), N points [z_C ; z_M]. Returns frames: (N, 3, S, S) in [-1, 1]."""
        return self.main(z)


class ImageDiscriminator(nn.Module):
    """D_I: is this one frame from a real video? It sees content, not motion."""

    def __init__(self, size=96):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(128, 256, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(256, 512, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(512, 1, size // 16, 1, 0, bias=False),
        )
        self.sigmoid = nn.Sigmoid()

    def logits(self, frame):
        """frame: (B, 3, S, S) in [-1, 1]. Returns (B, 1, 1, 1), the log-odds of being real."""
        return self.main(frame)

    def forward(self, frame):
        """frame: (B, 3, S, S) in [-1, 1]. Returns (B,), the probability that each is real."""
        return self.sigmoid(self.logits(frame)).flatten()


class VideoDiscriminator(nn.Module):
    """D_V: are these T frames in a row from a real video? It sees content and motion."""

    def __init__(self, size=96, frames=16):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv3d(3, 64, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv3d(64, 128, 4, 2, 1, bias=False),
            nn.BatchNorm3d(128),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv3d(128, 256, 4, 2, 1, bias=False),
            nn.BatchNorm3d(256),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv3d(256, 512, 4, 2, 1, bias=False),
            nn.BatchNorm3d(512),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.linear = nn.Linear(512 * (frames // 16) * (size // 16) ** 2, 1)
        self.sigmoid = nn.Sigmoid()

    def logits(self, window):
        """window: (B, 3, T, S, S) in [-1, 1]. Returns (B, 1), the log-odds of being real."""
        return self.linear(self.main(window).flatten(1))

    def forward(self, window):
        """window: (B, 3, T, S, S) in [-1, 1]. Returns (B,), the probability that each is real."""
        return self.sigmoid(self.logits(window)).flatten()


class VideoGenerator(nn.Module):
    """R_M and G_I together: noise to video, of any length (paper, figure 2)."""

    def __init__(self, size=96):
        super().__init__()
        self.size = size
        self.motion_rnn = MotionRNN()
        self.image_generator = ImageGenerator(size)

    def sample_noise(self, batch_size, length, rng):
        """Sample what `forward` takes, from `rng`, a torch.Generator on the CPU.

        Returns samples of N(0, I) on the device of the networks: z_content (B, 50), the noise e
        (B, K, 10) with K = length, and the first state h0 (B, 10).
        """
        device = next(self.parameters()).device
        z_content = torch.randn(batch_size, DIM_CONTENT, generator=rng)
        e = torch.randn(batch_size, length, DIM_NOISE, generator=rng)
        h0 = torch.randn(batch_size, DIM_MOTION, generator=rng)
        return z_content.to(device), e.to(device), h0.to(device)

    def path(self, z_content, e, h0):
        """The path [z_C ; z_M(1)] ... [z_C ; z_M(K)]: (B, K, 60), from `sample_noise`."""
        z_motion = self.motion_rnn(e, h0)
        z_content = z_content[:, None].expand(-1, z_motion.shape[1], -1)
        return torch.cat([z_content, z_motion], dim=2)

    def render(self, z):
        """One frame for each point of `z`, (..., 60): (..., 3, S, S) in [-1, 1]."""
        frames = self.image_generator(z.flatten(0, -2)[..., None, None])
        return frames.unflatten(0, z.shape[:-1])

    def forward(self, z_content, e, h0):
        """B videos of K frames from `sample_noise`: (B, 3, K, S, S) in [-1, 1]."""
        return self.render(self.path(z_content, e, h0)).transpose(1, 2)
