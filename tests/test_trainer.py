import copy

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch import nn

from data import ClipDataset
from trainer import Trainer
from utils import UserError


def book(trainer):
    """Copies of the trainer's networks in the default layout, and an optimiser for each."""
    nets = {}
    for name, net in trainer.networks.items():
        nets[name] = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        for weight in nets[name].parameters():
            weight.data = weight.data.contiguous()
    adams = {
        name: torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999), foreach=False)
        for name, net in nets.items()
    }
    return nets, adams


def share_moments(trainer, adams):
    """Give each of the four optimisers what the trainer's two hold for its weights."""
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


def by_the_book(nets, adams, real_window, real_frame, noise, looked_at):
    """The update by the book: BCE on probabilities, R_M frame by frame, a backward a term."""
    R_M, G_I, D_I, D_V = (nets[name] for name in ("R_M", "G_I", "D_I", "D_V"))
    z_content, e, h0 = noise
    B, T = len(e), real_window.shape[2]
    codes, state = [], h0
    for k in range(e.shape[1]):
        state = R_M(e[:, k : k + 1], state)[:, 0]
        codes.append(torch.cat([z_content, state], dim=1))
    points = [codes[int(k)][i] for i in range(B) for k in looked_at[i]]
    frames = G_I(torch.stack(points)[:, :, None, None])
    frames = frames.reshape(B, T + 1, *frames.shape[1:])
    fake_window = frames[:, :T].permute(0, 2, 1, 3, 4).contiguous()
    fake_frame = frames[:, T].contiguous()

    loss = nn.BCELoss()
    real, fake = e.new_full((B,), 0.9), e.new_zeros(B)
    losses, gradients = [], {}
    for name, D, v, w in (
        ("D_I", D_I, real_frame, fake_frame),
        ("D_V", D_V, real_window, fake_window),
    ):
        adams[name].zero_grad()
        on_real = loss(D(v.contiguous()), real)
        on_real.backward()
        on_fake = loss(D(w.detach()), fake)
        on_fake.backward()
        gradients[name] = [weight.grad.clone() for weight in D.parameters()]
        adams[name].step()
        losses.append(on_real + on_fake)
    adams["G_I"].zero_grad()
    adams["R_M"].zero_grad()
    for D, w in ((D_I, fake_frame), (D_V, fake_window)):
        term = loss(D(w), real)
        term.backward(retain_graph=True)
        losses.append(term)
    for name in ("G_I", "R_M"):
        gradients[name] = [weight.grad.clone() for weight in nets[name].parameters()]
        adams[name].step()
    return torch.stack(losses).detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_update_is_the_one_in_the_book(clips, device, dtype):
    """Epoch by epoch from the same state; float64 shows that nothing but rounding differs."""
    exact = dtype == torch.float64
    trainer = Trainer(clips, batch_size=3, device=device)
    for net in trainer.networks.values():
        net.to(dtype)
    for epoch in range(4):
        real_window, real_frame, noise, looked_at = trainer.draw()
        noise = tuple(n.to(dtype) for n in noise)
        batch = real_window.to(dtype), real_frame.to(dtype), noise, looked_at
        if epoch < 2 and not exact:
            # Adam's first steps are of full length even for a gradient that is nothing but
            # rounding: in float32 two ways to compute the same thing part there.
            trainer.update(*batch)
            continue
        nets, adams = book(trainer)
        if epoch:
            share_moments(trainer, adams)
        expected, gradients = by_the_book(nets, adams, *batch)
        losses = trainer.update(*batch)
        torch.testing.assert_close(losses, expected, rtol=1e-10 if exact else 1e-4, atol=0)
        for name, net in trainer.networks.items():
            differing = total = 0
            for (key, new), value in zip(net.named_parameters(), nets[name].parameters()):
                gradient = gradients[name].pop(0)
                error = (new.grad - gradient).norm() / gradient.norm()
                assert error < (1e-9 if exact else 1e-2), f"{name} {key}: gradient {error}"
                # a weight makes a step of about 0.0002
                near = 1e-9 if exact else 0.01 * 0.0002 + 1e-4 * value.abs()
                differing += ((new - value).abs() > near).sum().item()
                total += value.numel()
            assert differing <= (0 if exact else 0.05 * total), f"{name}: {differing} of {total}"
            for (key, new), value in zip(net.named_buffers(), nets[name].buffers()):
                error = (new - value).double().norm()
                assert error <= (1e-9 if exact else 1e-3) * value.double().norm(), f"{name} {key}"


def test_discriminators_learn_in_their_own_step_only(clips):
    """The generators' step neither moves D_I and D_V nor computes gradients for them."""
    trainer = Trainer(clips, batch_size=2)
    seen = {}

    def at_g_step(*_):
        seen["weights"] = [w.detach().clone() for w in trainer.discriminator_weights]
        seen["grads"] = [w.grad.clone() for w in trainer.discriminator_weights]

    def at_d_step(*_):
        seen["d_grads"] = [w.grad.clone() for w in trainer.discriminator_weights]
        seen["no g grads"] = all(w.grad is None for w in trainer.generator.parameters())

    trainer.optimizer_d.register_step_pre_hook(at_d_step)
    trainer.optimizer_g.register_step_pre_hook(at_g_step)
    trainer.update(*trainer.draw())
    assert seen["no g grads"]  # the fakes were detached
    for at_d, at_g in zip(seen["d_grads"], seen["grads"]):
        assert torch.equal(at_d, at_g)
    for weight, was in zip(trainer.discriminator_weights, seen["weights"]):
        assert torch.equal(weight, was) and weight.requires_grad


