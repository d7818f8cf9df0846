"""generate.py, with untrained networks whose videos differ, on 32×32 frames."""

import itertools
import os
import subprocess
import sys
from unittest import mock

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, run
from PIL import Image, ImageSequence

import checkpoint
import generate
from generate import (
    BLOCK,
    between,
    content_motion_grid,
    contents,
    interpolation,
    load_generator,
    motion_noise,
    video,
)
from models import VideoGenerator
from utils import alone_in, to_uint8
from video import LabelledGrid


def lively():
    """A VideoGenerator whose videos differ much from one another, and from frame to frame."""
    torch.manual_seed(0)
    network = VideoGenerator(32)
    with torch.no_grad():
        network.motion_rnn.gru.weight_ih_l0 *= 4
        for _ in range(30):  # the means and variances that evaluation mode goes by
            network(*network.draw_noise(2, 16, torch.Generator().manual_seed(1)))
        network.image_generator.main[-2].weight *= 20
    return network.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a generator.pt, and the networks in it."""
    network = lively()
    path = tmp_path_factory.mktemp("model") / "generator.pt"
    weights = network.motion_rnn.state_dict(), network.image_generator.state_dict()
    checkpoint.write(path, {"epoch": 7, "seed": 0, "networks": dict(zip(("R_M", "G_I"), weights))})
    return path, network


def by_the_book(network, z_content, h0, e):
    """A video at once, (K, 32, 32, 3) uint8: R_M over the whole path, then G_I frame by frame."""
    with torch.no_grad():
        frames = network(z_content[None], e[None], h0[None])[0]
    return to_uint8(frames).permute(1, 2, 3, 0).numpy()


def noise(seed, index, frames):
    """What video `index` of a seed is made from: z_C (50,), h0 (10,), e (frames, 10)."""
    draws = motion_noise(seed, [index])
    h0 = next(draws)[0]
    e = torch.cat([next(draws)[0] for _ in range(0, frames, BLOCK)])[:frames]
    return contents(seed, [index])[0], h0, e


def same(a, b):
    """Equal but for rounding: G_I's last digits depend on how many frames it renders at once."""
    assert np.shape(a) == np.shape(b)
    difference = np.abs(np.asarray(a, int) - b)
    assert difference.max() <= 1 and difference.mean() < 0.01


def call(path, out, *flags):
    """generate.main in this process; the names it left."""
    generate.main([f"--checkpoint={path}", f"--out={out}", "--device=cpu", *flags])
    return sorted(path.name for path in out.iterdir())


def test_draws(model):
    """Standard normal, each index and seed with its own, the same ones every time."""
    z = contents(3, range(500))
    assert z.shape == (500, 50) and abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert len(z.unique(dim=0)) == 500 and torch.equal(z[7:9], contents(3, [7, 8]))
    assert torch.isin(contents(4, range(500)), z).float().mean() < 0.01
    draws = motion_noise(3, range(100))
    h0, first, second = next(draws), next(draws), next(draws)
    assert h0.shape == (100, 10) and first.shape == second.shape == (100, BLOCK, 10)
    drawn = torch.cat([h0[:, None], first, second], dim=1)
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert drawn.unique().numel() > 0.99 * drawn.numel()  # fresh for every frame


@pytest.mark.parametrize("frames", [1, 16, BLOCK, 2 * BLOCK + 9])
def test_a_video_is_that_of_the_networks(model, frames):
    path, network = model
    shown = np.stack(list(video(load_generator(path), frames, seed=5, index=2)))
    same(shown, by_the_book(network, *noise(5, 2, frames)))
    assert frames == 1 or (shown[1:] != shown[:-1]).any(axis=(1, 2, 3)).all()
    if frames > 16:  # a longer one begins as a shorter one
        same(shown[:16], list(video(load_generator(path), 16, seed=5, index=2)))


def test_gradients_stay_as_they_were(model):
    """What yields frames must not leave its caller without gradients."""
    frames = video(load_generator(model[0]), 3)
    next(frames)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("form", ["gif", "mp4", "png", "npy"])
