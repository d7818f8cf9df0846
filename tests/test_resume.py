"""Runs that are cut, killed, starved or given damaged files, and that resume with the same bits.

The networks are a sixteenth as wide as the product's (small.py), all else is the same code. Each
run is a process, forked from one that has imported PyTorch already.
"""

import csv
import itertools
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import forkserver
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import ROOT

import checkpoint
import trainer

EPOCHS = 8
PATIENCE = 300  # seconds, for a machine that is busy


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small", __name__])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT / "tests")):
        forkserver.ensure_running()
    return context


class Run:
    """A run of main.py with small networks, in its own folders."""

    def __init__(self, processes, clips, path):
        self.processes, self.path, self.output = processes, path, path / "output"
        self.process = None
        self.models, self.videos = path / "models", path / "videos"
        self.newest = self.models / "checkpoint.pt"
        self.flags = [f"--data={clips}", f"--models={self.models}", f"--videos={self.videos}"]
        self.flags += ["--batch-size=2", "--precision=fp32", "--device=cpu", "--sample-every=3"]
        self.flags += [f"--epochs={EPOCHS}", "--checkpoint-every=1"]

    def start(self, *flags, prepare=None):
        self.path.mkdir(exist_ok=True)
        args = [*self.flags, *flags], self.output, prepare
        self.process = self.processes.Process(target=small.process, args=args)
        self.process.start()
        return self.process

    def finish(self, process, status):
        """Wait until the process ends with that status. Returns what it printed."""
        process.join(PATIENCE)
        process.kill()
        process.join()
        # TensorBoard's thread prints a traceback of its own when a disk is full.
        output = re.sub(
            r"Exception in thread .*?OSError: [^\n]*\n", "", self.output.read_text(), flags=re.S
        )
        assert process.exitcode == status and "Traceback" not in output, output
        return output

    def train(self, *flags, status=0, prepare=None):
        return self.finish(self.start(*flags, prepare=prepare), status)

    def error(self, *flags, status, prepare=None):
        """Train until an error, which must be one line. Returns it."""
        output = self.train(*flags, status=status, prepare=prepare)
        (line,) = re.findall("main.py: error: (.*)", output)
        return line

    def resume(self, *flags):
        """Train with --pre-train 1, or from scratch where there is no checkpoint yet."""
        exists = checkpoint.Checkpoints(self.models).existing()
        return self.train(*["--pre-train=1"] * bool(exists), *flags)

    def safe(self, epoch):
        return f"; {self.newest} of epoch {epoch} is safe; to resume: python main.py --data="

    def losses(self):
        """The rows of losses.csv, without the seconds."""
        with open(self.models / "losses.csv", newline="") as file:
            return [row[:-1] for row in csv.reader(file)]

    def wait_for(self, name):
        end = time.monotonic() + PATIENCE
        while not (self.path / name).exists():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def run(processes, clips_folder, tmp_path):
    run = Run(processes, clips_folder, tmp_path / "run")
    yield run
    if run.process:
        run.process.kill()  # a failed test may have left it waiting


@pytest.fixture(scope="module")
def uninterrupted(processes, clips_folder, tmp_path_factory):
    """A run that nothing interrupts, with a numbered checkpoint of each epoch."""
    run = Run(processes, clips_folder, tmp_path_factory.mktemp("uninterrupted") / "run")
    run.train(f"--keep={EPOCHS}")
    return run


def assert_intact(run, uninterrupted):
    """No checkpoint is damaged, and the newest has the bits that it ought to have.

    These are weights, moments and the random state. Returns its epoch.
    """
    mine, damaged = checkpoint.Checkpoints(run.models).load_latest()
    epoch = mine["epoch"]
    theirs = checkpoint.load(uninterrupted.models / f"checkpoint-{epoch:06d}.pt")
    assert mine.keys() == theirs.keys() and mine["data"] == theirs["data"] and not damaged
    for content in (mine, theirs):
        del content["settings"], content["data"], content["history"]
        for name in ("optimizer_d", "optimizer_g"):
            content[name] = content[name]["state"]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    return epoch


