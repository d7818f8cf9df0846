import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT, SHARED, run, write_video
from PIL import Image

import resize
import synthetic


def psnr(a, b):
    """Peak signal-to-noise ratio of two uint8 arrays, in decibels."""
    assert a.shape == b.shape
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def resized(capsys, *args):
    """Run resize.py in this process; returns what it printed, by line."""
    resize.main([str(arg) for arg in args])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *args):
    """Run resize.py with something that it must refuse; returns its one line."""
    with pytest.raises(SystemExit) as exit_:
        resize.main([str(arg) for arg in args])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("resize.py: error: ")
    return line


# ---------------------------------------------------------------- geometry


def test_weizmann_frames_are_cut_as_published(drawn):
    assert (resize.resize_frame(drawn[0]) == drawn[0][24:120, 42:138]).all()


def test_square_frames_pass_whole(drawn):
    square = np.ascontiguousarray(drawn[0][:96, :96])
    assert (resize.resize_frame(square) == square).all()


@pytest.mark.parametrize("size", [32, 64, 96, 112, 256])
@pytest.mark.parametrize("width, height", [(180, 144), (640, 480), (1920, 1080), (300, 300),
                                           (480, 854), (90, 400), (40, 30), (97, 145)])  # fmt: skip
def test_what_part_of_a_frame_is_kept(width, height, size):
    """Against the rule, on a ramp whose colours say where each pixel came from."""
    x, y = (np.arange(n) + 0.5 for n in (width, height))
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 255 * x / width, (255 * y / height)[:, None]
    scale = size / width if width == height else max(size * 1.5 / height, size / width)
    out = resize.resize_frame(ramp, size)
    assert out.shape == (size, size, 3)
    centre = (np.arange(size) + 0.5 - size / 2) / scale
    for channel, axis, side in ((0, 0, width), (1, 1, height)):
        expected = 255 * (side / 2 + centre) / side
        got = out[..., channel].mean(axis=axis)
        # one pixel of the source or of the target: sides are rounded, and so are centres
        assert np.abs(got - expected).max() < 255 * (1 / side + 1 / scale / side) + 2


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.avi", {"codec": "mpeg4"}),
        ("a.mp4", {}),
        ("a.mov", {}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.gif", {}),
        ("A.MP4", {}),
    ],
)
def test_formats_read_as_another_library_reads_them(tmp_path, drawn, name, options):
    path = tmp_path / name
    write_video(path, drawn[:20], **options)
    ours = np.stack(list(resize.read_frames(path)))
    plugin = "pillow" if path.suffix == ".gif" else "FFMPEG"
    theirs = iio.imread(path, plugin=plugin, **({"mode": "RGB"} if plugin == "pillow" else {}))
    assert psnr(ours, theirs) > 40  # conversions from YUV differ by a level or two
    assert psnr(ours, drawn[:20]) > 30  # and it is the right way up, in RGB


def test_a_video_held_upright_is_read_upright(tmp_path, drawn):
    write_video(tmp_path / "a.mp4", drawn[:20])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    command += ["-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4"]
    subprocess.run(command, check=True)
    turned = np.stack(list(resize.read_frames(tmp_path / "turned.mp4")))
    assert psnr(turned, np.rot90(drawn[:20], axes=(1, 2))) > 30


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_strips(tmp_path, capsys, drawn, down, suffix):
    squares = drawn[:20, 24:120, 42:138]
    strip = np.concatenate(squares, axis=0 if down else 1)
    Image.fromarray(strip).save(tmp_path / f"a{suffix}", quality=98)
    assert resized(capsys, "--raw", tmp_path, "--out", tmp_path / "out")
    assert psnr(np.load(tmp_path / "out" / "a.npy"), squares) > (30 if suffix == ".jpg" else 80)


