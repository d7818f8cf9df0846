"""The algorithm: alternating updates of the discriminators and the generators (paper, section 3.2).

The objective, with v real and ṽ generated videos:

    F_V = E[-log D_I(S_1(v))] + E[-log(1 - D_I(S_1(ṽ)))]
        + E[-log D_V(S_T(v))] + E[-log(1 - D_V(S_T(ṽ)))]

D_I and D_V minimize it, G_I and R_M maximize it, in turns. In practice: binary cross-entropy on
log-odds; G_I and R_M minimize -log D(ṽ) instead, the non-saturating form; and the label of what is
to look real is 0.9, not 1.
"""

import copy
import math
import time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import checkpoint
from augment import augment, sample_augmentation
from data import Batch, to_float, to_uint8
from gallery import write_page
from generate import sample_videos
from models import ImageDiscriminator, VideoDiscriminator, VideoGenerator
from utils import TrainingError, progress_bar
from video import save_gif, video_grid

REAL_LABEL, FAKE_LABEL = (0.9, 0.0)  # one-sided label smoothing
BETAS = (0.5, 0.999)
NUM_SAMPLES = 16  # videos in a sample GIF
LOG_INTERVAL = 0.5  # seconds between log lines: fetching losses waits for the device
PAGE_INTERVAL = 60  # seconds between updates of the page
PROGRESS = "D: image {loss_d_image:.2f} video {loss_d_video:.2f} | "
PROGRESS += "G: image {loss_g_image:.2f} video {loss_g_video:.2f}"
NOT_FINITE = "not finite; try a smaller --lr, or --precision fp32"


