"""`ld-client page` as a data manager uses it, in a browser, at a site that really trained."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from flwr.supercore.task_identity import TaskIdentity
from playwright.sync_api import Browser, Page, expect

from ld_client import client_app as app
from ld_client.data.exclusions import read_exclusions
from ld_client.deployment.approve import withdraw
from ld_client.deployment.audit_log import log_entries
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger, Use
from ld_client.site_config import load_site
from ld_client.site_page import NODE_LOCK, SitePage
from ld_client.site_rounds import sent_bytes, sent_words
from ld_common.core.atomic_files import held
from ld_common.core.config import from_mapping
from ld_common.core.processes import free_port
from ld_common.page.serve import serving_page
from ld_common.protocol import messages
from ld_common.protocol.dp_accounting import Charge, epsilon
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.seen.browser import DESK, PHONE, cut_text, opened, violations, width
from tests.support.commands import start_command
from tests.support.site_homes import approved, asked, index_site, make_home, node_of, task_of

OPTIONS = {
    "name": "memory",
    "adapter": {"rank": 2, "targets": ["to_k", "to_v"]},
    "training": {"steps": 3, "batch_size": 2},
    "federation": {"rounds": 3, "sites": ["aster", "birch"]},
}
CHARGE = Charge(2.0, 0.1, 10)


def row(page: Page, section: str, first: str) -> str:
    """The text of a table's row, by its first cell."""
    rows = page.locator(f"section[aria-labelledby={section}] tbody tr")
    return rows.filter(has=page.get_by_role("rowheader", name=first, exact=True)).inner_text()


