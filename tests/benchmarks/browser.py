"""Pages in headless Chromium, which has no network there: what it draws, and what it complains of."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pytest

Theme = Literal["light", "dark"]
_SCHEMES: dict[Theme, int] = {"dark": 0, "light": 1}
"""Blink's numbers of what ``prefers-color-scheme`` is."""

_URL = re.compile(r"url\(([^)]*)\)")

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@dataclass(frozen=True)
class Shown:
    """A page after its scripts ran: its document as HTML, and the lines of the browser's console."""

    dom: str
    console: tuple[str, ...]


def show(page: Path, theme: Theme = "light") -> Shown:
    """Open a page and let its scripts run."""
    done = _chromium(page, theme, "--dump-dom")
    return Shown(done.stdout, _console(done.stderr))


def picture(page: Path, to: Path, theme: Theme = "light", width: int = 1200, height: int = 2400) -> bytes:
    """Draw a page as a PNG at ``to`` and return its bytes."""
    done = _chromium(page, theme, f"--screenshot={to}", f"--window-size={width},{height}")
    assert _console(done.stderr) == ()
    return to.read_bytes()


def addresses(text: str) -> list[str]:
    """Return what a page would load: addresses in attributes and in its style, but data that it carries."""
    found = _Addresses()
    found.feed(text)
    found.close()
    return [each for each in found.addresses if not each.startswith(("data:", "#"))]


class _Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._styled = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._styled = tag == "style"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.addresses += [each for name, value in attrs if name == "style" for each in _URL.findall(value or "")]

    def handle_endtag(self, tag: str) -> None:
        self._styled = False

    def handle_data(self, data: str) -> None:
        if self._styled:
            self.addresses += _URL.findall(data)


def _console(log: str) -> tuple[str, ...]:
    return tuple(line for line in log.splitlines() if "CONSOLE" in line)


def _chromium(page: Path, theme: Theme, *action: str) -> subprocess.CompletedProcess[str]:
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"),
        *(f"--disable-{name}" for name in quiet),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={_SCHEMES[theme]}"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"),
        *(f"--user-data-dir={page.parent / 'profile'}", *action, page.as_uri()),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
