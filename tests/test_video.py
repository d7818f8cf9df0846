"""Videos in files, read back by other libraries than the one that wrote them."""

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import video
from utils import UserError
from video import LabelledGrid, enlarge, save_gif, save_mp4, save_npy, save_video, video_grid


def read_gif(path):
    """The frames, (K, H, W, 3), and how many hundredths of a second each lasts."""
    frames, hundredths = [], []
    for frame in ImageSequence.Iterator(Image.open(path)):
        frames.append(np.array(frame.convert("RGB")))
        hundredths.append(frame.info["duration"] // 10)
    return np.stack(frames), hundredths


def noisy(frames, height=24, width=40):
    """A bright square that moves over a dark ground: (K, H, W, 3) uint8."""
    clip = np.full((frames, height, width, 3), (60, 20, 90), np.uint8)
    for k in range(frames):
        clip[k, 8:16, 2 + k % 24 : 10 + k % 24] = (250, 200, 10)
    return clip


def test_grid_and_gif(tmp_path):
    """Sixteen videos of one colour each stand where they should, play, and loop."""
    levels = torch.linspace(-1, 0.8, 16)
    videos = levels[:, None, None, None, None] * torch.ones(16, 3, 5, 32, 32)
    grid = video_grid(videos)
    assert grid.shape == (5, 4 * 34 + 2, 4 * 34 + 2, 3) and grid.dtype == np.uint8
    for i, level in enumerate(levels):
        row, column = divmod(i, 4)
        tile = grid[0, row * 34 + 2 : row * 34 + 34, column * 34 + 2 : column * 34 + 34]
        assert (tile == round((float(level) + 1) * 127.5)).all()
    assert (grid[:, :2] == 255).all()  # the frame around them

    save_gif(tmp_path / "a.gif", grid, fps=25)
    gif = Image.open(tmp_path / "a.gif")
    frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert gif.info["loop"] == 0 and gif.info["duration"] == 40
    assert len(frames) == 5
    assert np.abs(np.stack(frames).astype(int) - grid).max() <= 16  # 256 colours


def test_what_stands_still_in_a_video_stands_still_in_its_gif(tmp_path, drawn):
    clip = drawn[:16].copy()
    still = (clip == clip[0]).all(axis=(0, 3))
    assert 0.5 < still.mean() < 0.99
    save_gif(tmp_path / "a.gif", clip)
    gif = ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))
    frames = np.stack([np.array(frame.convert("RGB")) for frame in gif])
    assert (frames[:, still] == frames[0, still]).all()
    assert np.abs(frames.astype(int) - clip).mean() < 4


def test_each_format_is_read_back_by_another_library(tmp_path):
    clip = noisy(20)
    for name in ("a.gif", "a.mp4", "a.npy", "a"):
        save_video(tmp_path / name, iter(clip), fps=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.gif", "a.mp4", "a.npy"]

    capture = cv2.VideoCapture(str(tmp_path / "a.gif"))  # by FFmpeg
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(20)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 20
    frames, hundredths = read_gif(tmp_path / "a.gif")
    assert hundredths == [5] * 20 and Image.open(tmp_path / "a.gif").info["loop"] == 0
    assert np.array_equal(frames, clip)  # two colours: nothing is lost

    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p(tv, bt709")
    assert meta["fps"] == 20 and meta["size"] == (40, 24)
    frames = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert frames.shape == clip.shape
    assert np.abs(frames[:, 10:14, :] - clip[:, 10:14].astype(int)).mean() < 12
    assert np.abs(frames.mean(axis=(0, 1, 2)) - clip.mean(axis=(0, 1, 2))).max() < 4  # the colours
    boxes = (tmp_path / "a.mp4").read_bytes()
    assert boxes.index(b"moov") < boxes.index(b"mdat")  # so that it plays before it is all there

    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), clip)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        f"frame-{k:05d}.png" for k in range(20)
    ]
    for k in range(20):
        pixels = cv2.imread(str(tmp_path / "a" / f"frame-{k:05d}.png"))[..., ::-1]
        assert np.array_equal(pixels, clip[k])


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.npy", "a"])
@pytest.mark.parametrize("clip", [noisy(1), np.zeros((5, 16, 16, 3), np.uint8)])
def test_one_frame_and_frames_all_alike(tmp_path, name, clip):
    save_video(tmp_path / name, iter(clip))
    if name == "a":
        shown = np.stack([np.array(Image.open(p)) for p in sorted((tmp_path / name).iterdir())])
    elif name == "a.mp4":
        shown = iio.imread(tmp_path / name, plugin="FFMPEG")
    else:
        shown = np.load(tmp_path / name) if name == "a.npy" else read_gif(tmp_path / name)[0]
    assert shown.shape == clip.shape
    assert np.abs(shown - clip.astype(int)).mean() < 12


