import numpy as np
import pytest

import benchmark


@pytest.fixture
def flags(tmp_path):
    """Flags for small clips on the CPU."""
    (tmp_path / "clips").mkdir()
    for i in range(3):
        clip = np.random.default_rng(i).integers(0, 256, (18 + i, 32, 32, 3), np.uint8)
        np.save(tmp_path / f"clips/{i}.npy", clip)
    return ["--device=cpu", "--precision=fp32", f"--data={tmp_path / 'clips'}", "--turns=2"]


def expected_flops(B):
    """Operations of the project's epoch and of the naive one on B windows, 32×32, without R_M.

    A layer takes two for each weight and place (of the output, or of the input where that is
    smaller), in the forward pass, backward for its weights and backward for its input.
    """
    G_I = [122_880, 2_097_152 * 2**2, 524_288 * 4**2, 131_072 * 8**2, 3_072 * 16**2]
    D_I = [3_072 * 16**2, 131_072 * 8**2, 524_288 * 4**2, 2_097_152 * 2**2, 2_048]
    D_V = [12_288 * 8 * 16**2, 524_288 * 4 * 8**2, 2_097_152 * 2 * 4**2, 8_388_608 * 2**2, 2_048]
    G, D, first = 17 * sum(G_I), sum(D_I) + sum(D_V), D_I[0] + D_V[0]
    d_step = 2 * (3 * D - first)  # on real and on generated videos, whose gradients none needs
    # In G's step D's weights need no gradients; two backward passes through G cost twice as much.
    return [2 * B * (d_step + 2 * D + 3 * G), 2 * B * (d_step + 3 * D + 5 * G)]


def test_benchmark_compares_the_epoch_with_the_naive_one(flags, capsys):
    benchmark.main([*flags, "--batch-size=2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    for row, name, flops in zip(rows, ("project", "naive"), expected_flops(2), strict=True):
        assert row[:2] == ["2", name]
        ms, memory_gb, gflop, rate, ratio = map(float, row[2:])
        assert flops <= 1e9 * gflop + 5e7 and 1e9 * gflop - 5e7 < 1.01 * flops  # one decimal
        assert rate == pytest.approx(1000 * gflop / ms, rel=0.05, abs=1)
        assert ratio == pytest.approx(ms / float(rows[0][2]), abs=0.02)
        assert 0.1 < memory_gb < 20


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--batch-size=0", "argument --batch-size: "),
        ("--device=tpu", "--device tpu: "),
        ("--data=nowhere", "nowhere: no such folder"),
    ],
)
def test_benchmark_fails_in_one_line(flags, capsys, flag, message):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([*flags, flag])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert error.startswith("benchmark.py: error: ") and message in error