def test_the_strips_of_the_papers_own_code(tmp_path, capsys, drawn):
    if SHARED.is_dir():
        folder = SHARED / "strips"
    else:
        folder = tmp_path / "strips"
        folder.mkdir()
        for i in range(4):
            strip = np.hstack([cv2.resize(frame, (64, 64)) for frame in drawn[i:]])
            Image.fromarray(strip).save(folder / f"{i}.jpg", quality=95)
    out = tmp_path / "out"
    lines = resized(capsys, "--raw", folder, "--out", out, "--size", 64)
    paths = sorted(folder.glob("*.jpg"))
    assert len(paths) == 4 and lines[-1].startswith("4 clips, ")
    for path in paths:
        image = np.array(Image.open(path).convert("RGB"))
        frames = image.reshape(64, -1, 64, 3).swapaxes(0, 1)
        assert psnr(np.load(out / path.with_suffix(".npy").name), frames) > 40


# ---------------------------------------------------------------- the Weizmann clips


def test_raw_clips_give_the_published_ones(weizmann, tmp_path, capsys):
    raw, published, clips, frames, actions = weizmann
    out = tmp_path / "out"
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert lines[-1] == f"{clips} clips, {frames} frames, {actions} actions → {out} (0 skipped)"
    arrays = sorted(out.glob("*/*.npy"))
    assert len(arrays) == clips
    assert {a.parent.name for a in arrays} == {folder.name for folder in raw.iterdir()}
    total = 0
    for path in arrays:
        array = np.load(path)
        assert array.dtype == np.uint8 and array.shape[1:] == (96, 96, 3)
        number = int(path.stem[4:6])  # clip07_walk is 7.mp4
        assert psnr(array, iio.imread(published / f"{number}.mp4", plugin="FFMPEG")) >= 30
        total += len(array)
    assert total == frames


def test_published_videos_are_converted_where_they_lie(weizmann, tmp_path, capsys):
    out = tmp_path / "resized_data"
    out.mkdir()
    for path in sorted(weizmann[1].glob("*.mp4"))[:5]:
        (out / path.name).write_bytes(path.read_bytes())
    lines = resized(capsys, "--raw", tmp_path / "nowhere", "--out", out)
    assert lines[-1].startswith("5 clips, ") and lines[-1].endswith(f"→ {out} (0 skipped)")
    for path in out.glob("*.mp4"):
        assert psnr(np.load(path.with_suffix(".npy")), iio.imread(path, plugin="FFMPEG")) > 40


# ---------------------------------------------------------------- running it


def test_it_runs_again_without_doing_it_again(tmp_path, capsys, drawn):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "jack" / "indoors").mkdir(parents=True)
    write_video(raw / "jack" / "a.mp4", drawn[:40])
    write_video(raw / "jack" / "indoors" / "b.mp4", drawn[:34])

    def go(*args):
        lines = resized(capsys, "--raw", raw, "--out", out, *args)
        arrays = sorted(out.rglob("*.npy"))
        assert [a.relative_to(out).as_posix() for a in arrays] == [
            "jack/a.npy",
            "jack/indoors/b.npy",
        ]
        return lines, [np.load(a).shape for a in arrays], [a.stat().st_mtime_ns for a in arrays]

    lines, shapes, first = go()
    assert lines == [f"2 clips, 74 frames, 1 actions → {out} (0 skipped)"]
    assert go() == (lines, shapes, first)  # nothing was written
    write_video(raw / "jack" / "a.mp4", drawn[:35])  # one has changed
    _, shapes, second = go()
    assert shapes == [(35, 96, 96, 3), (34, 96, 96, 3)]
    assert second[0] != first[0] and second[1] == first[1]
    _, shapes, _ = go("--size", 64)
    assert shapes == [(35, 64, 64, 3), (34, 64, 64, 3)]
    _, shapes, _ = go("--size", 64, "--every", 2)
    assert shapes == [(18, 64, 64, 3), (17, 64, 64, 3)]
    (out / "jack" / "a.npy").write_bytes(b"damaged")
    _, shapes, _ = go("--size", 64, "--every", 1)
    assert shapes == [(35, 64, 64, 3), (34, 64, 64, 3)]