def test_files(model, tmp_path, capsys, form):
    """Three videos of 20 frames: what is in the files is what the networks make."""
    path, network = model
    suffix = "" if form == "png" else f".{form}"
    flags = f"--checkpoint={path}", "--num=3", "--frames=20", "--fps=20", "--seed=4"
    flags += f"--format={form}", f"--out={tmp_path / 'out'}"
    if form == "gif":  # once as a person does it
        said = run("generate.py", *flags).stdout
    else:
        generate.main(flags)
        said = capsys.readouterr().out
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"video-000{i}{suffix}" for i in range(3)]
    assert said.startswith(f"{files[0]} … {files[2]}: 60 frames, ")
    for i, file in enumerate(files):
        expected = by_the_book(network, *noise(4, i, 20))
        if form == "npy":
            same(np.load(file), expected)
        elif form == "png":
            assert len(list(file.iterdir())) == 20
            same([iio.imread(file / f"frame-{k:05d}.png") for k in range(20)], expected)
        elif form == "gif":
            gif = Image.open(file)
            assert (gif.n_frames, gif.size, gif.info["loop"]) == (20, (32, 32), 0)
            frames = [(np.array(f.convert("RGB")), f.info) for f in ImageSequence.Iterator(gif)]
            assert [info["duration"] for _, info in frames] == [50] * 20
            assert np.abs(np.stack([f for f, _ in frames]) - expected.astype(int)).mean() < 16
        else:
            meta = next(imageio_ffmpeg.read_frames(str(file)))
            assert (meta["fps"], meta["size"], meta["codec"]) == (20, (32, 32), "h264")
            frames = iio.imread(file, plugin="FFMPEG")
            assert len(frames) == 20
            assert np.abs(frames.mean(axis=(1, 2)) - expected.mean(axis=(1, 2))).max() < 8


def contents_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["gif", "mp4", "png", "npy"])
def test_the_same_seed_gives_the_same_bytes(model, tmp_path, form, device):
    flags = f"--format={form}", f"--device={device}", "--frames=20"
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(model[0], tmp_path / out, *flags, "--num=2", f"--seed={seed}")
    call(model[0], tmp_path / "d", *flags, "--num=3", "--seed=1")  # of more, the first are the same
    a, b, c, d = (contents_of(tmp_path / out) for out in "abcd")
    assert len(a) == (40 if form == "png" else 2)
    assert a == b and not set(a.values()) & set(c.values())
    assert a.items() < d.items()
    videos = [{data for name, data in a.items() if f"000{i}" in name.parts[0]} for i in (0, 1)]
    assert not videos[0] & videos[1]


def test_it_needs_no_more_than_generator_pt(model, tmp_path):
    """A whole checkpoint gives the same videos; generator.pt holds R_M and G_I and nothing else."""
    content = checkpoint.read(model[0])
    assert sorted(content["networks"]) == ["G_I", "R_M"]
    more = {"D_I": {"weight": torch.zeros(3)}}
    content["networks"] = {**more, **content["networks"]}
    checkpoint.write(tmp_path / "checkpoint.pt", {**content, "optimizer_d": {}})
    call(model[0], tmp_path / "a", "--num=1")
    call(tmp_path / "checkpoint.pt", tmp_path / "b", "--num=1")
    assert contents_of(tmp_path / "a") == contents_of(tmp_path / "b")


def test_enlarged_files(model, tmp_path):
    call(model[0], tmp_path / "a", "--num=1", "--format=npy")
    call(model[0], tmp_path / "b", "--num=1", "--format=npy", "--scale=3")
    call(model[0], tmp_path / "c", "--num=1", "--format=npy", "--scale=3", "--resample=lanczos")
    a, b, c = (np.load(tmp_path / x / "video-0000.npy") for x in "abc")
    assert np.array_equal(b, a.repeat(3, axis=1).repeat(3, axis=2))
    assert c.shape == b.shape and not np.array_equal(b, c)
    assert np.abs(c.astype(int) - b).mean() < 60


# ---------------------------------------------------------------- content and motion apart


