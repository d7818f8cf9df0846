"""generate.py, with untrained networks whose videos differ, on 32×32 frames."""

import itertools
import tracemalloc
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DEVICES, run
from PIL import Image

import checkpoint
import generate
from data import to_uint8
from generate import BATCH, content_motion_grid, interpolation, load_generator, sample_contents
from models import VideoGenerator
from utils import UserError
from video import LabelledGrid


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a generator.pt, and its networks, whose videos and frames differ a lot."""
    torch.manual_seed(0)
    network = VideoGenerator(32)
    with torch.no_grad():
        network.motion_rnn.gru.weight_ih_l0 *= 4
        for layer in network.image_generator.main[1:-2:3]:
            layer.momentum = 1  # take the means and variances of the next batch
        network(*network.sample_noise(2, 16, torch.Generator().manual_seed(1)))
        network.image_generator.main[-2].weight *= 20
    path = tmp_path_factory.mktemp("model") / "generator.pt"
    R_M, G_I = network.motion_rnn.state_dict(), network.image_generator.state_dict()
    checkpoint.save(path, {"epoch": 7, "networks": {"R_M": R_M, "G_I": G_I}})
    return path, network.eval()


def noise(seed, index, frames):
    """What video `index` of a seed is made from: z_C (50,), e (K, 10), h0 (10,)."""
    e, h0 = generate.sample_motion_noise(seed, [index], frames)
    return sample_contents(seed, [index])[0], e[0], h0[0]


def reference_video(network, z_content, e, h0):
    """A whole video by the networks alone, (K, 32, 32, 3) uint8."""
    with torch.no_grad():
        frames = network(z_content[None], e[None], h0[None])[0]
    return to_uint8(frames).permute(1, 2, 3, 0).numpy()


def assert_same(a, b):
    """Equal up to rounding: G_I's last digits depend on how many frames it renders at once."""
    assert np.shape(a) == np.shape(b)
    difference = np.abs(np.asarray(a, int) - b)
    assert difference.max() <= 1 and difference.mean() < 0.01


def call(path, out, *flags):
    """Run generate.main in this process; returns the names in `out`."""
    generate.main([f"--checkpoint={path}", f"--out={out}", "--device=cpu", *flags])
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def test_samples_are_standard_normal_and_differ_by_seed_and_index():
    z = sample_contents(3, range(500))
    assert z.shape == (500, 50) and abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert len(z.unique(dim=0)) == 500
    assert torch.equal(z[7:9], sample_contents(3, [7, 8]))
    assert torch.isin(sample_contents(4, range(500)), z).float().mean() < 0.01
    e, h0 = generate.sample_motion_noise(3, range(100), 133)
    assert e.shape == (100, 133, 10) and h0.shape == (100, 10)
    both = torch.cat([h0[:, None], e], dim=1)
    assert abs(both.mean()) < 0.02 and abs(both.std() - 1) < 0.02
    assert both.unique().numel() > 0.99 * both.numel()
    assert torch.equal(e[7:8, :9], generate.sample_motion_noise(3, [7], 9)[0])
    assert torch.isin(generate.sample_motion_noise(4, [7], 99)[0], e).float().mean() < 0.01


@pytest.mark.parametrize("frames", [1, 16, 137])
def test_video_is_the_output_of_the_networks(model, frames):
    path, network = model
    frames_of_video = generate.video(load_generator(path), frames, seed=5, index=2)
    shown = [next(frames_of_video)]
    assert torch.is_grad_enabled()  # as the caller had it
    shown = np.stack([*shown, *frames_of_video])
    assert_same(shown, reference_video(network, *noise(5, 2, frames)))
    assert (shown[1:] != shown[:-1]).any(axis=(1, 2, 3)).all()
    if frames > 16:  # a longer video begins as a shorter one
        assert_same(shown[:16], list(generate.video(load_generator(path), 16, seed=5, index=2)))


def cells(frames, rows, columns):
    """The videos of a labelled grid, (R, C, K, 32, 32, 3); test_video.py tests where they are."""
    first = LabelledGrid([""] * rows, [""] * columns, 32).margin + 2
    frames = np.stack(list(frames))[:, first : first + 34 * rows, first : first + 34 * columns]
    squares = frames.reshape(-1, rows, 34, columns, 34, 3).transpose(1, 3, 0, 2, 4, 5)
    return squares[:, :, :, :32, :32]


