"""Nothing is lost: runs that are cut off, really killed, starved or fed nonsense, and go on.

The networks are a sixteenth as wide as the product's (small.py), all else is the same code. Each
run is a process of its own, forked from one that has PyTorch in it already.
"""

import csv
import functools
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import ROOT
from jupyter_client.manager import start_new_kernel

import checkpoint

EPOCHS = 24
KILLS = 20
PYTHON = Path(sys.executable).name


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT / "tests")):  # where it looks for that
        forkserver.ensure_running()
    return context


class Run:
    """A run of main.py with small networks, in folders of its own."""

    def __init__(self, processes, clips, path):
        self.processes, self.path = processes, path
        self.models, self.videos = path / "models", path / "videos"
        self.said = path / "said"
        self.flags = [f"--data={clips}", f"--models={self.models}", f"--videos={self.videos}"]
        self.flags += ["--batch-size=2", "--precision=fp32", "--device=cpu", "--sample-every=9"]
        self.flags += [f"--epochs={EPOCHS}", "--checkpoint-every=1"]

    def start(self, *flags, prepare=None):
        self.path.mkdir(exist_ok=True)
        args = [*self.flags, *flags], self.said, prepare
        process = self.processes.Process(target=small.process, args=args)
        process.start()
        return process

    def train(self, *flags, status=0, prepare=None):
        """Train to the end of it. Returns what was printed."""
        process = self.start(*flags, prepare=prepare)
        process.join(120)
        said = self.said.read_text()
        assert process.exitcode == status, said
        assert "Traceback" not in said
        return said

    def error(self, *flags, status, prepare=None):
        """Train, to an error of one line, which is returned."""
        said = self.train(*flags, status=status, prepare=prepare)
        lines = [line for line in said.splitlines() if line.startswith("main.py: error: ")]
        assert len(lines) == 1 and said.endswith(lines[0] + "\n"), said
        return lines[0].removeprefix("main.py: error: ")

    def go_on(self, *flags):
        there = (self.models / "checkpoint.pt").exists()
        return self.train(*["--pre-train=1"] * there, *flags)

    def checkpoint(self, name="checkpoint.pt"):
        return checkpoint.read(self.models / name)

    def losses(self):
        """The rows of losses.csv, without the time they took."""
        with open(self.models / "losses.csv", newline="") as file:
            return [row[:5] for row in csv.reader(file)][1:]

    def wait_for_epoch(self, epoch, process):
        path, end = self.models / "losses.csv", time.monotonic() + 60
        while not path.exists() or path.read_text().count("\n") <= epoch:
            assert process.is_alive() and time.monotonic() < end, self.said.read_text()
            time.sleep(0.005)


