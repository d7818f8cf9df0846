import errno
import http.server
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT, encode, run, write_video
from PIL import Image

import resize
import synthetic
from video import FrameReader


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


def write_strip(path, length):
    """Write a strip of frames of noise, which no compression changes; returns the frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(length).integers(0, 256, (length, 32, 32, 3), np.uint8)
    Image.fromarray(np.concatenate(frames, axis=1)).save(path)
    return frames


@pytest.mark.parametrize("sides, size, scaled", [
    ((180, 144), 96, (180, 144)), ((640, 480), 96, (192, 144)), ((128, 128), 64, (64, 64)),
    ((128, 300), 64, (64, 150)), ((40, 30), 256, (512, 384))
])  # fmt: skip
def test_resize_frame_scales_and_keeps_the_centre(synthetic_clip, sides, size, scaled):
    """As Pillow does it, with no aliasing. Weizmann's 180×144 are only cut."""
    image = Image.fromarray(synthetic_clip[0]).resize(sides)
    smooth = Image.Resampling.BOX if scaled < sides else Image.Resampling.BICUBIC
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    expected = np.array(image.resize(scaled, smooth))[top : top + size, left : left + size]
    ours = resize.resize_frame(np.array(image), size)
    assert psnr(ours, expected) > (100 if sides == scaled else 43)


@pytest.mark.parametrize("name, codec", [
    ("a.avi", "mpeg4"), ("A.MP4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx-vp9"),
    ("a.gif", None)
])  # fmt: skip
def test_read_frames_agrees_with_another_library(tmp_path, synthetic_clip, name, codec):
    path = tmp_path / name
    write_video(path, synthetic_clip[:20], **({"codec": codec} if codec else {}))
    ours = np.stack(list(FrameReader(path)))
    options = {"plugin": "FFMPEG"} if codec else {"plugin": "pillow", "mode": "RGB"}
    assert psnr(ours, iio.imread(path, **options)) > 40  # conversions from YUV differ by 1 or 2
    assert psnr(ours, synthetic_clip[:20]) > 30  # and it is upright, and RGB


def test_raw_clips_give_the_published_ones(weizmann, tmp_path, capsys):
    raw, published, clips, frames, actions = weizmann
    lines = resized(capsys, "--raw", raw, "--out", tmp_path)
    assert lines == [f"{clips} clips, {frames} frames, {actions} actions → {tmp_path} (0 skipped)"]
    made = arrays(tmp_path)
    assert len(made) == clips and sum(map(len, made.values())) == frames
    for name, array in made.items():
        assert array.dtype == np.uint8 and array.shape[1:] == (96, 96, 3)
        number = int(name.split("/clip")[1][:2])  # walk/clip07_walk is 7.mp4
        assert psnr(array, iio.imread(published / f"{number}.mp4", plugin="FFMPEG")) >= 30


