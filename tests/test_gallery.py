"""The page of a run, as files and as a browser shows it."""

import io
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import gallery
import main
from gallery import Page
from utils import LossLog
from video import save_gif, save_mp4

PHONE, DESKTOP = {"width": 375, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if not path:
        if os.environ.get("NEED_BROWSER"):
            pytest.fail("there is no browser; tests/browser.py installs one")
        pytest.skip("there is no Chromium or Chrome here")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


class View:
    """A page that is looked at, and all that went wrong in it."""

    def __init__(self, chromium, path, viewport=DESKTOP, **options):
        self.tab = chromium.new_page(viewport=viewport, **options)
        self.wrong, self.asked_for = [], set()
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("requestfailed", lambda request: self.wrong.append(request.url))
        self.tab.on("request", lambda request: self.asked_for.add(request.url))
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
def views(chromium):
    """Make views; whatever is looked at must have no error, and ask the disk only."""
    made = []

    def view(*args, **options):
        made.append(View(chromium, *args, **options))
        return made[-1]

    yield view
    for one in made:
        one.tab.close()
        assert one.wrong == []
        assert all(re.match("file:|data:", url) for url in one.asked_for), one.asked_for


@pytest.fixture(scope="module")
def videos(clips_folder, tmp_path_factory):
    """The folder that a run of four epochs left, samples at each."""
    folder = tmp_path_factory.mktemp("run")
    main.main(
        [f"--data={clips_folder}", f"--models={folder / 'models'}", f"--videos={folder / 'videos'}"]
        + ["--batch-size=2", "--epochs=4", "--sample-every=1", "--device=cpu", "--precision=fp32"]
    )
    return folder / "videos"


def test_a_run_in_a_browser(videos, views):
    view = views(videos / "index.html")
    assert view.text("header").startswith("MoCoGAN epoch 4 of 4, done as of ")
    pictures = view.pictures()
    assert all(width > 0 for _, width in pictures)
    names = [src for src, _ in pictures if not src.startswith("data:")]
    timeline = [f"epoch-{epoch:06d}.gif" for epoch in range(5)]
    assert names == ["epoch-000004.gif", "real.gif", *timeline]
    curves = [src for src, _ in pictures if src.startswith("data:image/svg+xml")]
    assert len(set(curves)) == 2
    assert "4 after" not in view.text("#large") and "after epoch 4," in view.text("#large")
    assert "data" in view.text("dl") and "clips" in view.text("dl") and "R_M 660" in view.text("dl")
    # newest samples large, real clips beside them, as large
    large, real = (view.tab.locator(s).bounding_box() for s in ("#large img", "[src='real.gif']"))
    assert large["width"] > 500 and large["width"] == real["width"] and large["y"] == real["y"]
    # the losses are drawn: both colours of matplotlib are on the screen
    shot = view.tab.locator("[src^='data:image/svg']").first.screenshot()
    pixels = np.array(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (np.abs(pixels - colour).max(axis=2) < 30).sum() > 20


def test_at_the_width_of_a_phone(videos, views):
    view = views(videos / "index.html", PHONE, is_mobile=True, has_touch=True)
    assert view.tab.evaluate("document.documentElement.scrollWidth") == 375
    large, real = (view.tab.locator(s).bounding_box() for s in ("#large img", "[src='real.gif']"))
    assert large["width"] > 300 and real["y"] > large["y"] + large["height"]  # one below the other
    sizes = view.tab.evaluate(
        "Array.from(document.querySelectorAll('p, b, dd, dt, li, figcaption'))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14
    thumbnails = view.tab.locator(".timeline img").evaluate_all("all => all.map(i => i.width)")
    assert min(thumbnails) > 140
    assert all(width > 0 for _, width in view.pictures())


def test_an_earlier_epoch_is_shown_large(videos, views):
    view = views(videos / "index.html")

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


class Run:
    """What a Page asks of a trainer."""

    epoch = 0


def make_gif(path, level):
    save_gif(path, np.full((2, 34, 34, 3), level, np.uint8))


@pytest.fixture
def going_on(tmp_path):
    """The page of a run of 1,000 epochs, at epoch 0, in a folder with a name that needs care."""
    folder = tmp_path / "100 % <b>&amp;"
    folder.mkdir()
    for name in ("real", "epoch-000000"):
        make_gif(folder / f"{name}.gif", 99)
    log = LossLog(tmp_path)
    yield Page(
        folder, Run(), 1000, log, {"data": "a <script>alert(1)</script> & b", "\udcff": "odd"}
    )
    log.close()


def test_it_refreshes_itself_while_the_run_goes_on(going_on, views, monkeypatch):
    monkeypatch.setattr(gallery, "REFRESH", 1)
    going_on.write()
    page = (going_on.folder / "index.html").read_text(encoding="utf-8")
    assert page.count("http-equiv") == page.count('<noscript><meta http-equiv="refresh"') == 1
    view = views(going_on.folder / "index.html")
    assert view.text("b") == "epoch 0 of 1,000" and "training" in view.text("header")
    assert view.text("dd") == "a <script>alert(1)</script> & b"
    going_on.trainer.epoch = 500
    make_gif(going_on.folder / "epoch-000500.gif", 200)
    make_gif(going_on.folder / "epoch-000750.gif", 200)  # of a later epoch than the run is at
    going_on.log.add(500, torch.ones(500, 8), 1)
    going_on.write()
    view.tab.wait_for_selector("text=epoch 500 of 1,000")
    assert [src for src, _ in view.pictures() if src.startswith("epoch")] == [
        "epoch-000500.gif", "epoch-000000.gif", "epoch-000500.gif",
    ]  # fmt: skip
    # a run that ends says how, and the page rests
    with pytest.raises(RuntimeError), going_on:
        raise RuntimeError("out of <memory>")
    view.tab.wait_for_selector("text=stopped by RuntimeError: out of <memory>")
    loads = len(view.asked_for)
    view.tab.evaluate("window.still = true")
    time.sleep(1.5)
    assert view.tab.evaluate("window.still") and len(view.asked_for) == loads


def test_a_run_without_news_may_have_been_cut_off(going_on, views, monkeypatch):
    monkeypatch.setattr(gallery, "time", SimpleNamespace(time=lambda: 1e9))  # in 2001
    going_on.write()
    view = views(going_on.folder / "index.html")
    assert re.search(r"no news for \d+ minutes, it may have been cut off", view.text("#age"))
    with going_on:
        going_on.trainer.epoch = 400
    view.tab.goto((going_on.folder / "index.html").as_uri())
    assert view.text("header").startswith("MoCoGAN epoch 400 of 1,000, stopped as of ")
    assert "no news" not in view.text("header")


def test_pictures_that_are_no_pictures_end_no_run(going_on):
    for name in ("epoch-000001.gif", "epoch-x.gif", "epoch-99999999.gif", "epoch--3.gif"):
        (going_on.folder / name).write_bytes(b"")
    (going_on.folder / "epoch-000002.gif").mkdir()
    (going_on.folder / "real.gif").unlink()
    going_on.trainer.epoch = 10
    going_on.write()
    page = (going_on.folder / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="(epoch-[^"]*)"', page)
    assert shown == [f"epoch-00000{n}.gif" for n in (1, 0, 1)] and "real.gif" in page


def test_a_page_whose_folder_is_gone_hides_no_error(going_on):
    with pytest.raises(RuntimeError, match="the true one"), going_on:
        shutil.rmtree(going_on.folder)
        raise RuntimeError("the true one")
    with pytest.raises(OSError), going_on:
        pass


def test_the_page_needs_no_network(videos):
    page = (videos / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert not re.search(r"fetch\(|XMLHttpRequest|@import|url\(", page)
    assert Path(videos / "index.html").stat().st_size < 300_000


def test_an_mp4_plays_in_a_browser(tmp_path, views):
    clip = np.zeros((50, 96, 96, 3), np.uint8)
    clip[25:] = (200, 0, 0)
    save_mp4(tmp_path / "a.mp4", iter(clip), fps=25)
    (tmp_path / "a.html").write_text('<link rel="icon" href="data:,"><video muted src="a.mp4">')
    view = views(tmp_path / "a.html")
    can = """document.createElement('video').canPlayType('video/mp4; codecs="avc1.64001E"')"""
    if not view.tab.evaluate(can):
        pytest.skip("this browser has no H.264")
    video = view.tab.locator("video")
    view.tab.wait_for_function("document.querySelector('video').readyState >= 2")
    facts = "v => [v.duration, v.videoWidth, v.videoHeight, v.error]"
    assert video.evaluate(facts) == [2, 96, 96, None]
    for second, colour in ((0.5, (0, 0, 0)), (1.5, (200, 0, 0))):
        seek = f"v => new Promise(done => {{ v.onseeked = done; v.currentTime = {second}; }})"
        video.evaluate(seek)
        pixels = np.array(Image.open(io.BytesIO(video.screenshot())).convert("RGB"))
        assert np.abs(pixels[40:56, 40:56].mean(axis=(0, 1)) - colour).max() < 12
