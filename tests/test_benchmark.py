import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import run
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import ByTheBook, epoch_flops, matmul_rate
from data import ClipDataset
from models import ImageDiscriminator, ImageGenerator, VideoDiscriminator
from trainer import Trainer


def noise_clips(folder, size, frames, n=2):
    for i in range(n):
        clip = np.random.default_rng(i).integers(0, 256, (frames + 4, size, size, 3), np.uint8)
        np.save(folder / f"{i}.npy", clip)
    return ClipDataset(folder, frames)


@pytest.mark.parametrize("size, frames, batch_size", [(32, 16, 3), (48, 20, 1), (64, 32, 2)])
def test_operations_by_hand_are_those_pytorch_counts(tmp_path, size, frames, batch_size):
    trainer = Trainer(noise_clips(tmp_path, size, frames), batch_size)
    for epoch, by_the_book in ((trainer, False), (ByTheBook(trainer), True)):
        batch = epoch.draw()
        with FlopCounterMode(display=False) as counter:
            epoch.update(*batch)
        by_hand = epoch_flops(batch_size, size, frames, by_the_book)
        # PyTorch also counts R_M
        assert by_hand <= counter.get_total_flops() < 1.002 * by_hand


def test_operations_are_those_of_the_layer_tables():
    """From the weights and the shapes of the published tables (SPEC.md, torchsummary)."""
    G_I = 1_105_920 * 1 + 2_097_152 * 6**2 + 524_288 * 12**2 + 131_072 * 24**2 + 3_072 * 48**2
    image = [3_072 * 48**2, 131_072 * 24**2, 524_288 * 12**2, 2_097_152 * 6**2, 18_432]
    video = [12_288 * 8 * 48**2, 524_288 * 4 * 24**2, 2_097_152 * 2 * 12**2, 8_388_608 * 6**2]
    video += [18_432]
    D = sum(image) + sum(video)
    discriminators = 16 * 2 * (3 * D - image[0] - video[0])
    assert epoch_flops(16) == 2 * (discriminators + 16 * 17 * 3 * G_I + 16 * 2 * D)
    assert epoch_flops(16, by_the_book=True) == 2 * (
        discriminators + 16 * 17 * 5 * G_I + 16 * 3 * D
    )
    for network, weights in (
        (ImageGenerator(), 3_863_424 - 1_920),  # less those of batch normalisation
        (ImageDiscriminator(), 2_774_016),
        (VideoDiscriminator(), 11_042_561 - 1_792 - 1),
    ):
        layers = [w.numel() for n, w in network.named_parameters() if w.dim() > 1]
        assert sum(layers) == weights


def test_the_book_draws_what_the_trainer_draws(clips):
    book = ByTheBook(Trainer(clips, batch_size=3))
    windows, frames, noise, looked_at = book.draw()
    arrays = [torch.from_numpy(np.array(clips.open(path))) for path in clips.paths]
    arrays = [(array.float() / 127.5 - 1).permute(3, 0, 1, 2) for array in arrays]
    for window, frame in zip(windows, frames):
        starts = [(a, s) for a in arrays for s in range(a.shape[1] - 15)]
        assert any(torch.allclose(a[:, s : s + 16], window, atol=1e-6) for a, s in starts)
        assert any(
            torch.allclose(a[:, k], frame, atol=1e-6) for a in arrays for k in range(a.shape[1])
        )
    assert noise[1].shape[:1] == (3,) and noise[1].shape[1] in clips.lengths
    assert (looked_at[:, :16].diff(dim=1) == 1).all() and looked_at.max() < noise[1].shape[1]


def test_a_matrix_product_takes_its_time(monkeypatch):
    """The rate is operations by time, with time stood in for."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            self.now += 0.5
            return self.now

    monkeypatch.setattr(benchmark, "time", Clock())
    rate = matmul_rate(torch.device("cpu"), torch.bfloat16)
    assert rate == 2 * 4096**3 / 0.5


def test_benchmark_compares_the_two(clips_folder, tmp_path):
    figures = tmp_path / "figures.json"
    args = ["--batch-size", 2, 4, "--epochs", 11, "--device=cpu", "--precision=fp32"]
    done = run("benchmark.py", *args, f"--data={clips_folder}", f"--json={figures}")
    written = json.loads(figures.read_text())
    assert set(written) >= {"machine", "torch", "python", "date", "epochs"}
    assert set(written["batches"]) == {"2", "4"} and written["epochs"] == 11
    for batch_size, results in written["batches"].items():
        for name, result in results.items():
            assert len(result["seconds"]) == 10  # turns
            assert result["median"] == pytest.approx(np.median(result["seconds"]))
            frames = int(batch_size) * 17
            assert result["frames_a_second"] == pytest.approx(frames / result["median"])
            assert result["rate"] == pytest.approx(result["flops"] / result["median"])
            assert result["all_epochs"] == pytest.approx(40_000 * result["median"])
            assert result["share_of_matmul"] == result["rate"] / result["matmul_rate"]
            by_the_book = name == "by the book"
            assert result["flops"] == epoch_flops(int(batch_size), 32, 16, by_the_book)
            assert result["flops"] <= result["counted_flops"] < 1.002 * result["flops"]
            assert 2e8 < result["peak_memory"] < 2e10
            showing = ["sample", "checkpoint", "log line", "page"] * (name == "project")
            assert list(result["showing"]) == showing
            assert all(0 < seconds < 60 for seconds in result["showing"].values())
        medians = {name: result["median"] for name, result in results.items()}
        ratio = medians["by the book"] / medians["project"]
        assert f"is {ratio:.2f} times as fast" in done.stdout
    assert re.search(r"batch 2 +project \(fp32\) +by the book \(fp32\)", done.stdout)
    assert re.search(r"run: sample [\d.]+%, checkpoint [\d.]+%, log line [\d.]+%", done.stdout)
    assert re.search(r"\n +2 +[\d.,]+ +[\d.,]+ +[\d.]+ +[\d.]+\n", done.stdout)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--batch-size=0"], "'0' is not a whole number from 1"),
        (["--epochs=x"], "'x' is not a whole number"),
        (["--device=tpu"], "there is no such device here"),
        (["--data=nowhere"], "nowhere: no such folder"),
        (["--json=nowhere/figures.json"], "nowhere: no such folder"),
        (["--json=."], "--json .: cannot be written; name a file"),
    ],
)
def test_bad_flags_get_one_line(capsys, args, message):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("benchmark.py: error: ") and error.count("\n") == 1 and message in error


def test_a_process_that_dies_is_said_in_one_line(clips_folder, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "contestant", os.abort)  # it takes no arguments: it ends at once
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--device=cpu", f"--data={clips_folder}"])
    assert exit_.value.code == 2
    said = "benchmark.py: error: the process that trained project at batch 16 ended"
    assert capsys.readouterr().err.startswith(said)
