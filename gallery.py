"""The page that shows a run while it trains: generated_videos/index.html.

It needs no network and no server: open it from the disk. The GIFs are those beside it, all else is
in the page. While the run goes on it loads itself anew every half minute.
"""

import base64
import contextlib
import html
import struct
import time
from string import Template

from utils import LOOKS_AT, whole_file

REFRESH = 30  # seconds

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MoCoGAN, epoch $epoch</title>
<link rel="icon" href="data:,">
$refresh
<style>
  body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; color: #222; background: #fff;
         font: 1rem/1.5 system-ui, sans-serif; }
  header { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: baseline; }
  h1 { font-size: 1.6rem; margin: 1rem 0 0; }
  h2 { font-size: 1.2rem; margin: 2rem 0 .25rem; }
  p, figure { margin: 0; }
  img { display: block; width: 100%; height: auto; }
  figcaption, .note { color: #555; font-size: .9rem; }
  .late { color: #a30; }
  .pair { display: grid; gap: 1rem; grid-template-columns: 1fr 1fr; margin-top: 1rem; }
  .timeline { display: grid; gap: .75rem; padding: 0; list-style: none;
              grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
  .timeline a { display: block; color: inherit; text-align: center; text-decoration: none; }
  .timeline a.shown { outline: 3px solid #1f77b4; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
  dd { margin: 0; overflow-wrap: anywhere; }
  @media (max-width: 40rem) { .pair { grid-template-columns: 1fr; }
    .timeline { grid-template-columns: 1fr 1fr; } }
</style>
</head>
<body>
<header>
  <h1>MoCoGAN</h1>
  <p><b>epoch $epoch of $epochs</b>, $state</p>
  <p class="note" id="age"></p>
</header>
<section class="pair">
  <figure id="large">$newest<figcaption>Generated after epoch <b>$newest_epoch</b>, from 16 random
    codes, the same ones each time. <a href="#" hidden>Show the newest</a></figcaption></figure>
  <figure>$real<figcaption>Real: 16 windows of the clips.</figcaption></figure>
</section>
<h2>Losses</h2>
<p class="note">Faint: each epoch; strong: the running mean. D_I and D_V judge frames and videos and
  cannot fall below 0.33; G_I and G_V are what the generators lose to them.</p>
<section class="pair">$curves</section>
<h2>Timeline</h2>
<p class="note">The same codes at every epoch so far that has samples. Click one to enlarge it.</p>
<ol class="timeline">
$timeline
</ol>
<h2>This run</h2>
<dl>$facts</dl>
<script>
  const written = $written, refresh = $seconds;  // seconds; 0: the run has ended
  const links = Array.from(document.querySelectorAll(".timeline a"));
  const large = document.querySelector("#large img"), caption = document.querySelector("#large b");
  const newest = document.querySelector("#large a");
  function show() {  // the epoch named after the #, else the newest
    const link = links.find(a => a.dataset.epoch === location.hash.slice(1)) || links.at(-1);
    if (!link) return;
    links.forEach(a => a.classList.toggle("shown", a === link));
    if (large.getAttribute("src") !== link.getAttribute("href")) large.src = link.href;
    caption.textContent = link.dataset.name;
    newest.hidden = link === links.at(-1);
  }
  links.forEach(a => a.addEventListener("click", event => {
    event.preventDefault();
    location.hash = a.dataset.epoch;
    document.querySelector("#large").scrollIntoView({block: "nearest"});
  }));
  addEventListener("hashchange", show);
  show();
  const age = document.querySelector("#age");
  function tell() {
    const minutes = Math.floor((Date.now() / 1000 - written) / 60);
    age.textContent = "as of " + new Date(written * 1000).toLocaleString();
    if (refresh) age.textContent += ", loads itself anew every " + refresh + " seconds";
    if (refresh && minutes >= 5) {
      age.textContent += ": no news for " + minutes + " minutes, it may have been cut off";
      age.className = "late";
    }
  }
  tell();
  if (refresh) { setTimeout(() => location.reload(), refresh * 1000); setInterval(tell, 5000); }
</script>
</body>
</html>
""")


class Page:
    """The page of a run, index.html in `folder`, where its GIFs are.

    trainer: its epoch is read at each call; epochs: of the whole run; log: a LossLog; facts: a dict
    of lines about the run. In a `with` block it is written at the end, too, and says what ended the
    run.
    """

    def __init__(self, folder, trainer, epochs, log, facts):
        self.folder, self.trainer, self.epochs = folder, trainer, epochs
        self.log, self.facts = log, facts

    def samples(self):
        """The paths of the sample GIFs, by epoch, up to the one that the run stands at."""
        paths = {path.stem.removeprefix("epoch-"): path for path in self.folder.glob("epoch-*.gif")}
        paths = {int(digits): path for digits, path in paths.items() if digits.isdecimal()}
        epochs = (epoch for epoch in sorted(paths) if epoch <= self.trainer.epoch)
        return {epoch: paths[epoch] for epoch in epochs if paths[epoch].is_file()}

    def write(self, state="training"):
        """Write the page. state: "training", or how the run ended. Raises OSError."""
        samples, refresh = self.samples(), REFRESH if state == "training" else 0
        newest = list(samples)[-1:]  # or none
        by_itself = f'<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>'
        page = PAGE.substitute(
            epoch=f"{self.trainer.epoch:,}",
            epochs=f"{self.epochs:,}",
            state=html.escape(state),
            refresh=by_itself if refresh else "",
            newest="".join(gif(samples[epoch], epoch) for epoch in newest),
            newest_epoch="".join(f"{epoch:,}" for epoch in newest),
            real=gif(self.folder / "real.gif"),
            curves="".join(self._curves(looks_at) for looks_at in LOOKS_AT),
            timeline="\n".join(
                f'<li><a href="{path.name}" data-epoch="{epoch}" data-name="{epoch:,}">'
                f"{gif(path, epoch, 'lazy')}{epoch:,}</a></li>"
                for epoch, path in samples.items()
            ),
            facts="".join(
                f"<dt>{html.escape(name)}</dt><dd>{html.escape(line)}</dd>"
                for name, line in self.facts.items()
            ),
            written=round(time.time()),
            seconds=refresh,
        )
        with whole_file(self.folder / "index.html") as file:
            file.write(page.encode(errors="replace"))  # a folder may have a name that is no text

    def _curves(self, looks_at):
        svg = base64.b64encode(self.log.curves(looks_at)).decode()
        what = f"the losses of the discriminator and the generators on {looks_at}"
        return f'<img src="data:image/svg+xml;base64,{svg}" alt="{what}">'

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        state = "done" if self.trainer.epoch >= self.epochs else "stopped"
        if kind:
            state = f"stopped by {kind.__name__}{': ' if str(error) else ''}{error}"
        with contextlib.suppress(*[OSError] if kind else []):  # what ended the run is said instead
            self.write(state)


def gif(path, epoch=None, loading="eager"):
    """An img element for 16 videos, with its size, so that the page does not jump."""
    what = "16 real videos" if epoch is None else f"16 generated videos, epoch {epoch}"
    size = ""
    with contextlib.suppress(OSError, struct.error), open(path, "rb") as file:
        size = 'width="{}" height="{}"'.format(*struct.unpack("6x2H", file.read(10)))
    return f'<img src="{path.name}" alt="{what}" {size} loading="{loading}">'