@pytest.fixture
def run(processes, clips_folder, tmp_path):
    return Run(processes, clips_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(processes, clips_folder, tmp_path_factory):
    """The run that nothing interrupts, and how long it takes."""
    run = Run(processes, clips_folder, tmp_path_factory.mktemp("whole") / "run")
    run.error("--epochs=x", status=2)  # the first process waits for what is preloaded
    start = time.perf_counter()
    run.train()
    run.seconds = time.perf_counter() - start
    return run


def leaves(value, path=""):
    """All that is in nested dicts and lists: pairs of place and value."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


def assert_same(run, whole):
    """Weights, moments, random states and losses are the same, to the bit."""
    mine, theirs = (dict(leaves(r.checkpoint())) for r in (run, whole))
    settings = [place for place in theirs if place.startswith("/settings")]
    assert mine.keys() == theirs.keys() and len(mine) > 100 and settings
    for place in theirs.keys() - set(settings):
        if isinstance(theirs[place], torch.Tensor):
            assert torch.equal(mine[place], theirs[place]), place
        else:
            assert mine[place] == theirs[place], place
    assert run.losses() == whole.losses()
    assert [int(row[0]) for row in run.losses()] == list(range(1, EPOCHS + 1))
    assert not list(run.path.rglob("*.part"))
    gifs = list(whole.videos.glob("*.gif"))
    assert len(gifs) == 5
    for gif in gifs:
        assert (run.videos / gif.name).read_bytes() == gif.read_bytes()


# ---------------------------------------------------------------- cut up


@pytest.mark.parametrize("cuts", [(1,), (11,), (23,), (2, 9, 10, 20)])
def test_pieces_make_the_same_run(run, whole, cuts):
    for epochs in cuts:
        run.go_on(f"--epochs={epochs}", "--checkpoint-every=1000")
        assert run.checkpoint()["epoch"] == epochs
    said = run.go_on()
    assert f"note: --epochs was {cuts[-1]}, is {EPOCHS} now" in said
    assert "note: --checkpoint-every was 1000, is 1 now" in said
    assert f"epochs {cuts[-1] + 1} to {EPOCHS}, from {run.models / 'checkpoint.pt'}\n" in said
    assert_same(run, whole)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_make_the_same_run_on_cuda(run, processes, clips_folder, tmp_path, precision):
    """With --deterministic, and cut in and after the epochs before the CUDA graph."""
    flags = ["--device=cuda", "--deterministic", f"--precision={precision}"]
    whole = Run(processes, clips_folder, tmp_path / "whole")
    whole.train(*flags)
    for epochs in (2, 11, EPOCHS):
        run.go_on(*flags, f"--epochs={epochs}")
    assert_same(run, whole)


@needs_cuda
def test_from_one_device_to_the_other(run):
    for epoch, device in enumerate(("cuda", "cpu", "cuda", "cpu"), start=1):
        said = run.go_on(f"--device={device}", f"--epochs={epoch * 5}")
        assert run.checkpoint()["epoch"] == epoch * 5
        assert (f", is {device} now" in said) == (epoch > 1)
    assert [int(row[0]) for row in run.losses()] == list(range(1, 21))


def test_what_was_logged_after_the_checkpoint_is_logged_once(run, whole):
    """Whatever stands in losses.csv: later epochs, a line cut short, one twice, nonsense."""
    run.train("--epochs=8")
    rows = (run.models / "losses.csv").read_text().splitlines(keepends=True)
    other = [row.replace(row.split(",")[1], "9.5") for row in rows[1:]]
    later = [f"{epoch},1,1,1,1,1\n" for epoch in (9, 10, 11, -1, 0)]
    nonsense = ["nonsense\n", '"', "\0" * 200_000, "\n", "12,0.5,0.4"]
    text = "".join(["\ufeff", rows[0], other[2], *rows[1:], *later, *nonsense])
    (run.models / "losses.csv").write_text(text, encoding="utf-8")
    assert "lacks" not in run.go_on()
    assert_same(run, whole)


def test_lost_losses_are_said_and_what_was_there_is_kept(run):
    run.train("--epochs=4")
    path = run.models / "losses.csv"
    rows = path.read_text().splitlines(keepends=True)
    edited = "".join([*rows[:2], '"' + rows[2], rows[3].replace(",", ";"), *rows[4:]])
    path.write_text(edited)
    said = run.go_on("--epochs=5")
    kept = run.models / "losses-before-4.csv"
    assert (
        f"note: {path} lacks 2 of the 4 epochs so far; as it was, it is kept as {kept.name}" in said
    )
    assert [row[0] for row in run.losses()] == ["1", "4", "5"] and kept.read_text() == edited
    path.unlink()
    assert f"note: {path} lacks 5 of the 5 epochs so far\n" in run.go_on("--epochs=6")


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_instant(run, whole, number):
    """Anywhere from its start to its end; then it goes on to the same weights."""
    while True:
        process = run.start()
        instant = random.uniform(0, whole.seconds)
        print(f"killed after {instant} of {whole.seconds} s")
        time.sleep(instant)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        shutil.rmtree(run.path)  # it had ended before: once more
    logged = run.losses()[:-1] if (run.models / "losses.csv").exists() else []
    saved = (run.models / "checkpoint.pt").exists()
    if saved:  # with a checkpoint an epoch, no more than that of the last is lost
        assert run.checkpoint()["epoch"] >= len(logged)
    run.go_on()
    assert_same(run, whole)


def die_while_saving(names, left):
    """Have this process killed before a call of one of `names`, while it saves epoch 3."""
    saving = []

    def deadly(function):
        def wrapped(*args, **options):
            nonlocal left
            left -= bool(saving)
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return wrapped

    for name in names:
        place = checkpoint.HashingWriter if name == "write" else os
        setattr(place, name, deadly(getattr(place, name)))
    save = checkpoint.Checkpoints.save

    def third(checkpoints, content, **options):
        saving.extend([1] * (content["epoch"] == 3))
        save(checkpoints, content, **options)
        saving.clear()

    checkpoint.Checkpoints.save = third


def test_killed_at_each_step_of_a_checkpoint(processes, clips_folder, whole, tmp_path):
    """At some of the writes into the file, and before each other call that changes files."""

    def kill(names, left):
        run = Run(processes, clips_folder, tmp_path / f"{names[0]}{left}")
        process = run.start("--keep=1", prepare=functools.partial(die_while_saving, names, left))
        process.join(120)
        if process.exitcode == 0:
            return None
        assert process.exitcode == -signal.SIGKILL
        files = {path.name for path in run.models.glob("checkpoint*")}
        epoch = run.checkpoint()["epoch"]
        assert epoch in (2, 3)
        assert run.checkpoint("checkpoint-previous.pt")["epoch"] in (1, 2)
        run.go_on("--keep=1")
        assert_same(run, whole)
        return "checkpoint.pt.part" in files, epoch

    for left in (0, 1, random.randrange(2, 100), 100):
        assert kill(["write"], left) == (True, 2)
    steps = []
    while steps[-1:] != [None]:
        steps.append(kill(["fsync", "replace", "link", "unlink"], len(steps)))
    assert steps[0] == (False, 2) and steps[-2] == (False, 3) and len(steps) > 8
    assert steps.count((True, 2)) >= 4  # the new one is whole, but not yet under its name


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_epoch_and_saves(run, whole, number, status):
    process = run.start("--checkpoint-every=1000", "--epochs=100000", prepare=small.make_slow)
    run.wait_for_epoch(2, process)
    os.kill(process.pid, number)
    process.join(60)
    said = run.said.read_text()
    assert process.exitcode == status and "Traceback" not in said
    epoch = run.checkpoint()["epoch"]
    assert 2 <= epoch < EPOCHS
    assert [int(row[0]) for row in run.losses()] == list(range(1, epoch + 1))
    told, command = said.splitlines()[-2:]
    newest = run.models / "checkpoint.pt"
    assert told == f"stopped after epoch {epoch}, saved to {newest}; to go on:"
    words = shlex.split(command)
    assert words[:2] == [PYTHON, "main.py"] and words[-2:] == ["--pre-train", "1"]
    run.train(*words[2:], "--checkpoint-every=1", f"--epochs={EPOCHS}")
    assert_same(run, whole)


def test_ctrl_c_of_the_real_thing(clips_folder, tmp_path):
    """`python main.py` in a terminal of its own, and the command it prints, typed as it stands."""
    folders = [f"--models={tmp_path / 'the models'}", f"--videos={tmp_path / 'v'}"]
    command = [sys.executable, "main.py", f"--data={clips_folder}", *folders, "--batch-size=2"]
    process = subprocess.Popen(
        [*command, "--epochs=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=small.heed_signals,
    )
    losses = tmp_path / "the models" / "losses.csv"
    while not losses.exists() or losses.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    assert printed.startswith(f"{PYTHON} main.py ") and "'" in printed  # quoted for a shell
    epoch = checkpoint.read(tmp_path / "the models" / "checkpoint.pt")["epoch"]
    printed = printed.replace(PYTHON, sys.executable, 1).replace("100000", str(epoch + 1))
    done = subprocess.run(["sh", "-c", printed], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "done: " in done.stdout, done
    assert checkpoint.read(tmp_path / "the models" / "checkpoint.pt")["epoch"] == epoch + 1


def test_the_stop_button_of_a_notebook(run, whole):
    """Jupyter's interrupt: the epoch ends, the state is saved, the kernel lives and goes on."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "tests"))
    try:
        script = shlex.join(["small.py", *run.flags])
        said = []

        def hear(message):
            if message["msg_type"] in ("stream", "error"):
                said.append(message["content"].get("text") or str(message["content"]))
                if re.search(r"[1-9]\d*/100000 ", said[-1]) and "ending" not in "".join(said):
                    manager.interrupt_kernel()

        def cell(code):
            said.clear()
            client.execute_interactive(code, timeout=120, output_hook=hear)
            return "".join(said)

        cell("import small; small.make_slow()")
        printed = cell(f"%run {script} --epochs 100000 --checkpoint-every 100000")
        epoch = run.checkpoint()["epoch"]
        assert 1 <= epoch < EPOCHS and f"stopped after epoch {epoch}, saved to " in printed
        assert not re.search("Traceback|KeyboardInterrupt|SystemExit|exception", printed)
        (go_on,) = re.findall(r"^%run .*small\.py .*--pre-train 1$", printed, re.MULTILINE)
        assert cell("print(6 * 7)") == "42\n"
        go_on = go_on.replace("--epochs 100000 ", "").replace("every 100000", "every 1")
        assert "done: " in cell(go_on)
        assert_same(run, whole)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def press_twice(epoch):
    """Have Ctrl-C pressed twice while the checkpoint of that epoch is written."""
    save, write = checkpoint.Checkpoints.save, checkpoint.HashingWriter.write
    saving = []

    def noting(checkpoints, content, **options):
        saving.append(content["epoch"])
        save(checkpoints, content, **options)

    def pressed(*args):
        if saving[-1] == epoch:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return write(*args)

    checkpoint.Checkpoints.save, checkpoint.HashingWriter.write = noting, pressed


def test_ctrl_c_twice_stops_at_once(run, whole):
    said = run.train(status=130, prepare=functools.partial(press_twice, 6))
    line = said.splitlines()[-1]
    newest = run.models / "checkpoint.pt"
    expected = f"main.py: stopped at once; {newest} of epoch 5 is safe; to go on: {PYTHON} main.py"
    assert line.startswith(expected)
    assert run.checkpoint()["epoch"] == 5 and not list(run.models.glob("checkpoint*.part"))
    run.go_on()
    assert_same(run, whole)


def print_to_nobody():
    """As in `main.py 2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def print_to_a_full_disk():
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


@pytest.mark.parametrize("prepare", [print_to_nobody, print_to_a_full_disk])
def test_nobody_need_hear_what_it_says(run, whole, prepare):
    run.train(prepare=prepare)
    assert_same(run, whole)
    process = run.start("--epochs=100000", "--pre-train=1", prepare=prepare)
    run.wait_for_epoch(EPOCHS + 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert run.checkpoint()["epoch"] == len(run.losses())


def test_checkpoints_come_by_the_clock(run):
    flags = ["--checkpoint-every=1000", "--checkpoint-minutes=0.01"]
    process = run.start(*flags, prepare=small.make_slow)
    newest, end = run.models / "checkpoint.pt", time.monotonic() + 60
    while not newest.exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 1 <= run.checkpoint()["epoch"] < EPOCHS


def test_numbered_checkpoints_are_those_of_the_interval(run):
    run.train("--checkpoint-every=5", "--checkpoint-minutes=0", "--keep=2")
    kept = {p.name: run.checkpoint(p.name)["epoch"] for p in run.models.glob("checkpoint*")}
    assert kept == {
        "checkpoint.pt": 24,
        "checkpoint-previous.pt": 23,
        "checkpoint-000015.pt": 15,
        "checkpoint-000020.pt": 20,
    }


# ---------------------------------------------------------------- starved


def small_files(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_file_size_limit(run, whole):
    """A checkpoint that cannot be written in full: the one before is untouched."""
    run.train("--epochs=5")
    before = {p: p.read_bytes() for p in run.models.glob("checkpoint*")}
    newest = run.models / "checkpoint.pt"
    limit = functools.partial(small_files, newest.stat().st_size // 2)
    line = run.error("--pre-train=1", status=1, prepare=limit)
    assert line.startswith(
        f"{newest}: File too large; free some space; {newest} of epoch 5 is safe"
    )
    assert f"; to go on after that: {PYTHON} main.py --data=" in line and line.endswith(
        "--pre-train=1"
    )
    assert before == {p: p.read_bytes() for p in run.models.glob("checkpoint*")}
    run.go_on()
    assert_same(run, whole)


@pytest.mark.parametrize("size", [0.05, 0.3, 1.5, 2.5, 3.5])
def test_a_full_disk(run, whole, tmp_path, size):
    """A file system of so many MB, of which a checkpoint takes one. With space, it goes on."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(size * 1e6)}", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    run.said = tmp_path / "said"
    try:
        line = run.error("--keep=9", status=1)
        assert "No space left on device; free some space; " in line
        if "of epoch" in line:
            epoch = int(re.search(r"checkpoint.pt of epoch (\d+) is safe; to go on ", line)[1])
            assert epoch >= 1 and run.checkpoint()["epoch"] == epoch
        else:
            assert f"there is no checkpoint in {run.models}" in line and size < 1
        subprocess.run(["mount", "-o", "remount,size=100000000", disk], check=True)
        run.go_on("--keep=1")
        assert_same(run, whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def as_nobody():
    os.seteuid(65534)


def test_folders_that_cannot_be_written_or_read(processes, clips_folder, whole):
    import tempfile

    with tempfile.TemporaryDirectory() as path:  # pytest's own are closed to others
        path = Path(path)
        path.chmod(0o755)
        subprocess.run(["cp", "-r", "--no-preserve=mode", clips_folder, path / "clips"], check=True)
        run = Run(processes, path / "clips", path / "run")
        prepare = as_nobody if os.geteuid() == 0 else None
        run.models.mkdir(parents=True)
        run.models.chmod(0o555)
        line = run.error(status=2, prepare=prepare)
        expected = f"cannot write to {run.models}: Permission denied; see to its permissions, "
        assert line == expected + "or name another folder"
        run.models.chmod(0o777)
        run.videos.mkdir()
        run.videos.chmod(0o555)
        assert f"{run.videos}: Permission denied" in run.error(status=2, prepare=prepare)
        run.videos.chmod(0o777)
        run.train("--epochs=2")
        for file in (*run.models.iterdir(), *run.videos.iterdir()):
            file.chmod(0o666)
        run.models.chmod(0o555)  # the lock can be had, but no file made
        line = run.error("--pre-train=1", status=1, prepare=prepare)
        assert "Permission denied; see to its permissions" in line and "of epoch 2 is safe" in line
        run.models.chmod(0o777)
        for closed in (path / "clips", next(p for p in (path / "clips").iterdir() if p.is_dir())):
            closed.chmod(0o000)
            line = run.error("--pre-train=1", status=2, prepare=prepare)
            assert line.startswith(f"{closed}: Permission denied; see to its permissions")
            closed.chmod(0o755)
        checkpoint_file = run.models / "checkpoint.pt"
        checkpoint_file.chmod(0o000)
        line = run.error("--pre-train=1", status=2, prepare=prepare)
        assert line.startswith(f"cannot read {checkpoint_file}: Permission denied; see to its perm")
        checkpoint_file.chmod(0o666)
        run.go_on()
        assert_same(run, whole)


def spoil(epoch, error=None):
    """Have `epoch` raise `error`, or leave a weight that is infinite."""
    import trainer

    update = trainer.Trainer.update

    def spoilt(self, *batch):
        if self.epoch + 1 == epoch and error:
            raise error
        losses = update(self, *batch)
        if self.epoch + 1 == epoch:
            with torch.no_grad():
                next(self.generator.image_generator.parameters())[0, 0, 0, 0] = float("inf")
        return losses

    trainer.Trainer.update = spoilt


def test_losses_that_are_not_finite(run, whole):
    """A weight goes to infinity in epoch 8; the losses of epoch 9 show it."""
    prepare = functools.partial(spoil, 8)
    line = run.error("--checkpoint-every=5", status=1, prepare=prepare)
    assert re.match(r"at epoch 9 the losses \(\w+: nan\) are not finite: try a smaller --lr", line)
    assert f"; {run.models / 'checkpoint.pt'} of epoch 5 is safe; to go on after that: " in line
    assert run.checkpoint()["epoch"] == 5
    assert [int(row[0]) for row in run.losses()] == list(range(1, 10))
    run.go_on()
    assert_same(run, whole)


def test_weights_that_are_not_finite_are_not_saved(run, whole):
    """They go to infinity in an epoch whose losses are finite, and which ends with a checkpoint."""
    line = run.error(status=1, prepare=functools.partial(spoil, 8))
    assert line.startswith("after epoch 8 weights or their moments are not finite: try a smaller")
    assert "of epoch 7 is safe" in line and run.checkpoint()["epoch"] == 7
    run.go_on()
    assert_same(run, whole)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 14.74 GiB"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB). Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "mps", "cublas", "host"])
def test_out_of_memory(run, error):
    line = run.error("--epochs=9", status=1, prepare=functools.partial(spoil, 4, error))
    more = " for 20.00 MiB" if "20.00" in str(error) else ""
    safe = f"{run.models / 'checkpoint.pt'} of epoch 3 is safe; to go on after that: {PYTHON}"
    expected = f"not enough memory{more}: take a smaller --batch-size; {safe}"
    assert line.startswith(expected) and run.checkpoint()["epoch"] == 3


def out_of_memory_while_loading(error):
    def load(*_, **__):
        raise error

    torch.load = load


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], MemoryError()], ids=["cuda", "host"])
def test_out_of_memory_is_no_damage(run, error):
    run.train("--epochs=3")
    prepare = functools.partial(out_of_memory_while_loading, error)
    line = run.error("--pre-train=1", status=1, prepare=prepare)
    assert line.startswith("not enough memory") and "the checkpoints in " in line
    assert run.checkpoint()["epoch"] == 3


