import contextlib
import copy
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import DEVICES
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import logger as logger_module
import models
import trainer as trainer_module
from benchmark import NaiveTrainer
from checkpoint import Checkpoints
from data import Batch, ClipDataset
from logger import Logger
from trainer import Trainer, train
from utils import TrainingError


@pytest.fixture
def narrow(monkeypatch):
    """Networks with a sixteenth of the channels: the algorithm is the same, and it is faster."""
    for name in ("VideoGenerator", "ImageDiscriminator", "VideoDiscriminator"):
        monkeypatch.setattr(trainer_module, name, small.small(getattr(models, name)))


def weights_of(trainer):
    """A copy of all weights and running statistics."""
    return copy.deepcopy({name: net.state_dict() for name, net in trainer.networks.items()})


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def distance(a, b):
    """How far tensors are from others, relative to their norm."""
    a, b = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- the update


def share_moments(trainer, adams):
    """Give each of the naive optimizers the moments that the trainer's two hold for its weights."""
    for optimizer, names in (
        (trainer.optimizer_d, ("D_I", "D_V")),
        (trainer.optimizer_g, ("R_M", "G_I")),
    ):
        moments = iter(copy.deepcopy(optimizer.state_dict()["state"]).values())
        for name in names:
            state = adams[name].state_dict()
            indices = state["param_groups"][0]["params"]
            adams[name].load_state_dict({**state, "state": {i: next(moments) for i in indices}})


