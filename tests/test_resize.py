import errno
import http.server
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT, SHARED, run, write_video
from PIL import Image

import resize
import synthetic
from video import read_frames


def psnr(a, b):
    """Peak signal-to-noise ratio of two uint8 arrays, in decibels."""
    assert a.shape == b.shape
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def resized(capsys, *args):
    """Run resize.py in this process; returns the lines of its output."""
    resize.main([str(arg) for arg in args])
    return capsys.readouterr().out.splitlines()


def error_line(capsys, *args):
    """Run resize.py with something that it must refuse; returns its one-line error."""
    with pytest.raises(SystemExit) as exit_:
        resize.main([str(arg) for arg in args])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("resize.py: error: ")
    return line


def arrays(out):
    """All arrays below `out`: {path: array}."""
    return {path.relative_to(out).as_posix(): np.load(path) for path in sorted(out.rglob("*.npy"))}


@pytest.fixture
def one_person(monkeypatch):
    monkeypatch.setattr(synthetic, "PEOPLE", synthetic.PEOPLE[:1])


# ---------------------------------------------------------------- frames


def test_resize_frame_cuts_weizmann_frames_as_published(synthetic_clip):
    frame = synthetic_clip[0]
    assert (resize.resize_frame(frame) == frame[24:120, 42:138]).all()
    square = np.ascontiguousarray(frame[:96, :96])
    assert (resize.resize_frame(square) == square).all()


@pytest.mark.parametrize(
    "width, height, size",
    [
        (640, 480, 96),
        (1920, 1080, 64),
        (300, 300, 112),
        (90, 400, 96),
        (40, 30, 256),
        (97, 145, 32),
    ],
)
def test_resize_frame_keeps_the_centre(width, height, size):
    """Check the rule on a ramp whose colours say where each pixel came from."""
    x, y = (np.arange(n) + 0.5 for n in (width, height))
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 255 * x / width, (255 * y / height)[:, None]
    scale = size / width if width == height else max(size * 1.5 / height, size / width)
    out = resize.resize_frame(ramp, size)
    assert out.shape == (size, size, 3)
    centre = (np.arange(size) + 0.5 - size / 2) / scale
    for channel, axis, side in ((0, 0, width), (1, 1, height)):
        expected = 255 * (side / 2 + centre) / side
        actual = out[..., channel].mean(axis=axis)
        # one pixel of the source or of the target: sides are rounded, and so are centres
        assert np.abs(actual - expected).max() < 255 * (1 / side + 1 / scale / side) + 2


@pytest.mark.parametrize(
    "name, codec",
    [("a.avi", "mpeg4"), ("A.MP4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx-vp9"),
     ("a.gif", None)],
)  # fmt: skip
def test_read_frames_agrees_with_another_library(tmp_path, synthetic_clip, name, codec):
    path = tmp_path / name
    write_video(path, synthetic_clip[:20], **({"codec": codec} if codec else {}))
    ours = np.stack(list(read_frames(path)))
    options = {"plugin": "FFMPEG"} if codec else {"plugin": "pillow", "mode": "RGB"}
    assert psnr(ours, iio.imread(path, **options)) > 40  # conversions from YUV differ by 1 or 2
    assert psnr(ours, synthetic_clip[:20]) > 30  # and it is upright, and RGB


def test_read_frames_turns_a_rotated_video_upright(tmp_path, synthetic_clip):
    write_video(tmp_path / "a.mp4", synthetic_clip[:20])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    command += ["-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4"]
    subprocess.run(command, check=True)
    turned = np.stack(list(read_frames(tmp_path / "turned.mp4")))
    assert psnr(turned, np.rot90(synthetic_clip[:20], axes=(1, 2))) > 30


# ---------------------------------------------------------------- real clips


