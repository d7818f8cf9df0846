"""Draw assets/precision.png: the losses of runs in bf16 and in fp32, beside each other.

With the real clips in resized_data/, for precision bf16 and fp32, and for seed 0 and 1:

    python main.py --batch-size 8 --epochs 300 --precision bf16 --seed 0 --models /tmp/bf16-0 \\
        --videos /tmp/bf16-0

then

    python assets/precision.py /tmp/bf16-0 /tmp/fp32-0 /tmp/bf16-1 /tmp/fp32-1
"""

import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

WIDTH = 15  # epochs of the running mean

figure = Figure(figsize=(10, 6), layout="constrained")
for axes, name in zip(figure.subplots(2, 2).flat, ("D_I", "D_V", "G_I", "G_V")):
    for folder in sys.argv[1:]:
        precision, seed = Path(folder).name.split("-")[-2:]
        with open(Path(folder) / "losses.csv", newline="") as file:
            losses = np.array([float(row[name]) for row in csv.DictReader(file)])
        assert np.isfinite(losses).all(), f"{folder} {name}"
        mean = np.convolve(losses, np.ones(WIDTH) / WIDTH, mode="valid")
        colour = {"bf16": "tab:orange", "fp32": "tab:blue"}[precision]
        label = f"{precision}, seed {seed}"
        axes.plot(
            range(WIDTH, len(losses) + 1),
            mean,
            color=colour,
            label=label,
            linestyle=("-", ":")[int(seed) % 2],
        )
    axes.set(title=name, xlabel="epoch", ylabel="binary cross-entropy")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