@contextlib.contextmanager
def gradients_at_each_step(optimizers):
    """Yield a dict: by the name of each optimizer, the gradients with which it takes its step."""
    gradients = {}

    def hook(name):
        return lambda adam, *_: gradients.update(
            {name: [weight.grad.clone() for weight in adam.param_groups[0]["params"]]}
        )

    handles = [adam.register_step_pre_hook(hook(name)) for name, adam in optimizers.items()]
    yield gradients
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("device", DEVICES)
def test_update_equals_the_naive_one(clips, device, dtype, tolerance, monkeypatch):
    """Epoch by epoch from the same state; in float64 nothing but rounding may differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if dtype == torch.float64:
        monkeypatch.setattr(trainer_module, "to_float", lambda x: x.double() / 127.5 - 1)
    trainer = Trainer(clips, batch_size=3, device=device)
    for network in trainer.networks.values():
        network.to(dtype)
    for epoch in range(4):
        real, noise, frame_idx = trainer.sample_batch()
        noise = tuple(x.to(dtype) for x in noise)
        if epoch < 2 and dtype == torch.float32:
            # Adam's first steps are of full length even where a gradient is mere rounding: in
            # float32 two ways to compute the same thing part there.
            trainer.update(real, noise, frame_idx)
            continue
        naive = NaiveTrainer(trainer)
        if epoch:
            share_moments(trainer, naive.adams)
        v = [(x.to(dtype) / 127.5 - 1).contiguous() for x in (real.windows, real.frames)]
        with gradients_at_each_step(naive.adams) as expected:
            expected_losses = naive.update(*v, noise, frame_idx)
        both = {"D": trainer.optimizer_d, "G": trainer.optimizer_g}
        with gradients_at_each_step(both) as gradients:
            metrics = trainer.update(real, noise, frame_idx)
        for name, loss in expected_losses.items():
            assert metrics[name].item() == pytest.approx(loss, rel=tolerance), name
        expected = {"D": expected["D_I"] + expected["D_V"], "G": expected["R_M"] + expected["G_I"]}
        for side in "DG":
            for new, old in zip(gradients[side], expected[side], strict=True):
                assert distance([new], [old]) < (1e-9 if dtype == torch.float64 else 1e-2), side
        for name, network in trainer.networks.items():
            other = naive.networks[name]
            assert distance(network.parameters(), other.parameters()) < tolerance, name
            for new, old in zip(network.buffers(), other.buffers(), strict=True):
                assert distance([new], [old]) < tolerance, name


def test_metrics_are_mean_probabilities_before_the_step(clips, narrow):
    trainer = Trainer(clips, batch_size=3)
    for _ in range(3):
        real, noise, frame_idx = trainer.sample_batch()
        before = copy.deepcopy(trainer.networks)
        with torch.no_grad():
            v = Batch(real.windows / 127.5 - 1, real.frames / 127.5 - 1, None)
            fake = trainer.generate(noise, frame_idx)
            expected = {
                "d_image_real": before["D_I"](v.frames).mean(),
                "d_image_fake": before["D_I"](fake.frames).mean(),
                "d_video_real": before["D_V"](v.windows).mean(),
                "d_video_fake": before["D_V"](fake.windows).mean(),
            }
        metrics = trainer.update(real, noise, frame_idx)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6)
    assert len({value.item() for value in expected.values()}) == 4  # no two could be swapped


def test_discriminators_learn_in_their_own_step_only(clips, narrow):
    """No step moves or computes gradients for the networks of the other."""
    trainer = Trainer(clips, batch_size=2)
    D, G = trainer.discriminators, trainer.generator
    seen = {}

    def has_gradients(network):
        return any(weight.grad is not None for weight in network.parameters())

    def before_g_step(*_):
        seen["d at g's step"] = has_gradients(D)
        seen["weights"] = copy.deepcopy(D.state_dict())

    trainer.optimizer_d.register_step_pre_hook(
        lambda *_: seen.update({"g at d's step": has_gradients(G)})
    )
    trainer.optimizer_g.register_step_pre_hook(before_g_step)
    for _ in range(2):
        before = copy.deepcopy(D.state_dict())
        trainer.train_epoch()
        assert not seen["d at g's step"] and not seen["g at d's step"]
        assert_equal(
            dict(D.named_parameters()), {n: seen["weights"][n] for n, _ in D.named_parameters()}
        )
        assert not any(torch.equal(weight, before[n]) for n, weight in D.named_parameters())


@pytest.mark.parametrize("optimizer", ["optimizer_d", "optimizer_g"])
def test_interrupted_update_leaves_nothing_behind(clips, narrow, optimizer):
    """As when the stop button of a notebook is pressed, and training then continues."""
    trainer, expected = Trainer(clips, batch_size=2), Trainer(clips, batch_size=2)
    batch = trainer.sample_batch()
    with (
        mock.patch.object(getattr(trainer, optimizer), "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.update(*batch)
    for name, network in expected.networks.items():
        network.load_state_dict(trainer.networks[name].state_dict())
    if optimizer == "optimizer_g":
        expected.optimizer_d.load_state_dict(copy.deepcopy(trainer.optimizer_d.state_dict()))
    assert_equal(trainer.update(*batch), expected.update(*batch))
    assert_equal(weights_of(trainer), weights_of(expected))


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_update_never_waits_for_the_device(clips, narrow, precision):
    trainer = Trainer(clips, batch_size=2, precision=precision)
    batch = trainer.sample_batch()
    trainer.update(*batch)
    with Waits() as waits:
        trainer.update(*batch)
    assert waits.count == 0
    with Waits() as waits:
        trainer.sample_batch()
    assert waits.count > 0  # on the host it may, and this counter sees it


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(clips, device):
    metrics = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(clips, batch_size=2, device=device, precision=precision)
        metrics[precision] = trainer.train_epoch()
        assert all(value.dtype == torch.float32 for value in metrics[precision].values())
        assert all(weight.dtype == torch.float32 for weight in trainer.generator.parameters())
    # bf16 keeps 8 bits
    torch.testing.assert_close(metrics["bf16"], metrics["fp32"], rtol=0.05, atol=0.02)
    assert metrics["bf16"] != metrics["fp32"]


# ---------------------------------------------------------------- what is sampled


def assert_distributed(values, expected):
    """Check that `values` have the probabilities `expected`, within 5 standard deviations."""
    counts = torch.bincount(values, minlength=len(expected))
    assert len(counts) == len(expected)
    expected = expected * len(values)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_generated_videos_have_real_lengths(tmp_path, narrow, monkeypatch):
    """S_T and S_1 are uniform over videos of 17 and of 60 frames, half of them each."""
    for name, n in (("a", 17), ("b", 60)):
        np.save(tmp_path / f"{name}.npy", np.zeros((n, 32, 32, 3), np.uint8))
    trainer = Trainer(ClipDataset(tmp_path), batch_size=10_000)
    monkeypatch.setattr(trainer.clips, "sample", lambda *_: Batch(*torch.zeros(3)))
    _, noise, frame_idx = trainer.sample_batch()
    assert noise[1].shape == (10_000, 60, 10)
    windows, frame = frame_idx[:, :-1], frame_idx[:, -1]
    assert windows.shape == (10_000, 16) and (windows.diff() == 1).all()
    start = windows[:, 0]

    def uniform(n, total):
        return torch.cat([torch.full((n,), 1 / n), torch.zeros(total - n)])

    assert_distributed(start, (uniform(2, 45) + uniform(45, 45)) / 2)
    assert_distributed(frame, (uniform(17, 60) + uniform(60, 60)) / 2)
    assert_distributed(frame[start > 1], uniform(60, 60))  # both of the same video
    trainer.batch_size = 1
    for _ in range(20):
        _, noise, frame_idx = trainer.sample_batch()
        assert noise[1].shape[1] == frame_idx.max() + 1  # R_M runs as far as needed


def test_generate_renders_the_frames_of_the_whole_videos(clips, narrow):
    """Only the needed frames are rendered: they are those of the videos at these places."""
    trainer = Trainer(clips, batch_size=3)
    trainer.generator.eval()  # else a frame depends on which others are rendered
    _, noise, frame_idx = trainer.sample_batch()
    videos = trainer.generator(*noise)
    fake = trainer.generate(noise, frame_idx)
    for video, window, frame, idx in zip(videos, fake.windows, fake.frames, frame_idx):
        torch.testing.assert_close(window, video[:, idx[:-1]])
        torch.testing.assert_close(frame, video[:, idx[-1]])
    assert len(set(frame_idx[:, -1].tolist())) == 3  # each video has its own


def test_seed_decides_everything(clips, narrow):
    def train_two(seed, global_seed):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        trainer = Trainer(clips, batch_size=2, seed=seed)
        assert torch.initial_seed() == global_seed
        trainer.train_epoch()
        return [trainer.train_epoch(), weights_of(trainer)]

    first = train_two(seed=7, global_seed=0)
    assert_equal(train_two(seed=7, global_seed=1), first)
    assert first[0] != train_two(seed=8, global_seed=0)[0]


def test_sampling_leaves_no_trace_and_is_in_evaluation_mode(clips, narrow):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    before, rng = weights_of(trainer), trainer.rng.get_state()
    videos, real = trainer.sample(), trainer.sample_real()
    assert videos.shape == real.shape == (16, 16, 32, 32, 3)
    assert videos.dtype == real.dtype == torch.uint8
    assert_equal([trainer.sample(), trainer.sample_real()], [videos, real])
    assert_equal(weights_of(trainer), before)
    assert torch.equal(trainer.rng.get_state(), rng)
    assert all(network.training for network in trainer.networks.values())
    # in evaluation mode a video alone equals the same one in the batch
    trainer.generator.eval()
    with torch.no_grad():
        alone = trainer.generator(*(noise[3:4] for noise in trainer.fixed_noise))[0]
    expected = ((alone.permute(1, 2, 3, 0) + 1) * 127.5).round()
    assert (videos[3].float() - expected).abs().max() <= 1
    assert videos[3].float().std() > 1


# ---------------------------------------------------------------- checkpoints


def through_a_file(state, folder):
    checkpoint.save(folder / "checkpoint.pt", state)
    return checkpoint.load(folder / "checkpoint.pt")


@pytest.fixture
def trained(clips, narrow):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    return trainer


def test_training_resumes_exactly_from_a_file(clips, trained, tmp_path):
    state = through_a_file(trained.state(), tmp_path)
    resumed = Trainer(clips, batch_size=2, seed=99)
    resumed.load_state(state)
    assert resumed.epoch == 1 and resumed.seed == 0
    for _ in range(2):
        assert_equal(trained.train_epoch(), resumed.train_epoch())
    assert_equal(weights_of(trained), weights_of(resumed))
    assert_equal(
        [trained.sample(), trained.sample_real()], [resumed.sample(), resumed.sample_real()]
    )


def test_load_state_keeps_the_learning_rate_and_the_layout_of_now(clips, trained):
    state = copy.deepcopy(trained.state())
    for moments in state["optimizer_d"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()  # as on Apple's GPU
    other = Trainer(clips, batch_size=2, lr=1e-4)
    other.load_state(state)
    for weight, moments in other.optimizer_d.state.items():
        assert weight.stride() == moments["exp_avg"].stride()
    before = weights_of(other)
    other.train_epoch()
    for name, weight in (("G_I", "main.0.weight"), ("D_V", "main.0.weight")):
        step = (weights_of(other)[name][weight] - before[name][weight]).abs().max()
        assert 0 < step < 1.5e-4  # Adam's steps are about as long as its rate


@pytest.mark.parametrize("where", ["weight", "moment", "running mean"])
def test_state_that_is_not_finite_is_refused(trained, where):
    values = {
        "weight": trained.generator.motion_rnn.gru.bias_hh_l0.data,
        "moment": trained.optimizer_d.state[trained.video_discriminator.linear.bias]["exp_avg_sq"],
        "running mean": trained.video_discriminator.main[3].running_mean,
    }[where]
    trained.state()
    values.view(-1)[-1] = float("nan" if where == "weight" else "inf")
    with pytest.raises(TrainingError, match="epoch 1: weights or moments are not finite"):
        trained.state()


@pytest.mark.parametrize("damage", ["no rng", "other shapes", "other moments", "no moments"])
def test_state_that_does_not_fit_is_refused(clips, trained, damage):
    state = copy.deepcopy(trained.state())
    if damage == "no rng":
        del state["rng"]
    elif damage == "other shapes":
        state["networks"]["D_I"]["main.0.weight"] = torch.zeros(8, 3, 4, 4)
    elif damage == "other moments":
        state["optimizer_d"]["state"][0]["exp_avg"] = torch.zeros(7)
    else:
        state["optimizer_g"]["state"] = {}
    with pytest.raises(ValueError):
        Trainer(clips, batch_size=2).load_state(state)


# ---------------------------------------------------------------- the loop


class Quick:
    """A trainer whose epochs compute nothing; each of its metrics is the number of the epoch."""

    epoch = 0

    def train_epoch(self):
        self.epoch += 1
        sides = [f"loss_{side}_{kind}" for side in "dg" for kind in ("image", "video")]
        return dict.fromkeys(sides, torch.tensor(float(self.epoch)))

    def sample(self):
        return torch.zeros(16, 16, 32, 32, 3, dtype=torch.uint8)

    def state(self):
        return {"epoch": self.epoch}

    generator_state = state


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs `train` on a Quick trainer, with a fake clock; its attributes tell what happened."""
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)

    def run(epochs, sample_every, checkpoint_every, minutes=60, seconds_an_epoch=0.001, stop=()):
        clock = mock.Mock(perf_counter=lambda: loop.trainer.epoch * seconds_an_epoch)
        monkeypatch.setattr(trainer_module, "time", clock)
        monkeypatch.setattr(logger_module, "time", clock)
        args = SimpleNamespace(
            epochs=epochs,
            sample_every=sample_every,
            checkpoint_every=checkpoint_every,
            checkpoint_minutes=minutes,
            videos=tmp_path,
        )
        with Logger(tmp_path) as log, mock.patch.object(log, "flush", wraps=log.flush) as flush:
            loop.flush = flush
            train(loop.trainer, args, log, loop.page, loop.checkpoints, {"info": 1}, stop)

    def save(content, numbered):
        assert len(content["history"]["rows"]) == content["epoch"] and content["info"] == 1
        loop.saved.append(content["epoch"])
        loop.numbered += [content["epoch"]] * numbered
        real_save(content, numbered)

    loop = SimpleNamespace(run=run, trainer=Quick(), page=mock.Mock(), saved=[], numbered=[])
    loop.checkpoints = Checkpoints(tmp_path)
    real_save = loop.checkpoints.save
    monkeypatch.setattr(loop.checkpoints, "save", save)
    loop.rows = lambda: np.genfromtxt(tmp_path / "losses.csv", delimiter=",", names=True)
    loop.gifs = lambda: sorted(int(path.stem[6:]) for path in tmp_path.glob("epoch-*.gif"))
    return loop


