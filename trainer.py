"""The algorithm: alternating updates of the discriminators and the generators (paper, section 3.2).

The objective, with v real clips and w generated ones:

    F_V = E[-log D_I(S_1(v))] + E[-log(1 - D_I(S_1(w)))]
        + E[-log D_V(S_T(v))] + E[-log(1 - D_V(S_T(w)))]

It is the discriminators' loss: D_I and D_V make it small, G_I and R_M large, in turns. In practice
(README, The model): binary cross-entropy on log-odds; the generators' step in the non-saturating
form, where they make -log D(w) small; and 0.9 in place of 1 as the label of what is to look real.
"""

import contextlib
import math
import time
import warnings

import torch
import torch.nn.functional as F

from data import ReadAhead, look, split
from models import ImageDiscriminator, VideoDiscriminator, VideoGenerator
from utils import FIGURES, LOSSES, TrainingError, is_out_of_memory, progress_bar
from video import save_gif, video_grid

REAL, FAKE = 0.9, 0.0  # one-sided label smoothing
BETAS = 0.5, 0.999
SAMPLES = 16  # videos in a sample GIF
SHOW_EVERY = 0.5  # seconds between losses shown and logged
PAGE_EVERY, NEWS_EVERY = 60, 5  # seconds between page and plot drawn, and where samples are new
WARM_UP = 3  # epochs before one is recorded as a CUDA graph
DIVERGED = "are not finite: try a smaller --lr, or --precision fp32"


