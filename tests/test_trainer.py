import copy
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import DEVICES
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import logger as logger_module
import trainer as trainer_module
from benchmark import NaiveTrainer
from data import Batch, ClipDataset
from logger import Logger
from trainer import Trainer, train
from utils import TrainingError


@pytest.fixture
def narrow(monkeypatch):
    """Networks with a sixteenth of the channels, and one thread: the same algorithm, faster."""
    small.make_small(monkeypatch.setattr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained(clips, narrow):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    return trainer


def weights_of(trainer):
    """A copy of all weights and running statistics."""
    return copy.deepcopy({name: net.state_dict() for name, net in trainer.networks.items()})


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_near(new, old, tolerance):
    """Compare tensors, or the parameters of networks, relative to the norm of all of them."""
    new, old = (torch.cat([x.detach().double().flatten() for x in group]) for group in (new, old))
    assert (new - old).norm() <= tolerance * old.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("device", DEVICES)
def test_update_equals_the_naive_one(clips, narrow, device, dtype, tolerance, monkeypatch, request):
    """Epoch by epoch from the same state; in float64 nothing but rounding may differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = dtype == torch.float64
    if exact:
        monkeypatch.setattr(trainer_module, "to_float", lambda x: x.double() / 127.5 - 1)
    trainer = Trainer(clips, batch_size=3, device=device)
    for network in trainer.networks.values():
        network.to(dtype)
    steps = []  # the gradients with which each optimizer takes its step
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: steps.append([w.grad.clone() for w in adam.param_groups[0]["params"]])
    )
    request.addfinalizer(hook.remove)
    for epoch in range(4):
        real, noise, frame_idx = trainer.sample_batch()
        noise = tuple(x.to(dtype) for x in noise)
        if epoch < 2 and not exact:
            # Adam's first steps are of full length even where a gradient is mere rounding: in
            # float32 two ways to compute the same thing part there.
            trainer.update(real, noise, frame_idx)
            continue
        trainer.discriminators.requires_grad_(True)
        naive = NaiveTrainer(trainer)
        for name, network in trainer.networks.items():
            optimizer = trainer.optimizer_d if name in ("D_I", "D_V") else trainer.optimizer_g
            for weight, other in zip(network.parameters(), naive.networks[name].parameters()):
                naive.adams[name].state[other] = copy.deepcopy(optimizer.state[weight])
        steps.clear()
        expected = naive.update(real, noise, frame_idx)
        metrics = trainer.update(real, noise, frame_idx)
        for name, loss in expected.items():
            assert metrics[name].item() == pytest.approx(loss, rel=tolerance)
        D_I, D_V, G_I, R_M, *both = steps
        for gradients, expected in zip(both, (D_I + D_V, R_M + G_I), strict=True):
            for new, old in zip(gradients, expected, strict=True):
                assert_near([new], [old], 1e-9 if exact else 1e-2)
        for name, network in trainer.networks.items():
            assert_near(network.parameters(), naive.networks[name].parameters(), tolerance)
            for new, old in zip(network.buffers(), naive.networks[name].buffers(), strict=True):
                assert_near([new], [old], tolerance)


def test_update_returns_losses_and_mean_probabilities_before_the_step(trained):
    real, noise, frame_idx = trained.sample_batch()
    before = copy.deepcopy(trained.networks)
    with torch.no_grad():
        fake = trained.generate(noise, frame_idx)
        pairs = {
            "image": (before["D_I"](real.frames / 127.5 - 1), before["D_I"](fake.frames)),
            "video": (before["D_V"](real.windows / 127.5 - 1), before["D_V"](fake.windows)),
        }
    metrics = trained.update(real, noise, frame_idx)
    for kind, (p_real, p_fake) in pairs.items():  # the label of what is real is 0.9
        loss = -(0.9 * p_real.log() + 0.1 * (1 - p_real).log() + (1 - p_fake).log()).mean()
        torch.testing.assert_close(metrics[f"loss_d_{kind}"], loss)
        torch.testing.assert_close(metrics[f"d_{kind}_real"], p_real.mean())
        torch.testing.assert_close(metrics[f"d_{kind}_fake"], p_fake.mean())
    for optimizer in (trained.optimizer_d, trained.optimizer_g):
        assert optimizer.defaults["lr"] == 2e-4 and optimizer.defaults["betas"] == (0.5, 0.999)


def test_each_step_computes_the_gradients_of_its_own_networks_only(clips, narrow):
    trainer, computed = Trainer(clips, batch_size=2), []

    def note_gradients(*_):
        for network in (trainer.discriminators, trainer.generator):
            computed.append({weight.grad is not None for weight in network.parameters()})

    trainer.optimizer_d.register_step_pre_hook(note_gradients)
    trainer.optimizer_g.register_step_pre_hook(note_gradients)
    for _ in range(2):
        trainer.train_epoch()
    assert computed == [{True}, {False}, {False}, {True}] * 2


@pytest.mark.parametrize("optimizer", ["optimizer_d", "optimizer_g"])
def test_interrupted_update_leaves_nothing_behind(trained, optimizer):
    """As when the stop button of a notebook is pressed, and training then continues."""
    batch, stop = trained.sample_batch(), mock.Mock(side_effect=KeyboardInterrupt)
    with (
        mock.patch.object(getattr(trained, optimizer), "step", stop),
        pytest.raises(stop.side_effect),
    ):
        trained.update(*batch)
    clean = copy.deepcopy(trained)
    for network in clean.networks.values():
        network.requires_grad_(True).zero_grad()
    assert_equal(trained.update(*batch), clean.update(*batch))
    assert_equal(weights_of(trained), weights_of(clean))


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_update_never_waits_for_the_device(clips, narrow, precision):
    trainer = Trainer(clips, batch_size=2, precision=precision)
    with Waits() as in_sampling:
        batch = trainer.sample_batch()
    with Waits() as in_update:
        trainer.update(*batch)
    assert in_sampling.count > 0 and in_update.count == 0  # sampling is on the host


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(clips, narrow, device):
    metrics = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(clips, batch_size=2, device=device, precision=precision)
        metrics[precision] = trainer.train_epoch()
        assert all(value.dtype == torch.float32 for value in metrics[precision].values())
        assert all(weight.dtype == torch.float32 for weight in trainer.generator.parameters())
    torch.testing.assert_close(metrics["bf16"], metrics["fp32"], rtol=0.05, atol=0.02)  # 8 bits
    assert metrics["bf16"] != metrics["fp32"]


def test_generated_videos_have_real_lengths(tmp_path, narrow, monkeypatch):
    """S_T and S_1 are uniform over videos of 17 and of 60 frames, half of them each."""
    for name, n in (("a", 17), ("b", 60)):
        np.save(tmp_path / f"{name}.npy", np.zeros((n, 32, 32, 3), np.uint8))
    trainer = Trainer(ClipDataset(tmp_path), batch_size=10_000)
    monkeypatch.setattr(trainer.clips, "sample", lambda *_: Batch(*torch.zeros(3)))
    _, _, frame_idx = trainer.sample_batch()
    windows, frame = frame_idx[:, :-1], frame_idx[:, -1]
    assert windows.shape == (10_000, 16) and (windows.diff() == 1).all()
    start = windows[:, 0]
    uniform = {n: torch.nn.functional.pad(torch.ones(n) / n, (0, 60 - n)) for n in (2, 17, 45, 60)}
    for values, expected in (
        (start, (uniform[2] + uniform[45]) / 2),
        (frame, (uniform[17] + uniform[60]) / 2),
        (frame[start > 1], uniform[60]),  # S_T and S_1 of the same video
    ):
        expected = expected * len(values)
        assert ((values.bincount(minlength=60) - expected).abs() <= 5 * expected**0.5).all()
    trainer.batch_size = 1
    for _ in range(20):
        _, noise, frame_idx = trainer.sample_batch()
        assert noise[1].shape[1] == frame_idx.max() + 1  # R_M runs exactly as far as needed


def test_seed_decides_everything(clips, narrow):
    def train_two(seed, global_seed):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        trainer = Trainer(clips, batch_size=2, seed=seed)
        assert torch.initial_seed() == global_seed
        return [trainer.train_epoch(), trainer.train_epoch(), weights_of(trainer)]

    first = train_two(seed=7, global_seed=0)
    assert_equal(train_two(seed=7, global_seed=1), first)
    assert first[0] != train_two(seed=8, global_seed=0)[0]


def test_sample_is_in_evaluation_mode_and_leaves_no_trace(trained):
    before, rng = weights_of(trained), trained.rng.get_state()
    videos, real = trained.sample(), trained.sample_real()
    assert_equal([trained.sample(), trained.sample_real()], [videos, real])
    assert_equal(weights_of(trained), before)
    assert torch.equal(trained.rng.get_state(), rng)
    assert all(network.training for network in trained.networks.values())
    trained.generator.eval()  # then a video alone equals the same one in the batch
    with torch.no_grad():
        alone = trained.generator(*(noise[3:4] for noise in trained.fixed_noise))[0]
        in_training = trained.generator.train()(*trained.fixed_noise)[3]
    assert videos.shape == real.shape == (16, 16, 32, 32, 3)
    levels = [(video.permute(1, 2, 3, 0) + 1) * 127.5 for video in (alone, in_training)]
    assert (videos[3] - levels[0]).abs().max() < 0.51
    assert (videos[3] - levels[1]).abs().max() > 2


def test_training_resumes_exactly_from_a_file(clips, trained, tmp_path):
    state = copy.deepcopy(trained.state())
    for moments in state["optimizer_d"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()  # as it is on Apple's GPU
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    resumed, slower = Trainer(clips, batch_size=2, seed=99), Trainer(clips, lr=1e-4)
    for trainer in (resumed, slower):
        trainer.load_state(checkpoint.load(tmp_path / "checkpoint.pt"))
        assert trainer.epoch == 1 and trainer.seed == 0
        for weight, moments in trainer.optimizer_d.state.items():
            assert moments["exp_avg"].stride() == weight.stride()
    for _ in range(2):
        assert_equal(trained.train_epoch(), resumed.train_epoch())
    for what in (weights_of, Trainer.sample, Trainer.sample_real):
        assert_equal(what(trained), what(resumed))
    for optimizer in (slower.optimizer_d, slower.optimizer_g):
        assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("where", ["weight", "moment", "running mean"])
def test_state_that_is_not_finite_is_refused(trained, where):
    values = {
        "weight": trained.generator.motion_rnn.gru.bias_hh_l0.data,
        "moment": trained.optimizer_d.state[trained.video_discriminator.linear.bias]["exp_avg_sq"],
        "running mean": trained.video_discriminator.main[3].running_mean,
    }[where]
    values[-1] = float("nan" if where == "weight" else "inf")
    with pytest.raises(TrainingError, match="epoch 1: weights or moments are not finite"):
        trained.state()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("rng"),
        lambda state: state["networks"]["D_I"].update({"main.0.weight": torch.zeros(8, 3, 4, 4)}),
        lambda state: state["optimizer_d"]["state"][0].update(exp_avg=torch.zeros(7)),
        lambda state: state["optimizer_g"]["state"].clear(),
    ],
)
def test_state_that_does_not_fit_is_refused(clips, trained, damage):
    state = copy.deepcopy(trained.state())
    damage(state)
    with pytest.raises(ValueError):
        Trainer(clips, batch_size=2).load_state(state)


class Quick:
    """A trainer that computes nothing: its losses are the number of the epoch, or `bad`."""

    epoch, bad = 0, {}

    def train_epoch(self):
        self.epoch += 1
        names = ("loss_d_image", "loss_d_video", "loss_g_image", "loss_g_video")
        return dict.fromkeys(names, torch.tensor(float(self.bad.get(self.epoch, self.epoch))))

    def sample(self):
        return torch.zeros(16, 16, 32, 32, 3, dtype=torch.uint8)

    def state(self):
        return {"epoch": self.epoch}

    generator_state = state


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """`loop.run` trains a Quick trainer by a fake clock; the rest of `loop` tells what happened."""

    def run(**options):
        args = {"sample_every": 9999, "checkpoint_every": 9999, "checkpoint_minutes": 60, **options}
        args = SimpleNamespace(videos=tmp_path, **args)
        page = SimpleNamespace(write=lambda epoch, _: loop.pages.append(epoch))
        train(loop.trainer, args, loop.log, page, loop.checkpoints, {"info": 1}, loop.stop)

    def save(content, numbered):
        assert len(content["history"]["rows"]) == content["epoch"] and content["info"] == 1
        loop.saved[content["epoch"]] = numbered

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    loop = SimpleNamespace(run=run, trainer=Quick(), stop=[], saved={}, pages=[], seconds=0.001)
    clock = SimpleNamespace(perf_counter=lambda: loop.trainer.epoch * loop.seconds)
    monkeypatch.setattr(trainer_module, "time", clock)
    monkeypatch.setattr(logger_module, "time", clock)
    loop.checkpoints = SimpleNamespace(folder=tmp_path, save=save)
    with Logger(tmp_path) as loop.log:
        yield loop


def test_train_logs_every_epoch_once_and_seldom(loop, tmp_path):
    loop.log.flush = mock.Mock(wraps=loop.log.flush)
    loop.run(epochs=3000, sample_every=900, checkpoint_every=1200)
    assert [row[0] for row in loop.log.rows] == [*range(1, 3001)]
    assert sum(row[-1] for row in loop.log.rows) == pytest.approx(3)  # each second counts once
    assert loop.log.flush.call_count <= 13  # twice a second, and where there is something to show
    assert loop.saved == {1200: True, 2400: True, 3000: False}
    gifs = sorted(path.name for path in tmp_path.glob("*.gif"))
    assert gifs == [f"epoch-{epoch:06d}.gif" for epoch in (0, 900, 1800, 2700, 3000)]


def test_train_saves_and_writes_the_page_by_time_too(loop, tmp_path):
    loop.seconds = 1
    loop.run(epochs=99, sample_every=40, checkpoint_every=50, checkpoint_minutes=0.5)
    assert loop.saved == {30: False, 50: True, 80: False, 99: False}
    assert loop.pages == [5, 40, 80, 99]  # after 5 seconds, and with new samples
    assert checkpoint.load(tmp_path / "generator.pt")["epoch"] == 99


@pytest.mark.parametrize("moment", ["train_epoch", "sample", "save"])
def test_train_stops_after_the_epoch_in_hand_and_saves(loop, moment, monkeypatch):
    owner = loop.checkpoints if moment == "save" else loop.trainer
    function = getattr(owner, moment)

    def stopping(*args):
        loop.stop += [2] * (loop.trainer.epoch == 4)
        return function(*args)

    monkeypatch.setattr(owner, moment, stopping)
    loop.run(epochs=100, sample_every=4, checkpoint_every=4)
    assert loop.trainer.epoch == max(loop.saved) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_train_logs_what_is_not_finite_and_does_not_save_it(loop, value):
    loop.trainer.bad = {1234: value}
    with pytest.raises(TrainingError, match=f"epoch 1234: loss_d_image is {value}, not finite"):
        loop.run(epochs=5000, checkpoint_every=100)
    assert max(loop.saved) == 1200 and not np.isfinite(loop.log.rows[1233][0])


def test_train_saves_before_an_error_of_a_gif_ends_it(loop, monkeypatch):
    errors = [None, OSError(28, "No space left on device")]
    monkeypatch.setattr(trainer_module, "save_gif", mock.Mock(side_effect=errors))
    with pytest.raises(OSError, match="No space left"):
        loop.run(epochs=100, sample_every=7)
    assert loop.saved == {7: False}
