"""main.py on 32×32 clips, once at full width; test_resume.py has the runs that are cut off."""

import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
from conftest import ROOT, run
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import generate
import main
import models
import trainer
from data import ClipDataset, to_uint8
from evaluate import Evaluator

METRICS = [f"loss_{side}_{kind}" for side in "dg" for kind in ("image", "video")]
METRICS += [f"d_{kind}_{of}" for kind in ("image", "video") for of in ("real", "fake")]


class Folders:
    """Where a run reads and writes, and what it wrote."""

    def __init__(self, clips, path):
        self.models, self.videos = path / "models", path / "videos"
        self.args = [f"--data={clips}", f"--models={self.models}", f"--videos={self.videos}"]
        self.args += ["--batch-size=2", "--precision=fp32", "--device=cpu"]

    def train(self, *args):
        main.main([*self.args, *args])

    def gifs(self):
        return sorted(path.name for path in self.videos.glob("*.gif"))

    def losses(self):
        with open(self.models / "losses.csv", newline="") as file:
            return list(csv.DictReader(file))

    def files(self):
        return {p: p.stat().st_mtime_ns for p in self.models.parent.rglob("*") if p.is_file()}


@pytest.fixture
def folders(clips_folder, tmp_path, monkeypatch):
    """For quick runs in this process, with narrow networks."""
    for name in ("VideoGenerator", "ImageDiscriminator", "VideoDiscriminator"):
        monkeypatch.setattr(trainer, name, small.small(getattr(models, name)))
    return Folders(clips_folder, tmp_path)


@pytest.fixture(scope="module")
def finished(clips_folder, tmp_path_factory):
    """A run of three epochs at full width, as a person starts it, and its output."""
    folders = Folders(clips_folder, tmp_path_factory.mktemp("finished"))
    return folders, run("main.py", *folders.args, "--epochs=3", "--sample-every=2")


def tiles(gif):
    """The frames of the 16 videos of a GIF: (K, 16, 32, 32, 3)."""
    frames = [np.array(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(gif))]
    grid = np.stack(frames)
    assert grid.shape[1:] == (4 * 34 + 2, 4 * 34 + 2, 3)
    rows = [[grid[:, y : y + 32, x : x + 32] for x in range(2, 138, 34)] for y in range(2, 138, 34)]
    return np.stack([tile for row in rows for tile in row], axis=1)


def test_usage_is_the_published_one(capsys):
    with pytest.raises(SystemExit):
        main.main(["-h"])
    usage = capsys.readouterr().out
    assert re.match(
        r"usage: main\.py \[-h\] \[--batch-size BATCH_SIZE\] \[--epochs EPOCHS\]\s+"
        r"\[--pre-train PRE_TRAIN\]",
        usage,
    )
    usage = " ".join(usage.split())
    assert "--batch-size BATCH_SIZE set batch_size (default: 16)" in usage
    assert "--epochs EPOCHS set num of iterations (default: 40000)" in usage
    assert re.search(r"--pre-train PRE_TRAIN set 1 when you use pre-trained models.*?: -1\)", usage)
    defaults = "frames 16, lr 0.0002, seed 0, device auto, data resized_data, models trained_models"
    defaults += ", videos generated_videos, sample-every 1000, checkpoint-every 5000"
    defaults += ", checkpoint-minutes 10.0, keep 0"
    for default in defaults.split(", "):
        name, value = default.split()
        assert re.search(rf"--{name} [A-Z_]+ [^()]*\(default: {re.escape(value)}\)", usage), name


def test_run_prints_what_is_trained_on_what(finished, clips_folder):
    folders, done = finished
    lines = done.stdout.splitlines()
    lengths = [len(np.load(path)) for path in clips_folder.rglob("*.npy")]
    assert lines[0].startswith("device    cpu, ") and lines[0].endswith("threads, fp32")
    found = f"{len(lengths)} clips, {sum(lengths)} frames of 32×32"
    assert lines[1].startswith(f"data      {clips_folder}: {found}, ")
    assert "3 actions (jack walk wave2)" in lines[1]
    assert "R_M 660, " in lines[2]
    assert str(folders.videos) in lines[3] and str(folders.models) in lines[3]
    assert lines[-1].startswith(f"done: {folders.videos / 'epoch-000003.gif'}")
    losses = r"D: image [\d.]+ video [\d.]+ \| G: image [\d.]+ video [\d.]+"
    assert re.search(rf"3/3 \|.*\| 00:00 left, .*{losses}", done.stderr.split("\r")[-1])


