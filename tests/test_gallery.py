"""The page of a run, as a file and as a browser shows it."""

import base64
import os
import re
import time
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import small
import torch
from playwright.sync_api import expect, sync_playwright

import gallery
import main
from gallery import write_page
from logger import Logger
from video import save_gif

PHONE, DESKTOP = {"width": 375, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if not path:
        if os.environ.get("NEED_BROWSER"):
            pytest.fail("there is no browser; `python tests/browser.py` installs one")
        pytest.skip("there is no Chromium or Chrome here")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


class View:
    """A page in a tab, and all that went wrong in it."""

    def __init__(self, chromium, path, viewport=DESKTOP, **options):
        self.tab = chromium.new_page(viewport=viewport, **options)
        self.errors, self.requests = [], set()
        self.tab.on("console", lambda message: self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("requestfailed", lambda request: self.errors.append(request.url))
        self.tab.on("request", lambda request: self.requests.add(request.url))
        self.tab.goto(path.as_uri())

    def text(self, selector):
        return " ".join(self.tab.inner_text(selector).split())

    def pictures(self):
        """The src and the width in the file of every picture, when all have loaded."""
        self.tab.evaluate("for (const image of document.images) image.loading = 'eager'")
        self.tab.wait_for_function("Array.from(document.images).every(image => image.complete)")
        return self.tab.evaluate(
            "Array.from(document.images).map(i => [i.getAttribute('src'), i.naturalWidth])"
        )


@pytest.fixture
def open_page(chromium):
    """Open pages; each must show no error, and request only the disk."""
    views = []

    def opened(*args, **options):
        views.append(View(chromium, *args, **options))
        return views[-1]

    yield opened
    for view in views:
        view.tab.close()
        assert view.errors == []
        assert all(re.match("file:|data:", url) for url in view.requests), view.requests


@pytest.fixture(scope="module")
def finished_page(clips_folder, tmp_path_factory):
    """The page of a run of four epochs, sampled at each."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        small.make_small(patch.setattr)
        main.main(
            [f"--data={clips_folder}", f"--models={folder}", f"--videos={folder}", "--device=cpu"]
            + ["--batch-size=2", "--epochs=4", "--sample-every=1", "--precision=fp32"]
        )
    return folder / "index.html"


def test_page_shows_a_run(finished_page, open_page):
    view = open_page(finished_page)
    assert view.text("header").startswith("MoCoGAN epoch 4 of 4, done as of ")
    pictures = view.pictures()
    assert all(width > 0 for _, width in pictures)
    names = [src for src, _ in pictures if not src.startswith("data:")]
    timeline = [f"epoch-{epoch:06d}.gif" for epoch in range(5)]
    assert names == ["epoch-000004.gif", "real.gif", *timeline]
    (curves,) = (src for src, _ in pictures if src.startswith("data:image/png;base64,"))
    assert (
        base64.b64decode(curves.partition(",")[2])
        == finished_page.with_name("losses.png").read_bytes()
    )
    assert "after epoch 4," in view.text("#large")
    assert "clips" in view.text("dl") and "R_M 660" in view.text("dl")
    # the newest samples are large, with the real clips beside them, as large
    large, real = (view.tab.locator(s).bounding_box() for s in ("#large img", "[src='real.gif']"))
    assert large["width"] > 500 and large["width"] == real["width"] and large["y"] == real["y"]


def test_page_fits_a_phone(finished_page, open_page):
    view = open_page(finished_page, PHONE, is_mobile=True, has_touch=True)
    assert view.tab.evaluate("document.documentElement.scrollWidth") == 375
    large, real = (view.tab.locator(s).bounding_box() for s in ("#large img", "[src='real.gif']"))
    assert large["width"] > 300 and real["y"] > large["y"] + large["height"]  # one below the other
    sizes = view.tab.evaluate(
        "Array.from(document.querySelectorAll('p, b, dd, dt, li, figcaption'))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14


def test_page_enlarges_an_earlier_epoch(finished_page, open_page):
    view = open_page(finished_page)

    def shows(epoch):
        large = view.tab.locator("#large img")
        expect(large).to_have_attribute("src", re.compile(f"epoch-{epoch:06d}.gif$"))
        expect(view.tab.locator("#large")).to_contain_text(f"after epoch {epoch},")

    shows(4)
    view.tab.click(".timeline li:nth-child(3) a")
    shows(2)
    view.tab.reload()  # as the page does by itself
    shows(2)
    view.tab.click("text=Show the newest")
    shows(4)
    expect(view.tab.locator("text=Show the newest")).to_be_hidden()


def make_gif(path, level):
    save_gif(path, np.full((2, 34, 34, 3), level, np.uint8))


@pytest.fixture
def running(tmp_path):
    """The folder, with a name that needs care, of a run; what writes its page; and its log."""
    folder = tmp_path / "100 % <b>&amp;"
    folder.mkdir()
    for name in ("real", "epoch-000000"):
        make_gif(folder / f"{name}.gif", 99)
    facts = {"data": "a <script>alert(1)</script> & b", "\udcff": "no valid text"}
    with Logger(tmp_path) as log:
        args = SimpleNamespace(videos=folder, epochs=1000)
        yield folder, lambda epoch, *state: write_page(args, epoch, log, facts, *state), log


def test_page_reloads_while_the_run_goes_on(running, open_page, monkeypatch):
    folder, write, log = running
    path = folder / "index.html"
    monkeypatch.setattr(gallery, "REFRESH", 1)
    write(0)
    view = open_page(path)
    assert view.text("b") == "epoch 0 of 1,000" and "training" in view.text("header")
    assert view.text("dd") == "a <script>alert(1)</script> & b"
    make_gif(folder / "epoch-000500.gif", 200)
    make_gif(folder / "epoch-000750.gif", 200)  # of a later epoch than the run is at
    names = [f"loss_{side}_{kind}" for side in "dg" for kind in ("image", "video")]
    for _ in range(500):
        log.add(dict.fromkeys(names, torch.tensor(1.0)))
    log.flush(500)
    write(500)
    view.tab.wait_for_selector("text=epoch 500 of 1,000")
    shown = [src for src, _ in view.pictures() if src.startswith("epoch")]
    assert shown == ["epoch-000500.gif", "epoch-000000.gif", "epoch-000500.gif"]
    # a run that ends says how, and the page does not reload any more
    write(500, "stopped by RuntimeError: out of <memory>")
    view.tab.wait_for_selector("text=stopped by RuntimeError: out of <memory>")
    view.tab.evaluate("window.not_reloaded = true")
    time.sleep(1.5)
    assert view.tab.evaluate("window.not_reloaded")


def test_page_says_that_a_run_may_have_been_cut_off(running, open_page, monkeypatch):
    folder, write, _ = running
    monkeypatch.setattr(gallery, "time", SimpleNamespace(time=lambda: 1e9))  # in 2001
    write(0)
    view = open_page(folder / "index.html")
    assert re.search(r"no news for \d+ minutes, the run may have been cut", view.text("#age"))
    write(400, "stopped")
    view.tab.goto((folder / "index.html").as_uri())
    assert view.text("header").startswith("MoCoGAN epoch 400 of 1,000, stopped as of ")
    assert "no news" not in view.text("header")


def test_page_survives_damaged_pictures(running):
    folder, write, _ = running
    for name in ("epoch-000001.gif", "epoch-x.gif", "epoch-99999999.gif", "epoch--3.gif"):
        (folder / name).write_bytes(b"")
    (folder / "real.gif").unlink()
    write(10)
    text = (folder / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="(epoch-[^"]*)"', text)
    assert shown == [f"epoch-00000{n}.gif" for n in (1, 0, 1)] and "real.gif" in text
