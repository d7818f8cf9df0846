"""The page that shows a run while it trains: index.html beside its sample GIFs.

It needs no network and no server: open it from the disk. It reloads every half minute while the run
goes on. Its template is gallery.html.
"""

import base64
import html
import time
from pathlib import Path
from string import Template

from utils import atomic_write

REFRESH = 30  # seconds
TEMPLATE = Path(__file__).with_name("gallery.html")


class Page:
    """The page of a run, index.html in `folder`, beside the GIFs.

    epochs: of the whole run; facts: a dict of lines about the run.
    """

    def __init__(self, folder, epochs, facts):
        self.folder, self.epochs, self.facts = folder, epochs, facts

    def write(self, epoch, log, state="training"):
        """Write the page as of `epoch`, and losses.png. Raises OSError.

        state: "training", or how it ended.
        """
        samples = self._samples(epoch)
        newest = max(samples, default=epoch)
        refresh = REFRESH if state == "training" else 0
        page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            epoch=f"{epoch:,}",
            epochs=f"{self.epochs:,}",
            state=html.escape(state),
            newest=image_tag(self.folder / f"epoch-{newest:06d}.gif", "16 generated videos"),
            newest_epoch=f"{newest:,}",
            real=image_tag(self.folder / "real.gif", "16 real videos"),
            losses=base64.b64encode(log.plot()).decode(),
            evaluations=table(log.evaluations),
            timeline="\n".join(
                f'<li><a href="{path.name}" data-epoch="{e}" data-name="{e:,}">'
                f"{image_tag(path, f'16 generated videos, epoch {e}', lazy=True)}{e:,}</a></li>"
                for e, path in samples.items()
            ),
            facts="".join(
                f"<dt>{html.escape(name)}</dt><dd>{html.escape(line)}</dd>"
                for name, line in self.facts.items()
            ),
            written=round(time.time()),
            refresh=refresh,
        )
        with atomic_write(self.folder / "index.html") as file:
            file.write(page.encode(errors="replace"))  # a folder's name may be no valid text

    def _samples(self, epoch):
        """The paths of the sample GIFs by their epochs, up to `epoch`, sorted."""
        paths = {path.stem.removeprefix("epoch-"): path for path in self.folder.glob("epoch-*.gif")}
        samples = {int(digits): path for digits, path in paths.items() if digits.isdecimal()}
        return {e: samples[e] for e in sorted(samples) if e <= epoch}


def image_tag(path, text, lazy=False):
    """An img element for a GIF."""
    return f'<img src="{path.name}" alt="{text}" loading="{"lazy" if lazy else "eager"}">'


def table(rows):
    """A table of `rows`, dicts of numbers with the same names, newest first; nothing if empty."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in rows[0])
    body = ("".join(f"<td>{value:.4g}</td>" for value in row.values()) for row in rows[::-1])
    lines = "".join(f"<tr>{line}</tr>\n" for line in (head, *body))
    return f"<h2>Evaluation</h2>\n<table>{lines}</table>"
