"""The algorithm: alternating updates of the discriminators and the generators (paper, section 3.2).

The objective, with v real clips and w generated ones:

    F_V = E[-log D_I(S_1(v))] + E[-log(1 - D_I(S_1(w)))]
        + E[-log D_V(S_T(v))] + E[-log(1 - D_V(S_T(w)))]

It is the discriminators' loss: D_I and D_V make it small, G_I and R_M large, in turns. In practice
(README, The model): binary cross-entropy on log-odds; the generators' step in the non-saturating
form, where they make -log D(w) small; and 0.9 in place of 1 as the label of what is to look real.
"""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import ImageDiscriminator, VideoDiscriminator, VideoGenerator
from utils import LOSSES, UserError, save_gif, video_grid, whole_file

REAL, FAKE = 0.9, 0.0  # one-sided label smoothing
BETAS = 0.5, 0.999
FORMAT = 1  # of checkpoint.pt
SAMPLES = 16  # videos in a sample GIF


def bce(logits, label):
    """Binary cross-entropy of log-odds (any shape) against one label, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class Trainer:
    """The four networks, their optimisers, the random state, and one epoch of training.

    clips: a ClipDataset; it gives the size of the frames, T, and the lengths of the videos.
    seed: of all randomness: the first weights, the clips and windows drawn, the noise.
    precision: "fp32" or "bf16", the type of the convolutions; R_M and the losses stay float32.
    """

    def __init__(self, clips, batch_size=16, lr=2e-4, seed=0, device="cpu", precision="fp32"):
        self.clips = clips
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=precision == "bf16"
        )
        self.epoch = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = VideoGenerator(clips.size)
            self.image_discriminator = ImageDiscriminator(clips.size)
            self.video_discriminator = VideoDiscriminator(clips.size, clips.frames)
        for network, layout in (
            (self.generator, torch.channels_last),
            (self.image_discriminator, torch.channels_last),
            (self.video_discriminator, torch.channels_last_3d),
        ):
            network.to(self.device)
            if self.device.type != "mps":  # where Conv3d gave wrong results in it: pytorch#141471
                network.to(memory_format=layout)
        self.discriminator_weights = [
            *self.image_discriminator.parameters(),
            *self.video_discriminator.parameters(),
        ]
        self.optimizer_d = torch.optim.Adam(self.discriminator_weights, lr, BETAS)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr, BETAS)
        # On the CPU whatever the device is, so that the same seed draws the same everywhere.
        self.rng = torch.Generator().manual_seed(seed)
        self.sample_noise = self.generator.draw_noise(SAMPLES, clips.frames, self.rng)

    @property
    def networks(self):
        return {
            "R_M": self.generator.motion_rnn,
            "G_I": self.generator.image_generator,
            "D_I": self.image_discriminator,
            "D_V": self.video_discriminator,
        }

    def draw(self):
        """Draw all that is random in one epoch: what `update` takes."""
        real_window, real_frame = self.clips.read(
            *self.clips.draw(self.batch_size, self.rng), self.device
        )
        # A generated video has a real clip's length K, and S_T and S_1 look at it as at that clip.
        clip, start, frame = self.clips.draw(self.batch_size, self.rng)
        noise = self.generator.draw_noise(self.batch_size, self.clips.lengths[clip].max(), self.rng)
        window = start[:, None] + torch.arange(self.clips.frames)
        looked_at = torch.cat([window, frame[:, None]], dim=1).to(self.device)
        return real_window, real_frame, noise, looked_at

    def generate(self, noise, looked_at):
        """Generate videos, only the frames that the discriminators look at.

        noise: of the whole paths, as from `draw_noise`; looked_at: (B, T + 1), the places on the
        path of the window's T frames, then of the single frame.
        Returns S_T(w), (B, 3, T, S, S), and S_1(w), (B, 3, S, S).
        """
        path = self.generator.path(*noise)
        points = path.gather(1, looked_at[..., None].expand(-1, -1, path.shape[2]))
        with self.autocast:
            frames = self.generator.render(points)
        return frames[:, :-1].transpose(1, 2), frames[:, -1]

    def update(self, real_window, real_frame, noise, looked_at):
        """One epoch: a step of D_I and D_V with G_I and R_M fixed, then the other way round.

        Takes what `draw` returns. Returns the losses D_I, D_V, G_I, G_V: (4,), on the device.
        """
        D_I, D_V = self.image_discriminator.logits, self.video_discriminator.logits
        fake_window, fake_frame = self.generate(noise, looked_at)

        with self.autocast:
            loss_D_I = bce(D_I(real_frame), REAL) + bce(D_I(fake_frame.detach()), FAKE)
            loss_D_V = bce(D_V(real_window), REAL) + bce(D_V(fake_window.detach()), FAKE)
        self.optimizer_d.zero_grad()
        (loss_D_I + loss_D_V).backward()
        self.optimizer_d.step()

        # The generators' gradient passes through the discriminators, theirs need not be computed.
        for weight in self.discriminator_weights:
            weight.requires_grad_(False)
        with self.autocast:
            loss_G_I = bce(D_I(fake_frame), REAL)
            loss_G_V = bce(D_V(fake_window), REAL)
        self.optimizer_g.zero_grad()
        (loss_G_I + loss_G_V).backward()
        self.optimizer_g.step()
        for weight in self.discriminator_weights:
            weight.requires_grad_(True)

        self.epoch += 1
        return torch.stack([loss_D_I, loss_D_V, loss_G_I, loss_G_V]).detach()

    @torch.no_grad()
    def sample(self):
        """Videos from the fixed noise, in evaluation mode: (16, 3, T, S, S) in [-1, 1]."""
        self.generator.eval()
        one_by_one = zip(*(noise.split(1) for noise in self.sample_noise))  # to need little memory
        videos = [self.generator(*noise) for noise in one_by_one]
        self.generator.train()
        return torch.cat(videos)

    def real_sample(self, seed):
        """16 real windows, (16, 3, T, S, S), drawn without touching the training's random state."""
        rng = torch.Generator().manual_seed(seed)
        return self.clips.read(*self.clips.draw(SAMPLES, rng))[0]

    # ------------------------------------------------------------ checkpoint

    def save(self, path, settings):
        """Write all that is needed to go on, and `settings` (plain values), as one whole file."""
        checkpoint = {
            "format": FORMAT,
            "epoch": self.epoch,
            "settings": settings,
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "optimizer_d": self.optimizer_d.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "rng": self.rng.get_state(),
            "sample_noise": self.sample_noise,
        }
        with whole_file(path) as file:
            torch.save(checkpoint, file)

    def load(self, path, settings):
        """Go on from `path`. Returns a line for each setting that is another now than it was.

        Raises UserError where `path` is no checkpoint of ours, or where the settings that shape the
        networks differ.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            ours = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
            ours = ours and "settings" in checkpoint
        except OSError:
            raise
        except Exception:  # torch.load raises a dozen kinds for what is no checkpoint
            ours = False
        if not ours:
            raise UserError(f"{path}: not a checkpoint of this program, or a damaged one")
        old = checkpoint["settings"]
        changed = [
            f"{name} was {old[name]}, is {value} now"
            for name, value in settings.items()
            if old[name] != value
        ]
        if fixed := [line for line in changed if line.startswith(("size ", "frames "))]:
            raise UserError(f"{path}: cannot go on with other networks: {'; '.join(fixed)}")
        for name, network in self.networks.items():
            network.load_state_dict(checkpoint["networks"][name])
        for optimizer, state in (
            (self.optimizer_d, checkpoint["optimizer_d"]),
            (self.optimizer_g, checkpoint["optimizer_g"]),
        ):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"]
        self.rng.set_state(checkpoint["rng"])
        self.sample_noise = tuple(n.to(self.device) for n in checkpoint["sample_noise"])
        self.epoch = checkpoint["epoch"]
        return changed


def train(trainer, epochs, log, save_checkpoint, videos, sample_every, checkpoint_every):
    """Train up to epoch `epochs`, with a progress bar, sample GIFs and checkpoints on the way.

    log: a LossLog; save_checkpoint: called with nothing; videos: the folder for the GIFs. Samples
    and checkpoints are also made at the last epoch; losses.png is drawn once a minute.
    """

    def show_samples():
        grid = video_grid(trainer.sample())
        save_gif(videos / f"epoch-{trainer.epoch:06d}.gif", grid)
        log.add_image("samples", grid[len(grid) // 2], trainer.epoch)

    if trainer.epoch == 0:
        show_samples()
    waiting, since, plotted = [], time.perf_counter(), 0
    pace = None  # a running mean of the seconds an epoch takes
    bar = tqdm(
        total=epochs,
        initial=trainer.epoch,
        unit="epoch",
        mininterval=0.5,
        dynamic_ncols=True,
        bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
    )
    with bar:
        while trainer.epoch < epochs:
            waiting.append(trainer.update(*trainer.draw()))
            sample_now = trainer.epoch % sample_every == 0 or trainer.epoch == epochs
            save_now = trainer.epoch % checkpoint_every == 0 or trainer.epoch == epochs
            # Losses stay on the device until they are shown: fetching one waits for it.
            if sample_now or save_now or time.perf_counter() - since > 0.5:
                losses = torch.stack(waiting).cpu()
                seconds = time.perf_counter() - since
                log.add(trainer.epoch, losses, seconds)
                each = seconds / len(waiting)
                pace = each if pace is None else 0.8 * pace + 0.2 * each
                took = f"{pace:.3g} s" if pace >= 0.9995 else f"{pace * 1000:.3g} ms"
                figures = " ".join(f"{n} {x:.2f}" for n, x in zip(LOSSES, losses[-1].tolist()))
                bar.set_postfix_str(f"{took}/epoch, {figures}", refresh=False)
                bar.update(len(waiting))
                waiting = []
                if sample_now:
                    show_samples()
                if time.perf_counter() - plotted > 60:
                    log.plot()
                    plotted = time.perf_counter()
                if save_now:
                    save_checkpoint()
                since = time.perf_counter()


def parameters(network):
    """How many weights a network learns."""
    return sum(math.prod(weight.shape) for weight in network.parameters())
