"""The files by themselves; test_resume.py has the runs that write and read them."""

import errno
import hashlib
import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

import checkpoint
from checkpoint import Checkpoints, Damaged
from utils import UserError


def content(epoch=1):
    generator = torch.Generator().manual_seed(epoch)
    weights = {name: torch.randn(40, 50, generator=generator) for name in "abc"}
    return {"epoch": epoch, "weights": weights, "lr": 2e-4, "names": ["x", None], "on": True}


def assert_same(a, b):
    assert a.keys() - {"format"} == b.keys() - {"format"}
    for name in a.keys() - {"format", "weights"}:
        assert a[name] == b[name]
    for name, tensor in a["weights"].items():
        assert torch.equal(tensor, b["weights"][name])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, content())
    return path


def test_written_and_read(path):
    assert_same(checkpoint.read(path), content())
    assert_same(torch.load(path, weights_only=True), content())  # as anybody would
    assert zipfile.ZipFile(path).testzip() is None
    whole, _, line = path.read_bytes().rpartition(b"\nmocogan ")
    assert line.decode().split() == ["checkpoint,", "sha256", hashlib.sha256(whole).hexdigest()]


def test_damage_anywhere_is_found(path):
    """Cut short at 20 random places, and with one bit flipped at 20 random places and the ends."""
    whole, rng = path.read_bytes(), random.Random()
    places = [rng.randrange(len(whole)) for _ in range(20)]
    for place in [*places, 0, 1, 79, 80, 107, 108, 109, 110, len(whole) - 1]:
        path.write_bytes(whole[:place])
        with pytest.raises(Damaged):
            checkpoint.read(path)
    for place in [*places, 0, *range(len(whole) - 110, len(whole))]:
        flipped = whole[place] ^ 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(Damaged):
            checkpoint.read(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(Damaged):
        checkpoint.read(path)
    path.write_bytes(whole)
    assert_same(checkpoint.read(path), content())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def signed(data):
    return data + checkpoint.MARK + hashlib.sha256(data).hexdigest().encode() + b"\n"


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("how", ["a pickle", "in a zip", "in a checkpoint", "in the old format"])
@pytest.mark.parametrize("sign", [False, True])
def test_nothing_in_a_file_is_run(path, tmp_path, how, sign):
    """Not even where somebody has computed the checksum that fits."""
    bomb, file = Bomb(tmp_path / "run"), io.BytesIO()
    if how == "a pickle":
        file.write(pickle.dumps(bomb))
    elif how == "in the old format":
        torch.save(bomb, file, _use_new_zipfile_serialization=False)
    else:
        ours = {"format": checkpoint.FORMAT, **content(), "b": bomb}
        torch.save(bomb if how == "in a zip" else ours, file)
    path.write_bytes(signed(file.getvalue()) if sign else file.getvalue())
    reason = "refused, it holds more than plain values" if sign else "not a checkpoint"
    with pytest.raises(Damaged, match=reason):
        checkpoint.read(path)
    assert not (tmp_path / "run").exists()
    assert file.getvalue()[:1]  # and the bomb is one:
    file.seek(0)
    pickle.load(file) if how == "a pickle" else torch.load(file, weights_only=False)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data, error, reason",
    [
        (b"", Damaged, "not a checkpoint of this version of the program, or one cut short"),
        (b"hello\n", Damaged, "not a checkpoint of this version"),
        (saved({"model": torch.zeros(3)}), Damaged, "not a checkpoint of this version"),
        (signed(b""), Damaged, "refused"),
        (signed(b"hello"), Damaged, "refused"),
        (signed(saved(torch.zeros(3))), Damaged, "not a checkpoint of this program"),
        (signed(saved({"epoch": 3})), Damaged, "not a checkpoint of this program"),
        (signed(saved({"format": "3", "epoch": 3})), Damaged, "not a checkpoint of this program"),
        (
            signed(saved({"format": 99, "epoch": 3})),
            UserError,
            rf"checkpoint.pt: of a newer version of this program \(format 99; this one reads "
            rf"{checkpoint.FORMAT}\)",
        ),
        (signed(saved({"format": 1, "epoch": 3})), UserError, "of an older version"),
    ],
)
def test_what_is_none(path, data, error, reason):
    path.write_bytes(data)
    with pytest.raises(error, match=reason):
        checkpoint.read(path)


def save_all(folder, epochs, keep=0):
    checkpoints = Checkpoints(folder, keep)
    for epoch in epochs:
        checkpoints.save(content(epoch))
    return checkpoints


def epochs_in(folder):
    return {p.name: checkpoint.read(p)["epoch"] for p in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_and_the_numbered_ones_are_kept(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    save_all(tmp_path, [1])
    assert epochs_in(tmp_path) == {"checkpoint.pt": 1}
    checkpoints = Checkpoints(tmp_path)
    assert_same(checkpoints.load()[0], content(1))
    checkpoints.save(content(2))
    checkpoints.save(content(3))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 3, "checkpoint-previous.pt": 2}
    save_all(tmp_path, range(10, 15), keep=3)
    assert epochs_in(tmp_path) == {
        "checkpoint.pt": 14,
        "checkpoint-previous.pt": 13,
        **{f"checkpoint-0000{epoch}.pt": epoch for epoch in (12, 13, 14)},
    }
    # what is a person's, or of a later epoch, stays
    shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "checkpoint-000001-mine.pt")
    save_all(tmp_path, [13], keep=1)
    assert epochs_in(tmp_path) == {
        "checkpoint.pt": 13,
        "checkpoint-previous.pt": 13,
        "checkpoint-000013.pt": 13,
        "checkpoint-000014.pt": 14,
        "checkpoint-000001-mine.pt": 14,
    }


