import os
import pickle

import numpy as np
import pytest
import torch

from data import ClipDataset, to_float, to_uint8
from utils import TrainingError, UserError

LENGTHS = (16, 18, 30)


def write_clip(path, n=20, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


@pytest.fixture
def three(tmp_path):
    for name, n in zip(("c.npy", "run/a.npy", "walk/b.npy"), LENGTHS):
        write_clip(tmp_path / name, n)
    return ClipDataset(tmp_path)


def test_dataset_finds_clips_and_their_actions(three):
    assert [name.as_posix() for name in three.names] == ["c.npy", "run/a.npy", "walk/b.npy"]
    assert three.lengths.tolist() == [16, 18, 30] and three.num_frames == 64
    assert three.actions == ["run", "walk"] and three.labels.tolist() == [-1, 0, 1]
    assert three.size == 32 and not three.skipped
    assert isinstance(three.clip(0), np.memmap)


def test_every_clip_and_position_is_sampled_evenly(three):
    n = 30_000
    clip, start, frame = three.sample_indices(n, torch.Generator().manual_seed(0))
    for which, length in enumerate(LENGTHS):
        of = clip == which
        for sampled, positions in ((start[of], length - 16 + 1), (frame[of], length)):
            counts = torch.bincount(sampled, minlength=positions)
            assert len(counts) == positions  # never beyond the last
            expected = n / 3 / positions
            assert (counts - expected).abs().max() < 5 * expected**0.5
    # S_1 does not depend on S_T
    start, frame = start[clip == 2].double(), frame[clip == 2].double()
    assert torch.corrcoef(torch.stack([start, frame]))[0, 1].abs() < 0.05


def test_sample_gives_windows_frames_and_labels_of_the_arrays(three, monkeypatch):
    clip, start, frame = [0, 2, 2, 1], [0, 14, 3, 2], [15, 0, 29, 7]
    indices = tuple(torch.tensor(x) for x in (clip, start, frame))
    monkeypatch.setattr(three, "sample_indices", lambda *_: indices)
    windows, frames, labels = three.sample(4, None)
    assert windows.shape == (4, 3, 16, 32, 32) and frames.shape == (4, 3, 32, 32)
    assert windows.is_contiguous(memory_format=torch.channels_last_3d)
    for i, (c, s, f) in enumerate(zip(clip, start, frame)):
        array = np.load(three.paths[c])
        assert (windows[i].numpy() == array[s : s + 16].transpose(3, 0, 1, 2)).all()
        assert (frames[i].numpy() == array[f].transpose(2, 0, 1)).all()
    assert labels.tolist() == [-1, 1, 1, 0]


def test_resident_clips_give_the_same_batch(clips_folder):
    read, resident = ClipDataset(clips_folder), ClipDataset(clips_folder)
    resident.to("cpu")  # as in the memory of a GPU
    resident.clip = None  # nothing is read any more
    batches = [clips.sample(8, torch.Generator().manual_seed(0)) for clips in (read, resident)]
    assert all(torch.equal(a, b) for a, b in zip(*batches))


def test_changed_or_removed_clip_is_an_error(three, tmp_path):
    for change in (
        lambda: write_clip(tmp_path / "walk/b.npy", 29),
        lambda: (tmp_path / "walk/b.npy").write_bytes(b"damaged"),
        (tmp_path / "walk/b.npy").unlink,
    ):
        change()
        with pytest.raises(TrainingError, match=r"b\.npy has changed: "):
            three.clip(2)


def test_fingerprint_tells_data_sets_apart(three, tmp_path):
    before, clip = three.fingerprint(), np.array(three.clip(2))
    assert before["clips"] == 3 and before["frames"] == 64
    first_frame, last_frame = clip.copy(), clip.copy()
    first_frame[0, 0, 0, 0] ^= 1
    last_frame[-1, 0, 0, 0] ^= 1
    shorter = np.delete(clip, 1, axis=0)
    for name, other in (("b", shorter), ("b", first_frame), ("b", last_frame), ("d", clip)):
        (tmp_path / "walk/b.npy").unlink()
        np.save(tmp_path / f"walk/{name}.npy", other)
        assert ClipDataset(tmp_path).fingerprint()["sha256"] != before["sha256"]
    (tmp_path / "walk/d.npy").rename(tmp_path / "walk/b.npy")
    assert ClipDataset(tmp_path).fingerprint() == before


def test_to_float_and_to_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    np.testing.assert_allclose(floats, np.arange(256) / 127.5 - 1, atol=1e-6)
    assert floats[0] == -1 and floats[255] == 1 and (to_uint8(floats) == levels).all()
    assert to_uint8(torch.tensor([-1.2, 1.2])).tolist() == [0, 255]  # clipped, not wrapped


class Bomb:
    def __reduce__(self):
        return os._exit, (3,)


def test_arrays_that_are_no_clips_are_skipped(tmp_path):
    write_clip(tmp_path / "good.npy")
    write_clip(tmp_path / "good2.npy")
    write_clip(tmp_path / "short.npy", 15)
    write_clip(tmp_path / "large.npy", size=64)
    write_clip(tmp_path / "odd.npy", size=40)
    np.save(tmp_path / "float.npy", np.zeros((20, 32, 32, 3)))
    np.save(tmp_path / "wide.npy", np.zeros((20, 32, 64, 3), np.uint8))
    np.save(tmp_path / "grey.npy", np.zeros((20, 32, 32), np.uint8))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "zip", np.zeros(3))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    intact = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "header.npy").write_bytes(intact[:20] + b'"(' + intact[22:])
    (tmp_path / "cut.npy").write_bytes(intact[:5000])
    (tmp_path / "empty.npy").write_bytes(b"")
    clips = ClipDataset(tmp_path)
    assert [name.name for name in clips.names] == ["good.npy", "good2.npy"]
    reasons = {line.split(": ")[0].split("/")[-1][:-4]: line for line in clips.skipped}
    skipped = "short large odd float wide grey pickle zip header cut empty"
    assert set(reasons) == set(skipped.split())
    assert "15 frames, shorter than a window of 16" in reasons["short"]
    assert "64 pixels wide, most are 32" in reasons["large"]
    assert "float64" in reasons["float"] and "64×32" in reasons["wide"]


def test_missing_folder_and_missing_clips_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; make it with resize\.py"):
        ClipDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no usable clips; make some"):
        ClipDataset(tmp_path)
    write_clip(tmp_path / "short.npy", 3)
    with pytest.raises(UserError, match=r"1 skipped; .*short\.npy: 3 frames"):
        ClipDataset(tmp_path)