def test_content_motion_grid_has_contents_by_row_and_motions_by_column(model):
    path, network = model
    generator = load_generator(path)
    frames = BATCH // 6 + 3  # more than are rendered at once
    grid = cells(content_motion_grid(generator, 2, 3, frames, seed=6), 2, 3)
    assert len(np.unique(grid.reshape(6 * frames, -1), axis=0)) == 6 * frames
    for r, c in itertools.product(range(2), range(3)):
        z_content, e, h0 = noise(6, r, 1)[0], *noise(6, c, frames)[1:]
        assert_same(grid[r, c], reference_video(network, z_content, e, h0))
    assert_same(grid[1, 1], list(generate.video(generator, frames, 6, 1)))


@pytest.mark.parametrize("what", ["content", "motion"])
def test_interpolation_leads_from_sample_to_sample_of_one_code(model, what):
    path, network = model
    grid = cells(interpolation(load_generator(path), what, 2, 3, 4, seed=6), 2, 3)
    assert len(np.unique(grid.reshape(6, -1), axis=0)) == 6
    first = noise(6, 0, 4)
    for r, c in itertools.product(range(2), range(3)):
        angle = np.pi / 2 * c / 2
        ab = zip(noise(6, 2 * r, 4), noise(6, 2 * r + 1, 4))
        mixed = [(np.cos(angle) * a + np.sin(angle) * b).float() for a, b in ab]
        expected = (mixed[0], *first[1:]) if what == "content" else (first[0], *mixed[1:])
        assert_same(grid[r, c], reference_video(network, *expected))


def test_grids_are_labelled(model, monkeypatch):
    labels = []
    monkeypatch.setattr(generate, "LabelledGrid", lambda *args: labels.append(args) or mock.Mock())
    generator = load_generator(model[0])
    next(content_motion_grid(generator, 2, 3, 1))
    next(interpolation(generator, "motion", 2, 3, 1))
    assert labels == [
        (["content 1", "content 2"], ["motion 1", "motion 2", "motion 3"], 32),
        (["motion 1-2", "motion 3-4"], ["0%", "50%", "100%"], 32),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["gif", "mp4", "png", "npy"])
def test_same_seed_gives_the_same_bytes(model, tmp_path, form, device):
    def generated(num, seed):
        out = tmp_path / f"{num}-{seed}"
        flags = f"--format={form}", f"--device={device}", f"--num={num}", f"--seed={seed}"
        call(model[0], out, "--frames=8", *flags)
        paths = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
        return {path.relative_to(out): path.read_bytes() for path in paths}

    two, three = generated(num=2, seed=1), generated(num=3, seed=1)
    assert len(set(two.values())) == len(two) == (16 if form == "png" else 2)
    assert two.items() < three.items()
    assert not set(two.values()) & set(generated(num=2, seed=2).values())


def test_files_hold_the_videos_enlarged(model, tmp_path):
    path, network = model
    flags = f"--checkpoint={path}", "--num=2", "--seed=4", "--scale=3", "--format=npy"
    printed = run("generate.py", *flags, f"--out={tmp_path / 'a'}", "--frames=5").stdout
    paths = [tmp_path / "a" / f"video-000{i}.npy" for i in range(2)]
    assert printed.startswith(f"{paths[0]} … {paths[1]}: 10 frames, ")
    for i, file in enumerate(paths):
        expected = reference_video(network, *noise(4, i, 5)).repeat(3, axis=1).repeat(3, axis=2)
        assert_same(np.load(file), expected)


def test_grids_are_written_in_the_asked_format_and_speed(model, tmp_path):
    flags = "--rows=2", "--columns=3", "--scale=2", "--frames=7", "--fps=20"
    names = call(model[0], tmp_path, "--grid=content-motion", "--interpolate=motion", *flags)
    assert names == ["content-motion.gif", "interpolate-motion.gif"]
    height, width, _ = LabelledGrid([""] * 2, [""] * 3, 64).empty.shape
    for name in names:
        gif = Image.open(tmp_path / name)
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (7, (width, height), 50)
    call(model[0], tmp_path, "--interpolate=content", "--format=mp4", *flags)
    path = tmp_path / "interpolate-content.mp4"
    assert iio.imread(path, plugin="FFMPEG").shape == (7, height, width, 3)
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 20


