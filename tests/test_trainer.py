import copy
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import small
import torch
from conftest import DEVICES
from naive import NaiveTrainer
from small import new_trainer
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import trainer as trainer_module
from augment import augment
from data import Batch
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
    trainer = new_trainer(clips)
    trainer.train_epoch()
    return trainer


def weights_of(trainer):
    return copy.deepcopy({name: net.state_dict() for name, net in trainer.networks.items()})


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_near(new, old, tolerance):
    """Compare tensors, or the parameters of networks, relative to the norm of all of them."""
    new, old = (torch.cat([x.detach().double().flatten() for x in group]) for group in (new, old))
    assert (new - old).norm() <= tolerance * old.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("device", DEVICES)
def test_update_equals_the_naive_one(clips, narrow, device, dtype, tolerance, monkeypatch):
    """Epoch by epoch from the same state; in float64 nothing but rounding may differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = dtype == torch.float64
    if exact:
        monkeypatch.setattr(trainer_module, "to_float", lambda x: x.double() / 127.5 - 1)
    trainer = new_trainer(clips, batch_size=3, device=device)
    for network in trainer.networks.values():
        network.to(dtype)
    for epoch in range(4):
        real, noise, frame_idx, _ = trainer.sample_batch()
        noise = tuple(x.to(dtype) for x in noise)
        if epoch < 2 and not exact:
            # Adam's first steps are of full length even where a gradient is mere rounding: in
            # float32 two ways to compute the same thing part there.
            trainer.update(real, noise, frame_idx)
            continue
        naive = NaiveTrainer(trainer)
        for name, network in trainer.networks.items():
            optimizer = trainer.optimizer_d if name in ("D_I", "D_V") else trainer.optimizer_g
            for weight, other in zip(network.parameters(), naive.networks[name].parameters()):
                naive.adams[name].state[other] = copy.deepcopy(optimizer.state[weight])
        expected = naive.update(real, noise, frame_idx)
        metrics = trainer.update(real, noise, frame_idx)
        for name, loss in expected.items():
            assert metrics[name].item() == pytest.approx(loss, rel=tolerance)
        for name, network in trainer.networks.items():
            assert_near(network.parameters(), naive.networks[name].parameters(), tolerance)
            for new, old in zip(network.buffers(), naive.networks[name].buffers(), strict=True):
                assert_near([new], [old], tolerance)


def test_update_returns_losses_and_mean_probabilities_before_the_step(trained):
    real, noise, frame_idx, _ = trained.sample_batch()
    before = copy.deepcopy(trained)
    metrics = trained.update(real, noise, frame_idx)
    fake = before.generate(noise, frame_idx)
    for kind, D, x, x_fake in (  # the label of what is real is 0.9
        ("image", before.image_discriminator, real.frames, fake.frames),
        ("video", before.video_discriminator, real.windows, fake.windows),
    ):
        p_real, p_fake = D(x / 127.5 - 1).detach(), D(x_fake).detach()
        loss = -(0.9 * p_real.log() + 0.1 * (1 - p_real).log() + (1 - p_fake).log()).mean()
        torch.testing.assert_close(metrics[f"loss_d_{kind}"], loss)
        torch.testing.assert_close(metrics[f"d_{kind}_real"], p_real.mean())
        torch.testing.assert_close(metrics[f"d_{kind}_fake"], p_fake.mean())


def test_each_step_computes_the_gradients_of_its_own_networks_only(trained):
    computed = []

    def note_gradients(*_):
        for network in (trained.discriminators, trained.generator):
            computed.append({weight.grad is not None for weight in network.parameters()})

    trained.optimizer_d.register_step_pre_hook(note_gradients)
    trained.optimizer_g.register_step_pre_hook(note_gradients)
    trained.train_epoch()
    assert computed == [{True}, {False}, {False}, {True}]


@pytest.mark.parametrize("optimizer", ["optimizer_d", "optimizer_g"])
def test_interrupted_update_leaves_nothing_behind(trained, optimizer):
    """As when the stop button of a notebook is pressed, and training then continues."""
    batch = trained.sample_batch()
    stop = mock.patch.object(getattr(trained, optimizer), "step", side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):
        trained.update(*batch)
    clean = copy.deepcopy(trained)
    for network in clean.networks.values():
        network.requires_grad_(True).zero_grad()
    assert_equal(trained.update(*batch), clean.update(*batch))
    assert_equal(weights_of(trained), weights_of(clean))


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("local_scalar_dense", "nonzero"))
        return function(*args, **kwargs or {})


def test_update_never_waits_for_the_device(trained):
    batch = trained.sample_batch()
    with Waits() as waits:
        trained.update(*batch)
    assert waits.count == 0


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(clips, narrow, device):
    metrics = {}
    for precision in ("fp32", "bf16"):
        trainer = new_trainer(clips, device=device, precision=precision)
        metrics[precision] = trainer.train_epoch()
        assert all(value.dtype == torch.float32 for value in metrics[precision].values())
        assert all(weight.dtype == torch.float32 for weight in trainer.generator.parameters())
    torch.testing.assert_close(metrics["bf16"], metrics["fp32"], rtol=0.05, atol=0.02)  # 8 bits
    assert metrics["bf16"] != metrics["fp32"]


def test_generated_windows_and_frames_lie_as_in_real_clips(clips, narrow):
    """And the path of R_M runs exactly as far as the last of them."""
    start, frame = [0, 5, 20], [9, 3, 40]
    clips.sample = lambda *_: Batch(*torch.zeros(3))
    clips.sample_indices = lambda *_: (None, torch.tensor(start), torch.tensor(frame))
    _, (_, e, _), frame_idx, _ = new_trainer(clips, batch_size=3).sample_batch()
    assert frame_idx.tolist() == [[*range(s, s + 16), f] for s, f in zip(start, frame)]
    assert e.shape[:2] == (3, 41)


def test_seed_decides_everything(clips, narrow):
    def train_two(seed, global_seed):
        torch.manual_seed(global_seed)
        trainer = new_trainer(clips, seed=seed)
        return [trainer.train_epoch(), trainer.train_epoch(), weights_of(trainer)]

    first = train_two(seed=7, global_seed=0)
    assert_equal(train_two(seed=7, global_seed=1), first)
    assert first[0] != train_two(seed=8, global_seed=0)[0]


def test_sample_is_in_evaluation_mode_and_leaves_no_trace(trained):
    before = weights_of(trained), trained.rng.get_state()
    videos, real = trained.sample(), trained.sample_real()
    assert_equal([trained.sample(), trained.sample_real()], [videos, real])
    assert_equal((weights_of(trained), trained.rng.get_state()), before)
    assert all(network.training for network in trained.networks.values())
    trained.generator.eval()  # then a batch equals one video after the other
    with torch.no_grad():
        levels = (trained.generator(*trained.fixed_noise) + 1) * 127.5
    assert videos.shape == real.shape == (16, 16, 32, 32, 3)
    assert (videos - levels.permute(0, 2, 3, 4, 1)).abs().max() < 0.51


def test_training_resumes_exactly_from_a_file(clips, trained, tmp_path):
    state = copy.deepcopy(trained.state())
    for moments in state["optimizer_d"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()  # as it is on Apple's GPU
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    resumed, slower = new_trainer(clips, seed=99), new_trainer(clips, lr=1e-4)
    resumed.load_state(checkpoint.load(tmp_path / "checkpoint.pt"))
    slower.load_state(state)
    assert_equal(resumed.state()["average"], trained.state()["average"])
    assert resumed.epoch == 1 and resumed.seed == 0
    for weight, moments in resumed.optimizer_d.state.items():
        assert moments["exp_avg"].stride() == weight.stride()
    average = Trainer.generator_state
    for what in 2 * (Trainer.train_epoch, weights_of, average, Trainer.sample, Trainer.sample_real):
        assert_equal(what(trained), what(resumed))
    assert slower.optimizer_d.param_groups[0]["lr"] == 1e-4


def test_state_that_is_not_finite_is_refused(trained):
    D_V = trained.video_discriminator
    for values, bad in (
        (trained.generator.motion_rnn.gru.bias_hh_l0.data, float("nan")),
        (trained.optimizer_d.state[D_V.linear.bias]["exp_avg_sq"], float("inf")),
        (D_V.main[3].running_mean, float("inf")),
        (trained.average.module.image_generator.main[1].weight.data, float("nan")),
    ):
        good, values[-1] = values[-1].item(), bad
        with pytest.raises(TrainingError, match="epoch 1: weights or moments are not finite"):
            trained.state()
        values[-1] = good


def test_state_that_does_not_fit_is_refused(clips, trained):
    state, untrained = trained.state(), new_trainer(clips)
    for change in (
        {"rng": None},
        {"networks": {**state["networks"], "D_I": state["networks"]["D_V"]}},
        {"optimizer_d": state["optimizer_g"]},
        {"optimizer_g": untrained.optimizer_g.state_dict()},
        {"fixed_noise": trained.generator.sample_noise(16, 18, trained.rng)},  # another T
    ):
        with pytest.raises((LookupError, RuntimeError, TypeError, ValueError)):
            new_trainer(clips).load_state({**state, **change})


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
        train(loop.trainer, args, loop.log, {}, loop.checkpoints, {"info": 1}, loop.stop)

    def write_page(args, epoch, *_):
        loop.pages.append(epoch)

    def save(content, numbered):
        assert len(content["history"]["epoch"]) == content["epoch"] and content["info"] == 1
        loop.saved[content["epoch"]] = numbered

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    loop = SimpleNamespace(run=run, trainer=Quick(), stop=[], saved={}, pages=[], seconds=0.001)
    monkeypatch.setattr(trainer_module, "write_page", write_page)
    monkeypatch.setattr("time.perf_counter", lambda: loop.trainer.epoch * loop.seconds)
    loop.checkpoints = SimpleNamespace(folder=tmp_path, save=save)
    with Logger(tmp_path) as loop.log:
        yield loop


def test_train_logs_every_epoch_once_and_seldom(loop, tmp_path):
    loop.log.flush = mock.Mock(wraps=loop.log.flush)
    loop.run(epochs=3000, sample_every=900, checkpoint_every=1200)
    assert [row["epoch"] for row in loop.log.rows] == [*range(1, 3001)]
    assert all(row["loss_g_video"] == row["epoch"] for row in loop.log.rows)
    assert sum(row["seconds"] for row in loop.log.rows) == pytest.approx(3)  # each counts once
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


@pytest.mark.parametrize("moment", ["train_epoch", "sample", "state"])
def test_train_stops_after_the_epoch_in_hand_and_saves(loop, moment):
    function = getattr(loop.trainer, moment)

    def stopping():
        loop.stop += [2] * (loop.trainer.epoch == 4)
        return function()

    setattr(loop.trainer, moment, stopping)
    loop.run(epochs=100, sample_every=4, checkpoint_every=4)
    assert loop.trainer.epoch == max(loop.saved) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_train_logs_what_is_not_finite_and_does_not_save_it(loop, value):
    loop.trainer.bad = {1234: value}
    with pytest.raises(TrainingError, match=f"epoch 1234: loss_d_image is {value}, not finite"):
        loop.run(epochs=5000, checkpoint_every=100)
    logged = loop.log.rows[1233]["loss_d_image"]
    assert max(loop.saved) == 1200 and logged == pytest.approx(value, nan_ok=True)


def test_train_saves_before_an_error_of_a_gif_ends_it(loop, monkeypatch):
    save_gif = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    monkeypatch.setattr(trainer_module, "save_gif", save_gif)
    with pytest.raises(OSError, match="No space left"):
        loop.run(epochs=100, sample_every=7)
    assert loop.saved == {7: False}


def test_average_equals_a_loop_by_hand_and_leaves_the_training_as_it_is(clips, narrow):
    trainer, plain = new_trainer(clips, ema=0.3), new_trainer(clips, ema=0)
    average = None
    for n in range(5):
        assert_equal(trainer.train_epoch(), plain.train_epoch())
        decay = min(0.3, (1 + n) / (10 + n))
        now = {name: x.double() for name, x in trainer.generator.state_dict().items()}
        average = average or now
        average = {name: decay * average[name] + (1 - decay) * x for name, x in now.items()}
    assert_equal(weights_of(trainer), weights_of(plain))
    assert decay == 0.3  # both forms were used
    for name, x in trainer.average.module.state_dict().items():
        if "num_batches" not in name:  # which only counts
            torch.testing.assert_close(x.double(), average[name], rtol=1e-5, atol=1e-7)
    averaged = trainer.sample()
    trainer.average = None
    assert_equal(trainer.sample(), plain.sample())  # without an average, the weights as trained
    assert not torch.equal(trainer.sample(), averaged)


def test_average_begins_where_a_checkpoint_has_none(clips, trained):
    old = {**trained.state(), "average": {}, "n_averaged": 0}
    resumed = new_trainer(clips)
    resumed.load_state(old)
    assert_equal(resumed.average.module.state_dict(), trained.generator.state_dict())
    resumed.train_epoch()
    assert_equal(resumed.average.module.state_dict(), resumed.generator.state_dict())
    without = new_trainer(clips, ema=0)
    without.load_state(trained.state())
    assert without.state()["average"] == {}


def test_both_discriminators_get_augmented_videos(clips, narrow):
    trainer = new_trainer(clips, noise_sigma=0.1, augment=True)
    trainer.train_epoch()
    real, noise, frame_idx, augmentations = trainer.sample_batch()
    before = copy.deepcopy(trainer)
    images, windows = [], []
    for inputs, network in (
        (images, trainer.image_discriminator),
        (windows, trainer.video_discriminator),
    ):
        network.main[0].register_forward_pre_hook(
            lambda _, x, inputs=inputs: inputs.append(x[0].detach().clone())
        )
    trainer.update(real, noise, frame_idx, augmentations)
    v = Batch(real.windows / 127.5 - 1, real.frames / 127.5 - 1, None)
    fake = before.generate(noise, frame_idx)
    seen = [augment(x, a, 0.1) for x, a in zip((v, fake, fake), augmentations)]
    assert len(images) == len(windows) == len(set(map(str, augmentations))) == 3
    torch.testing.assert_close(images, [batch.frames.detach() for batch in seen])
    torch.testing.assert_close(windows, [batch.windows.detach() for batch in seen])


def test_options_change_the_training_and_resume_exactly(clips, narrow):
    options = {"batch_size": 2, "noise_sigma": 0.1, "augment": True}
    trainer, plain = new_trainer(clips, **options), new_trainer(clips)
    assert trainer.train_epoch() != plain.train_epoch()
    resumed = new_trainer(clips, **options)
    resumed.load_state(copy.deepcopy(trainer.state()))
    assert_equal(
        [trainer.train_epoch(), trainer.train_epoch()],
        [resumed.train_epoch(), resumed.train_epoch()],
    )
    assert_equal(weights_of(trainer), weights_of(resumed))


def test_weights_that_are_not_finite_are_never_the_best(trained, tmp_path):
    evaluator = SimpleNamespace(num=2, criterion="distance")
    evaluator.measure = lambda videos: ({"distance": float(len(list(videos)))}, None)
    log = SimpleNamespace(evaluations=[])
    log.add_evaluation = log.evaluations.append
    trained.generator.motion_rnn.gru.bias_hh_l0.data[0] = float("nan")
    with pytest.raises(TrainingError, match="weights or moments are not finite"):
        trainer_module.evaluate(trained, evaluator, log, tmp_path)
    assert not any(tmp_path.iterdir()) and not log.evaluations
    trained.generator.motion_rnn.gru.bias_hh_l0.data[0] = 0
    trainer_module.evaluate(trained, evaluator, log, tmp_path)
    trained.epoch += 1
    trainer_module.evaluate(trained, evaluator, log, tmp_path)  # as good as the first
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 1
    assert [row["epoch"] for row in log.evaluations] == [1, 2]