def test_strips_of_the_papers_own_code(tmp_path, capsys, synthetic_clip):
    folder, out = SHARED / "strips", tmp_path / "out"
    if not SHARED.is_dir():
        folder = tmp_path / "strips"
        folder.mkdir()
        for i in range(4):
            strip = np.hstack([cv2.resize(frame, (64, 64)) for frame in synthetic_clip[i:]])
            Image.fromarray(strip).save(folder / f"{i}.jpg", quality=95)
    lines = resized(capsys, "--raw", folder, "--out", out, "--size", 64)
    paths = sorted(folder.glob("*.jpg"))
    assert len(paths) == 4 and lines[-1].startswith("4 clips, ")
    for path in paths:
        image = np.array(Image.open(path).convert("RGB"))
        frames = image.reshape(64, -1, 64, 3).swapaxes(0, 1)
        assert psnr(np.load(out / path.with_suffix(".npy").name), frames) > 40


def test_raw_clips_give_the_published_ones(weizmann, tmp_path, capsys):
    raw, published, clips, frames, actions = weizmann
    out = tmp_path / "out"
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert lines == [f"{clips} clips, {frames} frames, {actions} actions → {out} (0 skipped)"]
    made = arrays(out)
    assert len(made) == clips and sum(map(len, made.values())) == frames
    assert {name.split("/")[0] for name in made} == {folder.name for folder in raw.iterdir()}
    for name, array in made.items():
        assert array.dtype == np.uint8 and array.shape[1:] == (96, 96, 3)
        number = int(name.split("/clip")[1][:2])  # walk/clip07_walk is 7.mp4
        assert psnr(array, iio.imread(published / f"{number}.mp4", plugin="FFMPEG")) >= 30


def test_published_videos_in_out_itself_are_converted(weizmann, tmp_path, capsys):
    out = tmp_path / "resized_data"
    out.mkdir()
    for path in sorted(weizmann[1].glob("*.mp4"))[:3]:
        (out / path.name).write_bytes(path.read_bytes())
    lines = resized(capsys, "--raw", tmp_path / "nowhere", "--out", out)
    assert lines[-1].startswith("3 clips, ") and lines[-1].endswith(f"→ {out} (0 skipped)")
    for path in out.glob("*.mp4"):
        assert psnr(np.load(path.with_suffix(".npy")), iio.imread(path, plugin="FFMPEG")) > 40


# ---------------------------------------------------------------- running it


def test_only_what_is_new_or_changed_is_made(tmp_path, capsys, synthetic_clip):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "jack" / "indoors").mkdir(parents=True)
    write_video(raw / "jack" / "a.mp4", synthetic_clip[:40])
    write_video(raw / "jack" / "indoors" / "b.mp4", synthetic_clip[:34])
    a, b = out / "jack" / "a.npy", out / "jack" / "indoors" / "b.npy"

    def made_again(*args):
        """Run it; returns the shapes of both arrays, and which of them were written."""
        for path in (p for p in tmp_path.rglob("*") if p.is_file()):  # all of it is old, and
            os.utime(path, (2, 2) if path.suffix == ".npy" else (1, 1))  # the arrays are newer
        yield resized(capsys, "--raw", raw, "--out", out, *args)
        assert sorted(out.rglob("*.npy")) == [a, b] and not list(out.rglob("*.part"))
        yield [np.load(path).shape for path in (a, b)]
        yield [path.stat().st_mtime > 2 for path in (a, b)]

    lines, shapes, _ = made_again()
    assert lines == [f"2 clips, 74 frames, 1 actions → {out} (0 skipped)"]
    assert shapes == [(40, 96, 96, 3), (34, 96, 96, 3)]
    assert list(made_again()) == [lines, shapes, [False, False]]
    for n, args in ((64, ("--size", 64)), (64, ("--size", 64, "--every", 2)), (96, ())):
        _, shapes, written = made_again(*args)
        lengths = (20, 17) if "--every" in args else (40, 34)
        assert shapes == [(length, n, n, 3) for length in lengths] and written == [True, True]
    for damaged in (b"damaged", a.read_bytes()[:-1], b""):
        a.write_bytes(damaged)
        _, shapes, written = made_again()
        assert shapes == [(40, 96, 96, 3), (34, 96, 96, 3)] and written == [True, False]
    for array in (np.zeros((15, 96, 96, 3), np.uint8), np.zeros((40, 96, 96, 3), np.float32)):
        np.save(b, array)
        assert list(made_again())[1:] == [shapes, [False, True]]