def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path):
    save_all(tmp_path, range(1, 6), keep=4)
    assert_same(Checkpoints(tmp_path).load()[0], content(5))
    expected = [("checkpoint.pt", 5), ("checkpoint-000005.pt", 4), ("checkpoint-previous.pt", 4)]
    expected += [("checkpoint-000004.pt", 3)]
    damaged = []
    for name, next_best in expected:
        size = (tmp_path / name).stat().st_size
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()  # the others are links to the same
        (tmp_path / name).write_bytes(data[: size - 7])
        damaged.append(name)
        checkpoints = Checkpoints(tmp_path)
        state, lines = checkpoints.load()
        assert state["epoch"] == next_best
        assert checkpoints.good[1] == next_best and f"of epoch {next_best} is safe" in (
            checkpoints.safe()
        )
        assert {line.split(": ")[0].split("/")[-1] for line in lines} <= set(damaged)
        assert lines[0].startswith(f"{tmp_path / 'checkpoint.pt'}: not a checkpoint")
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path).load()
    assert all(path.name in str(error.value) for path in tmp_path.iterdir())


def test_only_what_is_there_is_called_safe(tmp_path):
    checkpoints = Checkpoints(tmp_path / "models")
    (tmp_path / "models").mkdir()
    assert checkpoints.safe() == f"there is no checkpoint in {tmp_path / 'models'}"
    checkpoints.save(content(7))
    assert checkpoints.safe() == f"{tmp_path / 'models' / 'checkpoint.pt'} of epoch 7 is safe"
    assert Checkpoints(tmp_path / "models").safe().endswith("models are untouched")
    shutil.rmtree(tmp_path / "models")
    assert checkpoints.safe() == f"there is no checkpoint in {tmp_path / 'models'}"


def test_two_names_of_one_file(tmp_path):
    """As a kill between the two renames of a save leaves them."""
    save_all(tmp_path, [1])
    os.link(tmp_path / "checkpoint.pt", tmp_path / "checkpoint-previous.pt")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.load()
    checkpoints.save(content(2))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 2, "checkpoint-previous.pt": 1}


def test_odd_names_do_no_harm(tmp_path):
    save_all(tmp_path, [1])
    for name in ("checkpoint-0000001.pt", "checkpoint-x.pt", "checkpoint-000001.txt"):
        shutil.copy(tmp_path / "checkpoint.pt", tmp_path / name)
    (tmp_path / "checkpoint-000002.pt").mkdir()
    save_all(tmp_path, [3, 4], keep=1)
    assert len(list(tmp_path.iterdir())) == 7
    assert checkpoint.read(tmp_path / "checkpoint-000004.pt")["epoch"] == 4


def test_a_bad_sector_is_damage(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    opened = open

    def failing(path, *args):
        if str(path).endswith("checkpoint.pt"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *args)

    monkeypatch.setattr("builtins.open", failing)
    state, damaged = Checkpoints(tmp_path).load()
    assert state["epoch"] == 1 and "a part of the disk cannot be read" in damaged[0]


def test_a_damaged_one_does_not_replace_the_one_before(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.load()
    checkpoints.save(content(3))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 3, "checkpoint-previous.pt": 1}
    checkpoints.save(content(4))
    assert epochs_in(tmp_path) == {"checkpoint.pt": 4, "checkpoint-previous.pt": 3}


@pytest.mark.parametrize("links", [True, False])
def test_what_fails_leaves_the_good_ones(tmp_path, links, monkeypatch):
    """At whichever call on files a save fails, the newest state is there, under its own name."""
    calls = {name: CountDown(getattr(os, name)) for name in ("fsync", "replace", "link")}
    if not links:
        calls["link"] = CountDown(no_links)
    for name, function in calls.items():
        monkeypatch.setattr(os, name, function)
    checkpoints, failed = save_all(tmp_path, [1, 2, 3], keep=1), []
    for name, function in calls.items():
        for left in range(7):
            newest = checkpoints.good[1]
            function.left = left
            try:
                checkpoints.save(content(newest + 1))
            except OSError as error:
                assert "full" in str(error)
                failed.append((name, left))
            function.left = None
            again = Checkpoints(tmp_path, keep=1)
            state, damaged = again.load()
            assert not damaged and again.good == checkpoints.good
            assert again.good[0].name == "checkpoint.pt"
            assert state["epoch"] in (newest, newest + 1)
            assert checkpoint.read(tmp_path / "checkpoint-previous.pt")["epoch"] >= newest - 1
            assert not list(tmp_path.glob("checkpoint.pt.part"))
    # the file's, and that of a copy; the folders' do not matter; two second names and the newest
    assert [name for name, _ in failed].count("fsync") == (1 if links else 3)
    assert [name for name, _ in failed].count("replace") == 3


def no_links(*_):
    raise OSError("no links here")


class CountDown:
    """A function that fails once, after so many calls."""

    def __init__(self, function):
        self.function, self.left = function, None

    def __call__(self, *args):
        if self.left is not None:
            self.left -= 1
            if self.left == -1:
                raise OSError(28, "the disk is full")
        return self.function(*args)
