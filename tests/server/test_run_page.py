"""`ld-server page` as the study's people use it, in a browser, of a run that really happened."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from flwr.supercore.task_identity import TaskIdentity
from playwright.sync_api import Browser, Page, expect

from ld_common.core.processes import free_port
from ld_common.page import document
from ld_common.page.serve import serving_page
from ld_server.deployment.page import RunPage
from ld_server.round_log import FAILURE, ROUNDS, RoundRecord, append_round, locked, read_rounds, write_rounds
from ld_server.server_app import run_study
from ld_server.tracking.run_study import write_run_study
from ld_simulations.benchmarks.seen.browser import DESK, PHONE, cut_text, opened, violations, width
from tests.server.test_follow import record
from tests.server.test_status import fails_after_round_one
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study
from tests.support.commands import start_command
from tests.support.deployed_study import DeployedStudy

BRAIN_MRI = Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml"


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four rounds that ended; site z failed after the first."""
    folder = tmp_path_factory.mktemp("run")
    config = study(tiny_base, folder, ["p", "q", "z"], rounds=4, clip_update_norm=0.8)
    sites = {"p": honest, "q": honest, "z": fails_after_round_one}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        run_study(LocalGrid(sites, load_channels(tiny_base)), config, MODALITY)
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with serving_page(RunPage.of(run).render, "127.0.0.1", free_port(), "ld-server page") as shown:
        yield shown


def row(page: Page, section: str, first: str) -> str:
    """The text of a table's row, by its first cell."""
    rows = page.locator(f"section[aria-labelledby={section}] tbody tr")
    return rows.filter(has=page.get_by_role("rowheader", name=first, exact=True)).inner_text()


def test_the_page_shows_the_run_and_asks_nobody_else(browser: Browser, address: str, run: Path) -> None:
    requested: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    expect(page).to_have_title("Ended, the release is written · Study test")
    expect(page.locator(".state")).to_have_text("Ended, the release is written")
    overview = page.locator("section[aria-labelledby=overview]")
    expect(overview).to_contain_text(str(run / "rounds.csv"))
    expect(overview).to_contain_text("4 of 4")
    sites = page.get_by_role("table", name="Each site and its last accepted result")
    expect(sites.get_by_role("row")).to_have_count(4)
    q, z = row(page, "sites", "q"), row(page, "sites", "z")
    assert "clipped" in q
    assert "10 visits of 4 patients" in q
    assert "1 of 4" in z
    left_out = page.get_by_role("table", name="Sites whose result did not count").get_by_role("row")
    expect(left_out).to_have_count(2)
    expect(left_out.nth(1)).to_contain_text(re.compile(r"z\s*2-4.*the site's store is absent"))
    expect(page.get_by_role("img", name=re.compile("Training loss.*p: 0.5 in round 1, 0.5 in round 4"))).to_be_visible()
    expect(page.locator("section[aria-labelledby=curves]")).to_contain_text("No site has sent a validation loss.")
    rounds = page.get_by_role("table", name="Rounds, the newest first")
    expect(rounds.get_by_role("rowheader")).to_have_text(["4", "3", "2", "1"])
    assert "1 → 0.5" in row(page, "rounds", "3")
    assert "without z" in row(page, "rounds", "3")
    expect(page.locator("section[aria-labelledby=privacy]")).to_contain_text("nothing bounds")
    assert {urlsplit(url).hostname for url in requested if not url.startswith("data:")} == {"127.0.0.1"}
    page.close()


def test_only_who_has_the_token_reads_it_and_nobody_writes(address: str) -> None:
    root, _, token = address.partition("?token=")
    assert httpx.get(root).status_code == 401
    assert httpx.get(address, follow_redirects=False).status_code == 303
    posted = httpx.post(root, headers={"Authorization": f"Bearer {token}"}, data={"state": "stopped"})
    assert posted.status_code == 405


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, {"width": 800, "height": 900}, PHONE])
def test_nothing_is_cut_or_beside_the_screen_and_everybody_can_read_it(
    browser: Browser, address: str, scheme: str, size: dict[str, int]
) -> None:
    with opened(browser, address, size) as page:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert width(page) <= size["width"]
        assert cut_text(page) == []
        assert violations(page) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
        for heading in page.get_by_role("heading", level=2).all():
            heading.scroll_into_view_if_needed()
            expect(heading).to_be_in_viewport()


def test_every_link_is_reached_by_keyboard(browser: Browser, address: str) -> None:
    with opened(browser, address, PHONE) as page:
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        links = page.locator("nav a")
        for place in range(links.count()):
            page.keyboard.press("Tab")
            expect(links.nth(place)).to_be_focused()
            assert links.nth(place).evaluate("link => getComputedStyle(link).outlineStyle") != "none"
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Privacy")).to_be_in_viewport()


