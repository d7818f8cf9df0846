"""Fixtures: real clips where ../shared/weizmann exists, synthetic ones elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

# Threads that wait must not spin: on a busy machine that makes an epoch ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "weizmann"

import resize  # noqa: E402
import synthetic  # noqa: E402
from data import ClipDataset  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_report_header():
    kind = f"real, {SHARED}" if SHARED.is_dir() else "synthetic (no ../shared/weizmann)"
    return f"clips: {kind}; devices: {', '.join(DEVICES)}"


def encode(path, source, *options, before=()):
    """Make a video with FFmpeg. source: a lavfi graph, or the path of another video.

    options: of the output; before: of the input.
    """
    path.parent.mkdir(exist_ok=True)
    inputs = [*before, "-i", source] if os.path.exists(source) else ["-f", "lavfi", "-i", source]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *inputs, *options, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def write_video(path, frames, **options):
    """Write a video with imageio's ffmpeg (or, a GIF, with Pillow), in its own size."""
    if path.suffix == ".gif":
        iio.imwrite(path, frames, duration=40, loop=0)
    else:
        options = {"codec": "libx264", "macro_block_size": 2, "quality": 9} | options
        iio.imwrite(path, frames, plugin="FFMPEG", fps=25, **options)


@pytest.fixture(scope="session")
def weizmann(tmp_path_factory):
    """Raw clips, and the same clips as published: 96×96, named by number.

    (raw folder, published folder, numbers of clips, frames and actions). Without the real clips:
    synthetic ones, in the same layout.
    """
    if SHARED.is_dir():
        return SHARED / "raw_data", SHARED / "resized_data", 83, 5370, 10
    folder = tmp_path_factory.mktemp("weizmann")
    (folder / "published").mkdir()
    total = 0
    for number, action in enumerate(synthetic.MOVEMENTS):
        frames = np.stack(list(synthetic.render_clip(synthetic.PEOPLE[number % 9], action)))
        total += len(frames)
        (folder / "raw" / action).mkdir(parents=True)
        write_video(folder / "raw" / action / f"clip{number:02d}_{action}.avi", frames)
        write_video(folder / "published" / f"{number}.mp4", frames[:, 24:120, 42:138])
    return folder / "raw", folder / "published", 10, total, 10


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory):
    """A small data set: a few clips of three actions, 32×32."""
    out = tmp_path_factory.mktemp("clips")
    sources = resize.synthetic_sources()
    if SHARED.is_dir():
        sources, _ = resize.find_sources(SHARED / "raw_data", out)
    chosen = [a for a in sources if a.parts[0] in ("jack", "walk", "wave2")][::5]
    resize.convert({array: sources[array] for array in chosen}, out, size=32)
    return out


@pytest.fixture
def clips(clips_folder):
    return ClipDataset(clips_folder)


@pytest.fixture(scope="session")
def synthetic_clip():
    """A synthetic clip: (n, 144, 180, 3) uint8."""
    return np.stack(list(synthetic.render_clip(synthetic.PEOPLE[0], "jack")))


def run(script, *args, cwd=ROOT):
    """Run a script of the project as a user would; returns the process, with its output."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
