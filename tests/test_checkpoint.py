"""The files alone; test_resume.py has the runs that write and read them."""

import errno
import os
import pickle
import random
import shutil
from unittest import mock

import pytest
import torch

import checkpoint
from checkpoint import FORMAT, Checkpoints, DamagedError
from utils import UserError


def content(epoch=1):
    generator = torch.Generator().manual_seed(epoch)
    weights = {name: torch.randn(40, 50, generator=generator) for name in "abc"}
    return {"epoch": epoch, "weights": weights, "lr": 2e-4, "names": ["x", None], "on": True}


def assert_same(loaded, expected):
    expected = {"format": FORMAT, **expected}
    assert {**loaded, "weights": 0} == {**expected, "weights": 0}
    torch.testing.assert_close(loaded["weights"], expected["weights"], rtol=0, atol=0)


def save_all(folder, epochs, keep=0):
    checkpoints = Checkpoints(folder, keep)
    for epoch in epochs:
        checkpoints.save(content(epoch), numbered=True)
    return checkpoints


def epochs_in(folder):
    return {path.name: checkpoint.load(path)["epoch"] for path in folder.iterdir()}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, content())
    return path


def test_load_finds_damage_anywhere(path):
    """Cut short, or with one bit flipped: an error, or the same content, never another."""
    intact, rng = path.read_bytes(), random.Random(0)
    for size in [0, 1, len(intact) - 1, *rng.sample(range(len(intact)), 10)]:
        path.write_bytes(intact[:size])
        with pytest.raises(DamagedError):
            checkpoint.load(path)
    tensors = intact.index(content()["weights"]["b"].numpy().tobytes())
    in_tensors = [tensors + rng.randrange(8000) for _ in range(10)]
    for position in [0, len(intact) - 1, *in_tensors, *rng.sample(range(len(intact)), 30)]:
        flipped = bytes([intact[position] ^ 1 << rng.randrange(8)])
        path.write_bytes(intact[:position] + flipped + intact[position + 1 :])
        try:
            assert_same(checkpoint.load(path), content())
            assert position not in in_tensors, position
        except DamagedError:
            pass


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_load_runs_nothing(path, tmp_path, dump):
    with open(path, "wb") as file:
        dump({"bomb": Bomb(tmp_path / "run"), "format": FORMAT, **content()}, file)
    with pytest.raises(DamagedError):
        checkpoint.load(path)
    Checkpoints(tmp_path).existing()
    assert not (tmp_path / "run").exists()
    with open(path, "rb") as file:  # and the bomb is one:
        pickle.load(file) if dump == pickle.dump else torch.load(file, weights_only=False)
    assert (tmp_path / "run").exists()


def test_load_refuses_what_is_no_checkpoint(path):
    for value in (torch.zeros(3), {"epoch": 3}, {"format": FORMAT}):
        torch.save(value, path)
        with pytest.raises(DamagedError, match="not a checkpoint of this program"):
            checkpoint.load(path)
    for version in (FORMAT - 1, 99):
        torch.save({"format": version, "epoch": 3}, path)
        message = rf"checkpoint\.pt: of another version .*{version}.*{FORMAT}"
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)


def test_save_rotates_and_keeps_numbered_ones(tmp_path):
    save_all(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.load_latest()
    checkpoints.save(content(2))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 2, "checkpoint-previous.pt": 1}
    others = ("checkpoint-000001-mine.pt", "checkpoint-x.pt", "checkpoint-1.txt")
    for name in (*others, "checkpoint-000009.pt.part"):  # the last is of a save that was killed
        shutil.copy(tmp_path / "checkpoint.pt", tmp_path / name)
    save_all(tmp_path, range(999_990, 999_999), keep=3)
    assert epochs_in(tmp_path) == {
        "checkpoint.pt": 999_998,
        "checkpoint-previous.pt": 999_997,
        **{f"checkpoint-{epoch}.pt": epoch for epoch in (999_996, 999_997, 999_998)},
        **dict.fromkeys(others, 2),
    }


def test_load_latest_takes_the_highest_intact_epoch(tmp_path):
    """File times say nothing: a copied folder has others. And checkpoint.pt may be missing."""
    save_all(tmp_path, [10, 20, 30, 40], keep=3)
    for name, time in (("checkpoint-previous.pt", 5), ("checkpoint-000020.pt", 9)):
        os.utime(tmp_path / name, (time * 10**8,) * 2)
    (tmp_path / "checkpoint.pt").unlink()
    damaged = []
    for epoch, name in ((40, "checkpoint-000040.pt"), (30, "checkpoint-previous.pt"),
                        (30, "checkpoint-000030.pt"), (20, "checkpoint-000020.pt")):  # fmt: skip
        checkpoints = Checkpoints(tmp_path)
        loaded, lines = checkpoints.load_latest()
        assert_same(loaded, content(epoch))
        assert checkpoints.last == (tmp_path / name, epoch)
        assert {line.partition(": ")[0] for line in lines} == set(damaged)
        data = bytearray((tmp_path / name).read_bytes())
        data[data.index(content(epoch)["weights"]["a"].numpy().tobytes())] ^= 1
        (tmp_path / name).write_bytes(data)
        damaged.append(str(tmp_path / name))
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path).load_latest()
    assert all(name in str(error.value) for name in damaged)


@pytest.mark.parametrize("how", ["content", "bad sector"])
def test_damaged_newest_is_named_and_does_not_replace_the_previous_one(tmp_path, how, monkeypatch):
    save_all(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        if how == "content":
            (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
        else:
            errors = [OSError(errno.EIO, "Input/output error"), None]
            patch.setattr("zipfile.ZipFile.testzip", mock.Mock(side_effect=errors))
        loaded, damaged = checkpoints.load_latest()
    assert loaded["epoch"] == 1 and checkpoints.last == (tmp_path / "checkpoint-previous.pt", 1)
    assert len(damaged) == 1 and damaged[0].startswith(f"{tmp_path / 'checkpoint.pt'}: damaged")
    checkpoints.save(content(3))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 3, "checkpoint-previous.pt": 1}
    checkpoints.save(content(4))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 4, "checkpoint-previous.pt": 3}


@pytest.mark.parametrize("name, expected", [("fsync", [0, 2]), ("replace", [0, 1, 2])])
def test_save_that_fails_leaves_an_intact_checkpoint(tmp_path, name, expected, monkeypatch):
    """At whichever call on files it fails: that of this epoch or of the one before is loaded."""
    checkpoints, function, failed = save_all(tmp_path, [1, 2], keep=1), getattr(os, name), []
    for failing in range(5):
        calls, epoch = iter(range(99)), checkpoints.last[1]

        def fail_once(*args, failing=failing, calls=calls):
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail_once)
            try:
                checkpoints.save(content(epoch + 1), numbered=True)
            except OSError as error:
                assert error.errno == errno.ENOSPC and str(tmp_path) in error.filename
                failed.append(failing)
        loaded, damaged = Checkpoints(tmp_path).load_latest()
        assert not damaged and loaded["epoch"] in (epoch, epoch + 1)
        assert not list(tmp_path.glob("*.part"))
        checkpoints.save(content(epoch + 2))
    assert failed == expected  # of the files themselves; an fsync of a folder may fail
