"""A headless Chromium for tests: Debian's by its path, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

REQUIRED = "EPIC_RAG_BROWSER_TESTS"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Return the path of a browser that is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def chromium_or_skip() -> str:
    """Return the path of a browser; skip the test without one, or fail if the environment requires it."""
    path = find_chromium()
    if path is None:
        reason = "no Chromium is installed: apt-get install chromium, or put one on the PATH"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextmanager
def chromium(path: str) -> Iterator[Any]:
    """Run a browser; yield Playwright's object for it."""
    from playwright.sync_api import sync_playwright

    # The sandbox needs rights that a container lacks; only pages of a test's own server are opened.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Log:
    """What a page asked for and complained about."""

    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(each).netloc for each in self.requests}


def open_page(browser: Any, **options: Any) -> tuple[Any, Log]:
    """Open an empty page in a context of its own, with a log."""
    page, log = browser.new_context(**options).new_page(), Log()
    page.set_default_timeout(30_000)
    page.on("request", lambda request: log.requests.append(request.url))
    page.on(
        "console", lambda message: log.problems.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: log.problems.append(str(error)))
    page.on("requestfailed", lambda request: log.problems.append(f"{request.url}: {request.failure}"))
    return page, log