def test_every_keeps_every_nth_frame(tmp_path, capsys, drawn):
    write_video(tmp_path / "a.mp4", drawn[:50])
    resized(capsys, "--raw", tmp_path, "--out", tmp_path / "all")
    resized(capsys, "--raw", tmp_path, "--out", tmp_path / "third", "--every", 3)
    whole, third = (np.load(tmp_path / name / "a.npy") for name in ("all", "third"))
    assert (third == whole[::3]).all() and len(third) == 17


def test_bad_files_are_named_and_counted(tmp_path, capsys, drawn):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write_video(raw / "good.mp4", drawn[:20])
    write_video(raw / "short.mp4", drawn[:15])
    write_video(raw / "good.avi", drawn[:16], codec="mpeg4")
    (raw / "text.mp4").write_text("hello")
    (raw / "empty.avi").write_bytes(b"")
    (raw / "cut.mp4").write_bytes((raw / "good.mp4").read_bytes()[:3000])
    (raw / "words.jpg").write_text("hello")
    Image.fromarray(drawn[0]).save(raw / "photo.png")
    (raw / ".hidden.mp4").write_text("not looked at")
    (raw / "readme.txt").write_text("not looked at")
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert lines[-1] == f"1 clips, 16 frames, 0 actions → {out} (7 skipped)"
    reasons = dict(
        line.removeprefix(f"skipped {raw}{os.sep}").split(": ", 1) for line in lines[:-1]
    )
    assert reasons == {
        "short.mp4": "15 frames, shorter than 16",
        "good.mp4": f"would make the same array as {raw / 'good.avi'}: rename one",
        "text.mp4": "not a video that can be read",
        "empty.avi": "not a video that can be read",
        "cut.mp4": "not a video that can be read",
        "words.jpg": "not an image that can be read",
        "photo.png": "180×144 is not a strip of square frames",
    }
    assert sorted(p.name for p in out.glob("[!.]*")) == ["clips.jsonl", "good.npy"]
    (raw / "good.avi").write_text("hello")  # nothing is left: an error, and the array stays
    assert "none of 8 files gave a clip" in refused(capsys, "--raw", raw, "--out", out)
    assert np.load(out / "good.npy").shape == (16, 96, 96, 3)


def test_what_fails_leaves_the_arrays_alone(tmp_path, capsys, drawn, monkeypatch):
    monkeypatch.setattr(synthetic, "PEOPLE", synthetic.PEOPLE[:1])
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    resized(capsys, "--synthetic", "--out", out)
    (raw / "bad.mp4").write_text("hello")
    assert "none of 1 files" in refused(capsys, "--raw", raw, "--out", out)
    assert len(list(out.rglob("*.npy"))) == 10
    assert "shorter than 16" in refused(capsys, "--synthetic", "--every", 50, "--out", out)
    assert len(list(out.rglob("*.npy"))) == 10


def test_one_folder_in_the_other(tmp_path, capsys, drawn):
    (tmp_path / "data" / "raw" / "walk").mkdir(parents=True)
    write_video(tmp_path / "data" / "raw" / "walk" / "a.mp4", drawn[:20])
    write_video(tmp_path / "data" / "b.mp4", drawn[:20])
    lines = resized(capsys, "--raw", tmp_path / "data" / "raw", "--out", tmp_path / "data")
    assert lines == [f"2 clips, 40 frames, 1 actions → {tmp_path / 'data'} (0 skipped)"]
    assert (tmp_path / "data" / "walk" / "a.npy").exists()
    (tmp_path / "videos" / "resized").mkdir(parents=True)
    write_video(tmp_path / "videos" / "resized" / "a.mp4", drawn[:20])
    args = "--raw", tmp_path / "videos", "--out", tmp_path / "videos" / "resized"
    assert resized(capsys, *args)[-1].startswith("1 clips, 20 frames, 0 actions")
    args = "--raw", tmp_path / "videos", "--out", tmp_path / "videos"
    assert resized(capsys, *args)[-1].startswith("1 clips, 20 frames, 1 actions")
    (tmp_path / "same").symlink_to(tmp_path / "videos")
    args = "--raw", tmp_path / "videos", "--out", tmp_path / "same"
    assert resized(capsys, *args)[-1].startswith("1 clips, 20 frames, 1 actions")


