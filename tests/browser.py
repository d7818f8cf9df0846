"""The browser for the tests of the page: Chromium or Chrome, whichever is installed.

python tests/browser.py         # install Debian's Chromium if there is none, as root
"""

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The path of the browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


if __name__ == "__main__" and not find():
    for step in ("update", "install -y --no-install-recommends chromium"):
        subprocess.run(
            ["apt-get", "-q", *step.split()],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            check=True,
        )