def test_a_gif_holds_what_changes(tmp_path):
    """Twenty frames alike take little more than one, and none is wiped before the next."""
    still = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8).repeat(20, axis=0)
    for name, frames in (("one.gif", 1), ("all.gif", 20)):
        save_gif(tmp_path / name, iter(still[:frames]))
    one, all_ = ((tmp_path / name).read_bytes() for name in ("one.gif", "all.gif"))
    assert len(all_) < 2 * len(one) and all_.endswith(b";")
    gif = Image.open(tmp_path / "all.gif")
    assert [frame.disposal_method for frame in ImageSequence.Iterator(gif)] == [1] * 20


def test_an_mp4_keeps_colours_and_time(tmp_path):
    colours = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)], np.uint8)
    clip = np.broadcast_to(colours.repeat(16, axis=0)[None, None], (10, 32, 64, 3))
    for fps in (12.5, 29.97, 60):
        save_mp4(tmp_path / "a.mp4", iter(clip), fps)
        meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
        assert meta["fps"] == pytest.approx(fps) and meta["duration"] == pytest.approx(
            10 / fps, 0.1
        )
    shown = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")[:, 8:24]
    for i, colour in enumerate(colours):
        assert np.abs(shown[:, :, 16 * i + 5 : 16 * i + 11].mean(axis=(0, 1, 2)) - colour).max() < 6