def assert_same(run, uninterrupted, epoch=EPOCHS):
    """All that the run leaves, up to that epoch, is as it ought to be.

    losses.csv was written from the history in a checkpoint, if the run was resumed.
    """
    assert assert_intact(run, uninterrupted) == epoch
    assert run.losses() == uninterrupted.losses()[: epoch + 1]
    assert not list(run.path.rglob("*.part"))
    names = ["real.gif", *(f"epoch-{e:06d}.gif" for e in (0, 3, 6, EPOCHS) if e <= epoch)]
    for name in names:
        assert (run.videos / name).read_bytes() == (uninterrupted.videos / name).read_bytes(), name


@pytest.mark.parametrize("cuts", [(1,), (7,), (2, 3, 6)])
def test_resume_pieces_equal_uninterrupted(run, uninterrupted, cuts):
    for epochs in cuts:
        run.resume(f"--epochs={epochs}", "--checkpoint-every=1000")
    output = run.resume("--seed=8")  # which has no effect
    assert f"resuming from {run.newest}, epoch {cuts[-1]}\n" in output
    assert f"epoch {cuts[-1]} of {EPOCHS}\n" in output and "the clips have" not in output
    assert_same(run, uninterrupted)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_pieces_on_cuda(run, processes, clips_folder, tmp_path, precision):
    flags = ["--device=cuda", "--deterministic", f"--precision={precision}"]
    uninterrupted = Run(processes, clips_folder, tmp_path / "uninterrupted")
    uninterrupted.train(*flags, f"--keep={EPOCHS}")
    for epochs in (2, 7, EPOCHS):
        run.resume(*flags, f"--epochs={epochs}")
    assert_same(run, uninterrupted)


@needs_cuda
def test_resume_on_another_device_keeps_the_random_numbers(run, uninterrupted):
    for epochs, device in ((3, "cpu"), (6, "cuda"), (EPOCHS, "cpu")):
        output = run.resume(f"--device={device}", f"--epochs={epochs}")
        assert (f", is {device} now" in output) == (epochs > 3)
    mine, theirs = (checkpoint.load(r.newest) for r in (run, uninterrupted))
    assert torch.equal(mine["rng"], theirs["rng"])
    torch.testing.assert_close(mine["networks"], theirs["networks"], rtol=0.1, atol=0.05)


def test_resume_completes_losses_csv(run, uninterrupted):
    run.train("--epochs=3")
    (run.models / "losses.csv").write_bytes(b'epoch,"\0\0\n9,9.5,9\n13,1,2,3\n')
    run.resume("--epochs=4")
    assert_same(run, uninterrupted, 4)
    (run.models / "losses.csv").unlink()
    run.resume("--epochs=5")
    assert_same(run, uninterrupted, 5)


@pytest.mark.parametrize("epoch", [2, 5])
def test_kill_at_a_random_instant(run, uninterrupted, epoch):
    """After the start of an epoch; if the run is done by then, there is nothing to resume."""
    process = run.start(prepare=partial(small.at_epoch, epoch, small.wait, run.path))
    run.wait_for("waiting")
    instant = random.uniform(0, 0.3)
    print(f"killed {instant} s later")
    (run.path / "released").touch()
    time.sleep(instant)
    process.kill()
    process.join()
    assert assert_intact(run, uninterrupted) >= epoch - 1
    run.resume()
    assert_same(run, uninterrupted)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def at_save(epoch, names, number, *signals):
    """Have this process receive `signals` while it saves `epoch`.

    This is before call `number` of all the functions `names`, which are those of os, or "write",
    which stands for the writes of torch.save.
    """
    saving, calls = [], itertools.count()
    save, torch_save = trainer.save_checkpoint, torch.save

    def patched(function):
        def wrapper(*args, **options):
            if saving and next(calls) == number:
                send(*signals)
            return function(*args, **options)

        return wrapper

    def patched_save(the_trainer, *args):
        saving.extend([1] * (the_trainer.epoch == epoch))
        save(the_trainer, *args)
        saving.clear()

    trainer.save_checkpoint = patched_save
    if names == ["write"]:
        torch.save = lambda content, file: torch_save(
            content, SimpleNamespace(write=patched(file.write), flush=file.flush)
        )
    else:
        for name in names:
            setattr(os, name, patched(getattr(os, name)))