@pytest.mark.parametrize("form", ["npy", "mp4"])
def test_memory_does_not_grow_with_the_length(model, tmp_path, form):
    """Not for the pixels in NumPy's arrays: all 200 frames are 39 MB. And torch renders a few."""
    tracemalloc.start()
    try:
        call(model[0], tmp_path, "--num=1", "--frames=200", "--scale=8", f"--format={form}")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    generator, inputs = load_generator(model[0]), []

    def hook(_, args):
        assert not torch.is_grad_enabled()
        inputs.append(args[0])

    generator.image_generator.register_forward_pre_hook(hook)
    next(content_motion_grid(generator, 7, 11, 1000))
    assert sum(len(z) for z in inputs) == 77 and max(len(z) for z in inputs) <= BATCH
    inputs.clear()
    next(generate.video(generator, 1000))
    assert len(inputs) == 1 and len(inputs[0]) == BATCH


def test_load_generator_refuses_what_is_no_generator(model, tmp_path):
    networks, path = checkpoint.load(model[0])["networks"], tmp_path / "bad.pt"
    R_M, G_I = networks["R_M"], networks["G_I"]
    nan = {name: weight * float("nan") for name, weight in R_M.items()}
    for networks, message in (
        ({}, "it does not hold R_M and G_I of this program"),
        ({"R_M": G_I, "G_I": G_I}, "it does not hold R_M and G_I of this program"),
        ({"R_M": nan, "G_I": G_I}, "its weights are not finite"),
    ):
        checkpoint.save(path, {"epoch": 3, "networks": networks})
        with pytest.raises(UserError, match=rf"bad\.pt: {message}"):
            load_generator(path)
    path.write_text("text")
    with pytest.raises(UserError, match=r"bad\.pt: damaged, or not a checkpoint of this program"):
        load_generator(path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed=-1", "-1 is not from 0 to 9223372036854775807"),
        ("--fps=60", "a GIF plays at most 50 frames per second: use mp4 for 60"),
        ("--grid=content-motion --rows=100 --scale=8", "(16384): take a smaller --scale"),
        ("--checkpoint=nowhere", "nowhere: no such file; train with main.py, or name one"),
        ("", "video-0000.gif: Is a directory"),
    ],
)
def test_main_reports_bad_input_in_one_line(model, tmp_path, capsys, flags, message):
    (tmp_path / "video-0000.gif").mkdir()  # in the way of a video
    with pytest.raises(SystemExit) as stop:
        call(model[0], tmp_path, "--num=1", *flags.split())
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert stop.value.code == (2 if flags else 1) and message in lines[-1]
    assert lines[-1].startswith("generate.py: error: ")
    assert all("frame" in line for line in lines[:-1])  # the progress bar


def test_average_and_best_are_taken_unless_another_is_asked_for(model, tmp_path, capsys):
    path, network = model
    content = checkpoint.load(path)
    for name, seed in (("checkpoint.pt", 1), ("best.pt", 2)):
        torch.manual_seed(seed)
        other = VideoGenerator(32)
        states = other.motion_rnn.state_dict(), other.image_generator.state_dict()
        average = dict(zip(("R_M", "G_I"), states))
        checkpoint.save(tmp_path / name, {**content, "average": average})
        loaded = load_generator(tmp_path / name).state_dict()
        torch.testing.assert_close(loaded, other.state_dict(), rtol=0, atol=0)
    raw = load_generator(tmp_path / "best.pt", raw=True).state_dict()
    torch.testing.assert_close(raw, network.state_dict(), rtol=0, atol=0)

    def first_frame(*flags):
        flags = [*flags, "--num=1", "--frames=1", "--format=npy"]
        call(flags[0], tmp_path / "out", *flags[1:])
        return np.load(tmp_path / "out" / "video-0000.npy")

    best = first_frame(tmp_path / "best.pt")
    assert (first_frame(tmp_path) == best).all()  # of a folder
    assert not (first_frame(tmp_path / "checkpoint.pt") == best).all()
    assert (first_frame(tmp_path, "--raw") == first_frame(path)).all()
    (tmp_path / "best.pt").rename(tmp_path / "generator.pt")
    assert (first_frame(tmp_path) == best).all()