def bce(logits, label):
    """Binary cross-entropy of log-odds (any shape) against one label, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


@contextlib.contextmanager
def fixed(weights):
    """Constants, as far as gradients are concerned, for what is computed meanwhile."""
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


class Trainer:
    """The four networks, their optimisers, the random state, and one epoch of training.

    clips: a ClipDataset; it gives the size of the frames, T, and the lengths of the videos. On a
    CUDA device with room for all of them the clips are moved there.
    seed: of all randomness: the first weights, the clips and windows drawn, the noise.
    precision: "fp32" or "bf16", the type of the convolutions; R_M and the losses stay float32.
    graph: on CUDA, record an epoch as a CUDA graph; False runs it kernel by kernel, for debugging.
    """

    def __init__(
        self, clips, batch_size=16, lr=2e-4, seed=0, device="cpu", precision="fp32", graph=True
    ):
        self.clips = clips
        self.batch_size, self.seed = batch_size, seed
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
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
        # One pass over all weights a step; "capturable": in a CUDA graph.
        options = {"lr": lr, "betas": BETAS, "fused": True, "capturable": cuda}
        self.optimizer_d = torch.optim.Adam(self.discriminator_weights, **options)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **options)

        self.longest = int(clips.lengths.max())
        rng = torch.Generator().manual_seed(seed)
        self.sample_noise = self.generator.draw_noise(SAMPLES, clips.frames, rng)
        if cuda and clips.bytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            clips.to(self.device)
            self.ahead = None
        else:
            other = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng)))
            self.ahead = ReadAhead(clips, batch_size, other, pin=cuda)
        # Draws are made where they are used, so that the host need not be waited for.
        self.rng = torch.Generator(self.device).manual_seed(seed) if cuda else rng
        self.use_graph = graph and cuda
        self.graph, self.epochs_before_graph = None, WARM_UP
        self.side_stream = torch.cuda.Stream(self.device) if self.use_graph else None

    @property
    def networks(self):
        return {
            "R_M": self.generator.motion_rnn,
            "G_I": self.generator.image_generator,
            "D_I": self.image_discriminator,
            "D_V": self.video_discriminator,
        }

    # ------------------------------------------------------------ one epoch

    def next_pixels(self):
        """The next batch of real clips, on the device, as from `ClipDataset.read`."""
        if self.ahead is None:
            return self.clips.read(*self.clips.draw(self.batch_size, self.rng))
        return self.ahead.next().to(self.device, non_blocking=self.device.type == "cuda")

    def draw(self, pixels=None):
        """Draw all that is random in one epoch: what `update` takes, on the device.

        pixels: from `next_pixels`, which is asked where they are not given.
        """
        if pixels is None:
            pixels = self.next_pixels()
        # A generated video has a real clip's length K, and S_T and S_1 look at it as at that clip.
        _, start, frame = self.clips.draw(self.batch_size, self.rng)
        window = start[:, None] + torch.arange(self.clips.frames, device=start.device)
        looked_at = torch.cat([window, frame[:, None]], dim=1)
        # R_M looks back only, so a path may end with the last frame that is looked at. To know
        # which that is, the host would have to wait for a GPU: there paths have the longest length.
        length = self.longest if self.device.type == "cuda" else int(looked_at.max()) + 1
        noise = self.generator.draw_noise(self.batch_size, length, self.rng)
        return pixels, noise, looked_at.to(self.device)

    def generate(self, noise, looked_at):
        """Generate videos, only the frames that the discriminators look at.

        noise: of the whole paths, as from `draw_noise`; looked_at: (B, T + 1), the places on the
        path of the window's T frames, then of the single frame.
        Returns S_T(w), (B, 3, T, S, S), and S_1(w), (B, 3, S, S).
        """
        path = self.generator.path(*noise)
        points = path.gather(1, looked_at[..., None].expand(-1, -1, path.shape[2]))
        points = torch.cat([points[:, :-1].flatten(0, 1), points[:, -1]])
        with self.autocast:
            return split(self.generator.render(points), len(looked_at))

    def update(self, pixels, noise, looked_at):
        """The update: a step of D_I and D_V with G_I and R_M fixed, then the other way round.

        Takes what `draw` returns. Returns the figures of an epoch, (8,), on the device: the losses
        D_I, D_V, G_I, G_V, then the mean answers, from 0 to 1, that D_I and D_V gave to what was
        real, and to what was generated, before their step.
        """
        D_I, D_V = self.image_discriminator.logits, self.video_discriminator.logits
        self.optimizer_d.zero_grad()
        self.optimizer_g.zero_grad()

        real_window, real_frame = look(pixels, self.batch_size)
        with self.autocast:
            on_real = D_I(real_frame), D_V(real_window)
        real_D_I, real_D_V = (bce(logits, REAL) for logits in on_real)
        (real_D_I + real_D_V).backward()
        del real_window, real_frame
        fake_window, fake_frame = self.generate(noise, looked_at)
        with self.autocast:
            on_fake = D_I(fake_frame.detach()), D_V(fake_window.detach())
        fake_D_I, fake_D_V = (bce(logits, FAKE) for logits in on_fake)
        (fake_D_I + fake_D_V).backward()
        self.optimizer_d.step()
        self.optimizer_d.zero_grad()  # not needed any more: memory for what comes

        # The generators' gradient passes through the discriminators, theirs need not be computed.
        with fixed(self.discriminator_weights), self.autocast:
            G_I, G_V = bce(D_I(fake_frame), REAL), bce(D_V(fake_window), REAL)
        (G_I + G_V).backward()
        self.optimizer_g.step()

        losses = real_D_I + fake_D_I, real_D_V + fake_D_V, G_I, G_V
        answers = (x.detach().float().sigmoid().mean() for x in (*on_real, *on_fake))
        return torch.stack([*losses, *answers]).detach()

    def train_epoch(self):
        """Draw and update once. Returns the epoch's figures, (8,), as `update` does.

        On CUDA the first epochs run kernel by kernel; then one is recorded as a CUDA graph, and
        from there on each is one launch: Python is slower at launching kernels than a GPU at
        running them.
        """
        if not self.use_graph:
            figures = self.update(*self.draw())
        elif self.epochs_before_graph:
            self.epochs_before_graph -= 1
            figures = self._on_side_stream()
        else:
            if self.graph is None:
                self._record(None if self.ahead is None else self.next_pixels())
            elif self.ahead is not None:
                self.recorded_pixels.copy_(self.ahead.next(), non_blocking=True)
            self.graph.replay()
            figures = self.recorded_figures.clone()
        self.epoch += 1
        return figures

    def _on_side_stream(self):
        """An epoch as recording needs it before: the optimisers' state made, kernels chosen."""
        main_stream = torch.cuda.current_stream(self.device)
        self.side_stream.wait_stream(main_stream)
        with torch.cuda.stream(self.side_stream):
            figures = self.update(*self.draw())
        main_stream.wait_stream(self.side_stream)
        return figures

    def _record(self, pixels):
        """Record an epoch without running it; each replay draws anew, from `rng`.

        pixels: None where the clips are on the device and the gather is part of the epoch; else a
        batch, whose memory each later one is copied into.
        Raises TrainingError where the update cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the thread that reads ahead may ask for pinned memory meanwhile.
        recording = torch.cuda.graph(
            graph, stream=self.side_stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self.device):
            # PyTorch registers the generators that are used by itself by now, but not yet in 2.6.
            if register := getattr(graph, "register_generator_state", None):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    register(self.rng)
            try:
                with recording:
                    figures = self.update(*self.draw(pixels))
            except RuntimeError as error:  # a changed update that waits for the GPU: print(loss)
                if is_out_of_memory(error) or is_out_of_memory(error.__context__):
                    raise
                reason = str(error).partition("\n")[0]
                raise TrainingError(
                    f"an epoch cannot be recorded as a CUDA graph ({reason}); "
                    "--no-graph trains kernel by kernel"
                ) from error
        self.graph, self.recorded_pixels, self.recorded_figures = graph, pixels, figures

    @torch.no_grad()
    def sample(self):
        """Videos from the fixed noise, in evaluation mode: (16, 3, T, S, S) in [-1, 1]."""
        one_by_one = zip(*(noise.split(1) for noise in self.sample_noise))  # to need little memory
        self.generator.eval()
        try:
            videos = [self.generator(*noise) for noise in one_by_one]
        finally:
            self.generator.train()
        return torch.cat(videos)

    def real_sample(self, seed):
        """16 real windows, (16, 3, T, S, S), drawn without touching the training's random state."""
        rng = torch.Generator().manual_seed(seed)
        return look(self.clips.read(*self.clips.draw(SAMPLES, rng)), SAMPLES)[0]

    # ------------------------------------------------------------ checkpoint

    def state(self):
        """All that is needed to go on, as plain values and tensors, for a checkpoint.

        Raises TrainingError if a number in it is not finite.
        """
        state = {
            "epoch": self.epoch,
            "seed": self.seed,
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "optimizer_d": self.optimizer_d.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "rng": self._random_states(),
            "sample_noise": self.sample_noise,
        }
        held = list(state["networks"].values())
        for optimizer in (state["optimizer_d"], state["optimizer_g"]):
            held += optimizer["state"].values()
        if not all(tensor.isfinite().all() for tensors in held for tensor in tensors.values()):
            raise TrainingError(f"after epoch {self.epoch} weights or their moments {DIVERGED}")
        return state

    def generator_state(self):
        """What generating videos needs of `state`."""
        R_M, G_I = (self.networks[name].state_dict() for name in ("R_M", "G_I"))
        return {"epoch": self.epoch, "seed": self.seed, "networks": {"R_M": R_M, "G_I": G_I}}

    def differences(self, state):
        """A line for each tensor that has another shape in `state` than here."""

        def shape(tensor):
            return "absent" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"

        lines = []
        for name, network in self.networks.items():
            old, new = state["networks"].get(name, {}), network.state_dict()
            for key in old | new:
                was, now = shape(old.get(key)), shape(new.get(key))
                if was != now:
                    lines.append(f"{name} {key} was {was}, is {now} now")
        return lines

    def load_state(self, state):
        """Go on from what `state` returned, perhaps on another device.

        Raises ValueError where it does not fit; the trainer is then of no use any more.
        """
        try:
            self._load(state)
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(str(error).partition("\n")[0]) from error

    def _load(self, state):
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name in ("optimizer_d", "optimizer_g"):
            # The moments are the checkpoint's, the options (fused, lr) those of now.
            optimizer = getattr(self, name)
            now = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": now})
            for weight in optimizer.param_groups[0]["params"]:
                moments = optimizer.state[weight]
                if state["epoch"] and not moments:
                    raise ValueError("weights without moments")
                for key, value in moments.items():  # copied, in the layout of the weights here
                    if key != "step" and value.shape != weight.shape:
                        raise ValueError("moments that do not fit the weights")
                    moments[key] = torch.empty_like(weight if value.dim() else value).copy_(value)
        self.graph, self.epochs_before_graph = None, WARM_UP
        self.sample_noise = tuple(noise.to(self.device) for noise in state["sample_noise"])
        self.epoch, self.seed = state["epoch"], state["seed"]
        if self.epoch < 0:
            raise ValueError(f"epoch {self.epoch}")
        self._go_on_from(state["rng"])

    def _random_states(self):
        ahead = None if self.ahead is None else self.ahead.state
        return {"device": self.rng.device.type, "draws": self.rng.get_state(), "clips": ahead}

    def _go_on_from(self, states):
        """Take the random states of a checkpoint; those of another device mean nothing on this."""
        anew = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        if states["device"] == self.rng.device.type:
            self.rng.set_state(states["draws"])
        else:
            self.rng.manual_seed(int(torch.randint(2**62, (), generator=anew)))
        if self.ahead is not None:
            self.ahead.go_on_from(anew.get_state() if states["clips"] is None else states["clips"])


