"""`ld-client check` names what is wrong and ends soon; `ld-client dry-run` leaves no trace but its line in the log."""

from __future__ import annotations

import datetime
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from ld_client.cli import app as client
from ld_client.deployment.approve import withdraw
from ld_client.deployment.audit_log import AuditLog, parse_line
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.check import check_home
from ld_client.deployment.check_result import CheckResult
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import TRAINING, Ledger, Use
from ld_common.core.config import from_mapping
from ld_common.core.errors import PolicyError, PrivacyError
from ld_common.protocol.dp_accounting import Charge
from ld_common.protocol.keys import new_elliptic_key
from ld_common.protocol.study_config import StudyConfig
from ld_server.deployment.certificates import certify_server, certify_site, make_authority, pem
from tests.support.site_homes import approved, make_home

AUTHORITY_KEY, AUTHORITY_CERTIFICATE = make_authority("demo")
OPEN: dict[str, Any] = {
    "name": "demo",
    "adapter": {"rank": 1, "targets": ["to_k"]},
    "training": {"steps": 2, "batch_size": 2},
    "federation": {"rounds": 2, "sites": ["aster", "birch", "cedar"], "weighting": "equal"},
}
PRIVATE = OPEN | {
    "privacy": {
        "enabled": True,
        "patients": 10,
        "expected_batch_size": 2,
        "target_delta": 1e-5,
        "augmentation_multiplicity": 1,
    }
}


@contextmanager
def serving(
    folder: Path, *, hosts: tuple[str, ...] = ("localhost",), days: float = 400, ahead: float = 0, own: bool = True
) -> Iterator[str]:
    """A server as the study's gate is one, with a certificate and a clock of choice; yields `host:port`."""
    key = ec.generate_private_key(ec.SECP384R1())
    authority_key, authority = (AUTHORITY_KEY, AUTHORITY_CERTIFICATE) if own else make_authority("another")
    certificate = certify_server(authority_key, authority, key.public_key(), list(hosts), days)
    file = folder / "server.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pem(certificate))

    class Gate(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead)

        def log_message(self, format: str, *arguments: object) -> None: ...

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent(drip: bytes = b"") -> Iterator[str]:
    """A server that takes connections and says nothing, or one byte again and again."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                    while drip:
                        connections[-1].sendall(drip)
                        time.sleep(0.2)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"localhost:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


def home_at(folder: Path, site_yaml: Path, server: str, options: dict[str, Any] = OPEN) -> SiteHome:
    """A site that is ready."""
    study = from_mapping(StudyConfig, options)
    home = approved(make_home(folder, site_yaml, study, server, pem(AUTHORITY_CERTIFICATE)))
    certify(home, home.key("certificate").public_key())
    return home


def certify(home: SiteHome, key: Any, site: str = "aster", days: float = 400, own: bool = True) -> None:
    authority_key, authority = (AUTHORITY_KEY, AUTHORITY_CERTIFICATE) if own else make_authority("another")
    home.certificate.write_bytes(pem(certify_site(authority_key, authority, key, site, days)))


def change(home: SiteHome, **values: Any) -> None:
    """Replace values of the site's config; a mapping adds to the one that is there."""
    content = yaml.safe_load(home.config_file.read_text())
    for name, value in values.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    home.config_file.write_text(yaml.safe_dump(content))


def by_name(findings: list[CheckResult]) -> dict[str, CheckResult]:
    assert len({one.name for one in findings}) == len(findings)
    return {one.name: one for one in findings}


def failures(home: SiteHome) -> dict[str, str]:
    """What failed: name -> what was said and the remedy."""
    findings = check_home(home)
    assert all(one.remedy for one in findings if one.status != "ok")
    return {one.name: f"{one.detail}; {one.remedy}" for one in findings if one.status == "failed"}


