import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data import ClipDataset, look
from utils import TrainingError, UserError, to_float, to_uint8


def write(folder, name, n=20, size=32, start=0):
    """A clip whose frame k is filled with the value start + k."""
    clip = np.broadcast_to(
        (start + np.arange(n, dtype=np.uint8))[:, None, None, None], (n, size, size, 3)
    )
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, clip)


@pytest.fixture
def three(tmp_path):
    write(tmp_path, "run/a.npy", 16)
    write(tmp_path, "run/b.npy", 18, start=50)
    write(tmp_path, "walk/c.npy", 30, start=100)
    return ClipDataset(tmp_path)


def test_what_it_finds(three):
    assert [name.as_posix() for name in three.names] == ["run/a.npy", "run/b.npy", "walk/c.npy"]
    assert three.lengths.tolist() == [16, 18, 30]
    assert three.actions == ["run", "walk"] and three.size == 32 and not three.skipped
    assert isinstance(three.open(three.paths[0]), np.memmap)


def test_every_clip_and_position_is_drawn_evenly(three):
    n = 30_000
    clip, start, frame = three.draw(n, torch.Generator().manual_seed(0))
    for which, length in enumerate((16, 18, 30)):
        of = clip == which
        for drawn, positions in ((start[of], length - 16 + 1), (frame[of], length)):
            counts = torch.bincount(drawn, minlength=positions)
            assert len(counts) == positions  # never beyond the last
            expected = n / 3 / positions
            assert (counts - expected).abs().max() < 5 * expected**0.5  # all, and evenly
    # S_1 does not look where S_T looks
    start, frame = start[clip == 2].double(), frame[clip == 2].double()
    assert torch.corrcoef(torch.stack([start, frame]))[0, 1].abs() < 0.05


def test_windows_and_frames_are_those_of_the_arrays(three):
    clip, start, frame = (
        torch.tensor([0, 2, 2, 1]),
        torch.tensor([0, 14, 3, 2]),
        torch.tensor([15, 0, 29, 7]),
    )
    pixels = three.read(clip, start, frame)
    assert pixels.shape == (4 * 16 + 4, 32, 32, 3) and pixels.dtype == torch.uint8
    windows, frames = look(pixels, 4)
    assert windows.is_contiguous(memory_format=torch.channels_last_3d)
    assert windows.shape == (4, 3, 16, 32, 32) and frames.shape == (4, 3, 32, 32)
    assert windows.dtype == frames.dtype == torch.float32
    first = torch.tensor([0, 100 + 14, 100 + 3, 50 + 2])
    bytes_ = (first[:, None] + torch.arange(16)).double()
    expected = (bytes_ / 127.5 - 1).float()[:, None, :, None, None].expand_as(windows)
    torch.testing.assert_close(windows, expected)
    single = torch.tensor([15, 100, 129, 57]).double() / 127.5 - 1
    torch.testing.assert_close(frames, single.float()[:, None, None, None].expand_as(frames))


def test_a_clip_that_is_not_what_it_was(three, tmp_path):
    zero, other = torch.tensor([0]), torch.tensor([2])
    three.read(zero, zero, zero)
    write(tmp_path, "run/a.npy", 40)
    three.read(zero, zero, zero)  # it is still open
    for change in (lambda: write(tmp_path, "walk/c.npy", 29), (tmp_path / "walk/c.npy").unlink):
        change()
        with pytest.raises(TrainingError, match=r"c\.npy is not what it was: "):
            three.read(other, zero, zero)


def test_a_fingerprint_tells_data_sets_apart(three, tmp_path):
    before = three.fingerprint()
    assert before["clips"] == 3 and before["frames"] == 64
    assert ClipDataset(tmp_path).fingerprint() == before
    for name, n, start in (("walk/c.npy", 31, 100), ("walk/c.npy", 30, 101)):
        write(tmp_path, name, n, start=start)
        assert ClipDataset(tmp_path).fingerprint()["sha256"] != before["sha256"]
    write(tmp_path, "walk/c.npy", 30, start=100)
    assert ClipDataset(tmp_path).fingerprint() == before
    (tmp_path / "walk/c.npy").rename(tmp_path / "walk/d.npy")
    assert ClipDataset(tmp_path).fingerprint()["sha256"] != before["sha256"]