class Watched:
    """A generator that notes the codes which are fed to its G_I."""

    def __init__(self, path):
        self.generator, self.codes = load_generator(path), []
        self.generator.image_generator.register_forward_pre_hook(
            lambda _, args: self.codes.append(args[0].flatten(1))
        )

    def points(self, videos, frames):
        """What was fed since: z_C (videos, frames, 50) and z_M (videos, frames, 10)."""
        z = torch.cat(self.codes).unflatten(0, (frames, videos)).transpose(0, 1)
        self.codes.clear()
        return z.split([50, 10], dim=2)


def cells(shown, rows, columns, size=32):
    """The videos on a labelled sheet, (R, C, K, S, S, 3); where they are is tested by itself."""
    sheet = LabelledGrid([""] * rows, [""] * columns, size)
    return [[shown[(slice(None), *sheet.cell(r, c))] for c in range(columns)] for r in range(rows)]


@pytest.mark.parametrize("frames", [5, BLOCK + 3])
def test_the_grid_has_a_content_a_row_and_a_motion_a_column(model, frames):
    path, network = model
    watched = Watched(path)
    shown = np.stack(list(content_motion_grid(watched.generator, 3, 4, frames, seed=6)))
    z_content, z_motion = (z.unflatten(0, (3, 4)) for z in watched.points(12, frames))
    # a row has one content, at every frame
    assert torch.equal(z_content, z_content[:, :1, :1].expand_as(z_content))
    assert torch.equal(z_content[:, 0, 0], contents(6, range(3)))
    # a column has one motion, another at every frame
    assert torch.equal(z_motion, z_motion[:1].expand_as(z_motion))
    assert len(z_motion[0].flatten(0, 1).unique(dim=0)) == 4 * frames
    # and the pixels are those of the networks, from these draws
    grid = cells(shown, 3, 4)
    for r, c in itertools.product(range(3), range(4)):
        _, h0, e = noise(6, c, frames)
        same(grid[r][c], by_the_book(network, contents(6, [r])[0], h0, e))
    if frames == 5:
        same(grid[2][2], list(video(watched.generator, frames, 6, 2)))
        distinct = {video.tobytes() for row in grid for video in row}
        assert len(distinct) == 12


def test_interpolation_of_content(model):
    path, network = model
    watched = Watched(path)
    shown = np.stack(list(interpolation(watched.generator, "content", 2, 5, 6, seed=6)))
    z_content, z_motion = (z.unflatten(0, (2, 5)) for z in watched.points(10, 6))
    assert torch.equal(z_motion, z_motion[:1, :1].expand_as(z_motion))  # one motion in all
    assert torch.equal(z_content, z_content[:, :, :1].expand_as(z_content))
    draws = contents(6, range(4))
    assert torch.equal(z_content[:, 0, 0], draws[::2])  # from one draw
    assert torch.equal(z_content[:, -1, 0], draws[1::2])  # to another
    for a, b in zip(draws[::2], draws[1::2]):
        torch.testing.assert_close(between(a, b, 0.5), (a + b) / 2**0.5)
    steps = (z_content[:, 1:, 0] - z_content[:, :-1, 0]).norm(dim=-1)
    assert (steps.amax(dim=1) / steps.amin(dim=1) < 1.2).all()  # in even steps
    _, h0, e = noise(6, 0, 6)
    grid = cells(shown, 2, 5)
    same(grid[1][0], by_the_book(network, draws[2], h0, e))
    same(grid[1][4], by_the_book(network, draws[3], h0, e))


def test_interpolation_of_motion(model):
    path, network = model
    watched = Watched(path)
    shown = np.stack(list(interpolation(watched.generator, "motion", 2, 5, 6, seed=6)))
    z_content, z_motion = (z.unflatten(0, (2, 5)) for z in watched.points(10, 6))
    assert torch.equal(z_content, contents(6, [0])[0].expand_as(z_content))  # one content in all
    assert len(z_motion.flatten(0, 2).unique(dim=0)) == 60
    grid = cells(shown, 2, 5)
    for r, c, index in ((0, 0, 0), (0, 4, 1), (1, 0, 2), (1, 4, 3)):
        _, h0, e = noise(6, index, 6)
        same(grid[r][c], by_the_book(network, contents(6, [0])[0], h0, e))
    middle = (between(a, b, 0.5) for a, b in zip(noise(6, 2, 6)[1:], noise(6, 3, 6)[1:]))
    same(grid[1][2], by_the_book(network, contents(6, [0])[0], *middle))


