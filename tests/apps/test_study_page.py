"""The voting page over a real server: by HTTP, and by a person's eyes and keys in a real browser."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.study.server import serve, study_app
from triptych.errors import MissingExtra
from triptych.evaluation.ballots import CHECK, Poll, open_design
from triptych.evaluation.compare import compare
from triptych.evaluation.lines import read_lines
from triptych.evaluation.study_file import read_study

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
VOTER = "0123456789abcdef"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Page:
    """A voting page that is being served."""

    url: str
    poll: Poll

    def post(self, path: str, body: object) -> tuple[int, dict]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=content, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"{}")

    def get(self, path: str) -> tuple[int, bytes, dict]:
        try:
            with urllib.request.urlopen(self.url + path) as reply:
                return reply.status, reply.read(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), dict(error.headers)

    def rows(self) -> list[dict]:
        return list(read_lines(self.poll.path))

    def shown(self, token: str) -> str:
        path, degraded = self.poll.picture(token) or (Path(), False)
        return CHECK if degraded else path.parent.name


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A red and a blue system on six prompts, served from a thread."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a fine picture, number {n} <b>" for n in range(6)))
    tables = []
    for name, colour in (("red", "#c03030"), ("blue", "#3030c0")):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("RGB", (256, 256), colour).save(tmp_path / name / f"{index:05d}.png")
        tables.append(f'[[systems]]\nname = "{name}"\nfolder = "{{here}}/{name}"\n')
    (tmp_path / "study.toml").write_text('prompts = "{here}/prompts.txt"\n' + "\n".join(tables))
    out = tmp_path / "out"
    compare(read_study(tmp_path / "study.toml"), out)
    poll = Poll(out, open_design(out, session=6, check_every=4))
    server = uvicorn.Server(uvicorn.Config(study_app(poll), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Page(f"http://127.0.0.1:{port}/", poll)
    server.should_exit = True
    thread.join()
    poll.close()


def test_a_vote_by_http_is_on_the_disk_when_the_next_ballot_comes(page: Page) -> None:
    status, reply = page.post("api/ballot", {"voter": VOTER})
    first = reply["ballot"]
    assert status == 200
    assert (first["number"], first["session"]) == (1, 6)
    assert page.post("api/ballot", {"voter": VOTER})[1] == reply  # asking again changes nothing
    vote = {"voter": VOTER, "ballot": first["id"], "answer": "left", "milliseconds": 900}
    status, reply = page.post("api/vote", vote)
    assert status == 200
    assert reply["ballot"]["id"] != first["id"]
    assert reply["ballot"]["number"] == 2
    (row,) = page.rows()
    assert row["answer"] in ("a", "b")
    assert row["milliseconds"] == 900


def test_pictures_and_pages_tell_nothing(page: Page) -> None:
    ballot = page.post("api/ballot", {"voter": VOTER})[1]["ballot"]
    status, content, headers = page.get(f"picture/{ballot['left']}.png")
    assert (status, headers["content-type"]) == (200, "image/png")
    assert b"tEXt" not in content
    assert b"triptych" not in content
    assert page.get("picture/0123.png")[0] == 404
    assert page.get("api/votes")[0] == 404
    status, content, headers = page.get("")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http" not in content
    assert b"red" not in content.replace(b"stored", b"").replace(b"ered", b"")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("api/ballot", {"voter": "short"}, 422),
        ("api/ballot", {"voter": "<script>alert(1)</script>"}, 400),
        ("api/ballot", b"{", 422),
        ("api/vote", {"voter": VOTER, "ballot": "x", "answer": "left"}, 400),
        ("api/vote", {"voter": VOTER, "ballot": "x", "answer": "both"}, 422),
        ("api/vote", {"voter": VOTER, "ballot": "x", "answer": "left", "milliseconds": -1}, 422),
        ("api/vote", {"voter": VOTER, "ballot": "x" * 100, "answer": "left"}, 422),
    ],
)
def test_what_is_no_vote_is_refused(page: Page, path: str, body: object, status: int) -> None:
    assert page.post(path, body)[0] == status
    assert page.rows() == []


def test_many_voters_at_once_lose_no_vote(page: Page) -> None:
    def vote(voter: str) -> None:
        ballot = page.post("api/ballot", {"voter": voter})[1]["ballot"]
        for _ in range(5):
            ballot = page.post("api/vote", {"voter": voter, "ballot": ballot["id"], "answer": "tie"})[1][
                "ballot"
            ]

    threads = [threading.Thread(target=vote, args=(f"voter-{n:06d}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = page.rows()
    assert len(rows) == 40
    assert len({(r["voter"], r["question"], r["stem"], r["b"]) for r in rows}) == 40


def test_without_the_extra_the_command_says_what_to_install(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=r"triptych\[serve\]"):
        serve(page.poll, "127.0.0.1", 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def better(page: Page, tab) -> str:
    """The key of the picture that is not degraded, and of the red one otherwise."""
    tokens = [Path(tab.get_attribute(f"#{side} img", "src")).stem for side in ("left", "right")]
    names = [page.shown(token) for token in tokens]
    return "2" if names[0] == CHECK or (names[0] == "blue" and names[1] != CHECK) else "1"


def test_a_person_votes_with_keys_in_a_browser(page: Page, browser) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto(page.url)
    tab.click("#start")
    questions = []
    for number in range(1, 7):
        if number == 4:  # the second question begins after a word about it
            tab.wait_for_selector("#note:visible")
            assert "different question" in tab.inner_text("#said")
            tab.click("#start")
        tab.locator("#count", has_text=f"{number} of 6").wait_for()
        tab.wait_for_selector("#pair:visible")
        questions.append(tab.inner_text("#question"))
        prompt = tab.inner_text("#prompt")
        assert ("number" in prompt and "<b>" in prompt) == ("shows this" in questions[-1])
        natural = tab.evaluate("[...document.querySelectorAll('#pair img')].map(i => i.naturalWidth)")
        assert natural == [256, 256]
        tab.keyboard.press(better(page, tab) if number != 5 else "s")
    tab.wait_for_selector("#note:visible")
    assert "Thank you: 6 answers" in tab.inner_text("#said")
    assert len(set(questions[:3])) == len(set(questions[3:])) == 1
    assert questions[0] != questions[3]
    rows = page.rows()
    assert len(rows) == 6
    assert [row["answer"] for row in rows].count("skip") == 1
    assert {row["answer"] for row in rows} == {"a", "skip"}  # "a" is red, and the whole one of a check
    assert len({row["voter"] for row in rows}) == 1
    assert all(row["milliseconds"] >= 0 for row in rows)
    assert all(url.startswith((page.url, "data:")) for url in asked)
    assert errors == []
    tab.close()


def test_the_page_fits_a_phone_and_takes_taps(page: Page, browser) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(page.url)
    tab.tap("#start")
    tab.wait_for_selector("#pair:visible")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("document.documentElement.scrollHeight") <= 640
    boxes = [tab.locator(selector).bounding_box() for selector in ("#left img", "#right img")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] + 1  # one above the other
    assert min(box["width"] for box in boxes) >= 120
    assert all(box["height"] >= 44 for box in (b.bounding_box() for b in tab.locator("nav button").all()))
    tab.tap("[data-answer=tie]")
    tab.locator("#count", has_text="2 of 6").wait_for()
    (row,) = page.rows()
    assert row["answer"] == "tie"
    voter = tab.evaluate("localStorage.getItem('triptych-voter')")
    tab.reload()
    tab.tap("#start")
    tab.wait_for_selector("#pair:visible")
    assert tab.inner_text("#count") == "2 of 6"  # the same voter goes on
    assert row["voter"] == voter
    context.close()


def test_a_server_that_ends_is_told_and_nothing_is_lost(page: Page, browser) -> None:
    tab = browser.new_page()
    tab.goto(page.url)
    tab.click("#start")
    tab.wait_for_selector("#pair:visible")
    tab.route("**/api/vote", lambda route: route.abort())
    tab.keyboard.press("1")
    tab.wait_for_selector("#note:visible")
    assert "may not have been counted" in tab.inner_text("#said")
    tab.unroute("**/api/vote")
    tab.click("#start")
    tab.wait_for_selector("#pair:visible")
    assert tab.inner_text("#count") == "1 of 6"
    assert page.rows() == []
    tab.close()