@pytest.fixture(scope="module")
def home(site_files: Path, tmp_path_factory: pytest.TempPathFactory) -> SiteHome:
    """A site that trained round 1, refused round 2, and charged an earlier private study."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(site_files, folder, dirs_exist_ok=True)
    site_yaml = folder / "site.yaml"
    text = (folder / "visits.csv").read_text()
    (folder / "visits.csv").write_text(f"{text}PLANTED-DORA,2020-01-01,50,Female,Normal\n")  # without a scan
    made = approved(make_home(folder, site_yaml, from_mapping(StudyConfig, OPTIONS)))
    site = made.site()
    private = Use("earlier", "1" * 64, 1, {"training": CHARGE})
    Ledger(site.ledger_path).charge(private, site.policy.max_epsilon, site.policy.delta)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        for task in (task_of(made), replace(task_of(made), round=2, base_digest="0" * 64)):
            app.app(asked(messages.pack_task(task), "train"), node_of(made))
    return made


@pytest.fixture(scope="module")
def address(home: SiteHome) -> Iterator[str]:
    with serving_page(SitePage(home.site(), home).render, "127.0.0.1", free_port(), "ld-client page") as shown:
        yield shown


def test_the_page_shows_what_ran_what_left_and_what_was_refused(browser: Browser, address: str, home: SiteHome) -> None:
    with opened(browser, address) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text("Site aster")
        expect(page.locator(".state")).to_have_text("Not taking part now")
        expect(page.locator("section[aria-labelledby=overview]")).to_contain_text("memory")
        first, second = row(page, "rounds", "1"), row(page, "rounds", "2")
        (left,) = [entry for entry in log_entries(home.audit_log) if entry.event == "left"]
        assert "update sent" in first
        assert re.search(r"3\s+6\s+\d", first)  # patients, visits, loss
        assert "refused: approval" in second
        what = page.locator("section[aria-labelledby=what-left-the-site]")
        expect(what).to_contain_text(f"adapter of {len(left.details['tensors'])} tensors")
        expect(what).to_contain_text("number of patients, ")
        expect(page.locator("section[aria-labelledby=refusals]")).to_contain_text("is not approved")
        site = home.site()
        spent = epsilon([CHARGE], site.policy.delta)
        meter = page.get_by_role("img", name=re.compile(rf"^ε {spent:.4g} spent of 10 at δ 1e-05"))
        expect(meter).to_be_visible()
        budget = page.locator("section[aria-labelledby=privacy-budget]")
        expect(budget).to_contain_text("Trained without differential privacy, so that no ε bounds what left: memory.")
        expect(budget.get_by_role("rowheader")).to_have_text(["earlier (111111111111)", re.compile("memory")])
        (excluded,) = read_exclusions(site.store_path)
        assert re.search(r"1\s+0", row(page, "excluded-from-training", excluded.reason.value))


@pytest.mark.attack
def test_no_patient_and_no_file_is_named(home: SiteHome) -> None:
    text = SitePage(home.site(), home).render()
    assert not re.search(r"PLANTED|anna|bert|carl|dora|\.dcm|visits\.csv", text, re.IGNORECASE)


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


@pytest.mark.attack
def test_only_who_has_the_token_reads_it_and_nobody_writes(address: str, home: SiteHome) -> None:
    root, _, token = address.partition("?token=")
    assert httpx.get(root).status_code == 401
    assert httpx.post(root, headers={"Authorization": f"Bearer {token}"}, data={"yes": "1"}).status_code == 405
    before = {path: path.stat().st_mtime_ns for path in home.path.rglob("*") if path.is_file()}
    assert httpx.get(root, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert {path: path.stat().st_mtime_ns for path in home.path.rglob("*") if path.is_file()} == before


def test_the_state_follows_the_node_the_approval_and_the_budget(home: SiteHome, tmp_path: Path) -> None:
    copy = SiteHome(tmp_path / "home")
    shutil.copytree(home.path, copy.path)
    page = SitePage(copy.site(), copy)
    with held(copy.path / NODE_LOCK):
        assert "Takes part; round 2 was refused" in page.render()
    assert "Nothing is approved" not in page.render()
    withdraw(copy)
    assert "Nothing is approved, so nothing runs here" in page.render()
    spent = replace(copy.site(), policy=replace(copy.site().policy, max_epsilon=0.5))
    assert "The privacy budget is spent" in SitePage(spent, copy).render()
    assert "chain and signatures are whole" in page.render()
    content = copy.audit_log.read_bytes()
    for altered in (content.replace(b"approval", b"approvaI"), content.replace(b"{", b"[", 1)):
        copy.audit_log.write_bytes(altered)
        assert "The audit log was altered" in page.render()


def test_a_site_without_a_home_shows_its_ledger(site_yaml: Path) -> None:
    site = load_site(site_yaml)
    unindexed = SitePage(site, None).render()
    assert "run ld-client index" in unindexed
    index_site(site)
    Ledger(site.ledger_path).charge(Use("demo", "2" * 64, 4, {"training": None}), 1.0, 1e-5)
    text = SitePage(site, None).render()
    assert "A site without a home" in text
    assert "Rounds that trained here, by the ledger" in text
    assert "no ε bounds what left: demo." in text
    assert "The last index excluded nothing." in text


def test_what_left_under_secure_aggregation_and_a_validation_are_counted(home: SiteHome) -> None:
    (left,) = [entry for entry in log_entries(home.audit_log) if entry.event == "left"]
    shares = {"to": ["birch"], "sealed": [{"bytes": 40, "sha256": "0"}, {"bytes": 2, "sha256": "1"}]}
    stage = replace(left, details={"kind": "shares", "payload": shares})
    assert (sent_bytes(stage), sent_words(stage)) == (42, "secure aggregation, stage shares")
    scores = replace(left, details={"kind": "evaluate", "scores": {"visits": 5.0, "loss": 0.1}, "bytes": 0})
    assert (sent_bytes(scores), sent_words(scores)) == (16, "scores on held-out patients: loss, visits")
    masked_details = {"kind": "train", "payload": {}, "tensors": [], "numbers": None, "bytes": 9}
    owned = replace(left, details={**masked_details, "own": [{"name": "a"}, {"name": "b"}]})
    assert sent_words(owned) == "one masked vector; 2 tensors of this site's own, for the release; no counts or losses"
    masked = replace(left, details=masked_details)
    assert (sent_bytes(masked), sent_words(masked)) == (9, "one masked vector; no counts or losses")


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(home: SiteHome) -> None:
    command = [sys.executable, "-m", "ld_client.cli", "page", "--home", str(home.path), "--port", str(free_port())]
    process = start_command(command)
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline())
    assert address, process.communicate(timeout=20)
    assert "Site aster" in httpx.get(address.group(), follow_redirects=True).text
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", "", 0)


def test_a_page_without_a_home_or_config_is_one_line() -> None:
    command = [sys.executable, "-m", "ld_client.cli", "page"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: give --home HOME or --config FILE, exactly one of them\n"
