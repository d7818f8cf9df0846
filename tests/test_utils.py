import csv
import errno
import os
import platform
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode

import utils
from utils import (
    LossLog,
    alone_in,
    move_old_run,
    number,
    prints_without_fail,
    set_up_machine,
    signals_noted,
    whole_file,
)

PLAIN = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("cut off")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_numbers_of_the_command_line():
    assert number(int, 1)("12") == 12 and number(float, 0, 1)("1e-4") == 1e-4
    for kind, text in (
        (int, "0"),
        (int, "1.5"),
        (int, "x"),
        (int, ""),
        (float, "nan"),
        (float, "inf"),
    ):
        with pytest.raises(ArgumentTypeError, match="is not a"):
            number(kind, 1)(text)


def test_an_old_run_is_moved_whole(tmp_path):
    models, videos = tmp_path / "m", tmp_path / "v"
    models.mkdir()
    videos.mkdir()
    assert move_old_run(models, videos) == []
    for stamps in (["2026-03-01_10-00-00"], ["2026-03-01_10-00-00_2"]):
        ours = [models / "checkpoint.pt", models / "losses.csv", models / "events.out.tfevents.1.x"]
        ours += [models / "generator.pt", videos / "index.html"]
        ours += [videos / "real.gif", videos / "epoch-000000.gif"]
        for path in (*ours, models / "notes.txt", videos / "mine.gif"):
            path.write_text(path.name)
            os.utime(path, (0, datetime(2026, 3, 1, 10).timestamp()))
        moved = move_old_run(models, videos)
        assert moved == [models / stamps[0], videos / stamps[0]]
        for path in ours:
            assert not path.exists()
            assert (path.parent / stamps[0] / path.name).read_text() == path.name
        assert (models / "notes.txt").exists() and (videos / "mine.gif").exists()


def test_an_old_run_in_one_folder_is_moved_whole(tmp_path):
    for name in ("checkpoint.pt", "losses.csv", "real.gif"):
        (tmp_path / name).write_text(name)
    (moved,) = move_old_run(tmp_path, tmp_path)
    assert sorted(p.name for p in moved.iterdir()) == ["checkpoint.pt", "losses.csv", "real.gif"]


def read(folder):
    with open(folder / "losses.csv", newline="") as file:
        return [[float(x) for x in row] for row in list(csv.reader(file))[1:]]


def test_loss_log(tmp_path):
    log = LossLog(tmp_path)
    log.plot()  # nothing to show yet
    log.add(3, torch.arange(12).reshape(3, 4) / 7, seconds=6)
    log.add(5, torch.ones(2, 4), seconds=3)
    log.plot()
    log.close()
    rows = read(tmp_path)
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    assert [row[5] for row in rows] == [2, 2, 2, 1.5, 1.5]
    np.testing.assert_allclose(rows[2][1:5], np.arange(8, 12) / 7, rtol=1e-6)
    assert (tmp_path / "losses.csv").read_text().startswith("epoch,D_I,D_V,G_I,G_V,seconds\n")
    assert np.array(Image.open(tmp_path / "losses.png")).std() > 10

    # a run that goes on from epoch 3: what came after is dropped, here and in TensorBoard
    log = LossLog(tmp_path, epoch=3)
    log.add(4, torch.full((1, 4), 9.0), seconds=1)
    log.add_image("samples", np.zeros((8, 8, 3), np.uint8), 4)
    log.close()
    assert [row[0] for row in read(tmp_path)] == [1, 2, 3, 4] and read(tmp_path)[3][1] == 9
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    events = board.Scalars("loss/D_V")  # a point a call, the mean of its epochs
    assert [event.step for event in events] == [3, 4]
    assert events[0].value == pytest.approx(5 / 7) and events[1].value == 9
    assert [event.step for event in board.Images("samples")] == [4]


def test_loss_log_drops_a_line_cut_short(tmp_path):
    (tmp_path / "losses.csv").write_text("epoch,D_I,D_V,G_I,G_V,seconds\n1,1,1,1,1,1\n2,1,1")
    LossLog(tmp_path, epoch=5).close()
    assert read(tmp_path) == [[1, 1, 1, 1, 1, 1]]
    (tmp_path / "losses.csv").write_bytes(b"1,1,1,1,1,1\n\xff\n")
    LossLog(tmp_path, epoch=5).close()
    assert read(tmp_path) == [[1, 1, 1, 1, 1, 1]]  # the first line is not needed


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = LossLog(tmp_path)
    log.add(1, torch.ones(1, 4), seconds=1)
    log.add_image("samples", np.zeros((8, 8, 3), np.uint8), 1)
    log.close()
    assert len(read(tmp_path)) == 1 and not list(tmp_path.glob("events*"))
    assert capsys.readouterr().out.startswith("tensorboard is not installed")


def test_cuda_is_set_up_on_the_device_that_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_up_machine(torch.device("cuda:1"))
    assert used == [torch.device("cuda:1")] and torch.backends.cudnn.benchmark


def test_deterministic_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        set_up_machine(torch.device("cuda:0"), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_up_machine(torch.device("cuda:0"))  # the next run of a notebook, without
        assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def heeded():
    """The signals are heeded, wherever the tests were started (nohup, &), and then as before."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    small.heed_signals()
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.mark.usefixtures("heeded")
def test_signals_are_noted_and_handlers_restored(capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signals_noted() as noted:
        assert not noted
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        assert capsys.readouterr().err.startswith("\nending after this epoch, and saving (Ctrl-C")
        with pytest.raises(KeyboardInterrupt):  # as is said: Ctrl-C now stops at once
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signals_noted() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a second is no hurry, but for Ctrl-C
        assert noted == [signal.SIGINT, signal.SIGTERM]


def test_signals_that_are_ignored_stay_so(monkeypatch):
    """As after nohup, or in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_noted():
    def work():
        with signals_noted() as noted:
            return noted

    assert ThreadPoolExecutor(1).submit(work).result() == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in(tmp_path):
        pass
    out, error = capsys.readouterr()
    assert out == f"note: {tmp_path} cannot be locked: let no second run write there\n"
    assert not error


def test_prints_that_fail_are_lost():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, mock.patch.object(sys, "stdout", stream):
        with prints_without_fail():
            for _ in range(3):
                print("hello", flush=True)
        assert sys.stdout is stream
    with mock.patch.object(sys, "stdout", None), prints_without_fail():
        print("hello")


def test_tensorboard_may_fail(tmp_path, capsys):
    log = LossLog(tmp_path)
    log.board.add_scalar = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with log:
        for epoch in (1, 2):
            log.add(epoch, torch.ones(1, 4), seconds=1)
    assert len(read(tmp_path)) == 2
    assert capsys.readouterr().out.count("note: no more goes to TensorBoard") == 1


def test_a_device_comes_with_its_index(monkeypatch):
    """torch.cuda.set_device refuses "cuda" alone, as it would be typed or chosen by itself."""
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        for name in ("auto", "cuda", "cuda:0"):
            assert utils.pick_device(name) == torch.device("cuda:0")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_epoch():
    """Pages that an epoch of large tensors has the system give anew, with and without."""
    script = """
import resource, sys, torch
from utils import set_up_machine
if sys.argv[1] == "kept":
    set_up_machine(torch.device("cpu"))
for epoch in range(6):
    tensors = [torch.ones(20_000_000) for _ in range(3)]
    del tensors
    if epoch == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", script, how], **PLAIN).stdout)
        for how in ("kept", "as it is")
    }
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    assert faults["kept"] < faults["as it is"] / 5  # now and then one is placed anew