def bce(logits, label):
    """Binary cross-entropy of log-odds (any shape) against one label, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class Trainer:
    """The four networks, their optimizers, the random state, and the update.

    clips: a ClipDataset; it gives the size of the frames, T, and the lengths of the videos.
    seed: of the first weights, the sampled clips and windows, and the noise.
    precision: "fp32" or "bf16", of G_I, D_I and D_V; R_M and the losses stay float32.
    ema: the decay of the exponential moving average of R_M and G_I, `average`, an AveragedModel;
    0: there is none.
    noise_sigma, augment: augmentation of what D_I and D_V get, see augment.py.

    All random numbers but the pixels' noise are sampled on the host, so a seed means the same on
    every device.
    """

    def __init__(self, clips, batch_size, lr, seed, device, precision, ema, noise_sigma, augment):
        self.clips, self.batch_size, self.seed = clips, batch_size, seed
        self.ema, self.noise_sigma, self.augment = ema, noise_sigma, augment
        self.device = device = torch.device(device)
        self.epoch = 0
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = VideoGenerator(clips.size).to(device)
            self.image_discriminator = ImageDiscriminator(clips.size).to(device)
            self.video_discriminator = VideoDiscriminator(clips.size, clips.frames).to(device)
        discriminators = self.image_discriminator, self.video_discriminator
        self.discriminators = torch.nn.ModuleList(discriminators)
        self.networks = {
            "R_M": self.generator.motion_rnn,
            "G_I": self.generator.image_generator,
            "D_I": self.image_discriminator,
            "D_V": self.video_discriminator,
        }
        if device.type != "mps":  # where Conv3d was wrong in this layout: pytorch#141471
            self.generator.to(memory_format=torch.channels_last)
            self.image_discriminator.to(memory_format=torch.channels_last)
            self.video_discriminator.to(memory_format=torch.channels_last_3d)
        # The statistics of G_I's batch normalization are averaged as the weights are.
        self.average = AveragedModel(self.generator, use_buffers=True).eval() if ema else None
        if ema:
            self.average.module.motion_rnn.gru.flatten_parameters()  # as cuDNN wants them
        options = {"lr": lr, "betas": BETAS, "fused": True}
        self.optimizer_d = torch.optim.Adam(self.discriminators.parameters(), **options)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **options)
        self.rng = torch.Generator().manual_seed(seed)
        self.fixed_noise = self.generator.sample_noise(NUM_SAMPLES, clips.frames, self.rng)
        if self.device.type == "cuda":
            free_memory, _ = torch.cuda.mem_get_info(self.device)
            if 3 * clips.num_frames * clips.size**2 < free_memory / 2:
                clips.to(self.device)

    def sample_batch(self):
        """Sample all that is random in one epoch: what `update` takes.

        Returns real: a Batch of uint8 pixels; noise: of whole paths, from
        `VideoGenerator.sample_noise`; frame_idx: (B, T + 1) int64, the places on each path of the T
        frames of the window, then of the single frame, all on the device; augmentations: of the
        real videos, and of the generated ones in D's step and in G's, see augment.py.
        """
        real = self.clips.sample(self.batch_size, self.rng)
        real = Batch(*(x.to(self.device) for x in real))
        # A generated video has the length K of a real clip, and S_T and S_1 sample it like one.
        _, start, frame = self.clips.sample_indices(self.batch_size, self.rng)
        window_idx = start[:, None] + torch.arange(self.clips.frames)
        frame_idx = torch.cat([window_idx, frame[:, None]], dim=1)
        length = int(frame_idx.max()) + 1  # R_M is causal: stop at the last frame needed
        noise = self.generator.sample_noise(self.batch_size, length, self.rng)
        options = self.clips.size, self.rng, self.noise_sigma, self.augment
        augmentations = [sample_augmentation(self.batch_size, *options) for _ in range(3)]
        return real, noise, frame_idx.to(self.device), augmentations

    def generate(self, noise, frame_idx):
        """Generate the frames that S_T and S_1 take, from `sample_batch`: a Batch in [-1, 1]."""
        path = self.generator.path(*noise)
        z = path.gather(1, frame_idx[..., None].expand(-1, -1, path.shape[2]))
        with self.autocast:  # one pass of G_I over all frames: its BatchNorm sees them together
            frames = self.generator.render(z)
        return Batch(frames[:, :-1].transpose(1, 2), frames[:, -1], labels=None)

    def update(self, real, noise, frame_idx, augmentations=(None, None, None)):
        """One alternating update (paper, section 3.2) on what `sample_batch` returned.

        Returns the metrics of the epoch, a dict of tensors on the device: the losses, and the mean
        probability of being real that each discriminator gave to real and to generated videos.
        """
        D_I, D_V = self.image_discriminator.logits, self.video_discriminator.logits
        augmentation_real, augmentation_fake, augmentation_g = augmentations
        self.optimizer_d.zero_grad()
        self.optimizer_g.zero_grad()

        # (1) Update D_I and D_V: minimize
        #     -log D_I(S_1(v)) - log(1 - D_I(S_1(ṽ))) - log D_V(S_T(v)) - log(1 - D_V(S_T(ṽ)))
        self.discriminators.requires_grad_(True)
        v = Batch(to_float(real.windows), to_float(real.frames), real.labels)
        v = augment(v, augmentation_real, self.noise_sigma)
        with self.autocast:
            d_image_real, d_video_real = D_I(v.frames), D_V(v.windows)
        loss_image_real = bce(d_image_real, REAL_LABEL)
        loss_video_real = bce(d_video_real, REAL_LABEL)
        (loss_image_real + loss_video_real).backward()
        del v  # a backward pass for real and one for generated videos need less memory than one

        fake = self.generate(noise, frame_idx)
        fake_d = Batch(fake.windows.detach(), fake.frames.detach(), labels=None)
        fake_d = augment(fake_d, augmentation_fake, self.noise_sigma)
        with self.autocast:
            d_image_fake, d_video_fake = D_I(fake_d.frames), D_V(fake_d.windows)
        loss_image_fake = bce(d_image_fake, FAKE_LABEL)
        loss_video_fake = bce(d_video_fake, FAKE_LABEL)
        (loss_image_fake + loss_video_fake).backward()
        self.optimizer_d.step()
        self.optimizer_d.zero_grad()

        # (2) Update G_I and R_M: minimize -log D_I(S_1(ṽ)) - log D_V(S_T(ṽ))
        self.discriminators.requires_grad_(False)
        fake = augment(fake, augmentation_g, self.noise_sigma)
        with self.autocast:
            loss_g_image = bce(D_I(fake.frames), REAL_LABEL)
            loss_g_video = bce(D_V(fake.windows), REAL_LABEL)
        (loss_g_image + loss_g_video).backward()
        self.optimizer_g.step()

        metrics = {
            "loss_d_image": loss_image_real + loss_image_fake,
            "loss_d_video": loss_video_real + loss_video_fake,
            "loss_g_image": loss_g_image,
            "loss_g_video": loss_g_video,
            "d_image_real": d_image_real.float().sigmoid().mean(),
            "d_image_fake": d_image_fake.float().sigmoid().mean(),
            "d_video_real": d_video_real.float().sigmoid().mean(),
            "d_video_fake": d_video_fake.float().sigmoid().mean(),
        }
        return {name: value.detach() for name, value in metrics.items()}

    def train_epoch(self):
        """Sample a batch and update on it. Returns the metrics, as `update` does."""
        metrics = self.update(*self.sample_batch())
        if self.average:
            n = int(self.average.n_averaged)  # at first the average is of the last few epochs only
            self.average.multi_avg_fn = get_ema_multi_avg_fn(min(self.ema, (1 + n) / (10 + n)))
            self.average.update_parameters(self.generator)
        self.epoch += 1
        return metrics

    def sampler(self):
        """The generator to sample from, in evaluation mode: the average; without one, a copy."""
        if self.average:
            return self.average.module
        return copy.deepcopy(self.generator).to(self.device).eval()

    @torch.no_grad()
    def sample(self):
        """Videos of `sampler` from the fixed noise: (16, T, S, S, 3) uint8, on the CPU."""
        generator = self.sampler()
        path = generator.path(*self.fixed_noise)
        videos = [to_uint8(generator.render(z)) for z in path]  # one by one: less memory
        return torch.stack(videos).permute(0, 1, 3, 4, 2).cpu()

    def sample_real(self):
        """16 real windows, the same ones for a seed: (16, T, S, S, 3) uint8, on the CPU."""
        batch = self.clips.sample(NUM_SAMPLES, torch.Generator().manual_seed(self.seed))
        return batch.windows.permute(0, 2, 3, 4, 1).cpu()

    def state(self):
        """All that resuming needs, plain values and tensors. Raises TrainingError if not finite."""
        state = {
            **self.generator_state(),
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "optimizer_d": self.optimizer_d.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "rng": self.rng.get_state(),
            "fixed_noise": self.fixed_noise,
        }
        groups = [*state["networks"].values(), *state["average"].values()]
        for optimizer in (self.optimizer_d, self.optimizer_g):
            groups += optimizer.state.values()
        if not all(tensor.isfinite().all() for group in groups for tensor in group.values()):
            raise TrainingError(f"epoch {self.epoch}: weights or moments are {NOT_FINITE}")
        return state

    def generator_state(self):
        """What generate.py needs of `state`: R_M and G_I as trained, and their average."""
        state = {"epoch": self.epoch, "seed": self.seed, "networks": {}, "average": {}}
        for name, attribute in (("R_M", "motion_rnn"), ("G_I", "image_generator")):
            state["networks"][name] = self.networks[name].state_dict()
            if self.average:
                state["average"][name] = getattr(self.average.module, attribute).state_dict()
        return {**state, "n_averaged": int(self.average.n_averaged) if self.average else 0}

    def load_state(self, state):
        """Resume from what `state` returned, on any device. If it raises, discard the trainer."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        if self.average:  # it begins here, if the checkpoint has none
            average = state.get("average") or state["networks"]
            self.average.module.motion_rnn.load_state_dict(average["R_M"])
            self.average.module.image_generator.load_state_dict(average["G_I"])
            self.average.n_averaged.fill_(state.get("n_averaged", 0))
        for name in ("optimizer_d", "optimizer_g"):
            # The moments are the checkpoint's, the options (lr) those of now.
            optimizer = getattr(self, name)
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": options})
            for param in optimizer.param_groups[0]["params"]:
                moments = optimizer.state[param]
                for key in ("exp_avg", "exp_avg_sq"):  # in the memory layout of `param` here
                    moments[key] = torch.empty_like(param).copy_(moments[key])
        if state["fixed_noise"][1].shape != self.fixed_noise[1].shape:
            raise ValueError("it has another --frames")
        self.fixed_noise = tuple(noise.to(self.device) for noise in state["fixed_noise"])
        self.rng.set_state(state["rng"])
        self.epoch, self.seed = state["epoch"], int(state["seed"])


