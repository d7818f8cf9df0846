import contextlib
import copy
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import models
import trainer as trainer_module
from benchmark import ByTheBook
from data import ClipDataset
from trainer import Trainer, fixed, train
from utils import TrainingError, UserError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


def share_moments(trainer, adams):
    """Give each of the book's four optimisers what the trainer's two hold for its weights."""
    for optimizer, names in (
        (trainer.optimizer_d, ("D_I", "D_V")),
        (trainer.optimizer_g, ("R_M", "G_I")),
    ):
        moments = iter(copy.deepcopy(optimizer.state_dict()["state"]).values())
        for name in names:
            state = adams[name].state_dict()
            n = len(state["param_groups"][0]["params"])
            state["state"] = {i: next(moments) for i in range(n)}
            adams[name].load_state_dict(state)


@contextlib.contextmanager
def gradients_at_each_step(optimizers):
    """The gradients of each optimiser's weights, by name, when it takes its step."""
    taken = {}

    def hook(name):
        return lambda adam, *_: taken.update(
            {name: [w.grad.clone() for w in adam.param_groups[0]["params"]]}
        )

    handles = [o.register_step_pre_hook(hook(name)) for name, o in optimizers.items()]
    yield taken
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_update_is_the_one_in_the_book(clips, device, dtype, monkeypatch):
    """Epoch by epoch from the same state; float64 shows that nothing but rounding differs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = dtype == torch.float64
    look = trainer_module.look
    monkeypatch.setattr(trainer_module, "look", lambda *a: tuple(x.to(dtype) for x in look(*a)))
    B, T = 3, clips.frames
    trainer = Trainer(clips, batch_size=B, device=device, graph=False)
    for net in trainer.networks.values():
        net.to(dtype)
    for epoch in range(4):
        pixels, noise, looked_at = trainer.draw()
        noise = tuple(n.to(dtype) for n in noise)
        if epoch < 2 and not exact:
            # Adam's first steps are of full length even for a gradient that is nothing but
            # rounding: in float32 two ways to compute the same thing part there.
            trainer.update(pixels, noise, looked_at)
            continue
        book = ByTheBook(trainer, device)
        if epoch:
            share_moments(trainer, book.adams)
        real = (pixels.float() / 127.5 - 1).to(dtype)
        window = real[: B * T].reshape(B, T, 32, 32, 3).permute(0, 4, 1, 2, 3).contiguous()
        frame = real[B * T :].permute(0, 3, 1, 2).contiguous()
        with gradients_at_each_step(book.adams) as expected:
            expected_losses = torch.tensor(book.update(window, frame, noise, looked_at))
        both = {"D": trainer.optimizer_d, "G": trainer.optimizer_g}
        with gradients_at_each_step(both) as taken:
            losses = trainer.update(pixels, noise, looked_at).cpu()[:4]
        rtol = 1e-6 if exact else 1e-4  # a Python list of losses is made float32
        torch.testing.assert_close(losses.float(), expected_losses, rtol=rtol, atol=0)
        expected = {"D": expected["D_I"] + expected["D_V"], "G": expected["R_M"] + expected["G_I"]}
        for side in "DG":
            for new, old in zip(taken[side], expected[side], strict=True):
                error = (new - old).norm() / old.norm()
                assert error < (1e-9 if exact else 1e-2), f"{side} {tuple(old.shape)}: {error}"
        for name, net in trainer.networks.items():
            new, old = (
                torch.cat([weight.detach().flatten() for weight in network.parameters()])
                for network in (net, book.networks[name])
            )
            error = (new - old).norm() / old.norm()
            assert error < (1e-9 if exact else 1e-4), f"{name}: {error}"
            differing = total = 0  # and one by one: a weight makes a step of about 0.0002
            for new, value in zip(net.parameters(), book.networks[name].parameters()):
                near = 1e-9 if exact else 0.01 * 0.0002 + 1e-4 * value.abs()
                differing += ((new - value).abs() > near).sum().item()
                total += value.numel()
            assert differing <= (0 if exact else 0.05 * total), f"{name}: {differing} of {total}"
            for (key, new), value in zip(net.named_buffers(), book.networks[name].buffers()):
                error = (new - value).double().norm()
                assert error <= (1e-9 if exact else 1e-3) * value.double().norm(), f"{name} {key}"


def test_answers_are_the_mean_probabilities_before_the_step(clips):
    trainer = Trainer(clips, batch_size=3)
    for _ in range(3):
        pixels, noise, looked_at = trainer.draw()
        before = copy.deepcopy(trainer.networks)
        with torch.no_grad():
            real_window, real_frame = trainer_module.look(pixels, 3)
            fake_window, fake_frame = trainer.generate(noise, looked_at)
            expected = [
                before["D_I"](real_frame).mean(),
                before["D_V"](real_window).mean(),
                before["D_I"](fake_frame).mean(),
                before["D_V"](fake_window).mean(),
            ]
        answers = trainer.update(pixels, noise, looked_at)[4:]
        torch.testing.assert_close(answers, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert len(answers.unique()) == 4 and (answers > 0).all() and (answers < 1).all()


def test_discriminators_learn_in_their_own_step_only(clips):
    """The generators' step neither moves D_I and D_V nor computes gradients for them."""
    trainer = Trainer(clips, batch_size=2)
    seen = {}

    def at_g_step(*_):
        seen["weights"] = [w.detach().clone() for w in trainer.discriminator_weights]
        seen["no d grads"] = all(w.grad is None for w in trainer.discriminator_weights)

    def at_d_step(*_):
        seen["no g grads"] = all(w.grad is None for w in trainer.generator.parameters())

    trainer.optimizer_d.register_step_pre_hook(at_d_step)
    trainer.optimizer_g.register_step_pre_hook(at_g_step)
    trainer.train_epoch()
    assert seen["no g grads"]  # the fakes were detached
    assert seen["no d grads"]
    for weight, was in zip(trainer.discriminator_weights, seen["weights"]):
        assert torch.equal(weight, was) and weight.requires_grad
    before = seen["weights"]
    trainer.train_epoch()
    for weight, was in zip(trainer.discriminator_weights, before):
        assert not torch.equal(weight, was)  # in the next epoch they learn again


