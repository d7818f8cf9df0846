import errno
import os
import signal
import sys
from datetime import datetime
from unittest import mock

import pytest
import small
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import utils
from utils import TrainingError, UserError, atomic_write, graceful_stop, lock_folders


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("bad"), 2, "p.py: error: bad"),
        (TrainingError("bad"), 1, "p.py: error: bad"),
        (OSError(errno.EIO, "y", "x"), 1, "p.py: error: x: y"),
        (OSError(errno.ENOSPC, "y", "x"), 1, "p.py: error: x: y; free some space"),
        (OSError(errno.EACCES, "y"), 1, "[Errno 13] y; change its permissions, or name another"),
        (MemoryError(), 1, "p.py: error: not enough memory: take less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "memory: take less"),
        (KeyboardInterrupt(), 130, "\np.py: stopped at once"),
    ],
)
def test_one_line_errors_prints_a_line_and_exits(error, status, message, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_, utils.one_line_errors("p.py", "take less"):
        raise error
    line = capsys.readouterr().err
    assert exit_.value.code == status and message in line and line.strip().count("\n") == 0
    monkeypatch.setattr(utils, "IN_IPYTHON", True)  # where an exit looks like an error
    with utils.one_line_errors("p.py", "take less", lambda: "; advice"):
        raise error
    advice = "" if status == 2 else "; advice"  # bad input says itself what to do
    assert capsys.readouterr().err == f"{line[:-1]}{advice}\n"
    with pytest.raises(RuntimeError), utils.one_line_errors("p.py"):
        raise RuntimeError("of our own")


def test_number_is_within_limits_or_refused_in_one_line(capsys):
    parser = utils.Parser(prog="p.py")
    parser.add_argument("--n", type=utils.number(int, 1, 9))
    parser.add_argument("--x", type=utils.number(float, 1))
    for n, x in (("1", "1"), ("9", "1e4")):
        assert vars(parser.parse_args(["--n", n, "--x", x])) == {"n": int(n), "x": float(x)}
    for flag in ("--n=0", "--n=10", "--n=1.5", "--n=", "--x=nan", "--x=inf", "--x=0.9"):
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args([flag])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith(f"p.py: error: argument {flag[:3]}: ")
        assert flag[4:] in error and error.count("\n") == 1


@pytest.fixture
def handlers():
    """Heed the signals, wherever the tests were started (nohup, &), and then as before."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(which) for which in signals]
    small.heed_signals()
    yield lambda: [signal.getsignal(which) for which in signals]
    for which, handler in zip(signals, before):
        signal.signal(which, handler)


def test_graceful_stop_notes_signals_and_restores_handlers(handlers, monkeypatch):
    before, stderr = handlers(), mock.Mock()
    stderr.write.side_effect = OSError("broken pipe")
    monkeypatch.setattr(sys, "stderr", stderr)
    with graceful_stop("stopping") as received:
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), which)
        assert received == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        assert stderr.write.call_args_list == 3 * [mock.call("\nstopping")]
        with pytest.raises(KeyboardInterrupt):  # only a second Ctrl-C is urgent
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with graceful_stop("stopping") as received:
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []


def test_pick_device_gives_an_index_and_refuses_others(monkeypatch):
    assert utils.pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99"):
        with pytest.raises(
            UserError, match=f"^--device {name}: .*; try auto, cpu, cuda, cuda:1, mps$"
        ):
            utils.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        for name in ("auto", "cuda", "cuda:0"):
            assert utils.pick_device(name) == torch.device("cuda:0")


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "fp32")])
def test_pick_precision_takes_bf16_where_it_is_native(monkeypatch, native, precision):
    capability = (8, 0) if native else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    for device in ("cuda:1", "cpu"):
        assert utils.pick_precision("auto", torch.device(device)) == precision
    assert utils.pick_precision("auto", torch.device("mps")) == "fp32"
    assert utils.pick_precision("bf16", torch.device("mps")) == "bf16"


def test_set_up_device_sets_up_cuda(monkeypatch):
    used, cuda = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        for deterministic in (True, False):  # as two runs in a notebook
            utils.set_up_device(cuda, deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark != deterministic
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert used == [cuda, cuda]


def test_files_below_follows_links_and_leaves_out_hidden_names(tmp_path):
    for name in ("b", "a/c", ".hidden", ".git/d", "elsewhere/e"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data/elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to("..")  # which would never end
    (tmp_path / "data/a/up").symlink_to("..")
    paths = [path.relative_to(tmp_path / "data") for path in utils.files_below(tmp_path / "data")]
    assert [path.as_posix() for path in paths] == ["a/c", "b", "link/e"]
    with pytest.raises(OSError):
        utils.files_below(tmp_path / "missing")


def test_atomic_write_appears_complete_or_not_at_all(tmp_path):
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content, before in ((b"1", []), (b"2", ["file"])):
        with atomic_write(path, previous) as file:
            file.write(content)
            assert sorted(os.listdir(tmp_path)) == [*before, "file.part"]
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error)), atomic_write(path, previous) as file:
            file.write(b"half of the n")
            raise error
    assert error.filename == str(path)
    assert path.read_bytes() == b"2" and previous.read_bytes() == b"1"
    assert sorted(os.listdir(tmp_path)) == ["file", "previous"]
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "missing/file"):
        pass
    assert raised.value.filename == str(tmp_path / "missing/file")


def test_lock_folders_refuses_a_second_run(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    refused = pytest.raises(UserError, match="b: another run is writing there")
    with lock_folders(a, b, tmp_path / "a/../b"), refused, lock_folders(c, b):
        pass
    with lock_folders(c, b):
        (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"), lock_folders(tmp_path / "file"):
        pass


def test_lock_folders_passes_where_there_are_no_locks(tmp_path, monkeypatch):
    for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        error = OSError(code, os.strerror(code))
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=error))
        with lock_folders(tmp_path):
            pass


@pytest.mark.parametrize("videos", ["v", "m"])  # one folder for both, too
def test_archive_run_moves_a_run_and_overwrites_nothing(tmp_path, videos):
    models, videos = tmp_path / "m", tmp_path / videos
    models.mkdir()
    videos.mkdir(exist_ok=True)
    (models / "notes.txt").touch()
    assert utils.archive_run(models, videos) == []
    names = "checkpoint.pt checkpoint-previous.pt checkpoint-005000.pt generator.pt losses.csv"
    paths = [models / name for name in [*names.split(), "losses.png", "events.out.tfevents.1.x"]]
    paths += [videos / name for name in ("index.html", "real.gif", "epoch-000000.gif")]
    for run in ("first", "second"):  # within one second
        for path in paths:
            path.write_text(run + path.name)
            os.utime(path, (0, datetime(2026, 3, 1, 10).timestamp()))
        moved = utils.archive_run(models, videos)
        assert [folder.parent for folder in moved] == list(dict.fromkeys((models, videos)))
        assert moved[0].name.startswith("2026-03-01_10-00-00")
        for path in paths:
            assert not path.exists()
            assert (path.parent / moved[0].name / path.name).read_text() == run + path.name
    assert len(list(models.glob("2026*/checkpoint.pt"))) == 2 and (models / "notes.txt").exists()