def no_gif(epoch):
    import trainer

    show_samples = trainer.show_samples

    def fails(the_trainer, log, videos):
        if the_trainer.epoch == epoch:
            raise OSError(28, "No space left on device", str(videos / "epoch.gif"))
        show_samples(the_trainer, log, videos)

    trainer.show_samples = fails


def test_pictures_that_cannot_be_written_cost_no_epoch(run, whole):
    flags = ["--checkpoint-every=1000", "--sample-every=9"]
    line = run.error(*flags, status=1, prepare=functools.partial(no_gif, 9))
    assert "epoch.gif: No space left on device; free some space; " in line
    assert "of epoch 9 is safe" in line and run.checkpoint()["epoch"] == 9
    run.go_on("--epochs=18")
    (run.videos / "epoch-000009.gif").write_bytes((whole.videos / "epoch-000009.gif").read_bytes())
    run.go_on()
    assert_same(run, whole)


def little_memory():
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, now + 2**29))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="of Linux")
def test_a_batch_that_memory_does_not_hold(run):
    line = run.error("--batch-size=5000", status=1, prepare=little_memory)
    assert re.match(r"not enough memory( for [\d.]+ GB)?: take a smaller --batch-size; ", line)
    assert line.endswith(f"; there is no checkpoint in {run.models}")


