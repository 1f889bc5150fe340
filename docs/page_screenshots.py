"""Write the screenshots of the search page: this folder searched before and after three marks.

    python docs/page_screenshots.py [--output docs/images]

It indexes the Markdown files of docs/, serves them, opens the page in a headless Chromium, marks three hits, and prints
the ranks that changed, also for a query that was never marked. Needs Chromium and `playwright`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


QUERY = "what if the process is killed half way"
# Hits to mark: file, and words that the hit has.
RIGHT = (("reliability.md", "may end at any moment"), ("reliability.md", "fills a database beside"))
WRONG = ("training.md", "lose at most the steps")
NEVER_MARKED = "is my index safe if the computer crashes"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    return options


def epic_rag(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "epic_rag_cli", *arguments]


def places(page: Any) -> list[str]:
    found: list[str] = page.locator("article .place").all_inner_texts()
    return found


def search(page: Any, query: str) -> list[str]:
    page.fill("#q", query)
    page.keyboard.press("Enter")
    page.wait_for_function("query => document.querySelector('#results').dataset.query === query", arg=query)
    return places(page)


def mark(page: Any, path: str, words: str, text: str) -> None:
    """Press a button of the hit in a file that has these words."""
    page.evaluate("document.querySelector('#said').textContent = ''")
    hit = page.locator("article").filter(has=page.locator(".place", has_text=path))
    hit.filter(has=page.locator(".text", has_text=words)).first.get_by_role("button", name=text).click()
    page.wait_for_timeout(500)
    if page.locator("dialog[open]").count():
        page.locator("dialog button[value=ok]").click()
    page.wait_for_function("() => /Marked in .*moved/.test(document.querySelector('#said').textContent)")
    page.wait_for_function("() => document.querySelector('#gain').textContent !== ''")
    page.wait_for_timeout(500)


def compare(title: str, before: list[str], after: list[str]) -> None:
    print(title)
    for place in dict.fromkeys([*after, *before]):
        old, new = (str(hits.index(place) + 1) if place in hits else "-" for hits in (before, after))
        print(f"  {old:>2} -> {new:>2}  {place}{'' if old == new else '  *'}")


def main() -> int:
    options = parser().parse_args()
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("no Chromium is installed: apt-get install chromium")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as work:
        index = Path(work, "index")
        command = epic_rag("index", str(ROOT / "docs"), "--include", "*.md", "--index-dir", str(index))
        subprocess.run(command, check=True, env=environment)
        served = subprocess.Popen(
            epic_rag("serve", "--index-dir", str(index), "--port", "0", "--bank-dir", str(Path(work, "banks"))),
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            assert served.stderr is not None
            line = served.stderr.readline()
            url = re.search(r"http://\S+", line)
            if url is None:
                raise SystemExit(line + served.stderr.read())
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 760, "height": 900}, color_scheme="light")
                page.goto(url[0].rstrip("."))
                unmarked = search(page, NEVER_MARKED)
                before = search(page, QUERY)
                options.output.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=options.output / "page-before.png")
                mark(page, *WRONG, "This does not")
                for path, words in RIGHT:
                    mark(page, path, words, "This answers it")
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=options.output / "page-after.png")
                compare(f"{QUERY}: before and after three marks", before, places(page))
                compare(f"{NEVER_MARKED}: never marked", unmarked, search(page, NEVER_MARKED))
                browser.close()
        finally:
            served.terminate()
            served.communicate()
    for file in sorted(options.output.glob("page-*.png")):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