@pytest.mark.parametrize("where", ["discriminators", "generators"])
def test_an_interrupted_epoch_leaves_nothing_behind(clips, where):
    """As when the stop button of a notebook is pressed, and training then goes on."""
    trainer, expected = Trainer(clips, batch_size=2), Trainer(clips, batch_size=2)
    batch = trainer.draw()
    optimizer = trainer.optimizer_d if where == "discriminators" else trainer.optimizer_g
    with (
        mock.patch.object(optimizer, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.update(*batch)
    for name, network in expected.networks.items():
        network.load_state_dict(trainer.networks[name].state_dict())
    if where == "generators":
        expected.optimizer_d.load_state_dict(copy.deepcopy(trainer.optimizer_d.state_dict()))
    torch.testing.assert_close(trainer.update(*batch), expected.update(*batch))
    assert same(state_of(trainer), state_of(expected))


def test_generated_videos_have_real_lengths(tmp_path):
    for name, n in (("a", 17), ("b", 60)):
        np.save(tmp_path / f"{name}.npy", np.zeros((n, 32, 32, 3), np.uint8))
    trainer = Trainer(ClipDataset(tmp_path), batch_size=1)
    pixels = trainer.next_pixels()
    trainer.ahead.ahead.result()  # the thread that reads ahead draws, too

    def seen(draw, clip):
        def drawn(*args):
            places = draw(*args)
            clip["last"] = int(places[0])
            return places

        return drawn

    lengths, starts, frames = {}, {17: set(), 60: set()}, {17: set(), 60: set()}
    for _ in range(2000):
        clip = {}
        with mock.patch.object(trainer.clips, "draw", side_effect=seen(trainer.clips.draw, clip)):
            _, noise, looked_at = trainer.draw(pixels)
        K = [17, 60][clip["last"]]
        lengths[K] = lengths.get(K, 0) + 1
        window, frame = looked_at[0, :16], int(looked_at[0, 16])
        assert (window.diff() == 1).all()
        assert noise[1].shape[1] == looked_at.max() + 1  # R_M runs as far as is looked at
        starts[K].add(int(window[0]))
        frames[K].add(frame)
    assert set(lengths) == {17, 60} and 850 < lengths[17] < 1150
    assert starts == {17: {0, 1}, 60: set(range(45))}
    assert frames == {17: set(range(17)), 60: set(range(60))}


def test_frames_are_drawn_for_each_clip_for_itself(clips):
    trainer = Trainer(clips, batch_size=64)
    looked_at = trainer.draw()[2]
    assert len(set(looked_at[:, -1].tolist())) > 16
    assert len(set((looked_at[:, -1] - looked_at[:, 0]).tolist())) > 16


def state_of(trainer):
    nets = {
        f"{n}.{k}": v for n, net in trainer.networks.items() for k, v in net.state_dict().items()
    }
    return {k: v.clone() for k, v in nets.items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_seed_decides_everything(clips):
    def weights(seed, elsewhere):
        torch.manual_seed(elsewhere)
        np.random.seed(elsewhere)
        trainer = Trainer(clips, batch_size=2, seed=seed)
        for _ in range(2):
            trainer.train_epoch()
        return state_of(trainer)

    first = weights(seed=7, elsewhere=0)
    assert same(first, weights(seed=7, elsewhere=1))
    assert not same(first, weights(seed=8, elsewhere=0))


def test_sampling_leaves_no_trace(clips):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    before, rng = state_of(trainer), trainer.rng.get_state()
    video = trainer.sample()
    assert video.shape == (16, 3, 16, 32, 32) and torch.equal(video, trainer.sample())
    assert same(before, state_of(trainer)) and torch.equal(rng, trainer.rng.get_state())
    assert all(net.training for net in trainer.networks.values())
    # evaluation mode: each video is what it is alone, with the running statistics
    trainer.generator.eval()
    with torch.no_grad():
        alone = trainer.generator(*(n[3:4] for n in trainer.sample_noise))
    torch.testing.assert_close(video[3:4], alone)


def through_a_file(state, path):
    checkpoint.write(path / "checkpoint.pt", state)
    return checkpoint.read(path / "checkpoint.pt")


def test_goes_on_exactly_from_a_state(clips, tmp_path):
    whole = Trainer(clips, batch_size=2)
    for _ in range(4):
        whole.train_epoch()
    first = Trainer(clips, batch_size=2)
    for _ in range(2):
        first.train_epoch()
    second = Trainer(clips, batch_size=2, seed=99)
    second.load_state(through_a_file(first.state(), tmp_path))
    assert second.epoch == 2 and second.seed == 0
    for _ in range(2):
        second.train_epoch()
    assert same(state_of(whole), state_of(second))
    assert torch.equal(whole.sample(), second.sample())


def test_a_state_of_before_the_first_epoch(clips, tmp_path):
    first, second = (Trainer(clips, batch_size=2, seed=seed) for seed in (0, 1))
    second.load_state(through_a_file(first.state(), tmp_path))
    assert torch.equal(first.train_epoch(), second.train_epoch())
    assert same(state_of(first), state_of(second))


def test_the_learning_rate_is_that_of_now(clips):
    first, second = Trainer(clips, batch_size=2), Trainer(clips, batch_size=4, lr=1e-4)
    first.train_epoch()
    second.load_state(first.state())
    for optimizer in (second.optimizer_d, second.optimizer_g):
        assert [group["lr"] for group in optimizer.param_groups] == [1e-4]
    weights = state_of(second)
    second.train_epoch()
    steps = [(state_of(second)[key] - weights[key]).abs().max() for key in ("G_I.main.0.weight",)]
    assert 0 < max(steps) < 1.5e-4  # Adam's steps are about as long as its rate


def test_networks_of_other_shapes_are_listed(clips, monkeypatch):
    state = Trainer(clips, batch_size=2).state()
    assert Trainer(clips, batch_size=2).differences(state) == []
    monkeypatch.setattr(models, "DIM_CONTENT", 70)
    other = Trainer(clips, batch_size=2)
    other.image_discriminator.main.append(nn.BatchNorm2d(1))
    assert other.differences(state) == [
        "G_I main.0.weight was 60×512×2×2, is 80×512×2×2 now",
        *(
            f"D_I main.9.{name} was absent, is {shape} now"
            for name, shape in (
                ("weight", 1),
                ("bias", 1),
                ("running_mean", 1),
                ("running_var", 1),
                ("num_batches_tracked", "a number"),
            )
        ),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "moment", "running mean"])
def test_a_state_that_is_not_finite_is_not_given_away(clips, where, value):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    spoilt = {
        "weight": trainer.generator.motion_rnn.gru.bias_hh_l0.data,
        "moment": trainer.optimizer_d.state[trainer.discriminator_weights[-1]]["exp_avg_sq"],
        "running mean": trainer.video_discriminator.main[3].running_mean,
    }[where]
    trainer.state()
    spoilt.view(-1)[3 % spoilt.numel()] = value
    with pytest.raises(TrainingError, match="after epoch 1 weights or their moments are not fin"):
        trainer.state()


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_stays_beside_float32(clips, device):
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(clips, batch_size=4, device=device, precision=precision)
        losses[precision] = trainer.train_epoch().cpu()
        assert losses[precision].dtype == torch.float32
        assert all(weight.dtype == torch.float32 for weight in trainer.generator.parameters())
    # of the first step's losses, before the two part ways; bf16 keeps 8 bits
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0.02)
    assert not torch.equal(losses["bf16"], losses["fp32"])


def test_no_reading_ahead_is_lost_or_repeated(clips, tmp_path):
    """A checkpoint goes on with the batch after the last one used, whatever a thread read since."""
    whole, first, second = (Trainer(clips, batch_size=2, seed=5) for _ in range(3))
    batches = [whole.next_pixels() for _ in range(4)]
    assert not torch.equal(batches[0], batches[1])
    for batch in batches[:2]:
        assert torch.equal(first.next_pixels(), batch)
    assert first.ahead.ahead is not None  # a third is being read, or has been
    second.next_pixels()  # as is one of the run that is left
    second.graph = "of the run that is left"
    second.load_state(through_a_file(first.state(), tmp_path))
    for batch in batches[2:]:
        assert torch.equal(second.next_pixels(), batch)
    assert second.graph is None


def test_the_state_of_another_device_is_left(clips, tmp_path):
    """A checkpoint of a CUDA run: its random states, and Adam's options, mean nothing here."""
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    state = trainer.state()
    of_cuda = torch.zeros(16, dtype=torch.uint8)  # as CUDA's generator has it
    state["rng"] = {"device": "cuda", "draws": of_cuda, "clips": None}
    for optimizer in ("optimizer_d", "optimizer_g"):
        state[optimizer]["param_groups"][0]["capturable"] = True
        for moments in state[optimizer]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):  # as on Apple's GPU: in the default layout
                moments[name] = moments[name].contiguous()
    state = through_a_file(state, tmp_path)
    runs = [Trainer(clips, batch_size=2, seed=0) for _ in range(2)]
    for run in runs:
        run.load_state(state)
        assert run.epoch == 1 and not run.optimizer_d.param_groups[0]["capturable"]
        for weight, moments in run.optimizer_d.state.items():
            assert weight.stride() == moments["exp_avg"].stride()
        run.train_epoch()
    assert same(state_of(runs[0]), state_of(runs[1]))