def test_kill_while_saving(run, uninterrupted):
    """At writes into a checkpoint, and before each call that changes files.

    This is while the generator's, the newest and the numbered file are saved.
    """
    place = random.randrange(1, 100)
    print(f"killed at write {place}")
    calls = [(["write"], 0), (["write"], place)]
    calls += [(["fsync", "replace", "unlink"], number) for number in range(100)]
    epochs = []
    for call in calls:
        shutil.rmtree(run.path, ignore_errors=True)
        prepare = partial(at_save, 2, *call, signal.SIGKILL)
        process = run.start("--keep=1", "--epochs=2", prepare=prepare)
        process.join(PATIENCE)
        if process.exitcode == 0:  # there are no more calls
            break
        assert process.exitcode == -signal.SIGKILL
        epochs.append(assert_intact(run, uninterrupted))
        if call[0] == ["write"] or not run.newest.exists():
            run.resume("--epochs=3", "--keep=1")
            assert_same(run, uninterrupted, 3)
            assert [p.stem for p in run.models.glob("checkpoint-0*")] == ["checkpoint-000003"]
    assert epochs == [1] * 8 + [2] * 5


def break_output(kind):
    """Have all that this process prints fail."""
    reader, writer = os.pipe()
    os.close(reader)  # like the end of `main.py 2>&1 | head`
    if kind == "full disk":
        writer = os.open("/dev/full", os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(writer, stream)


def hang_up():
    """What happens when a terminal closes."""
    break_output("pipe")
    send(signal.SIGHUP)


STOPS = {130: partial(send, signal.SIGINT), 143: partial(send, signal.SIGTERM)}
STOPS |= {129: partial(send, signal.SIGHUP), 1: hang_up}


@pytest.mark.parametrize("status", STOPS)
def test_stop_signal_finishes_the_epoch_and_saves(run, uninterrupted, status):
    prepare = partial(small.at_epoch, 4, STOPS[status])
    output = run.train("--checkpoint-every=1000", status=status, prepare=prepare)
    assert assert_intact(run, uninterrupted) == 4 and len(run.losses()) == 5
    args = ["--pre-train=1"]
    if status > 1:
        assert "Ctrl-C again" in output
        stopped, command = output.splitlines()[-2:]
        assert stopped == f"stopped after epoch 4, saved to {run.newest}; to resume:"
        python, main, *args = shlex.split(command)
        assert (python, main, *args[-2:]) == ("python", "main.py", "--pre-train", "1")
    run.train(*args, "--checkpoint-every=1")
    assert_same(run, uninterrupted)


def test_stop_command_can_be_pasted(run, uninterrupted):
    """What Ctrl-C prints, into a shell; a folder has a space in its name."""
    run.models = run.path / "my models"
    command = [sys.executable, "tests/small.py", *run.flags, f"--models={run.models}"]
    command += ["--epochs=100000", "--checkpoint-every=100000"]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=small.heed_signals
    )
    run.wait_for("videos/epoch-000003.gif")
    process.send_signal(signal.SIGINT)
    pasted = process.communicate(timeout=PATIENCE)[1].splitlines()[-1]
    assert process.returncode == 130
    assert shlex.split(pasted) == [*command, "--pre-train", "1"]
    epoch = checkpoint.load(run.models / "checkpoint.pt")["epoch"] + 1
    subprocess.run(["sh", "-c", f"{pasted} --epochs {epoch}"], cwd=ROOT, check=True)
    assert checkpoint.load(run.models / "checkpoint.pt")["epoch"] == epoch


def test_stop_button_of_a_notebook(run, uninterrupted):
    """Jupyter's interrupt: the run stops and is saved, the kernel lives, and the run resumes."""
    from jupyter_client.manager import start_new_kernel

    run.path.mkdir()
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "tests"))

    def press():
        run.wait_for("waiting")
        manager.interrupt_kernel()
        (run.path / "released").touch()

    def execute(code):
        """Run a cell. Returns all it prints."""
        texts = []

        def hook(message):
            if message["msg_type"] in ("stream", "error"):
                texts.append(message["content"].get("text") or str(message["content"]))

        client.execute_interactive(code, timeout=PATIENCE, output_hook=hook)
        return "".join(texts)

    try:
        wait = f"small.at_epoch(4, small.wait, small.Path({str(run.path)!r}))"
        assert execute(f"import small; {wait}") == ""
        threading.Thread(target=press, daemon=True).start()
        script = shlex.join(["small.py", *run.flags])
        output = execute(f"%run {script} --epochs 100000 --checkpoint-every 100000")
        assert f"stopped after epoch 4, saved to {run.newest}; to resume:" in output
        assert not re.search("Traceback|KeyboardInterrupt|SystemExit|exception", output)
        (command,) = re.findall(r"^%run .*small\.py .*--pre-train 1$", output, re.MULTILINE)
        assert execute("print(6 * 7)") == "42\n"
        assert "done: " in execute(f"{command} --epochs {EPOCHS} --checkpoint-every 1")
        assert_same(run, uninterrupted)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_ctrl_c_twice_stops_at_once(run, uninterrupted):
    """While a checkpoint is written."""
    prepare = partial(at_save, 4, ["write"], 60, signal.SIGINT, signal.SIGINT)
    line = run.train(status=130, prepare=prepare).splitlines()[-1]
    assert line.startswith(f"main.py: stopped at once{run.safe(3)}")
    assert line.endswith(" --pre-train 1")
    assert assert_intact(run, uninterrupted) == 3 and not list(run.path.rglob("*.part"))


