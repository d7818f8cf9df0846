import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, SHARED, run
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import generate
import main
import utils
from models import VideoGenerator
from utils import to_uint8


class Folders:
    """Where a run reads and writes, and what it left there."""

    def __init__(self, clips, path):
        self.models, self.videos = path / "models", path / "videos"
        self.args = [f"--data={clips}", f"--models={self.models}", f"--videos={self.videos}"]
        self.args += ["--batch-size=2", "--precision=fp32", "--device=cpu"]

    def train(self, *args):
        main.main([*self.args, *map(str, args)])

    def gifs(self):
        return sorted(path.name for path in self.videos.glob("*.gif"))

    def losses(self):
        with open(self.models / "losses.csv", newline="") as file:
            return list(csv.DictReader(file))

    def checkpoint(self):
        return torch.load(self.models / "checkpoint.pt", weights_only=True)


@pytest.fixture
def folders(clips_folder, tmp_path):
    return Folders(clips_folder, tmp_path)


@pytest.fixture(scope="module")
def finished(clips_folder, tmp_path_factory):
    """A run of five epochs, as a person starts it, and what it printed."""
    folders = Folders(clips_folder, tmp_path_factory.mktemp("finished"))
    done = run("main.py", *folders.args, "--epochs=5", "--sample-every=2", "--checkpoint-every=3")
    return folders, done


def tiles(gif):
    """The frames of the 16 videos of a GIF: (K, 16, 32, 32, 3)."""
    frames = [np.array(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(gif))]
    grid = np.stack(frames)
    assert grid.shape[1:] == (4 * 34 + 2, 4 * 34 + 2, 3)
    rows = [[grid[:, y : y + 32, x : x + 32] for x in range(2, 138, 34)] for y in range(2, 138, 34)]
    return np.stack([tile for row in rows for tile in row], axis=1)


def test_usage_is_the_published_one():
    said = run("main.py", "-h").stdout
    assert re.match(
        r"usage: main\.py \[-h\] \[--batch-size BATCH_SIZE\] \[--epochs EPOCHS\]\s+"
        r"\[--pre-train PRE_TRAIN\]",
        said,
    )
    said = " ".join(said.split())
    assert "--batch-size BATCH_SIZE set batch_size (default: 16)" in said
    assert "--epochs EPOCHS set num of iterations (default: 40000)" in said
    assert re.search(
        r"--pre-train PRE_TRAIN set 1 when you use pre-trained models.*?default: -1", said
    )
    defaults = "frames 16, lr 0.0002, seed 0, device auto, data resized_data, models trained_models"
    defaults += ", videos generated_videos, sample-every 1000, checkpoint-every 5000"
    defaults += ", checkpoint-minutes 10.0, keep 0"
    for default in defaults.split(", "):
        name, value = default.split()
        assert re.search(rf"--{name} [A-Z_]+ [^()]*\(default: {re.escape(value)}\)", said), name


def test_what_a_run_says(finished, clips_folder):
    folders, done = finished
    lines = done.stdout.splitlines()
    lengths = [len(np.load(path)) for path in clips_folder.rglob("*.npy")]
    assert lines[0].startswith("device    cpu, ") and lines[0].endswith("threads, fp32")
    found = f"{len(lengths)} clips, {sum(lengths)} frames of 32×32"
    assert lines[1].startswith(f"data      {clips_folder}: {found}, ")
    assert "3 actions (jack walk wave2)" in lines[1]
    assert "R_M 660, " in lines[2]
    assert str(folders.videos) in lines[3] and str(folders.models) in lines[3]
    assert lines[-1].startswith(f"done: {folders.videos / 'epoch-000005.gif'}")
    losses = " ".join(rf"{name} [\d.]+" for name in ("D_I", "D_V", "G_I", "G_V"))
    bar = done.stderr.split("\r")[-1]
    assert re.search(rf"5/5 \|.*\| 00:00 left, [\d.]+ m?s/epoch, {losses}", bar)


def test_what_a_run_leaves(finished):
    folders, _ = finished
    assert folders.gifs() == [
        *(f"epoch-{epoch:06d}.gif" for epoch in (0, 2, 4, 5)),
        "real.gif",
    ]
    rows = folders.losses()
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 < float(row[name]) < 50 for row in rows for name in ("D_I", "D_V", "G_I", "G_V"))
    assert Image.open(folders.models / "losses.png").size == (1000, 400)
    board = EventAccumulator(str(folders.models))
    board.Reload()
    for name in ("D_I", "D_V", "G_I", "G_V"):
        epoch = 0
        for event in board.Scalars(f"loss/{name}"):  # the mean since the last point
            since = [float(row[name]) for row in rows[epoch : event.step]]
            assert event.value == pytest.approx(np.mean(since))
            epoch = event.step
        assert epoch == 5
    assert [event.step for event in board.Images("samples")] == [0, 2, 4, 5]
    for name in ("D_I on real", "D_V on real", "D_I on fake", "D_V on fake"):
        answers = board.Scalars(f"mean answer/{name}")
        assert answers[-1].step == 5 and all(0 < answer.value < 1 for answer in answers)
    assert board.Scalars("seconds an epoch")[-1].value > 0
    assert not list(folders.models.parent.rglob("*.part"))