def test_run_leaves_samples_and_metrics_by_name(finished):
    folders, _ = finished
    epochs = [f"epoch-{epoch:06d}.gif" for epoch in (0, 2, 3)]
    assert folders.gifs() == [*epochs, "real.gif"]
    rows = folders.losses()
    assert list(rows[0]) == ["epoch", *METRICS, "seconds"]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert all(0 < float(row[name]) < 50 for row in rows for name in METRICS)
    assert Image.open(folders.models / "losses.png").size == (1800, 600)
    board = EventAccumulator(str(folders.models))
    board.Reload()
    for name in (*METRICS, "seconds"):
        epoch = 0
        for event in board.Scalars(name):  # the mean since the last point
            since = [float(row[name]) for row in rows[epoch : event.step]]
            assert event.value == pytest.approx(np.mean(since), rel=1e-4)
            epoch = event.step
        assert epoch == 3
    assert [event.step for event in board.Images("samples")] == [0, 2, 3]
    assert not list(folders.models.parent.rglob("*.part"))


def test_real_gif_shows_windows_of_the_clips(finished, clips_folder):
    clips = [np.load(path).astype(int) for path in clips_folder.rglob("*.npy")]
    windows = [np.lib.stride_tricks.sliding_window_view(clip, 16, axis=0) for clip in clips]
    shown = tiles(finished[0].videos / "real.gif")
    for i in range(16):  # the nearest window of all is it, but for the GIF's 256 colours
        tile = shown[:, i].transpose(1, 2, 3, 0)
        assert min(np.abs(w - tile).mean(axis=(1, 2, 3, 4)).min() for w in windows) < 6


def test_samples_are_those_of_the_checkpoint(finished):
    """The last GIF, in another way: the weights of the checkpoint, one video at a time."""
    folders, _ = finished
    content = checkpoint.load(folders.models / "checkpoint.pt")
    generator = models.VideoGenerator(32).eval()
    generator.motion_rnn.load_state_dict(content["networks"]["R_M"])
    generator.image_generator.load_state_dict(content["networks"]["G_I"])
    shown = tiles(folders.videos / "epoch-000003.gif").astype(int)
    for i in (0, 5, 15):
        with torch.no_grad():
            video = generator(*(noise[i : i + 1] for noise in content["fixed_noise"]))[0]
        assert np.abs(to_uint8(video).permute(1, 2, 3, 0).numpy() - shown[:, i]).mean() < 8


def test_generator_pt_is_enough_to_generate(finished, tmp_path):
    folders, _ = finished
    paths = [folders.models / name for name in ("generator.pt", "checkpoint.pt")]
    assert 7 * paths[0].stat().st_size < paths[1].stat().st_size
    for path in paths:
        generate.main([f"--checkpoint={path}", "--num=1", f"--out={tmp_path / path.stem}"])
    first, second = (tmp_path / path.stem / "video-0000.gif" for path in paths)
    assert first.read_bytes() == second.read_bytes()
    assert checkpoint.load(paths[0])["epoch"] == 3


def test_finished_run_is_left_as_it_is(folders, capsys):
    folders.train("--epochs=2")
    names = ("checkpoint.pt", "generator.pt", "losses.csv")
    before = [(folders.models / name).read_bytes() for name in names]
    (folders.videos / "epoch-000002.gif").unlink()
    folders.train("--epochs=2", "--pre-train=1")
    note = "note: the run is at epoch 2 already; raise --epochs\n"
    assert note in capsys.readouterr().out
    assert before == [(folders.models / name).read_bytes() for name in names]
    assert "epoch-000002.gif" in folders.gifs()