def test_generated_videos_have_real_lengths(tmp_path):
    for name, n in (("a", 17), ("b", 60)):
        np.save(tmp_path / f"{name}.npy", np.zeros((n, 32, 32, 3), np.uint8))
    trainer = Trainer(ClipDataset(tmp_path), batch_size=1)
    lengths, starts, frames = {}, {17: set(), 60: set()}, {17: set(), 60: set()}
    for _ in range(2000):
        _, _, noise, looked_at = trainer.draw()
        K = noise[1].shape[1]
        lengths[K] = lengths.get(K, 0) + 1
        window, frame = looked_at[0, :16], int(looked_at[0, 16])
        assert (window.diff() == 1).all()
        starts[K].add(int(window[0]))
        frames[K].add(frame)
    assert set(lengths) == {17, 60} and 850 < lengths[17] < 1150
    assert starts == {17: {0, 1}, 60: set(range(45))}
    assert frames == {17: set(range(17)), 60: set(range(60))}


def test_frames_are_drawn_for_each_clip_for_itself(clips):
    trainer = Trainer(clips, batch_size=64)
    looked_at = trainer.draw()[3]
    assert len(set(looked_at[:, -1].tolist())) > 16
    assert len(set((looked_at[:, -1] - looked_at[:, 0]).tolist())) > 16


def state(trainer):
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
            trainer.update(*trainer.draw())
        return state(trainer)

    first = weights(seed=7, elsewhere=0)
    assert same(first, weights(seed=7, elsewhere=1))
    assert not same(first, weights(seed=8, elsewhere=0))


def test_sampling_leaves_no_trace(clips):
    trainer = Trainer(clips, batch_size=2)
    trainer.update(*trainer.draw())
    before, rng = state(trainer), trainer.rng.get_state()
    video = trainer.sample()
    assert video.shape == (16, 3, 16, 32, 32) and torch.equal(video, trainer.sample())
    assert same(before, state(trainer)) and torch.equal(rng, trainer.rng.get_state())
    assert all(net.training for net in trainer.networks.values())
    # evaluation mode: each video is what it is alone, with the running statistics
    trainer.generator.eval()
    with torch.no_grad():
        alone = trainer.generator(*(n[3:4] for n in trainer.sample_noise))
    torch.testing.assert_close(video[3:4], alone)


def test_goes_on_exactly_from_a_checkpoint(clips, tmp_path):
    settings = {"size": 32, "frames": 16, "lr": 2e-4, "batch_size": 2}
    whole = Trainer(clips, batch_size=2)
    for _ in range(4):
        whole.update(*whole.draw())
    first = Trainer(clips, batch_size=2)
    for _ in range(2):
        first.update(*first.draw())
    first.save(tmp_path / "checkpoint.pt", settings)
    second = Trainer(clips, batch_size=2, seed=99)
    assert second.load(tmp_path / "checkpoint.pt", settings) == []
    assert second.epoch == 2
    for _ in range(2):
        second.update(*second.draw())
    assert same(state(whole), state(second))
    assert torch.equal(whole.sample(), second.sample())


def test_loading_says_what_is_different(clips, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer = Trainer(clips, batch_size=2)
    trainer.update(*trainer.draw())
    old = {"size": 32, "frames": 16, "lr": 2e-4, "batch_size": 2}
    trainer.save(path, old)
    changed = trainer.load(path, old | {"lr": 1e-4, "batch_size": 4})
    assert changed == ["lr was 0.0002, is 0.0001 now", "batch_size was 2, is 4 now"]
    assert all(g["lr"] == 1e-4 for g in trainer.optimizer_d.param_groups)
    with pytest.raises(UserError, match="size was 32, is 64 now; frames was 16, is 32 now"):
        trainer.load(path, old | {"size": 64, "frames": 32})
    whole = path.read_bytes()
    others = [{"format": 1}, {"format": 2, "settings": old}, torch.zeros(3)]
    for content in (whole[:100_000], b"", b"hello", *others):
        torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
        with pytest.raises(UserError, match="not a checkpoint"):
            trainer.load(path, old)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_stays_beside_float32(clips, device):
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(clips, batch_size=4, device=device, precision=precision)
        losses[precision] = trainer.update(*trainer.draw()).cpu()
        assert losses[precision].dtype == torch.float32
        assert all(weight.dtype == torch.float32 for weight in trainer.generator.parameters())
    # of the first step's losses, before the two part ways; bf16 keeps 8 bits
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0.02)
    assert not torch.equal(losses["bf16"], losses["fp32"])