def test_a_changed_source_is_converted_again(tmp_path, capsys, synthetic_clip):
    out = tmp_path / "out"
    args = "--raw", tmp_path, "--out", out, "--size", 32
    for length in (20, 18):
        write_video(tmp_path / "a.mp4", synthetic_clip[:length])
        write_video(tmp_path / "b.mp4", synthetic_clip[:16])
        os.utime(tmp_path / "b.mp4", (1, 1))
        resized(capsys, *args)
        assert [len(array) for array in arrays(out).values()] == [length, 16]
    (tmp_path / "a.mp4").write_text("not a video any more")
    assert "skipped" in resized(capsys, *args)[0]
    assert len(np.load(out / "a.npy")) == 18  # what cannot be replaced stays


def test_every_keeps_every_nth_frame(tmp_path, capsys, synthetic_clip):
    write_video(tmp_path / "a.mp4", synthetic_clip[:50])
    for name, every in (("all", 1), ("third", 3)):
        resized(capsys, "--raw", tmp_path, "--out", tmp_path / name, "--every", every)
    frames, third = (np.load(tmp_path / name / "a.npy") for name in ("all", "third"))
    assert (third == frames[::3]).all() and len(third) == 17


def test_bad_files_are_named_and_counted(tmp_path, capsys, synthetic_clip):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write_video(raw / "good.mp4", synthetic_clip[:20])
    write_video(raw / "short.mp4", synthetic_clip[:15])
    write_video(raw / "good.avi", synthetic_clip[:16], codec="mpeg4")
    (raw / "text.mp4").write_text("hello")
    (raw / "empty.avi").write_bytes(b"")
    (raw / "cut.mp4").write_bytes((raw / "good.mp4").read_bytes()[:3000])
    (raw / "words.jpg").write_text("hello")
    (raw / "gone.mp4").symlink_to("nowhere")
    (raw / os.fsdecode(b"\xff.mp4")).write_bytes((raw / "good.mp4").read_bytes())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0))
    (raw / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))
    Image.fromarray(synthetic_clip[0]).save(raw / "photo.png")
    (raw / ".hidden.mp4").write_text("ignored")
    (raw / "readme.txt").write_text("ignored")
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert lines[-1] == f"1 clips, 16 frames, 0 actions → {out} (10 skipped)"
    reasons = dict(line.removeprefix(f"skipped {raw}/").split(": ", 1) for line in lines[:-1])
    assert "CV_IO_MAX_IMAGE_PIXELS" in reasons.pop("huge.png")
    assert reasons == {
        "short.mp4": "15 frames, shorter than 16",
        "good.mp4": f"would make the same array as {raw / 'good.avi'}: rename one",
        "text.mp4": "not a video that can be read",
        "empty.avi": "not a video that can be read",
        "cut.mp4": "not a video that can be read",
        "words.jpg": "not an image that can be read",
        "gone.mp4": "No such file or directory",
        os.fsdecode(b"\xff.mp4"): "its name is not valid UTF-8: rename it",
        "photo.png": "180×144 is not a strip of square frames",
    }
    assert list(arrays(out)) == ["good.npy"] and not list(out.rglob("*.part"))
    (raw / "good.avi").write_text("hello")
    assert "no clips from 11 files" in error_line(capsys, "--raw", raw, "--out", out)