def test_a_round_that_ends_appears_by_itself_and_the_end_of_the_server_is_said(
    browser: Browser, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "REFRESH_SECONDS", 0.2)
    write_run_study(tmp_path, study(tiny_base, tmp_path, ["p", "q"], rounds=3))
    write_rounds(tmp_path, [record(1)])
    with serving_page(RunPage.of(tmp_path).render, "127.0.0.1", free_port(), "ld-server page") as address:
        page = browser.new_page()
        with locked(tmp_path):
            page.goto(address)
            expect(page.locator(".state")).to_have_text("Running: round 2 of 3")
            page.locator("nav a").first.focus()
            append_round(tmp_path, record(2, left_out={"z": "it was not connected"}))
            expect(page.locator(".state")).to_have_text("Running: round 3 of 3")
            expect(page.get_by_role("status")).to_have_text("Running: round 3 of 3")
            expect(page.locator("nav a").first).to_be_focused()
            expect(page.locator("section[aria-labelledby=left-out]")).to_contain_text("it was not connected")
            append_round(tmp_path, RoundRecord(3, ended="2026-01-01T00:03:00+00:00", failure="no site connected"))
            (tmp_path / FAILURE).write_text("too few sites")
        expect(page.locator(".state")).to_have_text("Failed")
        expect(page.locator(".notice").first).to_have_text("Failed: too few sites")
        expect(page.locator("section[aria-labelledby=left-out]")).to_contain_text("no site connected")
        expect(page.locator("#told")).to_contain_text("every 0.2 seconds")
    expect(page.locator("#told")).to_contain_text("has ended")
    assert page.locator("h1").inner_text() == "Study test"
    page.close()


def test_a_damaged_log_is_said_in_place_of_a_page(run: Path, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes((run / "study.json").read_bytes())
    (tmp_path / ROUNDS).write_text("no round\n")
    with serving_page(RunPage.of(tmp_path).render, "127.0.0.1", free_port(), "ld-server page") as address:
        root, _, token = address.partition("?token=")
        answered = httpx.get(root, headers={"Authorization": f"Bearer {token}"})
    assert answered.status_code == 503
    assert ROUNDS in answered.text


def test_a_withholding_study_says_why_there_are_no_losses(tmp_path: Path, tiny_base: Path) -> None:
    config = study(tiny_base, tmp_path, ["p", "q", "r"], secure_aggregation=True, min_train_nodes=3)
    write_run_study(tmp_path, config)
    withheld = {"visits": None, "patients": None, "loss_first": None, "loss_last": None, "seconds": None}
    entry = {**withheld, "update_norm": None, "clipped": None, "uplink_bytes": 64, "drift": None}
    whole = RoundRecord(1, {"p": entry}, counted=True, mean_update_norm=0.25, ended="2026-01-01T00:01:00+00:00")
    write_rounds(tmp_path, [whole])
    text = RunPage.of(tmp_path).render()
    assert "This study withholds the sites&#x27; losses" in text
    assert "mean update: 0.25 in round 1" in text
    assert "hidden in the sum" in text


@pytest.mark.slow
def test_a_deployed_study_shows_who_is_admitted(browser: Browser, tmp_path: Path) -> None:
    deployed = DeployedStudy(tmp_path, "net", BRAIN_MRI)
    deployed.admit("aster")
    deployed.revoke("aster")
    deployed.home.run.mkdir()
    unknown = RoundRecord(1, counted=True, ended="2026-01-01T00:01:00+00:00", unknown_nodes=["SHA256:<b>abc</b>"])
    write_rounds(deployed.home.run, [unknown])
    shown = RunPage.of(deployed.home.path)
    with (
        serving_page(shown.render, "127.0.0.1", free_port(), "ld-server page") as address,
        opened(browser, address) as page,
    ):
        assert "revoked" in row(page, "sites", "aster")
        assert "not admitted yet" in row(page, "sites", "birch")
        expect(page.locator(".notice", has_text="no admitted site")).to_contain_text("SHA256:<b>abc</b>")
        assert violations(page) == []


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_leaves_the_run_alone(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [sys.executable, "-m", "ld_server.cli", "page", str(run), "--port", str(free_port())]
    process = start_command(command)
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line)
    assert address, process.communicate(timeout=20)
    assert "Study test" in httpx.get(address.group(), follow_redirects=True).text
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", "", 0)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_long_run_is_made_quickly_and_read_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"site{number:02}" for number in range(20)]
    write_run_study(tmp_path, study(tiny_base, tmp_path, names, rounds=300))
    entry = record(1).sites["p"]
    write_rounds(tmp_path, [record(1, round=n, sites=dict.fromkeys(names, entry)) for n in range(1, 301)])
    page, reads = RunPage.of(tmp_path), list[Path]()

    def counted(folder: Path) -> list[RoundRecord]:
        reads.append(folder)
        return read_rounds(folder)

    monkeypatch.setattr("ld_server.deployment.watched_run.read_rounds", counted)
    with locked(tmp_path):
        texts = {page.render() for _ in range(3)}
    assert (len(texts), reads) == (1, [tmp_path])
    text = texts.pop()
    assert text.count("<tr") == 50 + 20 + 2
    assert "The 250 rounds before stand in rounds.csv." in text
    assert "20 of 20 sites" in text
    assert "highest of 20" in text
    assert len(text) < 400_000
    assert json.loads((tmp_path / ROUNDS).read_text().splitlines()[-1])["round"] == 300