def test_labels(model, monkeypatch):
    """Each label is made of the letters that test_video.py finds in the font."""
    labels = []
    monkeypatch.setattr(generate, "LabelledGrid", lambda *args: labels.append(args) or mock.Mock())
    generator = load_generator(model[0])
    next(content_motion_grid(generator, 2, 3, 1))
    next(interpolation(generator, "motion", 2, 3, 1))
    assert labels == [
        (["content 1", "content 2"], ["motion 1", "motion 2", "motion 3"], 32),
        (["motion 1-2", "motion 3-4"], ["0%", "50%", "100%"], 32),
    ]


def test_what_lies_between_draws_is_a_draw():
    a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for s in (0, 0.2, 0.5, 1):
        assert abs(between(a, b, s).std() - 1) < 0.01
    assert between(a, b, 0) is a and between(a, b, 1) is b


def test_sheets_as_files(model, tmp_path):
    flags = "--rows=2", "--columns=3", "--scale=2", "--frames=7"
    names = call(model[0], tmp_path, "--grid=content-motion", "--interpolate=motion", *flags)
    assert names == ["content-motion.gif", "interpolate-motion.gif"]
    sheet = LabelledGrid([""] * 2, [""] * 3, 64).sheet
    for name in names:
        gif = Image.open(tmp_path / name)
        assert (gif.n_frames, gif.size) == (7, sheet.shape[1::-1])
    names = call(model[0], tmp_path, "--interpolate=content", "--format=mp4", *flags)
    assert "interpolate-content.mp4" in names
    shown = iio.imread(tmp_path / "interpolate-content.mp4", plugin="FFMPEG")
    assert shown.shape == (7, *sheet.shape)


# ---------------------------------------------------------------- memory, bad input