def test_the_real_gif_shows_windows_of_the_clips(finished, clips_folder):
    clips = [np.load(path).astype(int) for path in clips_folder.rglob("*.npy")]
    windows = [np.lib.stride_tricks.sliding_window_view(clip, 16, axis=0) for clip in clips]
    shown = tiles(finished[0].videos / "real.gif")
    assert len(shown) == 16
    for i in range(16):  # the nearest window of all is it, but for the GIF's 256 colours
        tile = shown[:, i].transpose(1, 2, 3, 0)
        assert min(np.abs(w - tile).mean(axis=(1, 2, 3, 4)).min() for w in windows) < 6


def test_samples_are_those_of_the_checkpoint(finished):
    """The last GIF, by another way: the weights of the checkpoint, one video at a time."""
    folders, _ = finished
    checkpoint = folders.checkpoint()
    generator = VideoGenerator(32).eval()
    generator.motion_rnn.load_state_dict(checkpoint["networks"]["R_M"])
    generator.image_generator.load_state_dict(checkpoint["networks"]["G_I"])
    shown = tiles(folders.videos / "epoch-000005.gif").astype(int)
    for i in (0, 5, 15):
        with torch.no_grad():
            video = generator(*(noise[i : i + 1] for noise in checkpoint["sample_noise"]))[0]
        assert np.abs(to_uint8(video).permute(1, 2, 3, 0).numpy() - shown[:, i]).mean() < 8


def test_generator_pt_is_enough_to_generate(finished, tmp_path):
    """With each checkpoint comes the part of it that makes videos, a fourteenth of its size."""
    folders, _ = finished
    files = {name: folders.models / name for name in ("generator.pt", "checkpoint.pt")}
    assert 14 * files["generator.pt"].stat().st_size < files["checkpoint.pt"].stat().st_size
    for name, path in files.items():
        generate.main([f"--checkpoint={path}", "--num=1", f"--out={tmp_path / name}"])
    first, second = ((tmp_path / name / "video-0000.gif").read_bytes() for name in files)
    assert first == second and checkpoint.read(files["generator.pt"])["epoch"] == 5


def test_a_generator_pt_that_is_not_the_checkpoint_s(folders, capsys):
    """As when the run was killed between the two: `--pre-train 1` makes it good."""
    folders.train("--epochs=1")
    path = folders.models / "generator.pt"
    good = path.read_bytes()
    checkpoint.write(path, {**checkpoint.read(path), "epoch": 0})
    for spoil in (lambda: None, path.unlink, lambda: path.write_bytes(good[:-9])):
        spoil()
        folders.train("--epochs=1", "--pre-train=1")
        assert "nothing to do" in capsys.readouterr().out and path.read_bytes() == good


def test_samples_come_from_the_same_noise(finished):
    first, last = (tiles(finished[0].videos / f"epoch-{n}.gif") for n in ("000004", "000005"))
    first, last = (x.mean(axis=0).reshape(16, -1).astype(float) for x in (first, last))
    # one epoch later each video is still most like itself
    distance = ((first[:, None] - last[None]) ** 2).mean(axis=2)
    assert (distance.argmin(axis=1) == np.arange(16)).mean() > 0.8


def test_pieces_make_the_same_run(finished, folders):
    """At full width; test_resume.py has the rest."""
    folders.train("--epochs=2", "--sample-every=2", "--checkpoint-every=3")
    folders.train("--epochs=5", "--sample-every=2", "--checkpoint-every=3", "--pre-train=1")
    whole, pieces = finished[0].checkpoint(), folders.checkpoint()
    assert whole["epoch"] == pieces["epoch"] == 5
    for name, net in whole["networks"].items():
        for key, value in net.items():
            assert torch.equal(value, pieces["networks"][name][key]), f"{name} {key}"
    assert folders.gifs() == finished[0].gifs()
    for gif in folders.gifs():
        assert (folders.videos / gif).read_bytes() == (finished[0].videos / gif).read_bytes()
    figures = [[{**row, "seconds": 0} for row in f.losses()] for f in (folders, finished[0])]
    assert figures[0] == figures[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="of Linux")