def test_clips_that_go_away(run, whole, tmp_path, clips_folder):
    clips = tmp_path / "clips"
    shutil.copytree(clips_folder, clips)
    run.flags[0] = f"--data={clips}"
    process = run.start("--epochs=100000")
    run.wait_for_epoch(2, process)
    for path in clips.rglob("*.npy"):
        other = path.with_suffix(".other")
        with open(other, "wb") as file:
            np.save(file, np.zeros((20, 32, 32, 3), np.uint8))
        os.replace(other, path)  # as resize.py does
    time.sleep(0.3)
    assert process.is_alive()  # it still has the ones it opened
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130


# ---------------------------------------------------------------- other settings


def test_what_may_change_is_said(run):
    run.train("--epochs=2")
    said = run.go_on(
        "--epochs=3",
        "--batch-size=3",
        "--lr=0.001",
        "--precision=bf16",
        "--sample-every=7",
        "--checkpoint-minutes=3",
        "--keep=2",
        "--seed=8",
    )
    assert [line for line in said.splitlines() if line.startswith("note: ")] == [
        "note: --batch-size was 2, is 3 now",
        "note: --lr was 0.0002, is 0.001 now",
        "note: --epochs was 2, is 3 now",
        "note: --sample-every was 9, is 7 now",
        "note: --checkpoint-minutes was 10.0, is 3.0 now",
        "note: --keep was 0, is 2 now",
        "note: --precision was fp32, is bf16 now",
        "note: --seed 8 has no effect: this run has 0",
    ]
    assert run.checkpoint()["settings"]["batch_size"] == 3