def test_train_logs_every_epoch_once_and_seldom(loop):
    loop.run(3000, sample_every=900, checkpoint_every=1200)
    rows = loop.rows()
    assert rows["epoch"].tolist() == rows["loss_g_video"].tolist() == [*range(1, 3001)]
    assert rows["seconds"].sum() == pytest.approx(3)  # each second counts once
    assert loop.flush.call_count <= 12  # twice a second, and where there is something to show
    assert loop.saved == [1200, 2400, 3000] and loop.numbered == [1200, 2400]
    assert loop.gifs() == [0, 900, 1800, 2700, 3000]


@pytest.mark.parametrize("minutes, expected", [(0.5, [30, 40, 70, 80, 99]), (0, [*range(1, 100)])])
def test_train_saves_by_time_too(loop, minutes, expected):
    loop.run(99, sample_every=99, checkpoint_every=40, minutes=minutes, seconds_an_epoch=1)
    assert loop.saved == expected and loop.numbered == [40, 80]


def test_train_writes_the_page_now_and_then(loop):
    """After 5 seconds, then every minute; sooner where there is a new sample."""
    written = []
    loop.page.write = lambda epoch, _: written.append(epoch)
    loop.run(200, sample_every=90, checkpoint_every=999, seconds_an_epoch=1)
    assert written == [5, 65, 90, 150, 180, 200]