def test_only_what_is_new_or_changed_is_made(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    a, b = raw / "jack" / "a.png", raw / "jack" / "indoors" / "b.png"
    frames_a, frames_b = write_strip(a, 40), write_strip(b, 34)

    def written(*args, changed=None):
        """Make the arrays newer than all else, and run it: the names of the arrays written."""
        paths = sorted(out.rglob("*.npy"))
        for path in (*paths, *([changed] if changed else [])):
            time.sleep(0.02)  # a file system's clock ticks every few milliseconds
            os.utime(path)
        before = {path: path.stat().st_mtime_ns for path in paths}
        resized(capsys, "--raw", raw, "--out", out, "--size", 32, *args)
        assert list(arrays(out)) == ["jack/a.npy", "jack/indoors/b.npy"]
        after = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.npy"))}
        return "".join(path.stem for path in after if after[path] != before.get(path))

    def holds(array_a, array_b):
        return all(map(np.array_equal, arrays(out).values(), (array_a, array_b)))

    assert written("--every", 2) == "ab" and holds(frames_a[::2], frames_b[::2])
    assert written() == "ab" and holds(frames_a, frames_b)
    assert written("--size", 64) == "ab" and arrays(out)["jack/a.npy"].shape == (40, 64, 64, 3)
    assert written() == "ab" and holds(frames_a, frames_b)
    assert written() == ""
    frames_a = write_strip(a, 20)
    assert written(changed=a) == "a" and holds(frames_a, frames_b)
    array = out / "jack" / "a.npy"
    for damaged in (array.read_bytes()[:-1], b""):
        array.write_bytes(damaged)
        assert written() == "a" and holds(frames_a, frames_b)
    moved = tmp_path / "moved.png"
    frames_a = write_strip(moved, 30)
    os.utime(moved, (1, 1))
    moved.replace(a)  # newer than the array, whatever its own date
    resized(capsys, "--raw", raw, "--out", out, "--size", 32)
    assert holds(frames_a, frames_b)
    b.unlink()
    lines = resized(capsys, "--raw", raw, "--out", out, "--size", 32)
    b = out / "jack" / "indoors" / "b.npy"
    assert lines[-1] == f"note: main.py trains on 1 older arrays, too: {b} …"


def test_bad_files_are_named_and_counted(tmp_path):
    for name, length in (("short.png", 15), ("good.jpg", 16), ("good.png", 17)):
        write_strip(tmp_path / name, length)
    names = "text.mp4", "words.jpg", ".hidden.mp4", "readme.txt", "notes.md", "live.m3u8"
    for name in (*names, os.fsdecode(b"\xff.mp4")):
        (tmp_path / name).write_text("P6")  # on which Pillow fails, too
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    Image.fromarray(np.zeros((144, 180, 3), np.uint8)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    done = run("resize.py", "--raw", tmp_path, "--out", out, "--size", "32")
    *skipped, last = done.stdout.splitlines()
    assert last == f"1 clips, 16 frames, 0 actions → {out} (10 skipped)"
    reasons = dict(line.removeprefix(f"skipped {tmp_path}/").split(": ", 1) for line in skipped)
    assert reasons == {
        "short.png": "15 frames, shorter than 16",
        "good.png": f"good.npy is made from {tmp_path / 'good.jpg'}: rename one",
        "text.mp4": "not a video that can be read",
        "words.jpg": "words.jpg is not an image that can be read",
        "gone.mp4": "No such file or directory",
        "?.mp4": "not a video that can be read",
        "readme.txt": "not a video",
        "notes.md": "not a video that can be read",
        "live.m3u8": "not a video",
        "photo.png": "an image of 180×144, no strip of square frames",
    }
    assert list(arrays(out)) == ["good.npy"] and not list(out.rglob("*.part"))
    assert "WARN" not in done.stderr and "mp4" not in done.stderr  # FFmpeg and OpenCV are silent


def write_frames(folder, length, size=(40, 32)):
    """Write a folder of numbered PNGs of noise; returns what resize.py makes of them at size 32."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(length).integers(0, 256, (length, *size[::-1], 3), np.uint8)
    for k, frame in enumerate(noise):
        Image.fromarray(frame).save(folder / f"{k}.png")
    return np.stack([resize.resize_frame(frame, 32) for frame in noise])


def test_folders_of_frames_are_clips(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    args = "--raw", raw, "--out", out, "--size", 32
    clips = {f"jack/v1.{n}.npy": write_frames(raw / "jack" / f"v1.{n}", 16 + n) for n in (1, 2)}
    for name in ("v1.1/about.json", "v1.1.json", "v1.2.json"):
        (raw / "jack" / name).write_text("{}")
    (raw / "jack" / "few").mkdir()
    Image.new("RGB", (40, 32)).save(raw / "jack" / "few" / "0.png")
    write_strip(raw / "strips" / "0.png", 16)  # a folder of strips is not one clip
    write_strip(raw / "strips" / "1.png", 17)
    (raw / "strips" / "1.csv").write_text("1,2")
    for name in ("0.webp", "1.webp"):  # nor is one of animations
        encode(raw / "moving" / name, "testsrc2=s=128x96:d=1", "-c:v", "libwebp_anim")
    lines = resized(capsys, *args)
    assert sorted(lines) == [
        f"6 clips, 118 frames, 3 actions → {out} (5 skipped)",
        f"skipped {raw / 'jack/few/0.png'}: an image of 40×32, no strip of square frames",
        f"skipped {raw / 'jack/v1.1.json'}: jack/v1.1.npy is made from {raw / 'jack/v1.1'}: "
        "rename one",
        f"skipped {raw / 'jack/v1.1/about.json'}: not a video",
        f"skipped {raw / 'jack/v1.2.json'}: not a video",
        f"skipped {raw / 'strips/1.csv'}: not a video",
    ]
    made = arrays(out)
    both = [f"{folder}/{k}.npy" for folder in ("moving", "strips") for k in (0, 1)]
    assert list(made) == [*clips, *both]
    assert all(np.array_equal(made[name], clip) for name, clip in clips.items())
    Image.new("RGB", (40, 32)).save(raw / "jack" / "v1.2" / "3.png")  # a frame changes
    clips["jack/v1.2.npy"][3] = 0
    resized(capsys, *args)
    assert np.array_equal(arrays(out)["jack/v1.2.npy"], clips["jack/v1.2.npy"])
    assert resized(capsys, "--raw", raw / "jack" / "v1.1", *args[2:])[1].startswith("1 clips, 17")
    assert np.array_equal(arrays(out)["v1.1.npy"], clips["jack/v1.1.npy"])


def test_zips_are_extracted_once(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    frames = write_frames(tmp_path / "f", 16)
    encode(tmp_path / "a.mp4", "testsrc2=s=64x64:d=1")
    encode(tmp_path / "a.y4m", "testsrc2=s=64x64:d=1")
    clip = {f"{k}.png": f"f/{k}.png" for k in range(16)}
    raw.mkdir()
    for name, members in {
        "walk.ZIP": {"anna.mp4": "a.mp4", "__MACOSX/._anna.mp4": "f/0.png", "../up.y4m": "a.y4m"},
        "run.zip": {"a.y4m": "a.y4m", **{f"f/{name}": path for name, path in clip.items()}},
        "clip.zip": clip,
        "jump.zip": {"more.zip": "raw/clip.zip"},
        "mine.zip": {"a.mp4": "a.mp4"},
        "bad.zip": {"a.mp4": "a.mp4", **clip},
    }.items():
        with zipfile.ZipFile(raw / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, source in members.items() if name != "jump.zip" else ():
                archive.write(tmp_path / source, member)
    with zipfile.ZipFile(raw / "jump.zip", "w") as archive:
        archive.write(raw / "clip.zip", "more.zip")
    content = bytearray((raw / "bad.zip").read_bytes())
    content[2000:2500] = bytes(500)
    (raw / "bad.zip").write_bytes(content)
    (raw / "text.zip").write_text("hello")
    (raw / "mine").mkdir()  # not from that zip
    (raw / ".clip.zip.part").mkdir()  # of a run that was killed
    args = "--raw", raw, "--out", out, "--size", 32
    first = resized(capsys, *args)
    lines = [line for line in first if not line.startswith("extracting ")]
    assert len(first) - len(lines) == 7
    assert lines[-1] == f"6 clips, 123 frames, 3 actions → {out} (3 skipped)"
    assert lines[1:3] == [
        f"skipped {raw / 'mine.zip'}: {raw / 'mine'} exists and is taken instead",
        f"skipped {raw / 'text.zip'}: File is not a zip file",
    ]
    assert lines[0].startswith(f"skipped {raw / 'bad.zip'}: ")
    made = arrays(out)
    names = ["clip", "jump/more", "run/a", "run/f", "walk/anna", "walk/up"]
    assert list(made) == [f"{name}.npy" for name in names]
    for name in ("clip", "jump/more", "run/f"):
        assert np.array_equal(made[f"{name}.npy"], frames)
    assert psnr(made["run/a.npy"], made["walk/anna.npy"]) > 25
    assert [path.name for path in raw.glob(".*")] == [".lock"]
    (raw / "walk" / "anna.mp4").unlink()  # a bad clip does not come back
    times = [path.stat().st_mtime_ns for path in out.rglob("*.npy")]
    again = resized(capsys, *args)
    assert again[-2] == f"5 clips, 98 frames, 3 actions → {out} (3 skipped)"
    assert times == [path.stat().st_mtime_ns for path in out.rglob("*.npy")]


def test_an_array_of_other_settings_goes_if_its_clip_is_too_short_now(tmp_path, capsys):
    write_strip(tmp_path / "walk" / "a.png", 40)
    write_strip(tmp_path / "walk" / "b.png", 20)
    args = "--raw", tmp_path, "--out", tmp_path / "out", "--size", 32
    resized(capsys, *args)
    assert len(resized(capsys, *args, "--every", 2)) == 2
    assert list(arrays(tmp_path / "out")) == ["walk/a.npy"]


def test_a_photo_never_costs_a_video(tmp_path, capsys):
    """Live Photos and thumbnails: another kind of file has a video's name."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for k, name in itertools.product(range(17), ("A.JPG", "b.webp", "z.png")):  # enough for a clip
        Image.new("RGB", (64, 48)).save(raw / f"{k}{name}")
    for name in ("A.MOV", "b.mp4", "z.dat"):
        encode(raw / f"0{name}", "testsrc2=s=64x48:d=1", "-f", "mp4")
    encode(raw / "0A.aac", "sine=d=1")
    cover = ["-i", raw / "0z.png", "-map", "0", "-map", "1", "-c:v", "png"]
    encode(raw / "0b.m4a", "sine=d=1", *cover, "-disposition:v", "attached_pic")
    lines = resized(capsys, "--raw", raw, "--out", out, "--size", 32)
    assert lines[-1] == f"3 clips, 75 frames, 0 actions → {out} (53 skipped)"
    assert list(arrays(out)) == ["0A.npy", "0b.npy", "0z.npy"]
    assert f"skipped {raw / '0b.m4a'}: not a video" in lines
    assert f"skipped {raw / '0A.aac'}: 0A.npy is made from {raw / '0A.MOV'}: rename one" in lines
    assert f"skipped {raw / '0A.JPG'}: 0A.npy is made from {raw / '0A.MOV'}: rename one" in lines
    assert f"skipped {raw / '9z.png'}: an image of 64×48, no strip of square frames" in lines


def test_rates_that_differ_are_told_and_fps_makes_them_one(tmp_path, capsys, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "walk").mkdir(parents=True)
    args = "--raw", raw, "--out", out, "--size", 32
    encode(raw / "walk" / "a.mp4", "testsrc2=s=64x64:r=25:d=2")
    encode(raw / "walk" / "b.mp4", "testsrc2=s=64x64:r=24:d=2")
    assert len(resized(capsys, *args)) == 1
    encode(raw / "walk" / "c.mp4", "testsrc2=s=64x64:r=60:d=2")
    note = "note: from 24 frames a second (walk/b.npy) to 60 (walk/c.npy); --fps 25 would give all "
    for _ in range(2):  # also of clips that were made before; a run is killed as it notes a rate
        with open(out / "rates.jsonl", "a") as file:
            file.write('["walk/a.npy", [2')
        told = f"3 clips, 218 frames, 1 actions → {out} (0 skipped)", f"{note}motion one speed"
        assert resized(capsys, *args) == [*told]
    (line,) = resized(capsys, *args, "--fps", 25)
    assert line == f"3 clips, 150 frames, 1 actions → {out} (0 skipped)"
    vary = ["-vf", "setpts='(N+30*gt(N,20)+0.1)/25/TB'", "-fps_mode", "vfr"]
    encode(raw / "walk" / "c.mp4", "testsrc2=s=64x64:r=25:d=2", *vary)
    assert "(walk/c.npy) to 25 (walk/" in resized(capsys, *args)[1]
    monkeypatch.setattr(resize.FrameReader, "rates", lambda _: (20, 25))  # FFmpeg lost a frame
    assert len(resized(capsys, *args, "--fps", 24)) == 1  # the advice was taken


def test_the_bar_moves_within_a_clip(tmp_path, capsys, monkeypatch):
    encode(tmp_path / "a.mp4", "testsrc2=s=64x64:r=25:d=4")
    resize_frame = resize.resize_frame

    def slow(*args):
        time.sleep(0.02)
        return resize_frame(*args)

    monkeypatch.setattr(resize, "resize_frame", slow)
    resize.main(["--raw", str(tmp_path), "--out", str(tmp_path / "out")])
    shown = re.findall(r"([\d.]+)/1 clips", capsys.readouterr().err)
    assert shown[0] == "0.0" and shown[-1] == "1.0" and len(set(shown)) > 3
    assert sorted(shown) == shown


@pytest.mark.parametrize("args, message", [
    (["--size", "90"], "invalid choice: 90 (choose from 32, 48, "),
    (["--fps", "0"], "0 is not from 0.1 to 1000"),
    (["--download", "--synthetic"], "not allowed with"),
    (["--raw", "nowhere"], "no clips from 0 files in nowhere; put videos there, in a folder"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_line(tmp_path, capsys, args, message):
    assert message in error_line(capsys, "--out", tmp_path, *args)


def test_without_ffmpeg_there_is_one_line(tmp_path, capsys, monkeypatch):
    encode(tmp_path / "a.mp4", "testsrc2=s=64x64:d=1")
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    line = error_line(capsys, "--raw", tmp_path, "--out", tmp_path / "out")
    assert line.endswith("there is no ffmpeg here; install it, or imageio-ffmpeg anew")


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
    assert len(made) == 10 and lines[0].startswith("10 clips, ")
    assert not list(tmp_path.rglob("*.part"))
    assert {path: path.stat().st_mtime_ns for path in times} == times  # not made again
    for action in ("bend", "pjump"):  # one made by the killed process, and the fourth
        clip = np.stack(list(synthetic.render_clip(synthetic.PEOPLE[0], action)))
        assert (made[f"{action}/anna_{action}.npy"] == clip[:, 24:120, 42:138]).all()


@pytest.mark.parametrize("action", synthetic.MOVEMENTS)
def test_synthetic_people_do_what_the_action_says(action):
    """What moves in front of the wall; the hands, the feet and the distance of the poses."""
    assert len(resize.synthetic_sources()) == 90
    who = synthetic.PEOPLE[list(synthetic.MOVEMENTS).index(action) % 9]
    clip = np.stack(list(synthetic.render_clip(who, action)))[:, 24:120, 42:138]
    figure = (np.abs(clip - np.median(clip, axis=0)) > 40).any(axis=3)
    assert figure.any(axis=(1, 2)).mean() > 0.4 and (figure[1:] != figure[:-1]).mean() > 1e-3
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
    two = {action: synthetic.MOVEMENTS[action] for action in ("run", "walk")}
    monkeypatch.setattr(synthetic, "MOVEMENTS", two)
    raw, out = tmp_path / "raw", tmp_path / "out"
    args = "--raw", raw, "--out", out, "--size", 32
    resized(capsys, "--synthetic", *args)
    assert "no clips from 0 files" in error_line(capsys, *args)
    assert len(arrays(out)) == 2  # nothing real comes in their place
    write_strip(raw / "bad.png", 15)
    frames = write_strip(raw / "walk" / "anna_walk.png", 20)  # named like a synthetic one,
    os.utime(raw / "walk" / "anna_walk.png", (1, 1))  # and older
    write_strip(raw / "walk" / "mine.png", 20)
    with monkeypatch.context() as stopped:
        stopped.setattr(resize, "is_up_to_date", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit):
            resized(capsys, *args)
    assert capsys.readouterr().out.startswith(f"removed 1 synthetic clips from {out}\n")
    assert list(arrays(out)) == ["walk/anna_walk.npy"]  # whose clip comes first, next time
    assert resized(capsys, *args)[1:] == [f"2 clips, 40 frames, 1 actions → {out} (1 skipped)"]
    assert "holds other clips, such as walk/mine" in error_line(capsys, "--synthetic", *args)
    made = arrays(out)
    assert list(made) == ["walk/anna_walk.npy", "walk/mine.npy"]
    assert (made["walk/anna_walk.npy"] == frames).all()


@pytest.fixture
def server(tmp_path):
    """A server of ten zips like Weizmann's, of one strip each, and a file that wants out."""
    write_strip(tmp_path / "strip.png", 20)
    folder = tmp_path / "served"
    folder.mkdir()
    for action in synthetic.MOVEMENTS:
        with zipfile.ZipFile(folder / f"{action}.zip", "w") as archive:
            archive.write(tmp_path / "strip.png", f"anna_{action}.png")
            archive.writestr("../evil.txt", "evil")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            server.requests.append(self.path)

    handler = partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.folder, server.requests = folder, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
    socket.setdefaulttimeout(None)


def test_download_fetches_each_zip_once(server, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    args = "--download", "--url", f"{server.url}/", "--raw", raw, "--out", out
    lines = resized(capsys, *args)
    assert lines[-1] == f"10 clips, 200 frames, 10 actions → {out} (10 skipped)"
    assert lines[0] == f"downloading {server.url}/bend.zip" and len(lines) == 31
    assert lines[20] == f"skipped {raw / 'bend/evil.txt'}: not a video"  # it got no further
    assert socket.getdefaulttimeout() == 30  # a server that never answers ends the run
    assert not (raw / "evil.txt").exists() and not (tmp_path / "evil.txt").exists()
    assert resized(capsys, *args) == lines[20:]
    assert server.requests == [f"/{action}.zip" for action in synthetic.MOVEMENTS]
    strips = [path.read_bytes() for path in raw.glob("*/anna_*.png")]
    assert strips == [(tmp_path / "strip.png").read_bytes()] * 10


@pytest.mark.parametrize("case, message", [
    ("missing", "File not found"), ("dead", "Connection refused"), ("damaged", "damaged zip"),
    ("html", "not a zip file")
])  # fmt: skip
def test_download_failures_are_one_line(server, tmp_path, capsys, case, message):
    content = bytearray((server.folder / "bend.zip").read_bytes())
    content[len(content) // 2] ^= 1
    (server.folder / "bend.zip").write_bytes(b"<html>busy" if case == "html" else content)
    urls = {"missing": f"{server.url}/nowhere", "dead": "http://127.0.0.1:1"}
    url = urls.get(case, server.url)
    line = error_line(capsys, "--download", "--url", url, "--raw", tmp_path / "raw")
    assert f"cannot download {url}/bend.zip: " in line and message in line
    assert "--url" in line and "--synthetic" in line
    assert not (tmp_path / "raw" / "bend.zip").exists()  # the next run fetches it again
