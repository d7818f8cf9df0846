"""video.py: files are read back by another library than the one that wrote them."""

import itertools
import sys

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

import video
from utils import UserError
from video import LabelledGrid, enlarge, read_frames, save_video


def moving_square(frames, height=24, width=40):
    """A bright square that moves over a dark background: (K, H, W, 3) uint8."""
    clip = np.full((frames, height, width, 3), (60, 20, 90), np.uint8)
    for k in range(frames):
        clip[k, 8:16, 2 + k % 24 : 10 + k % 24] = (250, 200, 10)
    return clip


def read_back(path):
    """The frames of a file or a folder of PNGs, (K, H, W, 3)."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".gif":
        gif = ImageSequence.Iterator(Image.open(path))
        return np.stack([np.array(frame.convert("RGB")) for frame in gif])
    if path.suffix == ".mp4":
        return iio.imread(path, plugin="FFMPEG")
    return np.stack([cv2.imread(str(p))[..., ::-1] for p in sorted(path.glob("frame-*.png"))])


def durations(path):
    """The duration of each frame of a GIF, in hundredths of a second."""
    return [frame.info["duration"] // 10 for frame in ImageSequence.Iterator(Image.open(path))]


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.npy", "a"])
def test_save_video_is_read_back(tmp_path, name):
    for length in (20, 1):  # the shorter one leaves nothing of the longer one
        clip = moving_square(length)
        save_video(tmp_path / name, iter(clip), fps=20)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        frames = read_back(tmp_path / name)
        assert frames.shape == clip.shape
        # Only MP4 is lossy: the palette of a GIF has room for two colours.
        assert np.abs(frames - clip.astype(int)).mean() <= (6 if name == "a.mp4" else 0)


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.npy"])
def test_save_video_replaces_a_file_only_when_complete(tmp_path, name):
    def interrupted():
        yield from moving_square(3)
        raise KeyboardInterrupt

    for expected in ([], [name]):
        with pytest.raises(KeyboardInterrupt):
            save_video(tmp_path / name, interrupted())
        assert [path.name for path in tmp_path.iterdir()] == expected
        save_video(tmp_path / name, iter(moving_square(5)))
    assert len(read_back(tmp_path / name)) == 5


def test_save_video_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    for name, message in (
        ("a.avi", r"a\.avi: unknown format, choose one of gif, mp4"),
        ("a.gif", "at most 50 frames per second: use mp4 for 60"),
        ("a.mp4", "no ffmpeg here: pip install imageio-ffmpeg"),
    ):
        with pytest.raises(UserError, match=message):
            save_video(tmp_path / name, iter(moving_square(2)), fps=60)


@pytest.mark.parametrize("palette_frames", [100, 3])
def test_save_gif_keeps_still_what_stands_still(
    tmp_path, synthetic_clip, monkeypatch, palette_frames
):
    """Also after the frames from which the palette is made, and in a second decoder."""
    clip = synthetic_clip[:16]
    monkeypatch.setattr(video, "PALETTE_BYTES", palette_frames * clip[0].nbytes)
    still = (clip == clip[0]).all(axis=(0, 3))
    assert 0.5 < still.mean() < 0.99
    save_video(tmp_path / "a.gif", iter(clip))
    frames = read_back(tmp_path / "a.gif")
    assert (frames[:, still] == frames[0, still]).all()
    assert np.abs(frames.astype(int) - clip).mean() < 4
    assert np.array_equal(list(read_frames(tmp_path / "a.gif")), frames)


def test_save_gif_durations_do_not_drift(tmp_path):
    for fps in (0.5, 7, 29.97, 30, 48, 50):
        save_video(tmp_path / "a.gif", iter(moving_square(60)), fps)
        hundredths = durations(tmp_path / "a.gif")
        assert len(hundredths) == 60 and min(hundredths) >= 2
        assert max(hundredths) - min(hundredths) <= 1
        assert sum(hundredths) == pytest.approx(6000 / fps, abs=0.51)
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0


def test_save_mp4_keeps_colours_and_time(tmp_path):
    colours = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)], np.uint8)
    clip = np.broadcast_to(colours.repeat(16, axis=0)[None, None], (10, 32, 64, 3))
    for fps in (12.5, 29.97, 60):
        save_video(tmp_path / "a.mp4", iter(clip), fps)
        meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
        assert meta["fps"] == pytest.approx(fps, abs=0.01)
        assert meta["duration"] == pytest.approx(10 / fps, abs=0.02)
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p(tv, bt709")
    shown = read_back(tmp_path / "a.mp4")[:, 8:24]
    for i, colour in enumerate(colours):
        assert np.abs(shown[:, :, 16 * i + 5 : 16 * i + 11].mean(axis=(0, 1, 2)) - colour).max() < 6
    boxes = (tmp_path / "a.mp4").read_bytes()
    assert boxes.index(b"moov") < boxes.index(b"mdat")  # plays before it is fully loaded


def test_save_mp4_takes_odd_names_and_odd_sizes(tmp_path, monkeypatch):
    """Not as an option, a protocol or numbered files; the last row and column are repeated."""
    monkeypatch.chdir(tmp_path)
    save_video("-y:b %05d ü.mp4", iter(moving_square(6, 25, 41)))
    assert [path.name for path in tmp_path.iterdir()] == ["-y:b %05d ü.mp4"]
    frames = read_back((tmp_path / "-y:b %05d ü.mp4").rename(tmp_path / "a.mp4")).astype(int)
    assert frames.shape == (6, 26, 42, 3)
    assert np.abs(frames[:, 25] - frames[:, 24]).mean() < 10
    assert np.abs(frames[:, :, 41] - frames[:, :, 40]).mean() < 10


def test_save_mp4_raises_if_ffmpeg_fails(tmp_path, monkeypatch):
    """On a disk that gets full, early or just before the end; if frames are lost; at its start."""
    clip = np.random.default_rng(0).integers(0, 256, (12, 256, 256, 3), np.uint8)
    save_video(tmp_path / "a.mp4", iter(clip))
    size = (tmp_path / "a.mp4").stat().st_size
    ffmpeg, real = tmp_path / "ffmpeg", imageio_ffmpeg.get_ffmpeg_exe()
    script = f"#!{sys.executable}\nimport os, resource, sys\n"
    limit = script + "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    limit += f"os.execv({real!r}, [{real!r}] + sys.argv[1:])\n"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    lossy = script + "options = ['-frames:v', '5'] * ('-crf' in sys.argv)\n"
    lossy += f"os.execv({real!r}, [{real!r}] + sys.argv[1:-1] + options + sys.argv[-1:])\n"
    for content, frames in (
        (limit.format(4096), clip),
        (limit.format(size - 1), clip),
        (lossy, clip[:, :32, :32]),
        (script + "sys.exit(3)", clip),
    ):
        ffmpeg.write_text(content)
        ffmpeg.chmod(0o755)
        with pytest.raises(OSError, match="ffmpeg could not write it; is the disk full") as error:
            save_video(tmp_path / "b.mp4", iter(frames))
        assert error.value.filename == str(tmp_path / "b.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]


def test_enlarge_repeats_or_interpolates_pixels():
    frame = moving_square(1)[0]
    assert np.array_equal(enlarge(frame, 1), frame)
    nearest, lanczos = enlarge(frame, 3), enlarge(frame, 3, "lanczos")
    assert np.array_equal(nearest, frame.repeat(3, axis=0).repeat(3, axis=1))
    assert lanczos.shape == nearest.shape and len(np.unique(lanczos)) > len(np.unique(nearest))
    assert np.abs(lanczos - nearest.astype(int)).mean() < 8


@pytest.mark.parametrize("size", [64, 192])
def test_labelled_grid_places_videos_between_lines_and_labels(size):
    grid = LabelledGrid(["content 1", "content 2"], ["motion 1", "motion 2", "motion 3"], size)
    shades = [np.full((size, size, 3), 20 + 20 * i, np.uint8) for i in range(6)]
    frame = grid.frame(iter(shades))
    assert frame.dtype == np.uint8 and frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    tops, lefts = ([grid.margin + 2 + i * (size + 2) for i in range(n)] for n in (2, 3))
    ink = (frame < 100).all(axis=2)
    for i, (y, x) in enumerate(itertools.product(tops, lefts)):
        assert (frame[y : y + size, x : x + size] == shades[i]).all()
        assert (frame[y - 1, x : x + size] == 255).all()
        assert (frame[y : y + size, x - 1] == 255).all()
        assert ink[: grid.margin, x : x + size].any()  # a label above each column
        assert ink[y : y + size, : grid.margin].any()  # and left of each row
    swapped = LabelledGrid(["content 2", "content 1"], ["motion 1", "motion 2", "motion 3"], size)
    second = swapped.empty[tops[1] : tops[1] + size, : grid.margin]
    assert np.array_equal(frame[tops[0] : tops[0] + size, : grid.margin], second)
    assert np.array_equal(grid.frame(shades), frame)  # every frame starts from an empty grid
    with pytest.raises(UserError, match=r"a grid of .* pixels is too large \(16384\)"):
        LabelledGrid(["content"] * 100, ["motion"] * 2, 192)


@pytest.mark.parametrize("axis", [0, 1])
def test_read_frames_splits_a_strip(tmp_path, axis):
    frames = moving_square(5, 32, 32)
    Image.fromarray(np.concatenate(frames, axis)).save(tmp_path / "a.PNG")
    assert np.array_equal(list(read_frames(tmp_path / "a.PNG")), frames)