def lose_output(kind):
    """Break the output at epoch 4, and slow the epochs down, so that something is printed."""
    small.at_epoch(4, break_output, kind)
    for epoch in range(4, EPOCHS):
        small.at_epoch(epoch, time.sleep, 0.6)


@pytest.mark.parametrize("kind", ["broken pipe", "full disk"])
def test_output_that_fails_ends_the_run_saved(run, uninterrupted, kind):
    run.train("--checkpoint-every=1000", status=1, prepare=partial(lose_output, kind))
    assert 4 <= assert_intact(run, uninterrupted) < EPOCHS
    run.resume()
    assert_same(run, uninterrupted)


def test_checkpoints_by_the_clock_and_numbered(run):
    run.train("--checkpoint-every=4", "--checkpoint-minutes=0", "--keep=1", "--epochs=7")
    epochs = {path.stem: checkpoint.load(path)["epoch"] for path in run.models.glob("checkpoint*")}
    assert epochs == {"checkpoint": 7, "checkpoint-previous": 6, "checkpoint-000004": 4}


@pytest.mark.parametrize("megabytes, epoch", [(0.5, None), (2.5, 1)])
def test_full_disk(run, uninterrupted, tmp_path, megabytes, epoch):
    """A checkpoint takes one megabyte."""
    run.path.mkdir()
    run.output = tmp_path / "output"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(megabytes * 1e6)}", "none", run.path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        line = run.error("--keep=9", status=1)
        end = run.safe(epoch) if epoch else ""
        assert f"No space left on device; free some space{end}" in line
        assert epoch is None or assert_intact(run, uninterrupted) == epoch
        subprocess.run(["mount", "-o", "remount,size=100000000", run.path], check=True)
        run.resume("--keep=1")
        assert_same(run, uninterrupted)
    finally:
        subprocess.run(["umount", run.path], check=True)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
LESS_MEMORY = "not enough memory: take a smaller --batch-size"


def fail(error):
    raise error


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()])
def test_out_of_memory(run, uninterrupted, error):
    line = run.error(status=1, prepare=partial(small.at_epoch, 4, fail, error))
    assert line.startswith(LESS_MEMORY + run.safe(3))
    assert assert_intact(run, uninterrupted) == 3


def spoil_weight(epoch):
    """Have the update of `epoch` leave an infinite weight."""
    update = trainer.Trainer.update

    def patched(self, *batch):
        metrics = update(self, *batch)
        if self.epoch + 1 == epoch:
            with torch.no_grad():
                next(self.generator.image_generator.parameters())[0, 0, 0, 0] = float("inf")
        return metrics

    trainer.Trainer.update = patched


@pytest.mark.parametrize(
    "every, saved, message", [(4, 4, r"epoch 6: \w+ is nan,"), (1, 4, "epoch 5: weights .* are")]
)
def test_not_finite_is_not_saved(run, uninterrupted, every, saved, message):
    """The metrics of epoch 6 show the weight of epoch 5, or the checkpoint of epoch 5 does."""
    prepare = partial(spoil_weight, 5)
    line = run.error(f"--checkpoint-every={every}", status=1, prepare=prepare)
    assert re.match(f"{message} not finite; try a smaller --lr", line) and run.safe(saved) in line
    assert assert_intact(run, uninterrupted) == saved