def check_finite(epoch, figures):
    """Raise TrainingError if a figure of the epochs up to `epoch`, (n, 8), is not finite."""
    bad = (~figures.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        at = epoch - len(figures) + 1 + row
        value = figures[row, column].item()
        raise TrainingError(f"at epoch {at} the losses ({FIGURES[column]}: {value}) {DIVERGED}")


def show_samples(trainer, log, videos):
    """Write a GIF of the trainer's samples into the folder `videos`, and a frame of it to `log`."""
    grid = video_grid(trainer.sample())
    save_gif(videos / f"epoch-{trainer.epoch:06d}.gif", grid)
    log.add_image("samples", grid[len(grid) // 2], trainer.epoch)


def train(
    trainer,
    epochs,
    log,
    save_checkpoint,
    videos,
    sample_every,
    checkpoint_every,
    checkpoint_seconds=math.inf,
    stop=(),
    show=lambda: None,
):
    """Train up to epoch `epochs`, with a progress bar, sample GIFs and checkpoints on the way.

    log: a LossLog; save_checkpoint: called with nothing; videos: the folder for the GIFs. Samples
    are made every so many epochs, and checkpoints, or sooner, when the last is so many seconds old;
    both also at the last epoch.
    stop: once it holds something (see `signals_noted`), the epoch in hand is the last; that gives a
    checkpoint.
    show: called with nothing, to draw how the run stands: once a minute, and soon after samples.
    Raises TrainingError, before anything is saved, if a loss is not finite.
    """
    if trainer.epoch == 0:
        show_samples(trainer, log, videos)
    waiting, since = [], time.perf_counter()
    saved, shown = since, since - PAGE_EVERY + NEWS_EVERY
    pace = None  # a running mean of the seconds an epoch takes
    bar = progress_bar(
        total=epochs,
        initial=trainer.epoch,
        unit="epoch",
        bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
    )
    with bar:
        last = trainer.epoch >= epochs
        while not last:
            waiting.append(trainer.train_epoch())
            done = trainer.epoch == epochs
            last = done or len(stop) > 0
            sample_now = done or trainer.epoch % sample_every == 0
            save_now = last or trainer.epoch % checkpoint_every == 0
            save_now = save_now or time.perf_counter() - saved >= checkpoint_seconds
            # Losses stay on the device until they are shown, every half second or so: to fetch them
            # is to wait for it.
            # A host that runs ahead of a GPU must go by the count, not by its own clock.
            waited = max(len(waiting) * (pace or SHOW_EVERY), time.perf_counter() - since)
            if sample_now or save_now or waited >= SHOW_EVERY:
                figures = torch.stack(waiting).cpu()
                seconds = time.perf_counter() - since
                log.add(trainer.epoch, figures, seconds)
                each = seconds / len(waiting)
                pace = each if pace is None else 0.8 * pace + 0.2 * each
                took = f"{pace:.3g} s" if pace >= 0.9995 else f"{pace * 1000:.3g} ms"
                losses = " ".join(f"{n} {x:.2f}" for n, x in zip(LOSSES, figures[-1].tolist()))
                bar.set_postfix_str(f"{took}/epoch, {losses}", refresh=False)
                bar.update(len(waiting))
                waiting = []
                check_finite(trainer.epoch, figures)
                try:
                    if sample_now:
                        show_samples(trainer, log, videos)
                    if time.perf_counter() - shown > (NEWS_EVERY if sample_now else PAGE_EVERY):
                        show()
                        shown = time.perf_counter()
                except Exception:  # pictures that cannot be written: save what they were to show
                    save_checkpoint()
                    raise
                if save_now:
                    save_checkpoint()
                    saved = time.perf_counter()
                since = time.perf_counter()


def parameters(network):
    """How many weights a network learns."""
    return sum(math.prod(weight.shape) for weight in network.parameters())