def test_a_resident_data_set_trains_the_same(clips, tmp_path):
    """On a GPU the clips lie in its memory: one gather gives what reading the maps gives."""
    places = clips.draw(8, torch.Generator().manual_seed(0))
    read = clips.read(*places)
    resident = ClipDataset(clips.folder)
    resident.to("cpu")
    resident.open = None  # no more reading
    assert torch.equal(resident.read(*places), read)
    assert resident.pixels.numel() == resident.bytes
    pixels = resident.pixels
    resident.to("cpu")
    assert resident.pixels is pixels  # a second trainer on it moves nothing


def test_a_batch_that_failed_is_read_again(clips, monkeypatch):
    """A clip that cannot be read for a while costs no batch, and none is used twice."""
    trainer, expected = Trainer(clips, batch_size=2), Trainer(clips, batch_size=2)
    assert torch.equal(trainer.next_pixels(), expected.next_pixels())
    trainer.ahead.go_on_from(trainer.ahead.state)  # without what it has read ahead
    with monkeypatch.context() as patch:
        patch.setattr(clips, "read", mock.Mock(side_effect=ValueError("cannot be read")))
        for _ in range(2):
            with pytest.raises(ValueError):
                trainer.next_pixels()
    for _ in range(3):
        assert torch.equal(trainer.next_pixels(), expected.next_pixels())