def test_layout_is_channels_first_of_rgb(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", clip)
    zero = torch.tensor([0])
    windows, frames = look(ClipDataset(tmp_path).read(zero, zero, zero + 3), 1)
    assert (to_uint8(windows[0]).numpy() == clip.transpose(3, 0, 1, 2)).all()
    assert (to_uint8(frames[0]).numpy() == clip[3].transpose(2, 0, 1)).all()


def test_bytes_and_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats[0] == -1 and floats[255] == 1
    assert (to_uint8(floats) == levels).all()
    assert to_uint8(torch.tensor([-1.2, 1.2])).tolist() == [0, 255]  # clipped, not wrapped


class Bomb:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_arrays_that_are_no_clips_are_left_out(tmp_path, capsys):
    write(tmp_path, "a/good.npy")
    write(tmp_path, "a/good2.npy")
    write(tmp_path, "a/short.npy", 15)
    write(tmp_path, "a/large.npy", size=64)
    write(tmp_path, "a/odd.npy", size=40)
    np.save(tmp_path / "a/float.npy", np.zeros((20, 32, 32, 3)))
    np.save(tmp_path / "a/grey.npy", np.zeros((20, 32, 32), np.uint8))
    (tmp_path / "a/text.npy").write_text("hello")
    (tmp_path / "a/empty.npy").write_bytes(b"")
    (tmp_path / "a/pickle.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "a/objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a/zip", np.zeros(3))
    (tmp_path / "a/zip.npz").rename(tmp_path / "a/zip.npy")
    whole = (tmp_path / "a/good.npy").read_bytes()
    (tmp_path / "a/header.npy").write_bytes(whole[:20] + b'"(' + whole[22:])
    cut = whole[:5000]
    (tmp_path / "a/cut.npy").write_bytes(cut)
    clips = ClipDataset(tmp_path)
    assert [name.name for name in clips.names] == ["good.npy", "good2.npy"]
    reasons = {line.split(": ")[0].split("/")[-1]: line for line in clips.skipped}
    left_out = "short large odd float grey text empty pickle objects zip header cut"
    assert set(reasons) == {f"{name}.npy" for name in left_out.split()}
    assert "15 frames, shorter than a window of 16" in reasons["short.npy"]
    assert "64 pixels wide, most are 32" in reasons["large.npy"]
    assert "float64" in reasons["float.npy"]
    assert "a pickle was run" not in capsys.readouterr().out


def test_longer_windows_leave_out_more(tmp_path):
    write(tmp_path, "a.npy", 20)
    write(tmp_path, "b.npy", 40)
    clips = ClipDataset(tmp_path, frames=32)
    assert clips.lengths.tolist() == [40] and "20 frames" in clips.skipped[0]
    starts = clips.draw(500, torch.Generator().manual_seed(0))[1]
    assert set(starts.tolist()) == set(range(9))


def test_no_folder_and_no_clips_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; make it with resize\.py"):
        ClipDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no usable clips; make some"):
        ClipDataset(tmp_path)
    write(tmp_path, "short.npy", 3)
    with pytest.raises(UserError, match=r"1 left out; .*short\.npy: 3 frames"):
        ClipDataset(tmp_path)


def test_more_clips_than_files_may_be_open(tmp_path):
    for i in range(60):
        write(tmp_path, f"{i}.npy", 16)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 60
    clips = ClipDataset(tmp_path)
    clips.open = functools.lru_cache(maxsize=8)(clips.open.__wrapped__)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, hard))
    try:
        each = torch.arange(60)
        windows, _ = look(clips.read(each, each * 0, each * 0), 60)
        assert len(ClipDataset(tmp_path)) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(windows) == 60


def test_links_to_folders_are_followed_and_may_lead_back(tmp_path):
    write(tmp_path, "elsewhere/a.npy", 16)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "walk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    clips = ClipDataset(tmp_path / "data")
    assert [name.as_posix() for name in clips.names] == ["walk/a.npy"]
