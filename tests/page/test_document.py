"""The read-only pages' parts: figures, tables, text of others, and who is answered."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise

import httpx
import pytest

from ld_common.core.errors import ConfigError, StoreError
from ld_common.core.processes import free_port
from ld_common.page.content import (
    Curve,
    Curves,
    DataTable,
    Facts,
    Marked,
    Meter,
    PageContent,
    PageSection,
    Sentence,
    bytes_text,
    number_text,
    time_text,
)
from ld_common.page.document import document
from ld_common.page.figure import MOST_CURVES, figure, round_ticks, tick_texts, value_ticks
from ld_common.page.serve import serving_page

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\'">&amp;'


def content(text: str) -> PageContent:
    parts = [
        Facts([(text, Marked(text, text))]),
        DataTable(text, [text, f"#{text}"], [[text, Marked(text, "bad")]], text),
        DataTable(text, [text], [], text),
        Curves(text, [Curve(text, [(1, 0.5), (2, 0.25)])], text),
        Curves(text, [], text),
        Meter(text, 1.0, 2.0, text),
        Sentence(text),
    ]
    return PageContent(text, text, Marked(text, text), [PageSection("Parts", parts)], [Marked(text, "warn")])


class Elements(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, set[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name for name, _ in attributes}))


@pytest.mark.attack
def test_text_of_others_makes_no_element_and_no_attribute() -> None:
    plain = Elements(document(content("t" * len(HOSTILE))))
    hostile = Elements(document(content(HOSTILE)))
    assert hostile.found == plain.found
    assert {name for _, names in hostile.found for name in names if name.startswith("on")} == set()


def test_the_same_content_gives_the_same_page() -> None:
    assert document(content("a")) == document(content("a")) != document(content("b"))


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.0],
        [-3.0, -1.0],
        [0.0571, 0.0987],
        [1e-7, 2e-7],
        [5.0, 5.0],
        [0.1, 1e6],
        [3.37e6, 2.04e6],
        [1e300, 1.0],
    ],
)
def test_the_heights_of_a_figure_enclose_its_values_evenly(values: list[float]) -> None:
    ticks = value_ticks(values)
    assert len(set(tick_texts(ticks))) == len(ticks)
    assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert steps[0] > 0


def test_the_heights_of_a_figure_have_equal_decimals() -> None:
    assert tick_texts([0.09, 0.1, 0.11]) == ["0.09", "0.10", "0.11"]
    assert tick_texts([0.0, 2.5, 5.0]) == ["0.0", "2.5", "5.0"]
    assert tick_texts([0.0, 10.0, 20.0]) == ["0", "10", "20"]
    assert tick_texts([0.0, 1e6, 2e6]) == ["0", "1e+06", "2e+06"]


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (1, 8), (1, 10), (3, 1000), (1, 14)])
def test_the_rounds_of_a_figure_are_evenly_spaced_from_first_to_last(first: int, last: int) -> None:
    ticks = round_ticks(first, last)
    assert (ticks[0], ticks[-1]) == (first, last)
    assert len({after - before for before, after in pairwise(ticks)}) <= 1


def test_a_curve_is_drawn_where_its_values_are() -> None:
    drawn = figure(Curves("loss", [Curve("p", [(1, 0.0), (3, 10.0)])], ""))
    assert 'd="M0.00 100.00L100.00 0.00"' in drawn
    assert "p: 0 in round 1, 10 in round 3" in drawn
    alone = figure(Curves("loss", [Curve("p", [(1, 2.0)])], ""))
    assert re.search(r'd="M50\.00 \d', alone)


def test_many_curves_are_drawn_as_their_lowest_and_highest() -> None:
    curves = [Curve(f"site{number}", [(1, number), (2, -number)]) for number in range(MOST_CURVES + 1)]
    drawn = figure(Curves("loss", [Curve("mean", [(1, 4.0)], main=True), *curves], ""))
    assert "site3" not in drawn
    assert "lowest of 9: 0 in round 1, -8 in round 2; highest of 9: 8 in round 1, 0 in round 2" in drawn


def test_numbers_as_text() -> None:
    texts = {0: "0 bytes", 999: "999 bytes", 2048904: "2.05 MB", 999_999: "1 MB", 5.5e12: "5.50 TB"}
    assert {count: bytes_text(count) for count in texts} == texts
    assert (number_text(None), number_text(0.0571234)) == ("–", "0.05712")
    assert (time_text("2026-07-01T09:30:00+00:00"), time_text("")) == ("2026-07-01 09:30", "")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving_page(lambda: document(content("shown")), "127.0.0.1", free_port(), "ld-server page") as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["", "rounds.jsonl", "../keys/study.key", "%2e%2e/x", "?token=", "?token=guess", "?" + "a=1&" * 50]
)
@pytest.mark.attack
def test_without_the_token_nothing_is_answered(address: str, path: str) -> None:
    root = address.partition("?")[0]
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
        answered = httpx.request(method, f"{root}{path}", cookies={"ld-page-1": "guess"})
        assert answered.status_code == 401, method
        assert "shown" not in answered.text
        assert method == "HEAD" or "ld-server page printed" in answered.text


@pytest.mark.attack
def test_the_page_can_only_be_read(address: str) -> None:
    root, _, token = address.partition("?token=")
    bearer = {"Authorization": f"Bearer {token}"}
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answered = httpx.request(method, root, headers=bearer, content=b"x" * 10_000)
        assert (answered.status_code, answered.headers["allow"]) == (405, "GET, HEAD"), method
    assert httpx.request("TRACE", root, headers=bearer).status_code == 501
    assert "shown" in httpx.get(root, headers=bearer).text
    head = httpx.head(root, headers=bearer)
    assert (head.status_code, head.text) == (200, "")
    for path in ("rounds.jsonl", "../run/rounds.jsonl", "keys"):
        assert httpx.get(f"{root}{path}", headers=bearer).status_code == 404


def test_the_token_enters_once_and_leaves_the_address_line(address: str) -> None:
    with httpx.Client(follow_redirects=True) as browser:
        opened = browser.get(address)
        assert (opened.status_code, "token" in str(opened.url)) == (200, False)
        assert browser.get(opened.url).status_code == 200
        cookie = opened.history[0].headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert opened.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in opened.headers["content-security-policy"]


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://127.0.0.1:1"])
@pytest.mark.attack
def test_another_web_page_s_request_is_refused_even_with_the_token(address: str, origin: str) -> None:
    root, _, token = address.partition("?token=")
    headers = {"Authorization": f"Bearer {token}", "Origin": origin}
    assert httpx.get(root, headers=headers).status_code == 403


@pytest.mark.attack
def test_another_name_that_leads_to_loopback_is_not_answered(address: str) -> None:
    root, _, token = address.partition("?token=")
    port, bearer = root.rstrip("/").rpartition(":")[2], {"Authorization": f"Bearer {token}"}
    names = {f"127.0.0.1:{port}": 200, "localhost": 200, f"[::1]:{port}": 200, f"rebound.example:{port}": 400, "[": 400}
    for name, status in names.items():
        assert httpx.get(root, headers={"Host": name, **bearer}).status_code == status, name


@pytest.mark.slow
@pytest.mark.attack
def test_a_client_that_sends_nothing_or_nonsense_keeps_nobody_out(address: str) -> None:
    root, _, token = address.partition("?token=")
    port = int(root.rstrip("/").rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    silent[0].sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
    silent[1].sendall(b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
    assert httpx.get(root, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    for connection in silent:
        connection.close()


def test_a_page_that_did_not_change_is_not_sent_again(address: str) -> None:
    root, _, token = address.partition("?token=")
    bearer = {"Authorization": f"Bearer {token}"}
    tag = httpx.get(root, headers=bearer).headers["etag"]
    assert httpx.get(root, headers={**bearer, "If-None-Match": tag}).status_code == 304
    assert httpx.get(root, headers={**bearer, "If-None-Match": '"other"'}).status_code == 200


def test_what_cannot_be_read_is_said_and_the_server_goes_on() -> None:
    answers = iter([StoreError("the store is damaged"), None])

    def render() -> str:
        error = next(answers)
        if error is not None:
            raise error
        return "whole again"

    with serving_page(render, "127.0.0.1", free_port(), "ld-client page") as opened:
        root, _, token = opened.partition("?token=")
        bearer = {"Authorization": f"Bearer {token}"}
        refused = httpx.get(root, headers=bearer)
        assert (refused.status_code, refused.text) == (503, "the store is damaged\n")
        assert httpx.get(root, headers=bearer).text == "whole again"


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("192.0.2.1", free_port()), ("no host", free_port())):
            with pytest.raises(ConfigError, match="--port"), serving_page(str, host, number, "ld-server page"):
                pytest.fail("it listens")