@pytest.mark.slow
def test_a_site_that_is_ready_has_nothing_failed(site_yaml: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        home = home_at(tmp_path, site_yaml, server)
        found = by_name(check_home(home))
        assert {name for name, one in found.items() if one.status == "failed"} == set()
        assert set(found) == {
            *("kit", "key", "certificate", "server", "server certificate", "clock", "config", "disk", "base model"),
            *("memory", "modality", "index", "pairs", "ages", "policy", "budget", "approval", "audit log"),
        }
        assert "SHA256:" in found["kit"].detail
        assert "3 patients with 6 visits" in found["index"].detail
        assert "0 patients held out" in found["index"].detail
        assert found["pairs"].detail.startswith("2 patients")
        assert found["ages"].detail.startswith("6 of 6 visits")
        outcome = CliRunner().invoke(client, ["check", "--home", str(home.path), "--json"])
        assert outcome.exit_code == 0, outcome.output
        listed = json.loads(outcome.stdout)
        assert {entry["name"]: entry["status"] for entry in listed} == {name: one.status for name, one in found.items()}
        withdraw(home)
        outcome = CliRunner().invoke(client, ["check", "--home", str(home.path)])
        assert outcome.exit_code == 1
        assert "failed" in outcome.output


def _spoil_kit(home: SiteHome) -> None:
    (home.kit_folder / "study.yaml").write_text("name: other\n")


def _open_key(home: SiteHome) -> None:
    home.key_file("signing").chmod(0o644)


SPOILED: dict[str, tuple[Callable[[SiteHome], object], str, str]] = {
    "kit": (_spoil_kit, "kit", "study.yaml"),
    "open key": (_open_key, "key", "others may read the key"),
    "no key": (lambda home: home.key_file("signing").unlink(), "key", "cannot read the key"),
    "foreign certificate": (
        lambda home: certify(home, home.key("certificate").public_key(), own=False),
        "certificate",
        "site.crt",
    ),
    "certificate of another key": (
        lambda home: certify(home, new_elliptic_key().public_key()),
        "certificate",
        "certificate.key",
    ),
    "certificate of another site": (
        lambda home: certify(home, home.key("certificate").public_key(), "birch"),
        "certificate",
        "the certificate of 'birch'",
    ),
    "certificate run out": (
        lambda home: certify(home, home.key("certificate").public_key(), days=-2),
        "certificate",
        "expired",
    ),
    "no certificate": (lambda home: home.certificate.write_bytes(b"?"), "certificate", "site.crt"),
    "another site's config": (lambda home: change(home, site="birch"), "config", "is of site 'birch'"),
    "unknown key in config": (lambda home: change(home, polcy={}), "config", "polcy"),
    "no base": (lambda home: change(home, base_model="/nowhere"), "base model", "'/nowhere'"),
    "no GPU": (lambda home: change(home, device="cuda"), "GPU", "set device: cpu"),
    "no store": (lambda home: change(home, store="/nowhere/store"), "index", "/nowhere/store"),
    "few patients": (lambda home: change(home, policy={"min_patients": 4}), "index", "policy.min_patients"),
    "too many steps": (lambda home: change(home, policy={"max_steps": 1}), "policy", "training.steps=2"),
    "too many rounds": (lambda home: change(home, policy={"max_rounds": 1}), "policy", "federation.rounds=2"),
    "not approved": (withdraw, "approval", "ld-client approve --home"),
    "cut log": (lambda home: home.audit_log.write_bytes(b""), "audit log", "ld-client audit verify"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPOILED)
def test_each_thing_that_is_wrong_is_named_with_its_remedy(site_yaml: Path, tmp_path: Path, kind: str) -> None:
    spoil, name, words = SPOILED[kind]
    home = home_at(tmp_path, site_yaml, "localhost:1")
    AuditLog.of(home).append("asked", {})
    if kind == next(iter(SPOILED)):  # the same home each time: one look at it unspoilt is enough
        assert set(failures(home)) <= {"server", "GPU"}  # nobody listens on port 1
    spoil(home)
    after = failures(home)
    assert name in after
    assert words in after[name]


def test_doubts_are_warnings_and_do_not_fail(site_yaml: Path, tmp_path: Path) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1")
    certify(home, home.key("certificate").public_key(), days=3)
    now = datetime.datetime.now()
    begin, end = now + datetime.timedelta(hours=2), now + datetime.timedelta(hours=3)
    change(home, policy={"hours": f"{begin:%H:%M}-{end:%H:%M}", "max_memory_gb": 0.00001})
    found = by_name(check_home(home))
    for name, words in (
        ("certificate", "days"),
        ("hours", "policy.hours"),
        ("memory", "this base"),
    ):
        assert found[name].status == "warning"
        assert words in found[name].detail
    home.certificate.unlink()
    assert by_name(check_home(home))["certificate"].status == "warning"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hosts": ("elsewhere.example", "10.1.2.3")}, "elsewhere.example, 10.1.2.3, not for localhost"),
        ({"days": -1}, "expired"),
        ({"own": False}, "authority"),
    ],
)
@pytest.mark.attack
def test_a_server_that_is_not_the_studys_is_not_believed(
    site_yaml: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with serving(tmp_path, **options) as server:
        found = by_name(check_home(home_at(tmp_path, site_yaml, server)))
    assert found["server"].status == "ok"
    assert found["server certificate"].status == "failed"
    assert words in found["server certificate"].detail
    assert "clock" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ahead", "status"),
    [(0, "ok"), (-3.5, "warning"), (-8, "failed"), (200, "warning"), (308, "failed"), (30, "ok")],
)
def test_a_clock_that_flower_would_refuse_is_found(site_yaml: Path, tmp_path: Path, ahead: float, status: str) -> None:
    with serving(tmp_path, ahead=ahead) as server:
        found = by_name(check_home(home_at(tmp_path, site_yaml, server)))
    assert found["clock"].status == status, found["clock"].detail