def test_gif_that_cannot_be_written_costs_no_epoch(run, uninterrupted):
    gif = run.videos / "epoch-000003.gif"
    prepare = partial(small.at_epoch, 2, gif.mkdir)
    line = run.error("--checkpoint-every=1000", status=1, prepare=prepare)
    assert line.startswith(f"{gif}: Is a directory{run.safe(3)}")
    gif.rmdir()
    run.resume()
    assert_same(run, uninterrupted)


def test_changed_settings_are_printed(run):
    run.train("--epochs=1")
    flags = ["--epochs=2", "--batch-size=3", "--lr=0.001", "--precision=bf16", "--seed=8"]
    lines = run.resume(*flags).splitlines()
    assert {line for line in lines if line.startswith("note: ")} == {
        "note: batch_size was 2, is 3 now",
        "note: lr was 0.0002, is 0.001 now",
        "note: epochs was 1, is 2 now",
        "note: precision was fp32, is bf16 now",
        "note: --seed 8 has no effect: this run has 0",
    }
    assert checkpoint.load(run.newest)["settings"]["batch_size"] == 3
    assert " was " not in run.resume(*flags)


def test_other_clips_are_noted(run, tmp_path, clips_folder):
    clips = tmp_path / "clips"
    shutil.copytree(clips_folder, clips)
    run.flags[0] = f"--data={clips}"
    run.train("--epochs=1")
    arrays = {path: np.load(path) for path in clips.rglob("*.npy")}
    path, pixels = arrays.popitem()
    path.unlink()
    now = sum(len(clip) for clip in arrays.values())
    then = f"{len(arrays) + 1} with {now + len(pixels)} frames then"
    note = "note: the clips have changed, in name or content: "
    note += f"{then}, {len(arrays)} with {now} frames now\n"
    assert note in run.resume("--epochs=2")
    assert "the clips have changed" not in run.resume("--epochs=3")


def test_damaged_newest_falls_back_to_previous(run, uninterrupted):
    run.train("--epochs=3")
    data = bytearray(run.newest.read_bytes())
    data[len(data) // 2] ^= 16
    run.newest.write_bytes(data)
    output = run.train("--pre-train=1")
    assert f"warning: {run.newest}: damaged, or not a checkpoint of this program\n" in output
    assert f"resuming from {run.models / 'checkpoint-previous.pt'}, epoch 2\n" in output
    assert_same(run, uninterrupted)
    for path in run.models.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    line = run.error("--pre-train=1", status=2)
    assert "checkpoint.pt: damaged" in line and "checkpoint-previous.pt: damaged" in line


def test_highest_epoch_wins(run, uninterrupted):
    """Whatever the names and times of the files say."""
    run.train("--epochs=3")
    highest = run.models / "checkpoint-000006.pt"
    shutil.copy(uninterrupted.models / highest.name, highest)
    os.utime(highest, (0, 0))
    assert f"resuming from {highest}, epoch 6\n" in run.train("--pre-train=1")
    assert_same(run, uninterrupted)


def test_second_run_is_refused(run, processes, clips_folder, tmp_path):
    process = run.start(prepare=partial(small.at_epoch, 2, small.wait, run.path))
    run.wait_for("waiting")
    second = Run(processes, clips_folder, run.path)
    second.output = tmp_path / "output"
    for folder, flag in ((run.models, "--videos"), (run.videos, "--models")):
        line = second.error(f"{flag}={tmp_path / 'elsewhere'}", status=2)
        assert line.startswith(f"{folder}: another run is writing there; wait")
    process.kill()  # which frees the folders
    process.join()
    run.train("--epochs=1")


@pytest.mark.parametrize(
    "change, flags, reason",
    [
        ({"format": 99}, [], "of another version of this program (99, not "),
        ({"networks": {}}, [], "cannot resume from it ('R_M'); "),
        ({"rng": {}}, [], "cannot resume from it ("),
        ({}, ["--frames=32"], "cannot resume from it (Error(s) in loading state_dict for Small"),
    ],
)
def test_foreign_checkpoint_is_refused(run, uninterrupted, change, flags, reason):
    run.models.mkdir(parents=True)
    content = checkpoint.load(uninterrupted.models / "checkpoint-000002.pt")
    checkpoint.save(run.newest, {**content, **change})
    before = run.newest.read_bytes()
    line = run.error("--pre-train=1", *flags, status=2)
    assert line.startswith(f"{run.newest}: {reason}")
    assert "to resume" not in line and run.newest.read_bytes() == before