def test_odd_names_and_damaged_records(tmp_path, capsys, drawn):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    for name in ("take:1.mp4", "-x y%d.mp4", "ü×.mp4"):
        write_video(raw / "a.mp4", drawn[:20])
        (raw / "a.mp4").rename(raw / name)
    not_utf8 = os.fsdecode(b"x\xff.mp4")
    (raw / not_utf8).write_bytes((raw / "take:1.mp4").read_bytes())
    precious = tmp_path / "precious.npy"
    np.save(precious, np.zeros(3))
    lines = [[1, 2], None, 3, ["take:1.npy", None], ["take:1.npy", {"source": 5}], [["a"], {}]]
    lines.append(["../precious.npy", {"source": ["synthetic", 1]}])
    record = "\n".join(map(json.dumps, lines)).encode() + b"\n\xff\n" + b"[" * 100_000
    (out / "clips.jsonl").write_bytes(record)
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert "its name is not valid UTF-8: rename it" in lines[0]
    assert lines[1] == f"3 clips, 60 frames, 0 actions → {out} (1 skipped)"
    assert precious.exists()


def test_a_video_that_ends_early_is_mentioned(tmp_path, capsys, drawn):
    write_video(tmp_path / "a.mp4", drawn[:50], output_params=["-movflags", "faststart"])
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 8 // 10])
    lines = resized(capsys, "--raw", tmp_path, "--out", tmp_path / "out")
    assert re.match(rf"note: {tmp_path / 'a.mp4'}: only \d+ of 50 frames could be read", lines[0])


