"""Write the screenshots of the search page: a real folder searched before and after three marks.

    python docs/page_screenshots.py FOLDER --query TEXT --right PATH:LINE --right PATH:LINE --wrong PATH:LINE [--output docs/images]

It indexes the folder, serves it, opens the page in a headless Chromium, marks the hits that contain these lines, and
prints the ranks that changed, also for a query that was never marked (--check). Needs Chromium and `playwright`.
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


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    options.add_argument("--include", default="*.md")
    options.add_argument("--query", required=True)
    options.add_argument("--right", action="append", default=[], metavar="PATH:LINE")
    options.add_argument("--wrong", action="append", default=[], metavar="PATH:LINE")
    options.add_argument("--check", help="another query, whose ranks are printed too")
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


def find(page: Any, wanted: str) -> int:
    """Return the place of the hit that contains a line, from 0."""
    path, _, line = wanted.rpartition(":")
    for number, place in enumerate(places(page)):
        name, _, lines = place.rpartition(":")
        first, _, last = lines.partition("-")
        if name == path and int(first) <= int(line) <= int(last):
            return number
    raise SystemExit(f"no hit contains {wanted}: {', '.join(places(page))}")


def mark(page: Any, wanted: str, text: str) -> None:
    hit = page.locator("article").nth(find(page, wanted))
    hit.get_by_role("button", name=text).click()
    page.wait_for_timeout(300)
    if page.locator("dialog[open]").count():
        page.locator("dialog button[value=ok]").click()
    page.wait_for_function("() => /Marked in .*moved/.test(document.querySelector('#said').textContent)")
    page.wait_for_function("() => document.querySelector('#gain').textContent !== ''")
    page.evaluate("document.querySelector('#said').textContent += ' '")


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
        command = epic_rag("index", str(options.folder), "--include", options.include, "--index-dir", str(index))
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
                checked = search(page, options.check) if options.check else []
                before = search(page, options.query)
                options.output.mkdir(parents=True, exist_ok=True)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=options.output / "page-before.png")
                for text, wanted in (("This answers it", options.right), ("This does not", options.wrong)):
                    for each in wanted:
                        mark(page, each, text)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=options.output / "page-after.png")
                compare(f"{options.query}: before and after the marks", before, places(page))
                if options.check:
                    compare(f"{options.check}: never marked", checked, search(page, options.check))
                browser.close()
        finally:
            served.terminate()
            served.communicate()
    for file in sorted(options.output.glob("page-*.png")):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
