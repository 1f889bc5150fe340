"""The search page in a real browser: search, filters, marks, undo, keys, phones, accessibility, its requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from epic_rag import EpicEncoder
from epic_rag_server import AccessPolicy
from tests.conftest import make_encoder
from tests.helpers.browser import Log, chromium, chromium_or_skip, open_page
from tests.integrations.server.conftest import Running, index_files, serving

QUERY = "undo the last commit"
KEY = "k3y-of-the-browser"
TOPICS = (
    "undo",
    "branches",
    "tags",
    "remotes",
    "stash",
    "hooks",
    "blame",
    "bisect",
    "patches",
    "worktrees",
    "notes",
    "config",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(chromium_or_skip()) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the shipped model; a dozen files that share words with the query."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "docs" / "more").mkdir(parents=True)
    for number, topic in enumerate(TOPICS):
        name = f"more/{topic}.md" if number % 2 else f"{topic}.md"
        text = f"# {topic.title()}\n\nThe last commit matters to {topic}.\n" + "".join(
            f"\n## Part {part}\n\nPart {part} about {topic}: read it before the last commit, to undo nothing.\n"
            for part in range(2)
        )
        (folder / "docs" / name).write_text(text)
    encoder = EpicEncoder.from_pretrained("epic-minilm")
    with serving(encoder, folder, indexes={"docs": index_files(folder / "docs", encoder)}) as server:
        yield server


@pytest.fixture
def opened(browser: Any, served: Running) -> Iterator[tuple[Any, Log]]:
    """The page, with a log that a test expects to be clean."""
    page, log = open_page(browser)
    page.goto(served.url)
    yield page, log
    page.context.close()
    assert log.problems == []
    assert log.hosts == {served.url.removeprefix("http://")}
    for bank in served.bank_folder.glob("*"):
        for file in bank.iterdir():
            file.unlink()
        bank.rmdir()


def search(page: Any, query: str = QUERY) -> list[str]:
    page.fill("#q", query)
    page.keyboard.press("Enter")
    page.wait_for_function("query => document.querySelector('#results').dataset.query === query", arg=query)
    return places(page)


def places(page: Any) -> list[str]:
    return page.locator("article .place").all_inner_texts()


def mark(page: Any, rank: int, text: str) -> None:
    page.locator("article").nth(rank - 1).get_by_role("button", name=text).click()


def settled(page: Any, said: str) -> str:
    """Wait until the page has said something, and its gain; return all of it."""
    page.wait_for_function("said => document.querySelector('#said').textContent.startsWith(said)", arg=said)
    page.wait_for_function("() => document.querySelector('#gain').textContent !== ''")
    return str(page.inner_text("#learning"))


def test_three_marks_change_the_ranking_and_undo_takes_them_back(opened: tuple[Any, Log], served: Running) -> None:
    page, _ = opened
    before = search(page)
    assert len(before) == 10
    assert page.locator("mark").count() > 0

    chosen = before[4]
    mark(page, 5, "This answers it")
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in marks: hit 5 answers it.")
    first = places(page)
    assert first[0] == chosen
    assert page.locator("article").first.locator(".move").inner_text() == "▲ from 5"
    assert (
        page.locator("article").first.get_by_role("button", name="This answers it").get_attribute("aria-pressed")
        == "true"
    )

    refused = first[1]
    mark(page, 2, "This does not")
    said = settled(page, "Marked in marks: hit 2 does not.")
    assert "1 of the 10 examples" in said
    second = places(page)
    assert (second[0], refused in second) == (chosen, False)

    also = second[3]
    mark(page, 4, "This answers it")
    settled(page, "Marked in marks: hit 4 answers it.")
    third = places(page)
    assert set(third[:2]) == {chosen, also}
    examples = served.client.get("/v1/banks/marks").json()["examples"]
    assert [(each["query"], each["relevant"]) for each in examples] == [(QUERY, True), (QUERY, True), (QUERY, False)]

    page.reload()
    assert places(page) == third  # the address has query and bank
    assert page.locator("article.up, article.down").count() == 0

    for expected in (second, first, before):
        page.locator("#undo").click()
        settled(page, "Undone.")
        page.wait_for_function(
            "expected => expected === JSON.stringify([...document.querySelectorAll('article .place')].map(x => x.innerText))",
            arg=json.dumps(expected, ensure_ascii=False, separators=(",", ":")),
        )
    page.wait_for_selector("#undo", state="hidden")
    assert served.client.get("/v1/banks/marks").json()["num_examples"] == 0


def test_a_mark_is_taken_back_by_the_same_button(opened: tuple[Any, Log]) -> None:
    page, _ = opened
    before = search(page)
    mark(page, 3, "This answers it")
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in marks")
    mark(page, 1, "This answers it")
    settled(page, "Removed from marks.")
    assert places(page) == before


def test_a_mark_can_be_cancelled_and_goes_to_a_bank_of_choice(opened: tuple[Any, Log], served: Running) -> None:
    page, _ = opened
    search(page)
    mark(page, 2, "This answers it")
    page.locator("dialog").get_by_role("button", name="Cancel").click()
    assert list(served.bank_folder.glob("*")) == []
    mark(page, 2, "This answers it")
    page.fill("#choose-name", "no good name")
    page.locator("dialog button[value=ok]").click()
    assert page.locator("dialog").is_visible()  # the browser refuses the name
    page.fill("#choose-name", "mine")
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in mine")
    page.select_option("select[name=bank]", "docs")
    settled_bank = "Bank: docs."
    page.wait_for_function("said => document.querySelector('#said').textContent.startsWith(said)", arg=settled_bank)
    mark(page, 4, "This answers it")  # a built-in bank cannot be changed
    page.select_option("#choose-bank", "mine")
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in mine")
    assert served.client.get("/v1/banks/mine").json()["num_examples"] == 2
    assert page.input_value("select[name=bank]") == "mine"


def test_the_gain_is_shown_from_ten_examples_on(opened: tuple[Any, Log], served: Running) -> None:
    page, _ = opened
    pairs = [
        {"query": f"the use of {topic}", "passage": f"The last commit matters to {topic}."} for topic in TOPICS[:9]
    ]
    served.post("/v1/banks", {"name": "nine", "task": "docs", "examples": pairs})
    page.reload()
    page.select_option("select[name=bank]", "nine")
    search(page, "how are patches made")
    page.wait_for_function("() => document.querySelector('#gain').textContent.includes('9 of the 10')")
    mark(page, 2, "This answers it")
    settled(page, "Marked in nine")
    page.wait_for_function(
        "() => /Expected gain in nDCG@10 by the 10 examples of nine: [+-]/.test(document.querySelector('#gain').textContent)"
    )


def test_filters_mode_and_history(opened: tuple[Any, Log]) -> None:
    page, _ = opened
    everything = search(page)
    page.get_by_text("Filters").click()
    page.fill("input[name=path]", "more/**")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('path=')")
    page.wait_for_function(
        "() => [...document.querySelectorAll('article .place')].every(each => each.innerText.startsWith('more/'))"
    )
    assert page.input_value("input[name=path]") == "more/**"
    page.select_option("select[name=mode]", "keyword")
    page.wait_for_function("() => location.search.includes('mode=keyword')")
    page.go_back()
    page.go_back()
    page.wait_for_function("() => !location.search.includes('path=')")
    page.wait_for_function("() => !document.querySelector('#results').hasAttribute('aria-busy')")
    assert places(page) == everything


def test_a_wrong_filter_is_an_error_on_the_page(browser: Any, served: Running) -> None:
    page, log = open_page(browser)
    page.goto(f"{served.url}/?q=a")
    page.get_by_text("Filters").click()
    page.fill("input[name=where]", "nonsense")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .error")
    page.fill("input[name=where]", "")
    assert search(page)
    assert [each for each in log.problems if "400" not in each] == []  # the browser logs the status
    page.context.close()


def test_the_document_at_a_hit(opened: tuple[Any, Log]) -> None:
    page, _ = opened
    search(page)
    link = page.locator("article a.place").nth(1)
    link.click()
    page.wait_for_selector("article .preview .lines li.hit")
    assert link.get_attribute("aria-expanded") == "true"
    text = page.locator("article").nth(1).locator(".text").inner_text()
    assert page.locator(".preview li.hit").all_inner_texts()[0].strip() in text
    link.click()
    assert page.locator("article .preview .lines").is_hidden()


def test_everything_by_keyboard(opened: tuple[Any, Log]) -> None:
    page, _ = opened
    search(page)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.rank") == "3"
    page.keyboard.press("Enter")
    page.wait_for_selector("article[data-rank='3'] .preview .lines")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("y")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Enter")
    settled(page, "Marked in marks: hit 2 answers it.")
    assert page.evaluate("document.activeElement.dataset.rank") == "1"
    page.keyboard.press("n")
    settled(page, "Marked in marks: hit 1 does not.")
    page.locator("article").first.focus()
    page.keyboard.press("u")
    settled(page, "Undone.")
    page.fill("#q", "")
    page.focus("#q")
    page.keyboard.type("y/n u")
    assert page.input_value("#q") == "y/n u"  # letters are letters in the query


def test_typing_goes_on_while_a_mark_is_written(opened: tuple[Any, Log]) -> None:
    page, _ = opened
    search(page)
    page.fill("#q", "the next question")
    mark(page, 2, "This answers it")
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in marks")
    assert page.input_value("#q") == "the next question"
    assert page.get_attribute("#results", "data-query") == QUERY


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1280)])
def test_accessible_and_readable_everywhere(browser: Any, served: Running, scheme: str, width: int) -> None:
    page, log = open_page(browser, color_scheme=scheme, viewport={"width": width, "height": 800})
    axe = Axe()

    def check() -> None:
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    # axe-core is a script of the test, not of the page: Playwright runs it in spite of the page's policy.
    page.goto(served.url)
    check()
    search(page)
    page.get_by_text("Filters").click()
    page.locator("article a.place").first.click()
    page.wait_for_selector(".preview .lines")
    check()
    mark(page, 3, "This answers it")
    page.wait_for_selector("dialog[open]")
    check()
    page.locator("dialog button[value=ok]").click()
    settled(page, "Marked in marks")
    check()
    page.goto(page.locator("article a.place").first.evaluate("each => each.href"))
    check()
    page.goto(f"{served.url}/?q=a&mode=both")
    check()
    assert [each for each in log.problems if "400" not in each] == []
    page.context.close()
    served.client.post("/v1/banks/marks/undo", json={})


def test_without_javascript(browser: Any, served: Running) -> None:
    page, log = open_page(browser, java_script_enabled=False)
    page.goto(served.url)
    page.fill("#q", QUERY)
    page.get_by_role("button", name="Search").click()
    found = page.locator("article .place").all_inner_texts()
    assert len(found) == 10
    assert page.get_by_role("button", name="This answers it").count() == 0
    page.get_by_text("Filters").click()
    page.fill("input[name=path]", "more/**")
    page.get_by_role("button", name="Search").click()
    assert {each.partition("/")[0] for each in page.locator("article .place").all_inner_texts()} == {"more"}
    page.locator("article a.place").first.click()
    assert page.locator("li.hit").count() > 0
    assert log.problems == []
    page.context.close()


def test_a_server_with_a_key(browser: Any, tmp_path: Path) -> None:
    encoder = make_encoder()
    index = index_files(tmp_path / "docs", encoder)
    with serving(encoder, tmp_path, indexes={"docs": index}, policy=AccessPolicy(api_key=KEY)) as server:
        page, log = open_page(browser)
        page.goto(f"{server.url}/?q=undo")
        page.fill("#key", "wrong")
        page.get_by_role("button", name="Open").click()
        page.wait_for_function("() => document.querySelector('#said').textContent.startsWith('The key is wrong')")
        page.fill("#key", KEY)
        page.get_by_role("button", name="Open").click()
        page.wait_for_selector("article")
        mark(page, 2, "This answers it")
        page.locator("dialog button[value=ok]").click()
        settled(page, "Marked in marks")
        page.reload()
        page.wait_for_selector("article")  # the key stays for this tab
        assert [each for each in log.problems if "401" not in each] == []
        assert not [each for each in log.requests if KEY in each]
        page.context.close()


def test_a_server_that_stops(browser: Any, tmp_path: Path) -> None:
    encoder = make_encoder()
    index = index_files(tmp_path / "docs", encoder)
    page, _ = open_page(browser)
    with serving(encoder, tmp_path, indexes={"docs": index}) as server:
        page.goto(f"{server.url}/?q=undo")
        page.wait_for_selector("article")
    mark(page, 1, "This answers it")
    page.locator("dialog button[value=ok]").click()
    page.wait_for_function("() => document.querySelector('#said').textContent.startsWith('The server does not answer')")
    page.context.close()


def test_another_page_cannot_write(browser: Any, served: Running) -> None:
    """Requests by fetch, form and image of a page of another origin, and of the same host on another port."""
    page, _ = open_page(browser)
    page.route(
        "http://attacker.example/**", lambda route: route.fulfill(body="<p>attack</p>", content_type="text/html")
    )
    page.goto("http://attacker.example/")
    sent = page.evaluate(
        """async url => {
          const body = JSON.stringify({name: "stolen"});
          const answers = [];
          for (const mode of ["cors", "no-cors"]) {
            const response = await fetch(`${url}/v1/banks`, {method: "POST", mode, body}).catch(() => null);
            answers.push(response && response.type !== "opaque" ? response.status : "no answer");
          }
          return answers;
        }""",
        served.url,
    )
    assert sent == ["no answer", "no answer"]
    page.set_content(
        f'<form method="post" enctype="text/plain" action="{served.url}/v1/banks"><input name=\'{{"name":"stolen","task":"\' value=\'docs"}}\'></form>'
    )
    page.evaluate("document.forms[0].submit()")
    page.wait_for_load_state()
    assert "stolen" not in [bank["id"] for bank in served.client.get("/v1/banks").json()["data"]]
    page.context.close()
