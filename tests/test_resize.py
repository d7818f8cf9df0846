import errno
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from functools import partial

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
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code in (1, 2) and line.startswith("resize.py: error: ")
    return line


def arrays(out):
    """All arrays below `out`: {path: array}."""
    return {path.relative_to(out).as_posix(): np.load(path) for path in sorted(out.rglob("*.npy"))}


def write_strip(path, length, size=32):
    """Write a strip of frames of noise, which no compression changes; returns the frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(length).integers(0, 256, (length, size, size, 3), np.uint8)
    Image.fromarray(np.concatenate(frames, axis=1)).save(path)
    return frames


def test_resize_frame_cuts_weizmann_frames_and_averages_larger_ones(synthetic_clip):
    frame = synthetic_clip[0]
    assert (resize.resize_frame(frame) == frame[24:120, 42:138]).all()
    assert (resize.resize_frame(frame[:96, :96]) == frame[:96, :96]).all()
    means = frame[:128, :128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))  # no aliasing
    assert np.abs(resize.resize_frame(frame[:128, :128], 64) - means).max() < 1


@pytest.mark.parametrize("width, height, size", [
    (640, 480, 96), (1920, 1080, 64), (300, 300, 112), (90, 400, 96), (40, 30, 256), (97, 145, 32)
])  # fmt: skip
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


@pytest.mark.parametrize("name, codec", [
    ("a.avi", "mpeg4"), ("A.MP4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx-vp9"),
    ("a.gif", None)
])  # fmt: skip
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/weizmann")
def test_strips_of_the_papers_own_code_are_converted(tmp_path, capsys):
    lines = resized(capsys, "--raw", SHARED / "strips", "--out", tmp_path, "--size", 64)
    assert lines[-1].startswith("4 clips, ")
    for name, array in arrays(tmp_path).items():
        path = SHARED / "strips" / name.replace(".npy", ".jpg")
        image = iio.imread(path, plugin="pillow", mode="RGB")
        assert psnr(array, image.reshape(64, -1, 64, 3).swapaxes(0, 1)) > 40


def test_raw_clips_give_the_published_ones(weizmann, tmp_path, capsys):
    raw, published, clips, frames, actions = weizmann
    lines = resized(capsys, "--raw", raw, "--out", tmp_path)
    assert lines == [f"{clips} clips, {frames} frames, {actions} actions → {tmp_path} (0 skipped)"]
    made = arrays(tmp_path)
    assert len(made) == clips and sum(map(len, made.values())) == frames
    assert {name.split("/")[0] for name in made} == {folder.name for folder in raw.iterdir()}
    for name, array in made.items():
        assert array.dtype == np.uint8 and array.shape[1:] == (96, 96, 3)
        number = int(name.split("/clip")[1][:2])  # walk/clip07_walk is 7.mp4
        assert psnr(array, iio.imread(published / f"{number}.mp4", plugin="FFMPEG")) >= 30


def test_only_what_is_new_or_changed_is_made(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    a, b = raw / "jack" / "a.png", raw / "jack" / "indoors" / "b.png"
    frames_a, frames_b = write_strip(a, 40), write_strip(b, 34)

    def written(*args):
        """Make all files old, the arrays less so, and run it: the names of the arrays written."""
        for path in out.rglob("*"):
            os.utime(path, (2, 2) if path.suffix == ".npy" else (1, 1))
        os.utime(b, (1, 1))
        lines = resized(capsys, "--raw", raw, "--out", out, "--size", 32, *args)
        assert lines[0].endswith(f" frames, 1 actions → {out} (0 skipped)")
        assert list(arrays(out)) == ["jack/a.npy", "jack/indoors/b.npy"]
        return "".join(path.stem for path in sorted(out.rglob("*.npy")) if path.stat().st_mtime > 2)

    def holds(array_a, array_b):
        return all(map(np.array_equal, arrays(out).values(), (array_a, array_b)))

    assert written() == "ab" and holds(frames_a, frames_b)
    os.utime(a, (1, 1))
    assert written() == ""
    assert written("--every", 2) == "ab" and holds(frames_a[::2], frames_b[::2])
    assert written() == "ab" and holds(frames_a, frames_b)
    assert written("--size", 64) == "ab"
    assert {array.shape[1:] for array in arrays(out).values()} == {(64, 64, 3)}
    assert written() == "ab" and holds(frames_a, frames_b)
    frames_a = write_strip(a, 20)
    assert written() == "a" and holds(frames_a, frames_b)
    os.utime(a, (1, 1))
    array = out / "jack" / "a.npy"
    for content in (b"damaged", array.read_bytes()[:-1], b""):
        array.write_bytes(content)
        assert written() == "a" and holds(frames_a, frames_b)
    for other in (frames_a[:15], frames_a.astype(np.float32), np.uint8(0)):
        np.save(array, other)
        assert written() == "a" and holds(frames_a, frames_b)
    b.unlink()
    lines = resized(capsys, "--raw", raw, "--out", out, "--size", 32)
    assert "also holds 1 arrays of other clips, such as jack/indoors/b.npy" in lines[-1]


def test_bad_files_are_named_and_counted(tmp_path, monkeypatch):
    for name in ("OPENCV_LOG_LEVEL", "OPENCV_FFMPEG_LOGLEVEL"):
        monkeypatch.delenv(name, raising=False)  # set by video.py in this process
    for name, length in (("short.png", 15), ("good.jpg", 16), ("good.png", 17)):
        write_strip(tmp_path / name, length)
    for name in ("text.mp4", "words.jpg", ".hidden.mp4", "readme.txt", os.fsdecode(b"\xff.mp4")):
        (tmp_path / name).write_text("hello")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    png = bytearray((tmp_path / "good.png").read_bytes())
    png[16:24] = struct.pack(">II", 65536, 65536)  # its size, and the checksum of its header
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "huge.png").write_bytes(png)
    Image.fromarray(np.zeros((144, 180, 3), np.uint8)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    done = run("resize.py", "--raw", tmp_path, "--out", out, "--size", "32")
    *skipped, last = done.stdout.splitlines()
    assert last == f"1 clips, 16 frames, 0 actions → {out} (8 skipped)"
    reasons = dict(line.removeprefix(f"skipped {tmp_path}/").split(": ", 1) for line in skipped)
    assert "CV_IO_MAX_IMAGE_PIXELS" in reasons.pop("huge.png")
    assert reasons == {
        "short.png": "15 frames, shorter than 16",
        "good.png": f"would make the same array as {tmp_path / 'good.jpg'}: rename one",
        "text.mp4": "not a video that can be read",
        "words.jpg": "not an image that can be read",
        "gone.mp4": "No such file or directory",
        "?.mp4": "its name is not valid UTF-8: rename it",
        "photo.png": "180×144 is not a strip of square frames",
    }
    assert list(arrays(out)) == ["good.npy"] and not list(out.rglob("*.part"))
    assert "WARN" not in done.stderr and "mp4" not in done.stderr  # FFmpeg and OpenCV are silent


def test_one_folder_in_the_other_gives_each_clip_once(tmp_path, capsys):
    outer, inner = tmp_path / "data", tmp_path / "data" / "inner"
    write_strip(inner / "walk" / "a.png", 20)
    write_strip(outer / "take:1 ü×%d.png", 20)
    (tmp_path / "same").symlink_to(outer)
    for raw, out in ((inner, outer), (outer, inner), (outer, tmp_path / "same")):
        lines = resized(capsys, "--raw", raw, "--out", out)
        assert lines[0].startswith("2 clips, 40 frames, 1 actions")
    assert (outer / "walk" / "a.npy").exists() and (inner / "walk" / "a.npy").exists()


@pytest.mark.parametrize("args, message", [
    (["--size", "90"], "invalid choice: 90 (choose from 32, 48, "),
    (["--every", "0"], "argument --every: "),
    (["--out", __file__], "test_resize.py: File exists"),
    (["--download", "--synthetic"], "not allowed with"),
    (["--raw", "nowhere"], "no clips from 0 files; put videos into a folder for each action"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_line(tmp_path, capsys, args, message):
    assert message in error_line(capsys, "--out", tmp_path, *args)


def test_a_full_disk_ends_the_run(tmp_path, capsys, monkeypatch):
    for name in ("a.png", "b.png"):
        write_strip(tmp_path / name, 20)
    out, fsync = tmp_path / "out", os.fsync

    def full(descriptor):
        if (out / "b.npy.part").exists():
            raise OSError(errno.ENOSPC, "No space left")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    line = error_line(capsys, "--raw", tmp_path, "--out", out)
    assert line.endswith(f"{out / 'b.npy'}: No space left; free some space")
    assert list(arrays(out)) == ["a.npy"] and not list(out.rglob("*.part"))


def test_a_killed_run_is_completed(tmp_path, capsys, monkeypatch):
    hangs_in_the_fourth_clip = """if True:
        import resize, synthetic, time
        synthetic.PEOPLE, frames_left = synthetic.PEOPLE[:1], iter(range(200))
        resize_frame = resize.resize_frame
        resize.resize_frame = lambda *args: (
            resize_frame(*args) if next(frames_left, None) is not None else time.sleep(999)
        )
        resize.main()"""
    command = [sys.executable, "-c", hangs_in_the_fourth_clip, "--synthetic", "--out", tmp_path]
    process = subprocess.Popen(command, cwd=ROOT)
    while len(list(tmp_path.rglob("*.npy"))) < 3 or not list(tmp_path.rglob("*.part")):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    monkeypatch.setattr(synthetic, "PEOPLE", synthetic.PEOPLE[:1])
    lines = resized(capsys, "--synthetic", "--out", tmp_path)
    made = arrays(tmp_path)
    frames = sum(map(len, made.values()))
    assert lines == [f"10 clips, {frames} frames, 10 actions → {tmp_path} (0 skipped)"]
    assert made.keys() == {f"{action}/anna_{action}.npy" for action in synthetic.MOVEMENTS}
    assert not list(tmp_path.rglob("*.part"))
    assert {path: path.stat().st_mtime_ns for path in times} == times  # not made again
    bend = synthetic.render_clip(synthetic.PEOPLE[0], "bend")  # the same in every process
    assert (made["bend/anna_bend.npy"] == np.stack(list(bend))[:, 24:120, 42:138]).all()


def test_synthetic_clips_show_moving_people():
    assert len(resize.synthetic_sources()) == 90
    for who, action in zip(synthetic.PEOPLE + synthetic.PEOPLE[:1], synthetic.MOVEMENTS):
        clip = np.stack(list(synthetic.render_clip(who, action)))[:, 24:120, 42:138]
        assert len(clip) >= 36, action
        figure = (np.abs(clip - np.median(clip, axis=0)) > 40).any(axis=3)  # not the wall
        assert figure.any(axis=(1, 2)).mean() > 0.4, f"{who.name}, {action}: nobody in it"
        assert (figure[1:] != figure[:-1]).mean() > 1e-3, f"{who.name}, {action}: nothing moves"


@pytest.mark.parametrize("action", synthetic.MOVEMENTS)
def test_synthetic_figures_do_what_the_action_says(action):
    """The hands, the feet and the distance, read off the poses."""
    poses = [synthetic.MOVEMENTS[action][0](p) for p in np.linspace(0, 2, 81)]
    travel = np.array([pose.travel for pose in poses])
    travels = action in ("jump", "run", "side", "skip", "walk")
    assert (travel[-1] - travel[0] > 1) == travels and np.diff(travel).min() >= 0
    lifts = max(pose.lift for pose in poses) > 0.03
    assert lifts == (action in ("jack", "jump", "pjump", "run", "side", "skip"))
    hands = [sorted(arm[1] for arm in pose.arms) for pose in poses]  # 180: straight up
    assert any(upper > 150 for _, upper in hands) == (action in ("jack", "wave1", "wave2"))
    assert any(lower > 150 for lower, _ in hands) == (action in ("jack", "wave2"))
    assert (max(pose.lean for pose in poses) > 80) == (action == "bend")


def test_synthetic_and_real_clips_do_not_mix(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synthetic, "PEOPLE", synthetic.PEOPLE[:1])
    monkeypatch.setattr(resize, "ACTIONS", ("run", "walk"))
    raw, out = tmp_path / "raw", tmp_path / "out"
    args = "--raw", raw, "--out", out, "--size", 32
    lines = resized(capsys, "--synthetic", *args, "--every", 4)
    assert "skipped run/anna_run.npy: 10 frames, shorter than 16" in lines
    resized(capsys, "--synthetic", *args)
    write_strip(raw / "bad.png", 15)
    assert "no clips from 1 files" in error_line(capsys, *args)
    assert len(arrays(out)) == 2  # nothing real has come in their place
    frames = write_strip(raw / "walk" / "anna_walk.png", 20)  # named like a synthetic one,
    os.utime(raw / "walk" / "anna_walk.png", (1, 1))  # and older
    write_strip(raw / "walk" / "mine.png", 20)
    assert resized(capsys, *args)[1:] == [
        f"removed 1 synthetic clips from {out}",
        f"2 clips, 40 frames, 1 actions → {out} (1 skipped)",
    ]
    for _ in range(2):
        made = arrays(out)
        assert list(made) == ["walk/anna_walk.npy", "walk/mine.npy"]
        assert (made["walk/anna_walk.npy"] == frames).all()
        assert "holds other clips, such as walk/mine" in error_line(capsys, "--synthetic", *args)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def server(tmp_path):
    """A server of ten zips like Weizmann's, of one strip each.

    `limit`: how many bytes of a file it sends before it closes the connection.
    """
    write_strip(tmp_path / "strip.png", 20)
    folder = tmp_path / "served"
    folder.mkdir()
    for action in synthetic.MOVEMENTS:
        strip = {f"anna_{action}.png": (tmp_path / "strip.png").read_bytes()}
        write_zip(folder / f"{action}.zip", strip)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            server.requests.append(self.path)

        def copyfile(self, source, output):
            output.write(source.read(server.limit))

    handler = partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.folder, server.requests, server.limit = folder, [], -1
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
    socket.setdefaulttimeout(None)


def test_download_fetches_each_zip_once(server, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    args = "--download", "--url", f"{server.url}/", "--raw", raw, "--out", out
    lines = resized(capsys, *args)
    assert lines[-1] == f"10 clips, 200 frames, 10 actions → {out} (0 skipped)"
    assert lines[0] == f"downloading {server.url}/bend.zip" and len(lines) == 11
    (raw / "run" / "anna_run.png").unlink()
    (raw / "walk" / "anna_walk.png").write_bytes(b"cut off while it was extracted")
    assert resized(capsys, *args) == lines[-1:]
    assert server.requests == [f"/{action}.zip" for action in synthetic.MOVEMENTS]
    strips = [path.read_bytes() for path in raw.glob("*/anna_*.png")]
    assert strips == [(tmp_path / "strip.png").read_bytes()] * 10


@pytest.mark.parametrize("case, message", [
    ("missing", "File not found"), ("dead", "Connection refused"), ("silent", "timed out"),
    ("cut off", "not a zip file"), ("damaged", "damaged zip"), ("html", "not a zip file"),
    ("no url", "unknown url type")
])  # fmt: skip
def test_download_failures_are_one_line(server, tmp_path, capsys, monkeypatch, case, message):
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 100))
    content = bytearray((server.folder / "bend.zip").read_bytes())
    content[len(content) // 2] ^= case == "damaged"
    content = b"<html>busy</html>" if case == "html" else content
    (server.folder / "bend.zip").write_bytes(content)
    server.limit = 10_000 if case == "cut off" else -1
    silent = socket.create_server(("127.0.0.1", 0))  # accepts connections and never answers
    url = {
        "missing": f"{server.url}/nowhere",
        "dead": "http://127.0.0.1:1",
        "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "no url": "127.0.0.1/x",
    }.get(case, server.url)
    with silent:
        line = error_line(capsys, "--download", "--url", url, "--raw", tmp_path / "raw")
    assert f"cannot download {url}/bend.zip: " in line and message in line
    assert "--url" in line and "--synthetic" in line
    assert not (tmp_path / "raw" / "bend.zip").exists()  # the next run fetches it again


def test_download_lets_no_member_leave_its_folder(server, tmp_path, capsys):
    evil = {"../evil.txt": b"1", "/tmp/evil.txt": b"2", "a/../../../evil.txt": b"3"}
    write_zip(server.folder / "bend.zip", evil)
    raw = tmp_path / "a" / "b" / "raw"
    resized(capsys, "--download", "--url", server.url, "--raw", raw, "--out", tmp_path / "out")
    found = list(tmp_path.rglob("evil.txt"))
    assert len(found) == 3 and all(path.is_relative_to(raw / "bend") for path in found)
    assert not os.path.exists("/tmp/evil.txt")
