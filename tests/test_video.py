"""video.py: files are read back by another library than the one that wrote them."""

import itertools
import sys

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import encode
from PIL import Image, ImageSequence

import video
from utils import UserError
from video import FrameReader, LabelledGrid, Unusable, save_video


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
        ("a.mp4", "there is no ffmpeg here; install it"),
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
    assert np.array_equal(list(FrameReader(tmp_path / "a.gif")), frames)


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
    """On a disk that gets full, early or just before the end; at its start."""
    clip = np.random.default_rng(0).integers(0, 256, (12, 256, 256, 3), np.uint8)
    save_video(tmp_path / "a.mp4", iter(clip))
    size = (tmp_path / "a.mp4").stat().st_size
    ffmpeg, real = tmp_path / "ffmpeg", imageio_ffmpeg.get_ffmpeg_exe()
    script = f"#!{sys.executable}\nimport os, resource, sys\n"
    limit = script + "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    limit += f"os.execv({real!r}, [{real!r}] + sys.argv[1:])\n"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    for content, frames in (
        (limit.format(4096), clip),
        (limit.format(size - 1), clip),
        (script + "sys.exit(3)", clip),
    ):
        ffmpeg.write_text(content)
        ffmpeg.chmod(0o755)
        with pytest.raises(OSError, match="ffmpeg could not write it; is the disk full") as error:
            save_video(tmp_path / "b.mp4", iter(frames))
        assert error.value.filename == str(tmp_path / "b.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]


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


def frames_of(path, fps=None):
    """All frames that FrameReader gives: (K, H, W, 3) int."""
    return np.stack(list(FrameReader(path, fps))).astype(int)


TEST_VIDEO = "testsrc2=s=128x96:r=25:d=2"


@pytest.fixture(scope="module")
def source_frames(tmp_path_factory):
    """The frames of TEST_VIDEO as they are."""
    return frames_of(encode(tmp_path_factory.mktemp("test") / "a.avi", TEST_VIDEO, "-c:v", "ffv1"))


@pytest.mark.parametrize("name, options", [
    ("a.mpg", "-c:v mpeg2video -q:v 2"), ("a.vob", "-q:v 2"), ("a.m2v", "-q:v 2"),
    ("a.mxf", "-c:v mpeg2video -q:v 2"), ("a.divx", "-c:v mpeg4 -q:v 2 -f avi"),
    ("a.asf", "-c:v msmpeg4 -q:v 2"), ("a.3g2", "-c:v mpeg4 -q:v 2"), ("a.y4m", ""),
    ("a.mp4", "-c:v libsvtav1 -crf 10"), ("a.webm", "-c:v libvpx-vp9 -crf 10"),
    ("a.mkv", "-c:v ffv1 -pix_fmt rgb48le"), ("a.ts", "-c:v libx265 -crf 10 -pix_fmt yuv420p10"),
    ("a.dat", "-c:v mjpeg -q:v 2 -f mov"), ("a", "-c:v libx264 -crf 10 -f mp4"),
    ("a.png", "-f apng"), ("a.webp", "-c:v libwebp_anim -lossless 1"),
])  # fmt: skip
def test_frame_reader_reads_what_ffmpeg_reads(tmp_path, source_frames, name, options):
    frames = frames_of(encode(tmp_path / name, TEST_VIDEO, *options.split()))
    assert len(frames) == 50
    errors = [np.abs(source_frames - frame).mean(axis=(1, 2, 3)) for frame in frames]
    assert (
        np.argmin(errors, axis=1).tolist() == list(range(50)) and np.min(errors, axis=1).max() < 8
    )


@pytest.mark.parametrize("name, first, options", [
    ("a.mpg", "top", "-c:v mpeg2video -q:v 1 -flags +ildct+ilme"),
    ("a.MTS", "top", "-c:v libx264 -crf 5 -pix_fmt yuv420p -flags +ildct+ilme -x264-params tff=1"),
    ("a.mkv", "top", "-c:v ffv1"), ("b.mkv", "bottom", "-c:v ffv1"),
    ("b.vob", "bottom", "-c:v mpeg2video -q:v 1 -flags +ildct+ilme"),
])  # fmt: skip
def test_frame_reader_deinterlaces(tmp_path, name, first, options):
    """25 frames of two fields each, the upper or the lower one shown first, from 50 frames."""
    ball = "lum='255*exp(-(pow(X-10-N,2)+pow(Y-48,2))/200)':cb=128:cr=128"  # it moves
    source = f"color=black:s=128x96:r=50:d=2,geq={ball}"
    progressive = frames_of(encode(tmp_path / "p.avi", source, "-c:v", "ffv1"))
    fields = ["-vf", f"tinterlace=interleave_{first},setfield={first[0]}ff", *options.split()]
    frames = frames_of(encode(tmp_path / name, source, *fields))
    assert len(frames) == len({frame.tobytes() for frame in frames}) == 50
    woven = progressive[::2].copy()
    second = slice(first == "top", None, 2)
    woven[:, second] = progressive[1::2, second]
    ours, not_at_all = (np.abs(x - progressive[::2]).mean() for x in (frames, woven))
    assert ours < 0.3 * not_at_all


@pytest.mark.parametrize("options, upright", [
    ("-display_hflip", lambda v: v[:, :, ::-1]), ("-display_vflip", lambda v: v[:, ::-1]),
    ("-display_rotation 90", lambda v: np.rot90(v, 1, (1, 2))),
    ("-display_rotation 180", lambda v: np.rot90(v, 2, (1, 2))),
    ("-display_rotation 270", lambda v: np.rot90(v, 3, (1, 2))),
    ("-display_rotation 90 -display_hflip", lambda v: np.rot90(v[:, :, ::-1], 3, (1, 2))),
])  # fmt: skip
def test_frame_reader_turns_and_mirrors_as_the_metadata_says(tmp_path, options, upright):
    flat = encode(tmp_path / "a.mp4", TEST_VIDEO, "-pix_fmt", "yuv444p")
    turned = encode(tmp_path / "b.mp4", flat, "-c", "copy", before=options.split())
    np.testing.assert_array_equal(frames_of(turned), upright(frames_of(flat)))


@pytest.mark.parametrize("width, aspect", [(720, "64/45"), (1440, "32/45"), (1024, "1")])
def test_frame_reader_gives_square_pixels(tmp_path, width, aspect):
    circle = "color=black:s=1024x576:d=0.2,geq=lum='235*lt(hypot(X-512,Y-288),140)':cb=128:cr=128"
    scale = f"scale={width}:576,setsar={aspect},format=yuv420p"
    frame = frames_of(encode(tmp_path / "a.mp4", circle, "-vf", scale))[0]
    assert frame.shape == (576, 1024, 3)
    disc = frame[..., 1] > 120
    assert abs(disc.any(axis=0).sum() - disc.any(axis=1).sum()) <= 1


def test_frame_reader_takes_every_frame_of_a_varying_rate(tmp_path):
    """Each frame is a shade; after every tenth one, three frames' time passes with none."""
    shades = "color=black:s=32x32:r=25:d=4,geq=lum='20+2*N':cb=128:cr=128"
    pause = ["-vf", "setpts=(N+3*floor((N+0.5)/10)+0.1)/25/TB", "-fps_mode", "vfr"]
    path = encode(tmp_path / "a.mkv", shades, *pause, "-c:v", "ffv1")
    reader = FrameReader(path)
    shown = np.array([frame.mean() for frame in reader])
    assert len(shown) == 100 and (np.diff(shown) > 1).all()
    times = (np.arange(100) + 3 * (np.arange(100) // 10)) / 25
    np.testing.assert_allclose(reader.times, times, atol=1e-3)
    low, high = reader.rates()
    assert pytest.approx(low, rel=0.01) == 15 / (21 / 25)  # 16 frames with two gaps in them
    assert pytest.approx(high, rel=0.01) == 15 / (18 / 25)  # with one
    resampled = FrameReader(path, fps=25)
    expected = shown[np.searchsorted(times, np.arange(127) / 25 + 1e-6, side="right") - 1]
    np.testing.assert_allclose([frame.mean() for frame in resampled][:127], expected, atol=0.1)
    assert resampled.rates() == pytest.approx((25, 25), rel=0.01)


@pytest.mark.parametrize("fps, length", [(12.5, 25), (10, 20), (50, 100)])
def test_frame_reader_resamples(tmp_path, fps, length):
    title = "title=showinfo pts_time:-.- Duration: 1:1:1.1.1"  # which FFmpeg prints, too
    reader = FrameReader(encode(tmp_path / "a.mp4", TEST_VIDEO, "-metadata", title), fps)
    assert reader.has_frames()
    done = [reader.done for _ in reader]
    assert len(done) == length and done == sorted(done) and reader.done >= 0.9
    np.testing.assert_allclose(reader.times, np.arange(length) / fps, atol=1e-3)


def test_frame_reader_takes_what_can_be_decoded(tmp_path):
    path = encode(tmp_path / "a.avi", TEST_VIDEO, "-c:v", "mjpeg", "-q:v", "3")
    intact, content = frames_of(path), bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])  # cut off, without its index
    half = frames_of(path)
    assert 20 <= len(half) <= 30 and (half[:-1] == intact[: len(half) - 1]).all()
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    damaged = frames_of(path)
    assert len(damaged) >= 49 and (damaged[:20] == intact[:20]).all()
    assert (damaged[-20:] == intact[-20:]).all()


def test_frame_reader_survives_a_crash_of_ffmpeg(tmp_path, monkeypatch):
    """What came before is taken, as of any damaged file."""
    image = b"P6\n2 1\n255\n" + bytes(range(6))
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    script = f"#!{sys.executable}\nimport os\nos.write(1, {image + image[:-1]!r})\n"
    program.write_text(script + "os.abort()")
    program.chmod(0o755)
    assert frames_of(program).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    program.write_text(script + "os.kill(os.getpid(), 9)")  # as Linux does when memory is full
    with pytest.raises(Unusable, match="FFmpeg was killed: is there enough memory"):
        frames_of(program)


def test_frame_reader_takes_the_default_track(tmp_path):
    for colour in ("red", "green"):
        encode(tmp_path / f"{colour}.mkv", f"color={colour}:s=32x32:d=1", "-c:v", "ffv1")
    both = ["-i", str(tmp_path / "green.mkv"), "-map", "0", "-map", "1", "-c", "copy"]
    flags = ["-disposition:v:0", "0", "-disposition:v:1", "default"]
    encode(tmp_path / "a.mkv", tmp_path / "red.mkv", *both, *flags)
    assert frames_of(tmp_path / "a.mkv").mean(axis=(0, 1, 2)) == pytest.approx([0, 128, 0], abs=2)


def test_frame_reader_orders_a_folder_by_numbers(tmp_path):
    frames = moving_square(12)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{k}_of_12.png")
    (tmp_path / "._frame3.png").write_bytes(b"from a Mac")
    (tmp_path / "more").mkdir()
    Image.fromarray(frames[0]).save(tmp_path / "more" / "mask0.png")
    reader = FrameReader(tmp_path)
    assert [reader.done for _ in reader] == [k / 12 for k in range(1, 13)]
    assert np.array_equal(list(reader), frames) and reader.rates() is None
    (tmp_path / "frame7_of_12.png").write_bytes(b"")
    with pytest.raises(Unusable, match=r"^frame7_of_12.png is not an image that can be read$"):
        list(reader)
    Image.fromarray(frames[0, 1:]).save(tmp_path / "frame7_of_12.png")
    with pytest.raises(Unusable, match=r"images of different sizes, such as frame7_of_12.png"):
        list(reader)


@pytest.mark.parametrize("axis", [0, 1])
def test_frame_reader_splits_a_strip(tmp_path, axis):
    frames = moving_square(5, 32, 32)
    Image.fromarray(np.concatenate(frames, axis)).save(tmp_path / "a.PNG")
    assert np.array_equal(list(FrameReader(tmp_path / "a.PNG")), frames)