def test_a_bad_file_prints_nothing_but_its_line(tmp_path):
    """OpenCV and FFmpeg stay silent, in a fresh process, and a name in no encoding is printed."""
    (tmp_path / "bad.mp4").write_text("hello")
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_text("hello")
    strip = np.zeros((32, 32 * 16, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "good.png")
    done = run("resize.py", "--raw", tmp_path, "--out", tmp_path / "out")
    assert done.stdout.count("\n") == 3
    assert [
        line for line in done.stderr.split("\r") if line.strip() and "resizing: " not in line
    ] == []
    assert "WARN" not in done.stderr


def test_one_folder_in_the_other_gives_each_clip_once(tmp_path, capsys, synthetic_clip):
    inner, outer = tmp_path / "data" / "inner", tmp_path / "data"
    (inner / "walk").mkdir(parents=True)
    write_video(inner / "walk" / "a.mp4", synthetic_clip[:20])
    write_video(outer / "take:1 ü×%d.mp4", synthetic_clip[:20])
    (tmp_path / "same").symlink_to(outer)
    for raw, out, summary in (
        (inner, outer, "2 clips, 40 frames, 1 actions"),
        (outer, inner, "2 clips, 40 frames, 1 actions"),
        (outer, tmp_path / "same", "2 clips, 40 frames, 1 actions"),
    ):
        assert resized(capsys, "--raw", raw, "--out", out)[0].startswith(summary)
    assert (outer / "walk" / "a.npy").exists() and (inner / "walk" / "a.npy").exists()


def test_other_arrays_in_the_folder_are_mentioned(tmp_path, capsys, synthetic_clip):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, synthetic_clip[:20])
    assert len(resized(capsys, "--raw", tmp_path, "--out", tmp_path / "out")) == 1
    (tmp_path / "b.mp4").unlink()
    lines = resized(capsys, "--raw", tmp_path, "--out", tmp_path / "out")
    assert "also holds 1 arrays of other clips, such as b.npy" in lines[-1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--size", "90"], "invalid choice: 90 (choose from 32, 48, "),
        (["--every", "0"], "'0' is not a whole number from 1"),
        (["--out", __file__], "is not a folder"),
        (["--download", "--synthetic"], "not allowed with"),
        (["--what"], "unrecognized arguments"),
        (["--raw", "nowhere"], "no clips from 0 files; put videos into a folder for each action"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, capsys, args, message):
    assert message in error_line(capsys, "--out", tmp_path, *args)


# ---------------------------------------------------------------- writing


def test_an_interrupted_array_leaves_no_file(tmp_path, synthetic_clip):
    def interrupted():
        yield from synthetic_clip[:18]
        raise KeyboardInterrupt

    array = resize.Path("walk", "a.npy")
    with pytest.raises(KeyboardInterrupt):
        resize.convert({array: (resize.Path(__file__), interrupted())}, tmp_path)
    assert not list((tmp_path / "walk").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run(tmp_path, capsys, monkeypatch, synthetic_clip, code):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, synthetic_clip[:20])
    out, fsync = tmp_path / "out", os.fsync

    def full(descriptor):
        if list(out.rglob("b.npy.part")):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as exit_:
        resize.main(["--raw", str(tmp_path), "--out", str(out)])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and "skipped" not in printed.out
    assert f"{out / 'b.npy'}: {os.strerror(code)}; free some space" in printed.err
    assert list(arrays(out)) == ["a.npy"] and not list(out.rglob("*.part"))


# ---------------------------------------------------------------- synthetic clips


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory):
    """All synthetic clips, of a run that is killed as it writes the fourth and is repeated.

    Returns the folder, what the second run printed, and {array: time} of those from before.
    """
    out = tmp_path_factory.mktemp("synthetic") / "out"
    command = [sys.executable, ROOT / "resize.py", "--synthetic", "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.rglob("*.npy"))) < 3 or not list(out.rglob("*.part")):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    return out, run("resize.py", "--synthetic", "--out", out).stdout, times


def test_a_killed_run_is_completed(synthetic_run):
    out, printed, times = synthetic_run
    frames = sum(map(len, arrays(out).values()))
    assert printed == f"90 clips, {frames} frames, 10 actions → {out} (0 skipped)\n"
    assert len(times) >= 3 and not list(out.rglob("*.part"))
    assert {path: path.stat().st_mtime_ns for path in times} == times  # not made again


def test_synthetic_clips_show_moving_people(synthetic_run):
    clips = arrays(synthetic_run[0])
    people = [person.name for person in synthetic.PEOPLE]
    assert len(people) == 9 and len(synthetic.MOVEMENTS) == 10
    assert clips.keys() == {f"{a}/{who}_{a}.npy" for a in synthetic.MOVEMENTS for who in people}
    for name, clip in clips.items():
        assert clip.shape[1:] == (96, 96, 3) and len(clip) >= 36, name
        figure = (np.abs(clip - np.median(clip, axis=0)) > 40).any(axis=3)  # beside the wall
        assert figure.any(axis=(1, 2)).mean() > 0.4, f"{name}: nobody in it"
        assert (figure[1:] != figure[:-1]).mean() > 1e-3, f"{name}: nothing moves"


def test_synthetic_clips_are_the_same_every_time(synthetic_run):
    """What another process rendered, pixel by pixel, is what this one renders."""
    for person, action in ((0, "walk"), (4, "wave2"), (8, "bend")):
        who = synthetic.PEOPLE[person]
        clip = np.stack([f[24:120, 42:138] for f in synthetic.render_clip(who, action)])
        assert (clip == np.load(synthetic_run[0] / action / f"{who.name}_{action}.npy")).all()


def test_synthetic_figures_do_what_the_action_says():
    """The hands, the feet and the distance, read off the poses."""
    phases = np.linspace(0, 2, 81)
    for action, (movement, _, _) in synthetic.MOVEMENTS.items():
        poses = [movement(p) for p in phases]
        travel = [pose.travel for pose in poses]
        travels = action in ("jump", "run", "side", "skip", "walk")
        assert (travel[-1] - travel[0] > 1) == travels and np.diff(travel).min() >= 0, action
        lifts = max(pose.lift for pose in poses) > 0.03
        assert lifts == (action in ("jack", "jump", "pjump", "run", "side", "skip")), action
        one, both = (
            any(which(arm[1] > 150 for arm in pose.arms) for pose in poses) for which in (any, all)
        )
        assert one == (action in ("jack", "wave1", "wave2")), action
        assert both == (action in ("jack", "wave2")), action
        assert (max(pose.lean for pose in poses) > 80) == (action == "bend"), action


def test_synthetic_and_real_clips_do_not_mix(tmp_path, capsys, synthetic_clip, one_person):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "walk").mkdir(parents=True)
    (raw / "bad.mp4").write_text("hello")
    resized(capsys, "--synthetic", "--out", out, "--size", 32)
    assert "no clips from 1 files" in error_line(capsys, "--raw", raw, "--out", out, "--size", 32)
    assert len(arrays(out)) == 10  # nothing real has come in their place
    write_video(raw / "walk" / "anna_walk.mp4", synthetic_clip[:20])  # named as a synthetic one
    os.utime(raw / "walk" / "anna_walk.mp4", (1, 1))
    write_video(raw / "walk" / "mine.mp4", synthetic_clip[:20])
    lines = resized(capsys, "--raw", raw, "--out", out, "--size", 32)
    assert lines[1:] == [
        f"removed 9 synthetic clips from {out}",
        f"2 clips, 40 frames, 1 actions → {out} (1 skipped)",
    ]
    made = arrays(out)
    assert list(made) == ["walk/anna_walk.npy", "walk/mine.npy"]
    assert (made["walk/anna_walk.npy"] == made["walk/mine.npy"]).all()  # real, both
    assert "holds other clips, such as walk/mine.npy" in error_line(
        capsys, "--synthetic", "--out", out
    )
    assert list(arrays(out)) == list(made)


def test_synthetic_clips_that_are_too_short_are_named(tmp_path, capsys, one_person):
    lines = resized(capsys, "--synthetic", "--out", tmp_path, "--every", 4, "--size", 32)
    assert "skipped run/anna_run.npy: 9 frames, shorter than 16" in lines


# ---------------------------------------------------------------- downloading


class Server:
    """A server of files on 127.0.0.1 that notes the requests; it can cut off or never answer."""

    def __init__(self, files, cut_after=None, silent=False):
        self.requests = requests = []
        self.closing = closing = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path.lstrip("/"))
                if silent:
                    closing.wait()
                    return
                if requests[-1] not in files:
                    return self.send_error(404)
                body = files[requests[-1]]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut_after])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def make_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def zips(tmp_path_factory, synthetic_clip):
    """Ten zips like Weizmann's, of one clip each."""
    path = tmp_path_factory.mktemp("zips") / "a.avi"
    write_video(path, synthetic_clip[:20], codec="mpeg4")
    clip = path.read_bytes()
    return {f"{a}.zip": make_zip({f"anna_{a}.avi": clip}) for a in synthetic.MOVEMENTS}


