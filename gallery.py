"""The page that shows a run while it trains: index.html beside its sample GIFs.

It needs no network and no server: open it from the disk. It reloads every half minute while the run
goes on. Its template is gallery.html.
"""

import base64
import time
from pathlib import Path

from jinja2 import Template

from utils import atomic_write

REFRESH = 30  # seconds
TEMPLATE = Path(__file__).with_name("gallery.html")


def write_page(args, epoch, log, facts, state="training"):
    """Write index.html into `args.videos`, as of `epoch` of `args.epochs`, and losses.png.

    log: a Logger; facts: a dict of lines about the run; state: "training", or how it ended.
    """
    gifs = sorted(path.name for path in args.videos.glob("epoch-" + 6 * "[0-9]" + ".gif"))
    page = Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        epoch=epoch,
        epochs=args.epochs,
        state=state,
        samples={e: gif for gif in gifs if (e := int(gif[6:12])) <= epoch},
        losses=base64.b64encode(log.plot()).decode(),
        evaluations=log.evaluations[::-1],
        facts=facts,
        written=round(time.time()),
        refresh=REFRESH if state == "training" else 0,
    )
    with atomic_write(args.videos / "index.html") as file:
        file.write(page.encode(errors="replace"))  # a folder's name may be no valid text
