import csv
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from logger import Logger

NAMES = ("loss_d_image", "loss_d_video", "loss_g_image", "loss_g_video", "d_image_real")


def metrics(epoch):
    """Metrics that differ by name and by epoch."""
    return {name: torch.tensor(epoch + i / 7) for i, name in enumerate(NAMES)}


def read_csv(folder):
    with open(folder / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def assert_logged(row, epoch):
    assert list(row) == ["epoch", *NAMES, "seconds"] and int(row["epoch"]) == epoch
    for name, value in metrics(epoch).items():
        assert float(row[name]) == pytest.approx(value.item(), rel=1e-5)


@pytest.fixture
def five(tmp_path, monkeypatch):
    """A log of five epochs, flushed 6 seconds after the 3rd and the 5th; returns its history."""
    now = [100.0]
    monkeypatch.setattr("logger.time", SimpleNamespace(perf_counter=lambda: now[0]))
    with Logger(tmp_path) as log:
        for epoch in range(1, 6):
            log.add(metrics(epoch))
            if epoch in (3, 5):
                now[0] += 6
                rows = log.flush(epoch)
                log.start_clock()
        log.add_image("samples", np.full((8, 8, 3), 99, np.uint8), 5)
        assert log.board_error is None
    assert [row["epoch"] for row in rows] == [4, 5]
    assert_logged(rows[1], 5)
    return log.history()


def test_logger_writes_metrics_by_name(tmp_path, five):
    for epoch, row in enumerate(read_csv(tmp_path), start=1):
        assert_logged(row, epoch)
    assert [float(row["seconds"]) for row in read_csv(tmp_path)] == [2, 2, 2, 3, 3]
    events = read_events(tmp_path)
    for i, name in enumerate(NAMES):  # a point a flush, the mean of its epochs
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(3, pytest.approx(2 + i / 7)), (5, pytest.approx(4.5 + i / 7))]
    (image,) = events.Images("samples")
    pixels = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 5 and pixels.shape == (8, 8, 3) and (pixels == 99).all()


def test_logger_resumes_from_the_history_of_a_checkpoint(tmp_path, five):
    """What was logged after the checkpoint is dropped, here and in TensorBoard."""
    history = {"names": five["names"], "rows": five["rows"][:3]}
    with Logger(tmp_path, history) as log:
        log.add({name: value * 0 for name, value in metrics(4).items()})
        log.flush(4)
    rows = read_csv(tmp_path)
    for epoch, row in enumerate(rows[:3], start=1):
        assert_logged(row, epoch)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"] and rows[3]["d_image_real"] == "0"
    assert torch.equal(log.history()["rows"][:3], history["rows"])
    assert log.history()["names"] == five["names"] == [*NAMES, "seconds"]
    points = [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss_d_image")]
    assert points == [(3, pytest.approx(2)), (4, 0)]


def test_logger_plots_the_losses(tmp_path):
    with Logger(tmp_path) as log:
        log.plot()  # there is nothing to show yet
        empty = np.array(Image.open(tmp_path / "losses.png"))
        for epoch in range(1, 101):
            log.add(metrics(epoch))
        log.flush(100)
        log.plot()
        figure = log.figure("image", "video")
    assert (np.array(Image.open(tmp_path / "losses.png")) != empty).mean() > 0.01
    for axes, kind in zip(figure.axes, ("image", "video"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert axes.get_title() == f"{kind} losses"
        for name in (f"loss_d_{kind}", f"loss_g_{kind}"):
            expected = [metrics(epoch)[name] for epoch in range(1, 101)]
            means = np.mean([expected[i : i + 10] for i in range(91)], axis=1)
            np.testing.assert_allclose(lines[name].get_ydata(), means, rtol=1e-5)
            assert lines[name].get_xdata().tolist() == [*range(10, 101)]


def test_logger_works_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Logger(tmp_path) as log:
        log.add(metrics(1))
        log.flush(1)
        log.add_image("samples", np.zeros((8, 8, 3), np.uint8), 1)
        assert isinstance(log.board_error, ImportError)
    assert_logged(read_csv(tmp_path)[0], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["losses.csv"]
