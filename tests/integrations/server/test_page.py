"""The search page as a browser without JavaScript gets it: HTML, headers, files, refusals."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from epic_rag_server import AccessPolicy
from epic_rag_server.search_page import _TYPES
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, index_files, serving

QUERY = "undo the last commit"
KEY = "k3y-of-the-page"


class Page(HTMLParser):
    """What a test reads in a page: elements by name, and the text of each class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[dict[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("input", "link", "meta"):
            self.open.append(dict(attrs))
            for name in (dict(attrs).get("class") or "").split():
                self.texts.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for attributes in self.open:
            for name in (attributes.get("class") or "").split():
                self.texts[name][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(running: Running, address: str, status: int = 200) -> Page:
    response = running.client.get(address)
    assert response.status_code == status, response.text
    return Page(response.text)


def test_a_search_without_javascript(running: Running) -> None:
    found = page(running, f"/?q={QUERY}&mode=dense")
    hits = running.post("/v1/search", {"query": QUERY, "mode": "dense"}).json()["data"]
    assert [article["data-id"] for article in found.all("article")] == [hit["id"] for hit in hits]
    assert found.texts["text"] == [hit["text"] for hit in hits]
    assert [place.partition(":")[0] for place in found.texts["place"]] == [hit["path"] for hit in hits]
    assert "undo" in [
        word.lower() for word in re.findall("<mark>(.*?)</mark>", running.client.get(f"/?q={QUERY}").text)
    ]
    (query,) = [each for each in found.all("input") if each.get("id") == "q"]
    assert query["value"] == QUERY
    assert [each["value"] for each in found.all("option") if "selected" in each] == ["dense"]


def test_filters_bank_and_index(running: Running) -> None:
    def places(more: str) -> set[str]:
        return {
            place.partition(":")[0]
            for place in page(running, f"/?q={QUERY}&index=docs&bank=docs{more}").texts.get("place", [])
        }

    assert places("&path=guide/**") == {"guide/install.md"}
    assert places("&where=kind%3Dtext&since=7d") == {"notes.txt"}
    assert places("&since=2999-01-01") == set()


def test_the_document_at_a_hit(running: Running) -> None:
    found = page(running, f"/?q={QUERY}&path=undo.md")
    (link,) = {each["href"] for each in found.all("a") if each.get("class") == "place"}
    assert link is not None
    shown = page(running, link)
    lines = (running.docs / "undo.md").read_text().splitlines()
    assert shown.texts["hit"] == [line for line in lines if line.startswith("To undo")] or shown.texts["hit"]
    assert "".join(shown.texts["lines"]).split() == " ".join(lines).split()
    assert page(running, "/document?path=.env&line=1", 404).all("article") == []


def test_parts_of_a_long_document_are_linked(tmp_path: Path) -> None:
    encoder = make_encoder()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "long.txt").write_text("".join(f"line {number} of many\n" for number in range(1, 301)))
    with serving(encoder, tmp_path, indexes={"docs": index_files(tmp_path / "docs", encoder)}) as server:
        address: str | None = "/document?path=long.txt&line=150&last=151"
        shown = page(server, str(address))
        assert [text.strip() for text in shown.texts["hit"]] == ["line 150 of many", "line 151 of many"]
        seen, address = 0, "/document?path=long.txt&line=1"
        while address is not None:
            shown = page(server, address)
            links = [each["href"] for each in shown.all("a") if str(each.get("href")).startswith("/document")]
            numbers = [int(str(each["value"])) for each in shown.all("li")]
            assert numbers == list(range(seen + 1, seen + 1 + len(numbers)))
            seen = numbers[-1]
            address = links[-1] if seen < 301 else None
        assert seen == 301  # the empty one behind the last line end
        assert page(server, "/document?path=long.txt&line=999999").all("li")


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/?q=a&mode=both", 400),
        ("/?q=a&k=3", 400),
        ("/?q=a&q=b", 400),
        ("/?q=a&where=nonsense", 400),
        ("/?q=a&since=yesterday", 400),
        ("/?q=a&index=other", 404),
        ("/?q=a&bank=other", 404),
        ("/?q=" + "a" * 20_001, 400),
        ("/?bank=%00&q=a", 404),
        ("/document", 400),
        ("/document?path=notes.txt&line=x", 400),
        ("/document?path=notes.txt&line=1&last=99999999999", 400),
        ("/document?path=%00&line=1", 404),
        ("/document?path=../../etc/passwd&line=1", 404),
    ],
)
def test_wrong_addresses_show_an_error(running: Running, address: str, status: int) -> None:
    found = page(running, address, status)
    assert found.texts["error"][0].strip()
    assert found.all("article") == []


def test_the_first_page_is_short(running: Running) -> None:
    found = page(running, "/")
    assert found.all("article") == []
    assert page(running, "/?q=%20").all("article") == []
    assert not [each for each in found.all("button") if each.get("data-relevant")]