@pytest.mark.parametrize("damage", ["rng", "networks", "moments", "no moments", "an old rng"])
def test_a_state_with_parts_amiss_is_refused(clips, tmp_path, damage):
    trainer = Trainer(clips, batch_size=2)
    trainer.train_epoch()
    state = trainer.state()
    if damage == "moments":
        state["optimizer_d"]["state"][0]["exp_avg"] = torch.zeros(1)
    elif damage == "no moments":
        state["optimizer_d"]["state"] = {}
    elif damage == "an old rng":
        state["rng"] = state["rng"]["draws"]
    else:
        del state[damage]
    with pytest.raises(ValueError):
        Trainer(clips, batch_size=2).load_state(state)


def test_weights_are_fixed_for_as_long_as_it_says():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyboardInterrupt), fixed([weight]):
        assert not weight.requires_grad
        raise KeyboardInterrupt
    assert weight.requires_grad


# ---------------------------------------------------------------- what CUDA asks for, without CUDA


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_never_waits_for_the_device(clips, precision):
    trainer = Trainer(clips, batch_size=2, precision=precision)
    batch = trainer.draw()
    trainer.update(*batch)
    with Waits() as waits:
        trainer.update(*batch)
    assert waits.count == 0
    with Waits() as waits:
        trainer.draw()
    assert waits.count > 0  # on the CPU it may: it does see one