@pytest.mark.parametrize("moment", ["train_epoch", "sample", "save"])
def test_train_stops_after_the_epoch_in_hand_and_saves(loop, moment, monkeypatch):
    stop = []
    owner = loop.checkpoints if moment == "save" else loop.trainer
    function = getattr(owner, moment)

    def stopping(*args):
        result = function(*args)
        if loop.trainer.epoch == 4:
            stop.append(2)
        return result

    monkeypatch.setattr(owner, moment, stopping)
    loop.run(100, sample_every=4, checkpoint_every=4, stop=stop)
    assert loop.trainer.epoch <= 5 and loop.saved[-1] == loop.trainer.epoch


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_train_neither_saves_nor_hides_what_is_not_finite(loop, value, monkeypatch):
    class Bad(Quick):
        def train_epoch(self):
            metrics = super().train_epoch()
            return {**metrics, "loss_d_video": torch.tensor(value if self.epoch == 1234 else 1.0)}

    loop.trainer = Bad()
    with pytest.raises(
        TrainingError, match=f"epoch 1234: loss_d_video is {value}, not finite; try"
    ):
        loop.run(5000, sample_every=5000, checkpoint_every=100)
    assert loop.saved[-1] == 1200
    assert not np.isfinite(loop.rows()["loss_d_video"][1233])


def test_train_saves_before_an_error_of_a_gif_ends_it(loop, monkeypatch):
    save_gif = trainer_module.save_gif

    def failing(path, frames):
        if loop.trainer.epoch == 7:
            raise OSError(28, "No space left on device")
        save_gif(path, frames)

    monkeypatch.setattr(trainer_module, "save_gif", failing)
    with pytest.raises(OSError, match="No space left"):
        loop.run(100, sample_every=7, checkpoint_every=100)
    assert loop.saved == [7] and loop.gifs() == [0]