def peak_memory(*flags):
    """The most memory that a call of generate.py had, in bytes."""
    command = [sys.executable, ROOT / "generate.py", "--device=cpu", *map(str, flags)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not tell")
def test_memory_is_bounded(model, tmp_path):
    """More videos, or longer ones, need no more memory; to hold all frames would need 126 MB."""
    flags = f"--checkpoint={model[0]}", f"--out={tmp_path}", "--scale=8"
    few = peak_memory(*flags, "--num=10")
    many = peak_memory(*flags, "--num=40")
    long = peak_memory(*flags, "--num=1", "--frames=640", "--format=npy")
    long_gif = peak_memory(*flags, "--num=1", "--frames=640")
    assert max(many, long, long_gif) < few + 60e6, (few, many, long, long_gif)


BAD = {
    "--frames=0": "'0' is not a whole number from 1",
    "--frames=1.5": "'1.5' is not a whole number from 1",
    "--num=0": "'0' is not a whole number from 1",
    "--num=-3": "'-3' is not a whole number from 1",
    "--fps=0": "'0' is not a number from 0.1",
    "--fps=nan": "'nan' is not a number from 0.1",
    "--fps=60": "a GIF plays at most 50; take --format mp4",
    "--format=avi": "invalid choice: 'avi' (choose from",
    "--grid=motion-content": "invalid choice",
    "--interpolate=both": "invalid choice",
    "--scale=0": "'0' is not a whole number from 1",
    "--scale=1.5": "'1.5' is not a whole number from 1",
    "--resample=cubic": "invalid choice",
    "--grid=content-motion --rows=100 --scale=8": "pixels are too many, 16384 the most",
    "--rows=0": "'0' is not a whole number from 1",
    "--seed=-1": "'-1' is not a whole number from 0",
    "--device=tpu9": "there is no such device here",
    "--out=": "'' names no folder",
    "--checkpoint=nowhere/checkpoint.pt": "checkpoint.pt is not there: main.py writes it when",
    "--checkpoint=.": ". is not there",
    "--seed": "expected one argument",
    "--hight=3": "unrecognized arguments: --hight=3",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_flags_get_one_line(model, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        call(model[0], tmp_path / "out", *flag.split())
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert said[-1].startswith("generate.py: error: ") and BAD[flag] in said[-1]
    assert len(said) == 1 or flag.startswith("--grid=c")  # which comes after the bar


@pytest.fixture(scope="module")
def bad(model, tmp_path_factory):
    """A folder of files that are no generators, and of things in the way."""
    folder = tmp_path_factory.mktemp("bad")
    good = checkpoint.read(model[0])
    R_M, G_I = good["networks"]["R_M"], good["networks"]["G_I"]
    (folder / "picture.pt").write_bytes(b"GIF89a and so on")
    damaged = bytearray(model[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "damaged.pt").write_bytes(damaged)
    torch.save({"epoch": 3, "networks": {"R_M": R_M, "G_I": G_I}}, folder / "other.pt")
    checkpoint.write(folder / "swapped.pt", {**good, "networks": {"R_M": G_I, "G_I": R_M}})
    checkpoint.write(folder / "empty.pt", {"epoch": 3})
    R_M = {**R_M, "gru.bias_ih_l0": torch.full((30,), float("nan"))}
    checkpoint.write(folder / "nan.pt", {**good, "networks": {"R_M": R_M, "G_I": G_I}})
    checkpoint.write(folder / "numbers.pt", {"epoch": 3, "networks": {"R_M": {"a": 1}, "G_I": {}}})
    (folder / "file").write_text("in the way")
    (folder / "taken" / "video-0000.gif").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--checkpoint={bad}/picture.pt", "picture.pt: not a checkpoint of this version"),
        ("--checkpoint={bad}/damaged.pt", "damaged.pt: damaged, its checksum does not match"),
        ("--checkpoint={bad}/other.pt", "other.pt: not a checkpoint of this version"),
        ("--checkpoint={bad}/swapped.pt", "swapped.pt: no R_M and G_I of this program in it"),
        ("--checkpoint={bad}/empty.pt", "empty.pt: no R_M and G_I of this program in it"),
        ("--checkpoint={bad}/numbers.pt", "numbers.pt: no R_M and G_I of this program in it"),
        ("--checkpoint={bad}/nan.pt", "nan.pt: its weights are not finite"),
        ("--checkpoint={bad}", "{bad} is not there"),
        ("--out={bad}/file", "{bad}/file: "),
        ("--out={bad}/file/deep", "{bad}/file/deep: "),
        ("--out={bad}/taken", "{bad}/taken/video-0000.gif"),
        ("--out=/proc/here", "/proc/here"),
    ],
)
def test_bad_files_get_one_line(model, bad, tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit) as stop:
        call(model[0], tmp_path / "out", "--num=1", flag.format(bad=bad))
    # the bar that stood there, then the line
    said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert stop.value.code == 2 and message.format(bad=bad) in said[-1], said
    assert said[-1].startswith("generate.py: error: ")
    assert not any("Traceback" in line for line in said)


def test_two_calls_in_one_folder(model, tmp_path, capsys):
    """The second is refused; what a call that was killed left is removed."""
    with alone_in(tmp_path), pytest.raises(SystemExit) as stop:
        call(model[0], tmp_path, "--num=1")
    assert stop.value.code == 2 and "another run is writing there" in capsys.readouterr().err
    (tmp_path / "video-0003.gif.part").write_bytes(b"half")
    (tmp_path / "video-0004.part").mkdir()
    (tmp_path / "video-0004.part" / "frame-00000.png").write_bytes(b"half")
    (tmp_path / "mine.part").write_bytes(b"mine")
    call(model[0], tmp_path, "--num=1")
    assert {path.name for path in tmp_path.iterdir()} == {"video-0000.gif", "mine.part"}
    assert "note" not in capsys.readouterr().out
    call(model[0], tmp_path, "--num=2", "--format=npy")
    call(model[0], tmp_path, "--num=1", "--format=npy")
    said = capsys.readouterr().out
    assert "note: 1 of that name were there and are replaced" in said
    assert "also holds 2 of an earlier call, as video-0000.gif" in said


def test_ctrl_c(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "save_video", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        call(model[0], tmp_path, "--num=1")
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "generate.py: stopped"
