"""evaluate.py on 32×32 frames: the metrics against naive ones, and known things in their order."""

import itertools
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import run, write_video
from PIL import Image

import checkpoint
import evaluate
import generate
from data import ClipDataset
from evaluate import Evaluator, frechet_distance, kernel_distance
from features import Features
from models import VideoGenerator
from utils import UserError


def random_features(n, d, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.tensor(
        rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + rng.normal(size=d)
    )


@pytest.mark.parametrize("n, m, d", [(200, 300, 20), (30, 40, 64)])
def test_frechet_distance_equals_the_formula_with_covariances(n, m, d):
    x, y = random_features(n, d, 0), random_features(m, d, 1, 1.5)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = np.square(np.mean(x.numpy(), 0) - np.mean(y.numpy(), 0)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Where one is the other, scaled and moved, it is known in closed form.
    spread = np.trace(covariances[0])
    moved = np.square(2 * np.mean(x.numpy(), 0) + 5).sum()  # 3 x + 5 - x
    assert frechet_distance(x, 3 * x + 5) == pytest.approx(moved + 4 * spread)


def test_kernel_distance_equals_the_sums_and_is_unbiased():
    x, y = random_features(7, 5, 0), random_features(9, 5, 1)

    def mean(pairs):
        return np.mean([(float(a @ b) / 5 + 1) ** 3 for a, b in pairs])

    expected = mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2))
    expected -= 2 * mean(itertools.product(x, y))
    assert kernel_distance(x, y) == pytest.approx(expected)
    draws = torch.randn(2, 4000, 8, 3, generator=torch.Generator().manual_seed(0))
    values = [kernel_distance(a, b) for a, b in zip(*draws)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 4000**0.5


def test_acd_and_motion_of_known_videos(clips):
    videos = torch.zeros(2, 16, 32, 32, 3, dtype=torch.uint8)
    videos[1, ::2, :, :, 0] = 30  # all red jumps by 30, half of the time
    rows = Evaluator._describe(SimpleNamespace(num=2, networks=[], device="cpu"), [videos], "")
    assert rows["acd"][0] == rows["motion"][0] == 0
    assert rows["acd"][1] == pytest.approx(30 * 8 * 8 / (16 * 15 / 2))  # pairs that differ
    assert rows["motion"][1] == pytest.approx(10)  # of one channel in three
    assert rows["images"].shape == (2, 4, 32, 32, 3)


def test_acd_is_exact_at_any_length():
    """Also where colours hardly differ."""
    rng = torch.Generator().manual_seed(0)
    colours = 200 + torch.bernoulli(torch.full((60, 3), 0.3), generator=rng)
    videos = torch.full((1, 60, 32, 32, 3), 200, dtype=torch.uint8)
    videos[0, :, 0, 0] = colours.byte()  # of one pixel in 1,024
    rows = Evaluator._describe(SimpleNamespace(num=1, networks=[], device="cpu"), [videos], "")
    pairs = itertools.combinations(colours.double() / 1024, 2)
    expected = np.mean([(a - b).norm() for a, b in pairs])
    assert rows["acd"].item() == pytest.approx(expected, rel=1e-2)


def test_nearest_windows_are_those_of_a_search_by_hand(clips):
    clip, start, _ = clips.sample_indices(6, torch.Generator().manual_seed(0))
    windows = [clips.clip(c)[s : s + 16] for c, s in zip(clip.tolist(), start.tolist())]
    images = torch.from_numpy(np.stack(windows)[:, [0, 5, 10, 15]])
    distance, found, first = evaluate.find_nearest(images, clips)
    assert distance.max() < 0.5  # of 256 levels
    assert all(
        (clips.clip(c)[s : s + 16][[0, 5, 10, 15]] == w.numpy()).all()
        for c, s, w in zip(found, first, images)
    )

    def thumbnail(frames):
        edges = [(i * 32 // 24, -(-(i + 1) * 32 // 24)) for i in range(24)]
        rows = [frames[:, y0:y1, x0:x1].mean((1, 2)) for y0, y1 in edges for x0, x1 in edges]
        return np.stack(rows)

    distance, found, _ = evaluate.find_nearest(images, clips, own=clip)
    for i in range(6):
        others = [c for c in range(len(clips)) if c != clip[i]]
        expected = min(
            np.sqrt(np.mean((thumbnail(images[i].numpy()) - thumbnail(x[s : s + 16 : 5])) ** 2))
            for x in map(clips.clip, others)
            for s in range(len(x) - 15)
        )
        assert found[i] != clip[i] and distance[i] == pytest.approx(expected, rel=0.001)


class Colours:
    """Features that need no network: mean and deviation of each colour."""

    name, dim, sha256 = "efficientnet_lite0", 6, "colours"

    def __call__(self, windows, first=0):
        pixels = windows.double() / 255
        clips = torch.cat([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))], dim=1)
        return {"clips": clips, "frames": pixels[:, 0].mean((1, 2))}


def real_windows(clips, num, seed):
    """Real windows, one by one."""
    clip, start, _ = clips.sample_indices(num, torch.Generator().manual_seed(seed))
    for c, s in zip(clip.tolist(), start.tolist()):
        yield torch.from_numpy(clips.clip(c)[None, s : s + 16].copy())


def test_known_videos_come_in_the_right_order(clips, tmp_path):
    """Real windows, then noisier ones; frozen ones are worse by their clips alone."""
    network = Features("efficientnet_lite0")
    network.dim = 320  # so that 64 videos are enough
    evaluator = Evaluator(clips, [network], 64)
    rng = np.random.default_rng(0)

    def change(what):
        for window in real_windows(clips, 64, seed=9):
            noise = torch.from_numpy(rng.normal(0, 40, window.shape))
            yield {
                "real": window,
                "frozen": window[:, :1].expand_as(window),
                "noisy": (window + noise).clip(0, 255).to(torch.uint8),
            }[what]

    real, frozen, noisy = (evaluator.measure(change(w))[0] for w in ("real", "frozen", "noisy"))
    for kind in ("clips_frechet", "clips_kernel"):
        values = [m[f"efficientnet_lite0_{kind}"] for m in (evaluator.real_metrics, frozen, noisy)]
        assert values[0] < 0.5 * values[1] and values[0] < 0.5 * values[2]
        assert abs(real[f"efficientnet_lite0_{kind}"] - values[0]) < 0.3 * values[1]
    frames = [
        m["efficientnet_lite0_frames_frechet"] for m in (evaluator.real_metrics, frozen, noisy)
    ]
    assert frames[1] < 2 * frames[0] < frames[2]
    assert frozen["motion"] == frozen["acd"] == 0 and real["motion"] == pytest.approx(1, abs=0.5)
    assert real["efficientnet_lite0_clips_diversity"] == pytest.approx(1, abs=0.1)
    assert real["memorised"] == 1 and evaluator.real_metrics["memorised"] < 0.05


def test_real_windows_are_described_once(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "folder", tmp_path)
    first = Evaluator(clips, [Colours()], 20)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_describe", None)
        assert Evaluator(clips, [Colours()], 20).real_metrics == first.real_metrics
        for other in ({"seed": 1}, {"num": 21}):
            with pytest.raises(TypeError):
                Evaluator(clips, [Colours()], **{"num": 20, **other})
    (cache,) = (tmp_path / ".evaluation").iterdir()
    for damage in (b"damaged", cache.read_bytes()[:-200]):
        cache.write_bytes(damage)
        assert Evaluator(clips, [Colours()], 20).real_metrics == first.real_metrics
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save", mock.Mock(side_effect=full))
    assert Evaluator(clips, [Colours()], 20, seed=3).real_metrics != first.real_metrics


def test_too_few_videos_are_refused(clips):
    network = Colours()
    network.dim = 1280
    with pytest.raises(UserError, match=r"10 videos are too few for efficientnet_lite0.* 256"):
        Evaluator(clips, [network], 10)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two generators, and the same ones in other files."""
    folder = tmp_path_factory.mktemp("models")
    for epoch, seed in ((1, 0), (2000, 1)):
        torch.manual_seed(seed)
        raw, average = VideoGenerator(32), VideoGenerator(32)
        state, averaged = (
            {"R_M": net.motion_rnn.state_dict(), "G_I": net.image_generator.state_dict()}
            for net in (raw, average)
        )
        content = {"epoch": epoch, "networks": state, "average": averaged}
        for name in {1: ["checkpoint-000001.pt"], 2000: ["checkpoint.pt", "generator.pt"]}[epoch]:
            checkpoint.save(folder / name, content)
    return folder


def test_sampled_videos_are_those_of_generate(models):
    generator = generate.load_generator(models / "generator.pt")
    videos = torch.cat(list(generate.sample_videos(generator, 11, 16, seed=5)))
    assert videos.shape == (11, 16, 32, 32, 3)
    for i in (0, 10):
        frames = np.stack(list(generate.video(generator, 16, seed=5, index=i)))
        assert np.abs(videos[i].numpy().astype(int) - frames).max() <= 1


def test_command_line_measures_the_newest_offline(models, clips_folder, tmp_path):
    """As a user runs it, with the network that needs no download."""
    (tmp_path / "trained_models").symlink_to(models)
    args = [f"--data={clips_folder}", f"--json={tmp_path / 'results'}", "--num=256", "--repeats=1"]
    output = run("evaluate.py", *args, cwd=tmp_path).stdout
    assert "256 videos of 16 frames, 32×32" in output and "generator.pt, epoch 2,000" in output
    record = json.loads((tmp_path / "results").read_text())
    assert (record["n"], record["size"], record["seed"], record["raw"]) == (256, 32, 0, False)
    assert record["features"] == {"efficientnet_lite0": Features("efficientnet_lite0").sha256}
    assert record["data"] == ClipDataset(clips_folder).fingerprint()
    (metrics,) = record["repeats"]
    for name in ("clips_frechet", "clips_kernel", "frames_frechet", "frames_kernel"):
        name = f"efficientnet_lite0_{name}"
        assert record["real"][name] < metrics[name]
    assert record["real"]["memorised"] < 0.1 and metrics["memorised"] == 0
    picture = np.array(Image.open(tmp_path / "generated_videos" / "nearest.png"))
    assert picture.shape[0] > 10 * 32 and picture.shape[1] > 8 * 32


def test_all_generators_of_a_folder_are_measured(
    models, clips_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "Features", lambda *_: Colours())
    args = [f"--data={clips_folder}", "--json=results", "--num=20", "--repeats=2"]
    evaluate.main([f"--checkpoint={models}", *args])
    output = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2000]  # each epoch once
    name = "efficientnet_lite0_clips_frechet"
    means = {}
    for record in records:
        first, second = (metrics[name] for metrics in record["repeats"])
        means[(first + second) / 2] = record["path"]
        deviation = abs(first - second) / 2**0.5
        assert f"{(first + second) / 2:.4g} ± {deviation:.2g}" in output and first != second
    assert f"best: {means[min(means)]}, epoch" in output
    evaluate.main([f"--checkpoint={models / 'checkpoint.pt'}", "--raw", *args])
    *_, raw = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert raw["raw"] and raw["epoch"] == 2000 and raw["repeats"] != records[1]["repeats"]


def test_videos_made_elsewhere_are_measured(clips, tmp_path, monkeypatch, capsys):
    """Here copies of the real clips, as videos and as arrays, which are reported as memorised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "Features", lambda *_: Colours())
    fake = tmp_path / "fake"
    (fake / "walk").mkdir(parents=True)
    for i in range(len(clips)):
        if i % 2:
            np.save(fake / "walk" / f"{i}.npy", clips.clip(i))
        else:
            write_video(fake / f"{i}.mp4", clips.clip(i))
    (fake / "notes.txt").write_text("no video")
    for name, array in (
        ("object", np.array([{}])),
        ("scalar", np.uint8(3)),
        ("short", clips.clip(0)[:15]),
    ):
        np.save(fake / f"{name}.npy", array)
    (fake / "empty.npy").touch()
    evaluate.main([f"--fake={fake}", f"--data={clips.folder}", f"--json={tmp_path / 'results'}"])
    record = json.loads((tmp_path / "results").read_text())
    (metrics,) = record["repeats"]
    assert record["n"] == sum(length // 16 for length in clips.lengths.tolist())
    assert metrics["memorised"] > 0.9 and metrics["nearest"] < 5 and record["epoch"] is None
    output = capsys.readouterr().out
    for name in ("notes.txt", "object.npy", "scalar.npy", "short.npy", "empty.npy"):
        assert f"skipped {fake / name}: " in output
    assert len(evaluate.read_videos(fake, 3, 16, 32)) == 3  # no more than are asked for
    assert (tmp_path / "generated_videos" / "nearest.png").exists()


def test_bad_input_gets_one_line(models, clips_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "Features", lambda *_: Colours())
    for name in ("empty", "other", "short"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "other" / "a.npy", np.zeros((20, 48, 48, 3), np.uint8))
    for name, kind in (("float", np.float64), ("flat", np.uint8)):
        (tmp_path / name).mkdir()
        shape = (20, 32, 32, 3) if name == "float" else (20,)
        np.save(tmp_path / name / "a.npy", np.zeros(shape, kind))
    (tmp_path / "single").mkdir()
    np.save(tmp_path / "single" / "a.npy", np.zeros((20, 32, 32, 3), np.uint8))
    np.save(tmp_path / "short" / "a.npy", np.zeros((15, 32, 32, 3), np.uint8))
    for args, line in (
        ([], "trained_models/generator.pt: no such file; train with main.py"),
        (["--checkpoint=empty"], "empty: no such file; train with main.py"),
        (["--checkpoint=other/a.npy"], "other/a.npy: damaged, or not a checkpoint"),
        (["--fake=nowhere"], "nowhere: no such folder of videos"),
        (["--fake=empty"], "empty: no videos of at least 16 frames"),
        (["--fake=short"], "short: no videos of at least 16 frames"),
        (["--fake=float"], "float: no videos of at least 16 frames"),
        (["--fake=flat"], "flat: no videos of at least 16 frames"),
        (["--data=single", f"--checkpoint={models}"], "single: one clip alone cannot be measured"),
        ([f"--checkpoint={models}", "--json=no/where"], "no/where: No such file or directory"),
        ([f"--checkpoint={models}", "--fake=short"], "--fake: not allowed with argument --check"),
        (["--fake=other"], "other/a.npy: frames are (48, 48, 3), not (32, 32, 3)"),
        (["--data=other", f"--checkpoint={models}"], "checkpoint-000001.pt: 32 pixels, the clips"),
        (["--data=empty"], "empty: no usable clips"),
        (["--features=vgg"], "argument --features: invalid choice: 'vgg'"),
    ):
        with pytest.raises(SystemExit) as exit:
            evaluate.main([f"--data={clips_folder}", *args])
        error = capsys.readouterr().err.strip()
        assert exit.value.code in (1, 2) and "\n" not in error and line in error, error


def test_metrics_are_printed_where_no_picture_can_be_written(
    models, clips_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "Features", lambda *_: Colours())
    (tmp_path / "generated_videos").touch()
    (models / "rubbish.pt").write_bytes(b"rubbish")
    with pytest.raises(SystemExit):
        evaluate.main(
            [f"--data={clips_folder}", f"--checkpoint={models}", "--num=20", "--repeats=1"]
        )
    output, error = capsys.readouterr()
    assert error.splitlines()[-1].startswith("evaluate.py: error: generated_videos: ")
    assert f"skipped {models / 'rubbish.pt'}: " in output and "epoch 2,000" in output