def test_new_run_archives_the_old_one(folders, capsys):
    folders.train("--epochs=1")
    old = {path.name: path.read_bytes() for path in folders.files() if path.name != ".lock"}
    capsys.readouterr()
    folders.train("--epochs=1", "--seed=1")
    lines = capsys.readouterr().out.splitlines()
    moved = [x.removeprefix("moved an older run to ") for x in lines if x.startswith("moved")]
    assert len(moved) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.path.basename(moved[0]))
    kept = {}
    for folder in moved:
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                kept[name] = file.read()
    assert kept == old
    assert folders.gifs() == ["epoch-000000.gif", "epoch-000001.gif", "real.gif"]


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--batch-size=0", "argument --batch-size: 0 is not from 1 to 1000000"),
        ("--epochs=1.5", "argument --epochs: invalid int value: '1.5'"),
        (f"--epochs=1{'0' * 400}", "is not from 1 to 999999"),
        ("--pre-train=2", "argument --pre-train: 2 is not from -1 to 1"),
        ("--lr=nan", "argument --lr: nan is not from 1e-12 to 1"),
        ("--checkpoint-minutes=inf", "argument --checkpoint-minutes: inf is not from 0"),
        ("--device=tpu", "--device tpu: "),
        ("--precision=fp8", "invalid choice"),
        ("--what", "unrecognized arguments: --what"),
        ("--frames=1000", "no usable clips"),
        ("--data=nowhere", "nowhere: no such folder; make it with resize.py"),
        ("--pre-train=1", "--pre-train 1: no "),
        (f"--models={__file__}", f"cannot write to {__file__}: File exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(folders, capsys, arg, message):
    with pytest.raises(SystemExit) as exit_:
        folders.train(arg)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("main.py: error: ") and error.count("\n") == 1 and message in error
    assert not folders.files()


class Colours:
    """Features of evaluate.py that need no network: the mean of each colour."""

    name, dim, sha256 = "colours", 3, "colours of test_main.py"

    def __init__(self, *_):
        pass

    def __call__(self, windows, first=0):
        return {"clips": windows.double().mean((1, 2, 3))}


def test_evaluation_while_training(folders, clips_folder, monkeypatch):
    """It changes nothing in the training; best.pt and the metrics survive a resume."""
    monkeypatch.setattr(main, "Features", Colours)
    monkeypatch.setattr(main, "NUM_EVALUATED", 20)
    folders.train("--epochs=5")
    plain = checkpoint.load(folders.models / "checkpoint.pt")
    folders.train("--epochs=5", "--evaluate-every=2")
    best = {}
    for epochs in ([2, 4, 5], [2, 4, 5, 6, 8]):
        with open(folders.models / "evaluations.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["epoch"]) for row in rows] == epochs
        scores = {int(row["epoch"]): float(row["colours_clips_frechet"]) for row in rows}
        best = checkpoint.load(folders.models / "best.pt")
        assert best["epoch"] == min(scores, key=scores.get)
        page = (folders.videos / "index.html").read_text()
        assert page.count("<tr>") == 1 + len(epochs) and f"<td>{scores[5]:.4g}</td>" in page
        assert "other real windows: colours clips frechet" in page.replace("_", " ")
        state = checkpoint.load(folders.models / "checkpoint.pt")
        assert state["evaluations"][-1]["colours_clips_frechet"] == scores[epochs[-1]]
        if epochs[-1] == 5:
            torch.testing.assert_close(state["networks"], plain["networks"], rtol=0, atol=0)
            folders.train("--epochs=8", "--evaluate-every=2", "--pre-train=1")
    # The metrics are those of the averaged generator, measured by itself.
    generator = trainer.VideoGenerator(32)
    generator.motion_rnn.load_state_dict(best["average"]["R_M"])
    generator.image_generator.load_state_dict(best["average"]["G_I"])
    evaluator = Evaluator(ClipDataset(clips_folder), [Colours()], 20)
    metrics, _ = evaluator.measure(generate.sample_videos(generator.eval(), 20))
    assert metrics["colours_clips_frechet"] == pytest.approx(min(scores.values()), rel=0.01)
    board = EventAccumulator(str(folders.models)).Reload()
    logged = board.Scalars("evaluation/colours_clips_frechet")
    assert {event.step: event.value for event in logged} == pytest.approx(scores)
    folders.train("--epochs=1")  # a new run takes nothing over
    assert not (folders.models / "best.pt").exists()
    assert not (folders.models / "evaluations.csv").exists()


@pytest.mark.parametrize("script", ["main.py", "resize.py", "generate.py", "benchmark.py"])
def test_scripts_run_without_docstrings(script, capsys):
    """As python -OO compiles them; to compile PyTorch as well would take half a minute."""
    module = {"__name__": "script", "__file__": script}
    exec(compile((ROOT / script).read_text(), script, "exec", optimize=2), module)
    assert "__doc__" not in module or module["__doc__"] is None
    with pytest.raises(SystemExit):
        module["main"](["-h"])
    assert capsys.readouterr().out.startswith(f"usage: {script} ")


def test_scripts_run_twice_in_one_ipython_kernel(weizmann, tmp_path):
    """As in Colab: %run resize.py, %run main.py, and both again."""
    copy = tmp_path / "mocogan"
    copy.mkdir()
    for script in (*ROOT.glob("*.py"), ROOT / "gallery.html"):
        shutil.copy(script, copy)
    shutil.copytree(next(weizmann[0].glob("*")), copy / "raw_data" / "action")
    cells = ["%run resize.py --size 32", "%run main.py --epochs 1 --batch-size 2"] * 2
    script = tmp_path / "cells.ipy"
    script.write_text("\n".join([*cells, "print('the kernel is alive')"]))
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", script],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done
    assert "the kernel is alive" in done.stdout
    assert done.stdout.count("done: ") == 2 and done.stdout.count("(0 skipped)") == 2
    assert done.stdout.count("moved an older run to ") == 2
    assert (copy / "generated_videos" / "epoch-000001.gif").exists()