def check_finite(rows):
    """Raise TrainingError if a metric in `rows`, a list of dicts, is not finite."""
    for row in rows:
        for name, value in row.items():
            if not math.isfinite(value):
                raise TrainingError(f"epoch {row['epoch']}: {name} is {value}, {NOT_FINITE}")


def save_samples(trainer, log, folder):
    """Write a GIF of the trainer's samples into `folder`, and its middle frame to TensorBoard."""
    grid = video_grid(trainer.sample().numpy())
    save_gif(folder / f"epoch-{trainer.epoch:06d}.gif", grid)
    log.add_image("samples", grid[len(grid) // 2], trainer.epoch)


def evaluate(trainer, evaluator, log, folder):
    """Measure the generator, log it, and save it as best.pt into `folder` if it is the best."""
    trainer.state()  # raises TrainingError if a weight is not finite
    videos = sample_videos(trainer.sampler(), evaluator.num, trainer.clips.frames, trainer.seed)
    metrics, _ = evaluator.measure(videos)
    scores = [row[evaluator.criterion] for row in log.evaluations]
    log.add_evaluation({"epoch": trainer.epoch, **metrics})
    if metrics[evaluator.criterion] < min(scores, default=math.inf):
        checkpoint.save(folder / "best.pt", trainer.generator_state())


def save_checkpoint(trainer, log, checkpoints, info, numbered=False):
    """Save the run as it stands, and its generator alone as generator.pt."""
    content = {**trainer.state(), "history": log.history(), "evaluations": log.evaluations, **info}
    checkpoint.save(checkpoints.folder / "generator.pt", trainer.generator_state())
    checkpoints.save(content, numbered)


def train(trainer, args, log, facts, checkpoints, info, stop, evaluator=None):
    """Train up to epoch `args.epochs`, with samples, logs and checkpoints on the way.

    args: the options of main.py; facts: lines about the run; info: what a checkpoint holds besides
    the state; stop: once this list is not empty the epoch in hand is the last one. Raises
    TrainingError, before it is saved, at a metric that is not finite.
    """
    if not (args.videos / f"epoch-{trainer.epoch:06d}.gif").exists():
        save_samples(trainer, log, args.videos)
    saved = time.perf_counter()
    page_written = saved - PAGE_INTERVAL + 5  # the first page comes after five seconds
    style = "{n_fmt}/{total_fmt} |{bar}| {remaining} left, {rate_fmt}{postfix}"
    log.start_clock()
    bar = progress_bar(total=args.epochs, initial=trainer.epoch, unit="epoch", bar_format=style)
    with bar:
        for epoch in range(trainer.epoch + 1, args.epochs + 1):
            log.add(trainer.train_epoch())
            now = time.perf_counter()
            final = epoch == args.epochs
            last = final or bool(stop)
            numbered = epoch % args.checkpoint_every == 0
            sample_due = final or epoch % args.sample_every == 0
            evaluation_due = evaluator and (final or epoch % args.evaluate_every == 0)
            save_due = last or numbered or now - saved >= 60 * args.checkpoint_minutes
            if not (sample_due or evaluation_due or save_due or now - log.clock >= LOG_INTERVAL):
                continue

            try:
                rows = log.flush(epoch)
                check_finite(rows)
                bar.set_postfix_str(PROGRESS.format_map(rows[-1]), refresh=False)
                bar.update(epoch - bar.n)
                if sample_due:
                    save_samples(trainer, log, args.videos)
                if evaluation_due:
                    evaluate(trainer, evaluator, log, checkpoints.folder)
                if now - page_written >= PAGE_INTERVAL or (sample_due and now - page_written >= 5):
                    write_page(args, epoch, log, facts)
                    page_written = now
            except OSError:  # a full disk, a broken pipe: do not lose what they were to show
                save_checkpoint(trainer, log, checkpoints, info)
                raise
            if save_due:
                save_checkpoint(trainer, log, checkpoints, info, numbered)
                saved = time.perf_counter()
            if last:
                break
            log.start_clock()