@pytest.mark.parametrize("name", ["-y.mp4", "a:b.mp4", "a b %05d ü.mp4"])
def test_odd_names_of_mp4s(tmp_path, monkeypatch, name):
    """FFmpeg takes some names for options, others for protocols or numbered files."""
    monkeypatch.chdir(tmp_path)
    save_video(name, iter(noisy(3)))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).rename("a.mp4")
    assert len(iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")) == 3


def test_what_was_there_gives_way(tmp_path):
    """A shorter video leaves nothing of a longer one that had its name, and no other file goes."""
    for frames in (9, 4):
        for name in ("a.gif", "a.npy", "a"):
            save_video(tmp_path / name, iter(noisy(frames)))
    assert len(read_gif(tmp_path / "a.gif")[0]) == len(np.load(tmp_path / "a.npy")) == 4
    assert len(list((tmp_path / "a").iterdir())) == 4
    (tmp_path / "a" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
        with pytest.raises(OSError):
            save_video(tmp_path / name, iter(noisy(2)))
        assert not (tmp_path / f"{name}.part").exists()
    assert len(list((tmp_path / "a").glob("frame-*.png"))) == 4
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"


def test_a_gif_keeps_time(tmp_path):
    """A GIF counts hundredths of a second; rounding must not add up."""
    for fps in (0.5, 7, 12.5, 24, 29.97, 30, 48, 50):
        save_gif(tmp_path / "a.gif", iter(noisy(60)), fps)
        _, hundredths = read_gif(tmp_path / "a.gif")
        assert sum(hundredths) == pytest.approx(6000 / fps, abs=0.51)
        assert max(hundredths) - min(hundredths) <= 1 and min(hundredths) >= 2
    with pytest.raises(UserError, match="at most 50 frames a second: take mp4 for 60"):
        save_gif(tmp_path / "b.gif", iter(noisy(2)), 60)


def test_a_gif_of_any_length_shows_every_frame(tmp_path, monkeypatch):
    """Frames after those that the colours are chosen from, and more colours than a palette has."""
    monkeypatch.setattr(video, "PALETTE_BYTES", 7 * 24 * 40 * 3)
    clip = np.random.default_rng(0).integers(0, 256, (30, 1, 1, 3), np.uint8)
    clip = (clip // 2 + noisy(30) // 2).astype(np.uint8)
    save_gif(tmp_path / "a.gif", iter(clip))
    shown, _ = read_gif(tmp_path / "a.gif")
    assert shown.shape == clip.shape
    assert np.abs(shown[:8] - clip[:8].astype(int)).max() <= 16
    # A palette of 256 colours, however few there are: frames point to its last one.
    save_gif(tmp_path / "a.gif", iter(noisy(2)))
    assert (tmp_path / "a.gif").read_bytes()[10] & 7 == 7


def test_odd_sizes_as_mp4(tmp_path):
    clip = noisy(6, 25, 41)
    save_mp4(tmp_path / "a.mp4", iter(clip))
    shown = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert shown.shape == (6, 26, 42, 3)
    assert np.abs(shown[:, 24:] - shown[:, 23:24].astype(int)).mean() < 10  # the last row again


def test_an_ffmpeg_that_fails_is_said(tmp_path, monkeypatch):
    """As on a full disk: FFmpeg reads all frames, writes little, and ends with an error."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\ncat >/dev/null\necho no space left >&2\nexit 1\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    with pytest.raises(OSError, match=r"ffmpeg cannot write it \(no space left\)") as error:
        save_mp4(tmp_path / "a.mp4", iter(noisy(3)))
    assert error.value.filename == str(tmp_path / "a.mp4")
    ffmpeg.write_text("#!/bin/sh\nexit 3\n")  # and one that reads nothing
    with pytest.raises(OSError, match=r"ffmpeg cannot write it \(status 3\)"):
        save_mp4(tmp_path / "a.mp4", (np.zeros((512, 512, 3), np.uint8) for _ in range(9)))
    assert [p.name for p in tmp_path.iterdir()] == ["ffmpeg"]


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.npy", "a"])
def test_frames_that_fail_leave_no_file(tmp_path, name):
    def frames():
        yield from noisy(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_video(tmp_path / name, frames())
    assert not list(tmp_path.iterdir())
    save_video(tmp_path / name, iter(noisy(5)))
    with pytest.raises(KeyboardInterrupt):
        save_video(tmp_path / name, frames())
    assert [p.name for p in tmp_path.iterdir()] == [name]  # the earlier one
    if name == "a":
        assert len(list((tmp_path / name).iterdir())) == 5


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.avi: no such format; one of gif, mp4, png, npy"):
        save_video(tmp_path / "a.avi", iter(noisy(2)))


def test_enlarged():
    frame = noisy(1)[0]
    assert enlarge(frame, 1) is frame
    nearest = enlarge(frame, 3, "nearest")
    assert np.array_equal(nearest, frame.repeat(3, axis=0).repeat(3, axis=1))
    lanczos = enlarge(frame, 3, "lanczos")
    assert lanczos.shape == nearest.shape and len(np.unique(lanczos)) > len(np.unique(nearest))
    assert np.abs(lanczos - nearest.astype(int)).mean() < 8


def test_labels_can_be_drawn():
    """The font has a glyph for every letter in them; where they are too long, they are cut."""
    grid = LabelledGrid(["content 1"], ["motion 1"], 96)
    missing = grid.font.getmask("\uffff").getbbox(), bytes(grid.font.getmask("\uffff"))
    for letter in "content motion 0123456789-%":
        mask = grid.font.getmask(letter)
        assert (mask.getbbox(), bytes(mask)) != missing, letter
    small = LabelledGrid(["content 1"], ["motion 1"], 32)
    short = LabelledGrid(["c1"], ["m1"], 32)
    assert np.array_equal(small.sheet, short.sheet)


@pytest.mark.parametrize("size", [32, 96, 192])
def test_a_labelled_grid(size):
    grid = LabelledGrid(["content 1", "content 2"], ["motion 1", "motion 2", "motion 3"], size)
    shades = [np.full((size, size, 3), 20 * i, np.uint8) for i in range(6)]
    frame = grid.frame(iter(shades))
    assert frame.dtype == np.uint8 and frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    places = [grid.cell(r, c) for r in range(2) for c in range(3)]
    for place, shade in zip(places, shades):
        assert np.array_equal(frame[place], shade)
    rows, columns = places[0]
    for r in (rows.start - 1, rows.stop):  # thin lines around each
        assert (frame[r, columns] == video.LINE).all()
    for c in (columns.start - 1, columns.stop):
        assert (frame[rows, c] == video.LINE).all()
    ink = (grid.sheet < 100).all(axis=2)
    assert all(ink[: rows.start - 1, c].any() for _, c in places)  # a label above each column
    assert all(ink[r, : columns.start - 1].any() for r, _ in places)  # and beside each row
    assert not np.array_equal(grid.frame(iter(shades[::-1])), frame)
    assert np.array_equal(grid.frame(iter(shades)), frame)


def test_numpy_writes_the_same_file(tmp_path):
    save_npy(tmp_path / "ours.npy", iter(noisy(7)))
    np.save(tmp_path / "numpy.npy", noisy(7))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