def test_no_checkpoint_is_ahead_of_its_losses(folders, monkeypatch):
    """A power cut must not leave a checkpoint whose losses were still in memory."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        calls.append(f"→ {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folders.train("--epochs=1")
    last = calls.index("→ checkpoint.pt")
    assert calls[last - 2 : last + 2] == [
        "losses.csv",
        "checkpoint.pt.part",
        "→ checkpoint.pt",
        "models",
    ]


def test_nothing_to_do_when_it_is_done(finished, capsys):
    folders = finished[0]
    before = {p: p.stat().st_mtime_ns for p in folders.models.parent.rglob("[!.]*.*")}
    folders.train("--epochs=5", "--pre-train=1")
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert before == {p: p.stat().st_mtime_ns for p in folders.models.parent.rglob("[!.]*.*")}


def test_a_new_run_moves_the_old_one(folders, capsys):
    folders.train("--epochs=1")
    of_the_run = [*folders.models.glob("[!.]*"), *folders.videos.glob("[!.]*")]
    old = {path.name: path.read_bytes() for path in of_the_run}
    capsys.readouterr()
    folders.train("--epochs=1", "--seed=1")
    said = capsys.readouterr().out.splitlines()
    moved = [line.removeprefix("an older run was moved to ") for line in said if "older" in line]
    assert len(moved) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.path.basename(moved[0]))
    kept = {}
    for folder in moved:
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                kept[name] = file.read()
    assert kept == old
    assert folders.gifs() == ["epoch-000000.gif", "epoch-000001.gif", "real.gif"]


def test_bfloat16_and_the_device(folders):
    for device in DEVICES:
        folders.train("--epochs=2", "--precision=bf16", f"--device={device}")
        assert all(float(row["G_V"]) > 0 for row in folders.losses())


def test_auto_takes_what_is_there():
    device = utils.pick_device("auto")
    has_mps = torch.backends.mps.is_available()
    expected = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    assert device.type == expected
    assert main.pick_precision("fp32", device) == "fp32"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            native = re.search(r"avx512_bf16|amx_tile", file.read()) is not None
        assert main.pick_precision("auto", torch.device("cpu")) == ("bf16" if native else "fp32")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--batch-size=0"], "'0' is not a whole number from 1"),
        (["--batch-size=x"], "'x' is not a whole number from 1"),
        (["--epochs=-3"], "'-3' is not a whole number from 1"),
        (["--epochs=1.5"], "'1.5' is not a whole number"),
        (["--pre-train=2"], "'2' is not a whole number from -1 to 1"),
        (["--frames=8"], "'8' is not a whole number from 16"),
        (["--lr=0"], "'0' is not a number from 1e-12 to 1"),
        (["--lr=nan"], "'nan' is not a number"),
        (["--seed=-1"], "'-1' is not a whole number from 0"),
        (["--device=tpu"], "--device tpu: there is no such device here"),
        (["--device=hpu"], "--device hpu: there is no such device here"),
        (["--device=cuda:99"], "--device cuda:99: there is no such device here"),
        (["--precision=fp8"], "invalid choice"),
        (["--sample-every=0"], "'0' is not a whole number from 1"),
        (["--checkpoint-every=0"], "'0' is not a whole number from 1"),
        (["--checkpoint-minutes=-1"], "'-1' is not a number from 0"),
        (["--checkpoint-minutes=nan"], "'nan' is not a number from 0"),
        (["--keep=-1"], "'-1' is not a whole number from 0"),
        (["--keep=some"], "'some' is not a whole number from 0"),
        (["--epochs="], "'' is not a whole number from 1"),
        (["--batch-size"], "expected one argument"),
        (["--lr=2"], "'2' is not a number from 1e-12 to 1"),
        (["--seed=9223372036854775808"], "is not a whole number from 0 to 9223372036854775807"),
        (["--frames=1000"], "no usable clips"),
        (["--what"], "unrecognized arguments: --what"),
        ([f"--models={__file__}"], "test_main.py is not a folder"),
        (["--data=nowhere"], "nowhere: no such folder; make it with resize.py"),
        (["--pre-train=1"], "checkpoint.pt is not there; name its folder with --models, or leave"),
        (["--models="], "'' names no folder"),
        (["--batch-size=99999999999999999999"], "is not a whole number from 1 to 1000000"),
        ([f"--epochs=1{'0' * 400}"], "is not a whole number from 1 to 1000000000"),
    ],
)
def test_bad_flags_get_one_line(folders, capsys, args, message):
    with pytest.raises(SystemExit) as exit_:
        folders.train(*args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and message in error
    assert not folders.models.exists() and not folders.videos.exists()


def test_twice_over_in_one_ipython_kernel(tmp_path):
    """As in Colab: %run resize.py, %run main.py, and both again."""
    copy = tmp_path / "mocogan"
    copy.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, copy)
    raw = SHARED / "raw_data"
    source = f"--raw {raw}" if SHARED.is_dir() else "--synthetic"
    cells = [f"%run resize.py {source} --size 32", "%run main.py --epochs 3 --batch-size 2"] * 2
    script = tmp_path / "cells.ipy"
    script.write_text("\n".join([*cells, "print('the kernel is alive')"]))
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", script],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done
    assert "the kernel is alive" in done.stdout
    assert done.stdout.count("done: ") == 2 and done.stdout.count("(0 skipped)") == 2
    assert done.stdout.count("an older run was moved to ") == 2
    assert (copy / "generated_videos" / "epoch-000003.gif").exists()
