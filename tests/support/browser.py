"""Pages in a real browser, where there is one: what it makes of them, what it says about them, what it asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def browse(page: Path, *flags: str, fragment: str = "") -> subprocess.CompletedProcess[str]:
    """Open the page in a fresh browser; return what it prints."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'browser'}",
        *flags,
        f"{page.as_uri()}{fragment}",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def render(page: Path, fragment: str = "") -> str:
    """Return the document as the browser has it once the page's script has run."""
    return browse(page, "--dump-dom", fragment=fragment).stdout


def read_console(page: Path) -> list[str]:
    """Return what the browser's console shows once the page is there: errors, and what its policy has blocked."""
    said = browse(page, "--dump-dom", "--enable-logging=stderr").stderr
    return [line for line in said.splitlines() if "CONSOLE" in line]


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """Serve on this machine: yield the address to ask, and the paths that were asked for so far."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def photograph(page: Path, height: int) -> None:
    """Take the page's pictures, light, dark and narrow; $TUNESMITH_SCREENSHOTS names a folder to keep them in."""
    shots = {
        "light": (f"--window-size=1280,{height}",),
        "dark": (f"--window-size=1280,{height}", "--blink-settings=preferredColorScheme=0"),
        "narrow": (f"--window-size=500,{height + 600}",),
    }
    for name, flags in shots.items():
        picture = page.with_name(f"{page.stem}_{name}.png")
        browse(page, f"--screenshot={picture}", *flags)
        assert picture.stat().st_size > 50_000, "a blank page is a few kilobytes"
        if "TUNESMITH_SCREENSHOTS" in os.environ:
            folder = Path(os.environ["TUNESMITH_SCREENSHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder)
