import io
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import logger
from logger import Logger

NAMES = ("loss_d_image", "loss_d_video", "loss_g_image", "loss_g_video", "d_image_real")


def metrics(epoch):
    return {name: torch.tensor(epoch + i / 7) for i, name in enumerate(NAMES)}


def read_csv(folder):
    return np.genfromtxt(folder / "losses.csv", delimiter=",", names=True)


def read_events(folder):
    return EventAccumulator(str(folder)).Reload()


def assert_logged(table, epochs):
    assert table["epoch"].tolist() == epochs
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(table[name], np.array(epochs) + i / 7, rtol=1e-5)


@pytest.fixture
def five(tmp_path, monkeypatch):
    """A log of five epochs, flushed 6 seconds after the 3rd and the 5th; returns its history."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Logger(tmp_path) as log:
        for epoch in range(1, 6):
            log.add(metrics(epoch))
            if epoch in (3, 5):
                now[0] += 6
                rows = log.flush(epoch)
                log.start_clock()
        log.add_image("samples", np.full((8, 8, 3), 99, np.uint8), 5)
    assert [row["epoch"] for row in rows] == [4, 5]
    return log.history()


def test_logger_writes_metrics_by_name(tmp_path, five):
    table = read_csv(tmp_path)
    assert table.dtype.names == ("epoch", *NAMES, "seconds") == tuple(five)
    assert_logged(table, [1, 2, 3, 4, 5])
    assert table["seconds"].tolist() == [2, 2, 2, 3, 3]
    events = read_events(tmp_path)
    for i, name in enumerate(NAMES):  # a point a flush, the mean of its epochs
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(3, pytest.approx(2 + i / 7)), (5, pytest.approx(4.5 + i / 7))]
    (image,) = events.Images("samples")
    pixels = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 5 and pixels.shape == (8, 8, 3) and (pixels == 99).all()


def test_logger_resumes_from_the_history_of_a_checkpoint(tmp_path, five):
    """Without what was logged after it, here and in TensorBoard; and with a metric that is new."""
    (events,) = tmp_path.glob("events.out.tfevents.*")
    events.rename(tmp_path / "events.out.tfevents.1.a.1.0")  # two of the same second have no order
    with Logger(tmp_path, {name: column[:3] for name, column in five.items()}) as log:
        log.add({**metrics(4), "new": torch.tensor(8.0)})
        log.flush(4)
    for table in (read_csv(tmp_path), log.history()):
        assert_logged(table, [1, 2, 3, 4])
        np.testing.assert_array_equal(table["new"], [np.nan, np.nan, np.nan, 8])
    points = [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss_d_image")]
    assert points == [(3, pytest.approx(2)), (4, 4)]


@pytest.mark.parametrize("rc", [{}, {"text.usetex": True, "savefig.format": "pdf"}])
def test_logger_plots_the_losses_and_their_running_means(tmp_path, monkeypatch, rc):
    """Whatever the user's matplotlibrc says: there may be no LaTeX."""
    figures = []

    class Recorded(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(logger, "Figure", Recorded)
    for name, value in rc.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # it works without it, too
    with Logger(tmp_path) as log:
        assert isinstance(log.board_error, ImportError)
        log.plot()  # there is nothing to show yet
        empty = np.array(Image.open(tmp_path / "losses.png"))
        for epoch in range(1, 101):
            log.add(metrics(epoch))
        log.flush(100)
        log.add_image("samples", np.zeros((8, 8, 3), np.uint8), 100)
        assert log.plot() == (tmp_path / "losses.png").read_bytes()
        axes = figures[-1].axes
    assert (np.array(Image.open(tmp_path / "losses.png")) != empty).mean() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.csv", "losses.png"]
    for i, name in enumerate(NAMES[:4]):  # images on the left, videos on the right
        lines = {line.get_label(): line for line in axes[i % 2].lines}
        epochs = np.arange(10, 101)  # each mean is of ten epochs
        assert lines[name].get_xdata().tolist() == epochs.tolist()
        np.testing.assert_allclose(lines[name].get_ydata(), epochs - 4.5 + i / 7, rtol=1e-5)
    assert [ax.get_title() for ax in axes] == ["image losses", "video losses"]