def test_drawing_on_cuda_neither_waits_nor_copies(clips):
    """With fake CUDA tensors: to mix devices, or to fetch a value, raises."""
    trainer = Trainer(clips, batch_size=2)
    cuda = torch.device("cuda:0")

    def strip(function):
        return lambda *args, generator=None, **options: function(*args, **options)

    with FakeTensorMode(), contextlib.ExitStack() as stack:
        for module in trainer.generator.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                fake = nn.Parameter(torch.empty(weight.shape, device=cuda))
                module._parameters[name] = fake
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=cuda)
        # the GRU itself asks for a driver
        stack.enter_context(
            mock.patch.object(
                trainer.generator.motion_rnn, "forward", lambda e, h0: e + h0[:, None]
            )
        )
        for name in ("rand", "randn", "randint"):
            stack.enter_context(mock.patch.object(torch, name, strip(getattr(torch, name))))
        trainer.ahead, trainer.rng = None, mock.Mock(device=cuda)
        n = len(clips)
        clips.pixels = torch.empty(clips.bytes // 3072, 32, 32, 3, dtype=torch.uint8, device=cuda)
        clips.first = torch.empty(n, dtype=torch.long, device=cuda)
        clips.lengths_on = lambda device: torch.empty(n, dtype=torch.long, device=device)
        with pytest.raises(DataDependentOutputException):
            trainer.draw()  # it looks how long the paths need to be, as on a CPU it should
        trainer.device = cuda
        pixels, noise, looked_at = trainer.draw()
        windows, frames = trainer.generate(noise, looked_at)
        assert pixels.device == noise[1].device == windows.device == frames.device == cuda
        assert noise[1].shape[1] == trainer.longest
        assert windows.shape == (2, 3, 16, 32, 32)
        with pytest.raises(RuntimeError):
            trainer.generate(noise, looked_at.to("cpu"))


@pytest.mark.parametrize("resident", [False, True])
def test_what_is_recorded_is_replayed(clips, monkeypatch, resident):
    """The order of things around a CUDA graph, with a stand-in for the graph itself."""
    trainer = Trainer(clips, batch_size=2)
    trainer.use_graph = True
    seen, recording = [], []

    class Graph:
        def register_generator_state(self, rng):
            assert rng is trainer.rng

        def replay(self):
            update(trainer.recorded_pixels)

    def update(pixels, *_):
        if not recording:
            seen.append(pixels.clone())
            losses.fill_(len(seen))
        return losses

    @contextlib.contextmanager
    def record(graph, stream, capture_error_mode):
        recording.append(graph)
        yield
        recording.clear()

    losses = torch.zeros(4)
    expected = Trainer(clips, batch_size=2)
    monkeypatch.setattr(trainer, "update", update)
    monkeypatch.setattr(trainer, "_on_side_stream", lambda: update(*trainer.draw()).clone())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    if resident:
        clips.to("cpu")
        trainer.ahead = None
        monkeypatch.setattr(Graph, "replay", lambda self: update(torch.zeros(1)))
    returned = [trainer.train_epoch() for _ in range(8)]
    assert trainer.epoch == 8 and len(seen) == 8
    assert [int(x[0]) for x in returned] == list(range(1, 9))  # each epoch's own, none overwritten
    if resident:
        assert trainer.recorded_pixels is None
    else:
        assert all(torch.equal(pixels, expected.next_pixels()) for pixels in seen)
    # an update that cannot be recorded is said, and not replayed
    trainer.graph = None
    monkeypatch.setattr(trainer, "update", mock.Mock(side_effect=RuntimeError("it waits\nhere")))
    with pytest.raises(UserError, match=r"as a CUDA graph \(it waits\); --no-graph"):
        trainer.train_epoch()
    assert trainer.graph is None


@needs_cuda
@pytest.mark.parametrize("resident", [True, False])
def test_a_graph_trains_as_the_kernels_do(clips_folder, resident, monkeypatch):
    """The same draws, and losses as near as kernels of changing order of addition leave them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    runs = {}
    for graph in (False, True):
        clips = ClipDataset(clips_folder)
        if not resident:
            clips.bytes = 2**60
        trainer = Trainer(clips, batch_size=4, device="cuda", graph=graph)
        assert (trainer.ahead is None) == resident
        runs[graph] = torch.stack([trainer.train_epoch() for _ in range(8)]).cpu()
        assert (trainer.graph is not None) == graph
        assert torch.isfinite(runs[graph]).all() and trainer.epoch == 8
    torch.testing.assert_close(runs[True][:5], runs[False][:5], rtol=2e-2, atol=2e-2)
    assert len(runs[True].unique(dim=0)) == 8  # each replay draws anew


# ---------------------------------------------------------------- the loop


class Quick:
    """A trainer whose epochs take no time; its losses are the number of the epoch."""

    epoch = 0

    def train_epoch(self):
        self.epoch += 1
        return torch.full((4,), float(self.epoch))

    def sample(self):
        return torch.zeros(16, 3, 16, 32, 32)


def test_losses_are_fetched_seldom_and_all(tmp_path):
    log, saved, trainer = mock.Mock(), [], Quick()
    train(trainer, 5000, log, lambda: saved.append(trainer.epoch), tmp_path, 1500, 2000)
    calls = [call.args for call in log.add.call_args_list]
    assert len(calls) < 200  # not one an epoch
    rows = torch.cat([losses for _, losses, _ in calls])
    assert rows[:, 0].tolist() == list(range(1, 5001))
    assert all(losses[-1, 0] == epoch for epoch, losses, _ in calls)
    assert saved == [2000, 4000, 5000]
    assert {epoch for epoch, _, _ in calls} >= {1500, 2000, 3000, 4000, 4500, 5000}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"epoch-{epoch:06d}.gif" for epoch in (0, 1500, 3000, 4500, 5000)
    ]


@pytest.mark.parametrize("seconds, expected", [(6.5, [26, 40, 66, 80, 99]), (0, range(1, 100))])
def test_checkpoints_come_by_time_too(tmp_path, monkeypatch, seconds, expected):
    """An epoch takes 0.25 s of this clock, and nothing else takes any."""
    saved, trainer = [], Quick()
    clock = mock.Mock(perf_counter=lambda: trainer.epoch / 4)
    monkeypatch.setattr(trainer_module, "time", clock)

    def save():
        saved.append(trainer.epoch)

    train(trainer, 99, mock.Mock(), save, tmp_path, 99, 40, seconds)
    assert saved == list(expected)


def test_a_stop_ends_the_epoch_and_saves(tmp_path):
    """Whenever it comes: in an epoch, while the samples of one are made, while one is saved."""
    for when in ("train_epoch", "sample", "save"):
        stop, saved, trainer = [], [], Quick()

        def noting(function, name, when=when, stop=stop, trainer=trainer):
            def wrapped(*args):
                if name == when and trainer.epoch == 4:
                    stop.append(2)
                return function(*args)

            return wrapped

        trainer.sample = noting(trainer.sample, "sample")
        trainer.train_epoch = noting(trainer.train_epoch, "train_epoch")
        save = noting(lambda saved=saved, t=trainer: saved.append(t.epoch), "save")
        train(trainer, 100, mock.Mock(), save, tmp_path, 4, 4, stop=stop)
        assert trainer.epoch == 5 and saved == [4, 5], when


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, value):
    class Bad(Quick):
        def train_epoch(self):
            losses = super().train_epoch()
            losses[1] = value if self.epoch == 1234 else 1
            return losses

    log, saved, trainer = mock.Mock(), [], Bad()
    with pytest.raises(TrainingError, match=rf"at epoch 1234 the losses \(D_V: {value}\) are not"):
        train(trainer, 5000, log, lambda: saved.append(trainer.epoch), tmp_path, 5000, 100)
    assert saved[-1] == 1200
    logged = torch.cat([call.args[1] for call in log.add.call_args_list])
    assert not logged[1233].isfinite().all()  # for people to see


def test_losses_are_shown_twice_a_second(tmp_path):
    class Slow(Quick):
        def train_epoch(self):
            time.sleep(0.02)
            return super().train_epoch()

    log, start = mock.Mock(), time.perf_counter()
    train(Slow(), 100, log, lambda: None, tmp_path, 1000, 1000)
    took = time.perf_counter() - start
    calls = [call.args for call in log.add.call_args_list]
    assert 4 <= len(calls) <= 12
    assert 100 * 0.02 <= sum(seconds for _, _, seconds in calls) <= took  # each second once
