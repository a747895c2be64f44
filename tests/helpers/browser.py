"""A real browser without a window, if there is one: what a page becomes in it, and what it complains of."""

import shutil
import subprocess
import tempfile

HOW = "no chromium found: install one, as with 'apt-get install chromium'"


def chromium():
    """The browser's path; None: there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page):
    """Open a file; return its document as it is then, and what it wrote to its console, a line each.

    It has no network: names of hosts are not looked up, and what would be asked of one fails and is in the console.
    """
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr",
                "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