def other_networks():
    import models

    models.DIM_MOTION, models.DIM_CONTENT = 12, 40


def test_what_must_agree_is_listed(run, tmp_path):
    run.train("--epochs=1")
    rng = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / "48").mkdir(exist_ok=True)
        clip = rng.integers(0, 256, (40, 48, 48, 3), dtype=np.uint8)
        np.save(tmp_path / "48" / f"{i}.npy", clip)
    before = (run.models / "checkpoint.pt").read_bytes()
    line = run.error("--pre-train=1", f"--data={tmp_path / '48'}", "--frames=32", status=2)
    newest = run.models / "checkpoint.pt"
    assert line == (
        f"{newest}: cannot go on with other networks: size was 32, is 48 now; "
        "--frames was 16, is 32 now; G_I main.0.weight was 60×32×2×2, is 60×32×3×3 now; "
        "D_I main.8.weight was 1×32×2×2, is 1×32×3×3 now; D_V linear.weight was 1×128, is 1×576 "
        "now; go on with what it began with, or leave --pre-train out to start anew"
    )
    line = run.error("--pre-train=1", status=2, prepare=other_networks)
    assert "R_M gru.weight_ih_l0 was 30×10, is 36×10 now; " in line
    assert "; G_I main.0.weight was 60×32×2×2, is 52×32×2×2 now" in line
    assert (run.models / "checkpoint.pt").read_bytes() == before