def test_nothing_usable_says_what_to_do(tmp_path, capsys):
    line = refused(capsys, "--raw", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "no videos in" in line and "--download" in line and "--synthetic" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--size", "90"], "'90' is not a multiple of 16"),
        (["--size", "16"], "'16' is not a whole number from 32 to 256"),
        (["--every", "0"], "'0' is not a whole number from 1"),
        (["--download", "--synthetic"], "choose one"),
        (["--download", "--url", "ftp://x"], "must begin with http"),
        (["--what"], "unrecognized arguments"),
    ],
)
def test_bad_flags(capsys, args, message):
    with pytest.raises(SystemExit) as exit_:
        resize.main(args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


def test_an_array_is_written_whole_or_not_at_all(tmp_path, drawn):
    path = tmp_path / "a.npy"

    def breaks_off():
        yield from drawn[:18]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resize.write_clip(path, breaks_off())
    assert not list(tmp_path.iterdir())
    assert resize.write_clip(path, iter(drawn[:18])) == 18
    assert (np.load(path) == drawn[:18, 24:120, 42:138]).all()
    assert isinstance(np.load(path, mmap_mode="r"), np.memmap)


def test_killed_while_it_writes(tmp_path):
    """Really killed, at three moments: what is there is whole, and the next run completes it."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "resize.py", "--synthetic", "--out", out]
    for arrays in (1, 8, 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.rglob("*.npy"))) < arrays:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for path in out.rglob("*.npy"):
            assert np.load(path, mmap_mode="r").shape[1:] == (96, 96, 3)
    last = run("resize.py", "--synthetic", "--out", out).stdout.splitlines()[-1]
    assert last.startswith("90 clips, ") and last.endswith("(0 skipped)")
    assert not list(out.rglob("*.part"))


# ---------------------------------------------------------------- synthetic clips


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "out"
    done = run("resize.py", "--synthetic", "--out", out)
    return out, done.stdout


def test_synthetic_clips(synthetic_folder):
    out, said = synthetic_folder
    arrays = {path.stem: np.load(path) for path in out.glob("*/*.npy")}
    frames = sum(map(len, arrays.values()))
    assert said == f"90 clips, {frames} frames, 10 actions → {out} (0 skipped)\n"
    people = {name.rsplit("_", 1)[0] for name in arrays}
    assert len(people) == 9
    for action in resize.ACTIONS:
        assert {p.name for p in (out / action).iterdir()} == {f"{p}_{action}.npy" for p in people}
    for name, clip in arrays.items():
        assert clip.shape[1:] == (96, 96, 3) and len(clip) >= 36, name
        wall = np.median(clip, axis=0)
        figure = (np.abs(clip - wall) > 40).any(axis=3)
        assert figure.any(axis=(1, 2)).mean() > 0.4, f"{name}: nobody is there"
        assert (figure[1:] != figure[:-1]).mean() > 1e-3, f"{name}: nothing moves"


def test_synthetic_clips_are_the_same_every_time(synthetic_folder):
    """What another process drew, pixel by pixel, is what this one draws."""
    out = synthetic_folder[0]
    for person, action in ((0, "walk"), (4, "wave2"), (8, "bend")):
        who = synthetic.PEOPLE[person]
        clip = np.stack([resize.resize_frame(f) for f in synthetic.draw_clip(who, action)])
        assert (clip == np.load(out / action / f"{who.name}_{action}.npy")).all()


def test_figures_do_what_the_action_says():
    """The hands, the feet and the way made, read off the poses."""
    phases = np.linspace(0, 2, 81)
    poses = {a: [move(p) for p in phases] for a, (move, _, _) in synthetic.MOVEMENTS.items()}
    for action, path in poses.items():
        made = [pose.travel for pose in path]
        on_the_way = action in ("jump", "run", "side", "skip", "walk")
        assert (made[-1] - made[0] > 1) == on_the_way and np.diff(made).min() >= 0, action
        lifts = max(pose.lift for pose in path) > 0.03
        assert lifts == (action in ("jack", "jump", "pjump", "run", "side", "skip")), action
        overhead = [max(arm[1] for arm in pose.arms) > 150 for pose in path]
        both = [min(arm[1] for arm in pose.arms) > 150 for pose in path]
        assert any(overhead) == (action in ("jack", "wave1", "wave2")), action
        assert any(both) == (action in ("jack", "wave2")), action
        assert (max(pose.lean for pose in path) > 80) == (action == "bend"), action


def test_synthetic_and_real_clips_do_not_mix(tmp_path, capsys, drawn, monkeypatch):
    monkeypatch.setattr(synthetic, "PEOPLE", synthetic.PEOPLE[:1])
    raw, out = tmp_path / "raw", tmp_path / "out"
    resized(capsys, "--synthetic", "--out", out)
    assert len(list(out.rglob("*.npy"))) == 10
    (raw / "mine").mkdir(parents=True)
    write_video(raw / "mine" / "a.mp4", drawn[:20])
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert lines[0] == f"removed 10 clips that --synthetic had drawn in {out}"
    assert lines[1] == f"1 clips, 20 frames, 1 actions → {out} (0 skipped)" and len(lines) == 2
    assert [a.name for a in out.rglob("*.npy")] == ["a.npy"]
    assert "holds other clips" in refused(capsys, "--synthetic", "--out", out)
    assert [a.name for a in out.rglob("*.npy")] == ["a.npy"]


def test_other_arrays_in_the_folder_are_mentioned(tmp_path, capsys, drawn):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write_video(raw / "a.mp4", drawn[:20])
    write_video(raw / "b.mp4", drawn[:20])
    resized(capsys, "--raw", raw, "--out", out)
    (raw / "b.mp4").unlink()
    lines = resized(capsys, "--raw", raw, "--out", out)
    assert f"{out} also holds 1 that these clips did not give, such as b.npy" in lines[-1]


# ---------------------------------------------------------------- downloading


class Server:
    """A server of zips on 127.0.0.1, which can cut a connection off and count what it sent."""

    def __init__(self, files, ranges=True, cut_after=None):
        self.requests, self.sent, self.cuts = [], 0, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                outer.requests.append((name, start))
                if name not in files:
                    return self.send_error(404)
                body = files[name]
                if ranges and start >= len(body):
                    return self.send_error(416)
                body = body[start:] if ranges else body
                self.send_response(206 if ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if cut_after and name not in outer.cuts:
                    outer.cuts.append(name)
                    body = body[:cut_after]
                    self.close_connection = True
                self.wfile.write(body)
                outer.sent += len(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def make_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def zips(tmp_path_factory, drawn):
    """Ten zips as Weizmann's, of one clip each."""
    path = tmp_path_factory.mktemp("zips") / "a.avi"
    write_video(path, drawn[:20], codec="mpeg4")
    clip = path.read_bytes()
    return {f"{a}.zip": make_zip({f"anna_{a}.avi": clip}) for a in resize.ACTIONS}


def test_download(zips, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    with Server(zips) as server:
        args = "--download", "--url", server.url, "--raw", raw, "--out", out
        lines = resized(capsys, *args)
        assert lines[-1] == f"10 clips, 200 frames, 10 actions → {out} (0 skipped)"
        assert (out / "walk" / "anna_walk.npy").exists()
        assert server.requests == [(name, 0) for name in zips]
        resized(capsys, *args)
        assert len(server.requests) == 10  # nothing is fetched twice
        (raw / "run" / "anna_run.avi").unlink()
        resized(capsys, *args)  # but what is missing is unpacked again
        assert len(server.requests) == 10 and (raw / "run" / "anna_run.avi").exists()
    assert not list(raw.rglob("*.part"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_cut_off_is_taken_up_again(zips, tmp_path, capsys, ranges):
    total = sum(map(len, zips.values()))
    with Server(zips, ranges, cut_after=10_000) as server:
        resized(capsys, "--download", "--url", server.url, "--raw", tmp_path / "raw",
                "--out", tmp_path / "out")  # fmt: skip
        starts = [10_000 * again for _ in zips for again in (0, 1)]
        assert [start for _, start in server.requests] == starts
        assert server.sent == total + (0 if ranges else 10 * 10_000)
    for name, content in zips.items():
        assert (tmp_path / "raw" / name).read_bytes() == content


def test_a_download_killed_is_taken_up_again(zips, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    for have in (7_000, len(zips["bend.zip"])):  # cut off half-way, or just before it was renamed
        (raw / "bend.zip").unlink(missing_ok=True)
        (raw / "bend.zip.part").write_bytes(zips["bend.zip"][:have])
        with Server(zips) as server:
            resize.fetch(f"{server.url}/bend.zip", raw / "bend.zip")
            assert server.requests == [("bend.zip", have)]
        assert (raw / "bend.zip").read_bytes() == zips["bend.zip"]
        assert not (raw / "bend.zip.part").exists()


def test_no_server_no_file_and_damaged_files(zips, tmp_path, capsys):
    def fails(url):
        return refused(capsys, "--download", "--url", url, "--raw", tmp_path / "raw")

    with Server(zips) as server:
        pass
    line = fails(server.url)  # nobody is there any more
    assert "cannot download" in line and "--url" in line and "--synthetic" in line
    with Server({}) as server:
        assert "Not Found" in fails(server.url) and len(server.requests) == 1
    damaged = bytearray(zips["bend.zip"])
    damaged[len(damaged) // 2] ^= 1
    for url in ("http://[::1", "http://..x/"):
        assert "cannot download" in fails(url)
    for content in (bytes(damaged), b"<html>busy</html>", zips["bend.zip"][:5000]):
        with Server(zips | {"bend.zip": content}) as server:
            assert "not a sound zip" in fails(server.url)
        assert not list((tmp_path / "raw").glob("[!.]*"))


@pytest.mark.parametrize("name", ["../evil.avi", "/tmp/evil.avi", "a/../../evil.avi"])
def test_no_member_leaves_its_folder(tmp_path, capsys, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "bend.zip").write_bytes(make_zip({"good.avi": b"1", name: b"2"}))
    line = refused(capsys, "--download", "--url", "http://127.0.0.1:1", "--raw", raw)
    assert f"refused, {name} would land outside" in line
    assert [p.name for p in tmp_path.rglob("[!.]*")] == ["raw", "bend.zip"]
    assert not Path("/tmp/evil.avi").exists()