def test_texts_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} </textarea>'
    encoder = make_encoder()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a&b <i>.md").write_text(f"# <b>{evil}\n\n{evil}\n")
    with serving(encoder, tmp_path, indexes={"<u>": index_files(tmp_path / "docs", encoder)}) as server:
        answers = [
            server.client.get("/", params={"q": evil}),
            server.client.get("/", params={"q": "a", "path": evil, "where": evil, "bank": evil, "index": evil}),
            server.client.get("/", params={"q": "a", evil: evil}),
            server.client.get("/document", params={"path": "a&b <i>.md", "line": "1"}),
            server.client.get("/document", params={"path": evil, "line": "1"}),
        ]
        for answer in answers:
            tags = {tag for tag, _ in Page(answer.text).elements}
            assert not tags & {"img", "b", "i", "u"}
            assert [each.get("src") for each in Page(answer.text).all("script")] == ["/page/page.js"]
            assert "49" not in re.findall(r"\d+", answer.text.replace(evil, "")) or "7 * 7" in answer.text
        link = next(each["href"] for each in Page(answers[0].text).all("a") if each.get("class") == "place")
        assert server.client.get(str(link)).status_code == 200


def test_the_page_asks_for_nothing_else(running: Running) -> None:
    for address in ("/", f"/?q={QUERY}", "/document?path=notes.txt&line=1"):
        response = running.client.get(address)
        policy = dict(each.strip().split(" ", 1) for each in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {value for name, value in policy.items() if name != "default-src"} == {"'self'", "'none'"}
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        found = Page(response.text)
        assert not [
            each for each in found.elements if "style" in each[1] or any(name.startswith("on") for name in each[1])
        ]
        assert found.all("style") == []
        named = [str(each.get("src") or each.get("href") or "/") for _, each in found.elements]
        assert {name[0] for name in named} <= {"/", "#"}
        assert not [name for name in named if name.startswith("//")]


def test_the_files_of_the_page(running: Running) -> None:
    for name, kind in _TYPES.items():
        response = running.client.get(f"/page/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == kind
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
    for name in ("page.html", "../app.py", "%2e%2e%2fapp.py", "..%2fapp.py", ""):
        assert running.client.get(f"/page/{name}").status_code == 404


def test_only_the_page_shows_without_the_key(tmp_path: Path) -> None:
    encoder = make_encoder()
    index = index_files(tmp_path / "docs", encoder)
    with serving(encoder, tmp_path, indexes={"private-name": index}, policy=AccessPolicy(api_key=KEY)) as server:
        server.client.post("/v1/banks", json={"name": "private-bank"}, headers={"Authorization": f"Bearer {KEY}"})
        for address, status in (("/", 200), (f"/?q={QUERY}", 401), ("/?q=a&bank=private-bank", 401)):
            response = server.client.get(address)
            assert response.status_code == status
            assert "private" not in response.text.replace("bank=private-bank", "")
            assert "unlock" in response.text
        assert server.client.get("/page/page.js").status_code == 200
        for address in ("/document?path=notes.txt&line=1", "/v1/indexes", "/page"):
            assert server.client.get(address).status_code == 401
        opened = server.client.get(f"/?q={QUERY}", headers={"Authorization": f"Bearer {KEY}"})
        assert opened.status_code == 200
        assert Page(opened.text).all("article")


def test_links_of_other_pages_lead_to_the_page_alone(running: Running) -> None:
    def status(address: str, method: str = "GET", **fetch: str) -> int:
        headers = {f"Sec-Fetch-{name.title()}": value for name, value in fetch.items()}
        return running.client.request(method, address, headers=headers).status_code

    link = {"site": "cross-site", "mode": "navigate", "dest": "document"}
    assert status(f"/?q={QUERY}", **link) == 200
    assert status("/v1/models", **link) == 403
    assert status("/", **{**link, "dest": "iframe"}) == 403
    assert status("/", site="same-site", mode="no-cors", dest="image") == 403
    assert status("/v1/banks/docs/evaluate", "POST", site="cross-site", mode="no-cors", dest="empty") == 403
    assert status("/v1/models", site="same-origin", mode="cors", dest="empty") == 200
    assert status("/v1/models", site="none", mode="navigate", dest="document") == 200


def test_other_methods_are_refused(running: Running) -> None:
    for address in ("/", "/document", "/page/page.js"):
        assert running.client.post(address).status_code == 405


def test_a_server_without_an_index(tmp_path: Path) -> None:
    with serving(make_encoder(), tmp_path) as server:
        assert "no index" in server.client.get("/").text
        assert server.client.get("/?q=a").status_code == 404


def test_a_query_whose_client_leaves(running: Running) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{running.url}/?q=leaving", timeout=httpx.Timeout(10, read=0.0001))
    assert page(running, "/?q=staying").all("article")
