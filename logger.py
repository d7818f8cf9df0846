"""The metrics of a run, by name: losses.csv, evaluations.csv, losses.png and TensorBoard events."""

import io
import time

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

from utils import atomic_write


class Logger:
    """Logs the metrics of every epoch into `folder`.

    history, evaluations: of an earlier part of the run. `rows`: a dict of metrics for each epoch so
    far; `evaluations`: a dict for each that was measured; `board_error`: why nothing goes to
    TensorBoard, or None. The methods raise OSError.
    """

    def __init__(self, folder, history=None, evaluations=None):
        self.evaluations = list(evaluations or [])
        columns = {name: column.tolist() for name, column in (history or {}).items()}
        self.rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        self.pending = []  # metrics of epochs that still lie on the device
        self.folder = folder
        self.csv, self.names = None, []  # losses.csv, once there is a row to write, and its columns
        self.board = self.board_error = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=len(self.rows) + 1)
        except Exception as error:  # not installed, or broken beside another package
            self.board_error = error
        self.start_clock()

    def start_clock(self):
        """Measure the next epochs from now on."""
        self.clock = time.perf_counter()

    def add(self, metrics):
        """Add an epoch's metrics, a dict of tensors of one value on one device. Does not wait."""
        self.pending.append((metrics.keys(), torch.stack(list(metrics.values()))))

    def flush(self, epoch):
        """Wait for the metrics of the epochs up to `epoch` and write them. Returns their rows.

        TensorBoard, which is slower, gets their mean.
        """
        values = torch.stack([values for _, values in self.pending]).tolist()
        seconds = (time.perf_counter() - self.clock) / len(values)
        rows = [
            {"epoch": epoch - len(values) + i, **dict(zip(names, row)), "seconds": seconds}
            for i, ((names, _), row) in enumerate(zip(self.pending, values), start=1)
        ]
        self.pending = []
        self.rows += rows
        self._write_csv(rows)
        for name in set(rows[-1]) - {"epoch"} if self.board else ():
            self.board.add_scalar(name, np.mean([row[name] for row in rows]), epoch)
        return rows

    def _write_csv(self, rows):
        if not self.csv:
            self.csv = open(self.folder / "losses.csv", "w")  # noqa: SIM115 (closed by __exit__)
            self.names, rows = list(rows[0]), self.rows
            self.csv.write(",".join(self.names) + "\n")
        for row in rows:
            self.csv.write(",".join(f"{row.get(name, np.nan):.6g}" for name in self.names) + "\n")
        self.csv.flush()

    def add_evaluation(self, row):
        """Add what was measured of an epoch, a dict of floats: to evaluations.csv, TensorBoard."""
        self.evaluations.append(row)
        lines = [",".join(row), *(",".join(map(str, r.values())) for r in self.evaluations)]
        with atomic_write(self.folder / "evaluations.csv") as file:
            file.write("\n".join([*lines, ""]).encode())
        for name in set(row) - {"epoch"} if self.board else ():
            self.board.add_scalar(f"evaluation/{name}", row[name], row["epoch"])

    def add_image(self, name, image, epoch):
        """Show an image, (H, W, 3) uint8, in TensorBoard."""
        if self.board:
            self.board.add_image(name, image, epoch, dataformats="HWC")
            self.board.flush()

    def history(self):
        """All metrics so far, for a checkpoint: a dict of tensors, (epochs,) each, by name."""
        names = {**self.rows[0], **self.rows[-1]} if self.rows else {}
        return {name: torch.tensor([r.get(name, np.nan) for r in self.rows]) for name in names}

    @matplotlib.style.context("default")  # whatever the user's matplotlibrc says
    def plot(self):
        """Plot losses.png: the losses on images and on videos, side by side. Returns its bytes.

        Each epoch is faint, the running mean strong; at most some 1,000 points of each.
        """
        figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
        step = max(1, len(self.rows) // 1000)
        width = max(1, min(10, len(self.rows) // 5), len(self.rows) // 50)
        for axes, kind in zip(figure.subplots(1, 2), ("image", "video")):
            for name in (f"loss_d_{kind}", f"loss_g_{kind}") if self.rows else ():
                values = np.array([row[name] for row in self.rows])
                epochs = np.arange(1, len(values) + 1)
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                (line,) = axes.plot(epochs[width - 1 :: step], mean[::step], label=name)
                axes.plot(epochs[::step], values[::step], lw=0.5, alpha=0.25, c=line.get_color())
                axes.legend()
            axes.set(xlabel="epoch", ylabel="binary cross-entropy", title=f"{kind} losses")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        figure.savefig(png := io.BytesIO(), format="png")
        with atomic_write(self.folder / "losses.png") as file:
            file.write(png.getvalue())
        return png.getvalue()

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        if error_type is None and self.board:
            self.board.close()
        if self.csv:
            self.csv.close()