def test_other_clips_are_noted(run, tmp_path, clips_folder):
    clips = tmp_path / "clips"
    shutil.copytree(clips_folder, clips)
    run.flags[0] = f"--data={clips}"
    run.train("--epochs=1")
    assert "the clips are not those" not in run.go_on("--epochs=2")
    paths = sorted(clips.rglob("*.npy"))
    n, frames = len(paths), sum(len(np.load(path)) for path in paths)
    pixels = np.load(paths[0])
    pixels[0, 5, 5] ^= 1
    np.save(paths[0], pixels)
    then = "note: the clips are not those of the checkpoint, in name or content: "
    then += f"{n} of {frames} frames then, "
    assert f"{then}{n} of {frames} now" in run.go_on("--epochs=3")
    paths[0].rename(paths[0].with_name("renamed.npy"))
    assert f"{then}{n} of {frames} now" in run.go_on("--epochs=4")
    paths[1].unlink()
    frames_now = sum(len(np.load(path)) for path in clips.rglob("*.npy"))
    assert f"{then}{n - 1} of {frames_now} now" in run.go_on("--epochs=5")


# ---------------------------------------------------------------- nonsense


def test_damaged_checkpoints(run, whole):
    """Cut short, a bit flipped, text, empty: named, and the one before is used."""
    run.train("--epochs=5")
    newest = run.models / "checkpoint.pt"
    data = newest.read_bytes()
    flipped = bytearray(data)
    place = random.randrange(len(data) - checkpoint.TAIL)
    flipped[place] ^= 16
    for damaged, reason in (
        (
            data[: len(data) // 2],
            "not a checkpoint of this version of the program, or one cut short",
        ),
        (bytes(flipped), "damaged, its checksum does not match"),
        (b"hello", "not a checkpoint of this version of the program, or one cut short"),
        (b"", "not a checkpoint of this version of the program, or one cut short"),
    ):
        newest.write_bytes(damaged)
        said = run.train("--pre-train=1", "--epochs=4")  # nothing to do: only loaded
        assert f"warning: {newest}: {reason}" in said
        previous = run.models / "checkpoint-previous.pt"
        assert f"warning: going on from {previous}, of epoch 4" in said
        assert newest.read_bytes() == damaged
    run.go_on()
    assert_same(run, whole)
    for path in run.models.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    line = run.error("--pre-train=1", status=2)
    assert "checkpoint.pt: not a checkpoint" in line and "checkpoint-previous.pt: not" in line


def test_a_second_run_is_refused(run, whole, processes, clips_folder, tmp_path):
    process = run.start("--epochs=100000")
    run.wait_for_epoch(2, process)
    for folder, flag in ((run.models, "--videos"), (run.videos, "--models")):
        second = Run(processes, clips_folder, run.path)
        second.said = tmp_path / "second"
        line = second.error(f"{flag}={tmp_path / 'elsewhere'}", status=2)
        expected = "another run is writing there; wait until it ends, or name another folder"
        assert line == f"{folder}: {expected}"
    process.kill()  # which frees the folders
    process.join()
    assert "another run" not in run.train("--epochs=1")


def test_a_checkpoint_of_somebody_elses(run):
    run.train("--epochs=1")
    newest = run.models / "checkpoint.pt"
    state = run.checkpoint()
    for change, reason in (
        ({"format": 99}, "of a newer version of this program (format 99; this one reads "),
        ({"settings": None}, "not a checkpoint that main.py wrote"),
        ({"networks": {}}, "cannot go on with other networks: R_M gru.weight_ih_l0 was absent"),
        ({"data": 3}, "not a checkpoint that main.py wrote"),
        ({"optimizer_g": {"state": {}}}, "not a checkpoint that main.py wrote"),
        ({"rng": {}}, "not a checkpoint that main.py wrote"),
        ({"epoch": -4}, "not a checkpoint that main.py wrote"),
        ({"seed": "x"}, "not a checkpoint that main.py wrote"),
    ):
        checkpoint.write(newest, {**state, **change})
        assert f"{newest}: {reason}" in run.error("--pre-train=1", status=2)