@pytest.fixture(autouse=True)
def default_timeout():
    yield
    socket.setdefaulttimeout(None)


def test_download_fetches_each_zip_once(zips, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "bend.zip.0123.partial").write_bytes(b"of a download that was killed")
    with Server(zips) as server:
        args = "--download", "--url", f"{server.url}/", "--raw", raw, "--out", out
        lines = resized(capsys, *args)
        assert lines[-1] == f"10 clips, 200 frames, 10 actions → {out} (0 skipped)"
        assert lines[:-1] == [f"downloading {server.url}/{name}" for name in zips]
        assert (out / "walk" / "anna_walk.npy").exists()
        (raw / "run" / "anna_run.avi").unlink()
        (raw / "walk" / "anna_walk.avi").write_bytes(b"cut off as it was extracted")
        assert resized(capsys, *args) == lines[-1:]
        assert server.requests == list(zips)
    files = {path.relative_to(raw).as_posix(): path.read_bytes() for path in raw.glob("*/*")}
    assert len(files) == 10 and len(set(files.values())) == 1 and not list(raw.glob("*.partial"))


@pytest.mark.parametrize(
    "case, message",
    [
        ("404", "Not Found"),
        ("dead", "Connection refused"),
        ("silent", "timed out"),
        ("cut off", "File is not a zip file"),
        ("damaged", "damaged zip"),
        ("html", "File is not a zip file"),
        ("no url", "unknown url type"),
    ],
)
def test_download_failures_are_one_line(zips, tmp_path, capsys, monkeypatch, case, message):
    damaged = bytearray(zips["bend.zip"])
    damaged[len(damaged) // 2] ^= 1
    files = {"404": {}, "damaged": {"bend.zip": bytes(damaged)}, "html": {"bend.zip": b"<html>"}}
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 100))
    cut_after = 10_000 if case == "cut off" else None
    with Server(files.get(case, zips), cut_after, silent=case == "silent") as server:
        url = {"dead": "http://127.0.0.1:1", "no url": "127.0.0.1/x"}.get(case, server.url)
        line = error_line(capsys, "--download", "--url", url, "--raw", tmp_path)
    assert f"cannot download {url}/bend.zip: " in line and message in line
    assert "--url" in line and "--synthetic" in line
    assert len(server.requests) == (case not in ("dead", "no url"))
    assert not list(tmp_path.glob("[!.]*"))  # the next run fetches it again


def test_download_lets_no_member_leave_its_folder(zips, tmp_path, capsys):
    raw = tmp_path / "a" / "b" / "raw"
    raw.mkdir(parents=True)
    for name, content in zips.items():
        (raw / name).write_bytes(content)
    evil = {"../evil.txt": b"1", "/tmp/evil.txt": b"2", "a/../../../../evil.txt": b"3"}
    (raw / "bend.zip").write_bytes(make_zip(evil))
    resized(capsys, "--download", "--url", "http://127.0.0.1:1", "--raw", raw, "--out", tmp_path)
    found = list(tmp_path.rglob("evil.txt"))
    assert len(found) == 3 and all(path.is_relative_to(raw / "bend") for path in found)
    assert not os.path.exists("/tmp/evil.txt")
