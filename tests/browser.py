"""The browser that tests look at pages with: Chromium or Chrome, whichever is installed.

python tests/browser.py         # install Debian's, where there is none and that is possible
"""

import os
import shutil
import subprocess

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"


def find():
    """The path of the browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install():
    """Install one, or say what is missed without."""
    if find():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for step in ("update", "install -y --no-install-recommends chromium"):
            command = ["apt-get", "-q", *step.split()]
            subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
    if not find():
        print("no Chromium or Chrome here: the tests of the gallery page in a browser are skipped")


if __name__ == "__main__":
    install()