@pytest.mark.slow
@pytest.mark.parametrize("drip", [b"\x16", pytest.param(b"", marks=pytest.mark.slow)])
@pytest.mark.attack
def test_a_server_that_says_nothing_holds_nobody_up(site_yaml: Path, tmp_path: Path, drip: bytes) -> None:
    with silent(drip) as server:
        home = home_at(tmp_path, site_yaml, server)
        started = time.monotonic()
        found = by_name(check_home(home))
        assert time.monotonic() - started < 30
    assert found["server certificate"].status == "failed"


def test_a_server_that_is_not_there_is_said_at_once(site_yaml: Path, tmp_path: Path) -> None:
    found = by_name(check_home(home_at(tmp_path, site_yaml, "localhost:1")))
    assert found["server"].status == "failed"
    assert "localhost:1" in found["server"].detail


@pytest.mark.slow
def test_the_budget_is_compared_with_what_the_study_costs(site_yaml: Path, tmp_path: Path) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1", PRIVATE)
    assert by_name(check_home(home))["budget"].status == "ok"
    change(home, policy={"max_epsilon": 7.9})
    found = by_name(check_home(home))["budget"]
    assert found.status == "warning"
    change(home, policy={"max_epsilon": 1.0})
    assert "policy.max_epsilon" in failures(home)["budget"]


def contents(folder: Path) -> dict[str, str]:
    """Each file and its hash."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [OPEN, PRIVATE, OPEN | {"federation": {**OPEN["federation"], "secure_aggregation": True}}]
)
def test_a_dry_run_says_what_would_leave_and_leaves_no_trace(
    site_yaml: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1", options)
    now = datetime.datetime.now()
    begin, end = now + datetime.timedelta(hours=2), now + datetime.timedelta(hours=3)
    change(home, policy={"hours": f"{begin:%H:%M}-{end:%H:%M}"})  # by day, of a study that runs by night
    site = home.site()
    Ledger(site.ledger_path).charge(Use("other", "0" * 64, 1, {TRAINING: Charge(5.0, 0.1, 1)}), 10.0, 1e-5)
    before = contents(site.store_path)
    withdraw(home)  # nothing leaves, so nothing needs to be approved
    outcome = CliRunner().invoke(client, ["dry-run", "--home", str(home.path)], catch_exceptions=False)
    said = outcome.output
    assert outcome.exit_code == 0
    assert contents(site.store_path) == before
    assert len(Ledger(site.ledger_path).entries()) == 1
    assert "round 1 of 2 at aster: 2 steps in" in said
    assert "unet." in said
    assert "drift float32 [4, 1, 1], 16 bytes" in said
    private, secure = "privacy" in options, "secure_aggregation" in options["federation"]
    assert ("loss: not computed" in said) == private
    assert ("3 patients" in said) == (not private and not secure)
    assert ("one masked vector of" in said) == secure
    assert ("it stays here" in said) == secure
    last = parse_line(home.audit_log.read_bytes().splitlines()[-1])
    assert (last.event, last.details["sent"], last.details["charged"]) == ("dry-run", False, False)
    assert verify_home(home).problems == []


@pytest.mark.slow
def test_a_dry_run_refuses_what_a_round_would(site_yaml: Path, tmp_path: Path) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1", PRIVATE)
    site = home.site()
    Ledger(site.ledger_path).charge(Use("other", "0" * 64, 1, {TRAINING: Charge(0.9, 0.5, 30)}), 100.0, 1e-5)
    runner = CliRunner()
    with pytest.raises(PrivacyError, match="above this site's limit"):
        runner.invoke(client, ["dry-run", "--home", str(home.path)], catch_exceptions=False)
    change(home, policy={"max_epsilon": 100.0, "max_memory_gb": 0.01})
    with pytest.raises(PolicyError, match="max_memory_gb"):
        runner.invoke(client, ["dry-run", "--home", str(home.path)], catch_exceptions=False)
    assert len(Ledger(site.ledger_path).entries()) == 1


def test_what_needs_the_base_does_not_repeat_that_there_is_none(site_yaml: Path, tmp_path: Path) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1")
    change(home, base_model="/nowhere")
    found = by_name(check_home(home))
    assert found["base model"].status == "failed"
    for name in ("memory", "policy"):
        assert (found[name].status, found[name].detail) == ("warning", "not checked: it needs the base model")


def test_who_approves_or_withdraws_is_in_the_log(site_yaml: Path, tmp_path: Path) -> None:
    home = home_at(tmp_path, site_yaml, "localhost:1")
    runner = CliRunner()
    for option in ("--yes", "--withdraw"):
        assert runner.invoke(client, ["approve", "--home", str(home.path), option]).exit_code == 0
    *_, allowed, ended = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
    assert (allowed.event, ended.event) == ("approved", "withdrawn")
    assert allowed.details["study"] == home.study().digest()
    assert allowed.details["bundle"] == home.kit().bundle_digest
    assert verify_home(home).problems == []
