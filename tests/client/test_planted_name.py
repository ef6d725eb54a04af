"""A patient's name, planted wherever an error's text or a path may hold it, is in no byte that leaves the site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import ld_client.audit.statistics
from ld_client import client_app as app
from ld_client.data.store_index import INDEX
from ld_client.deployment.audit_log import parse_line
from ld_client.deployment.audit_recorder import AuditRecorder
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.secagg_round import SecaggSiteRound
from ld_client.site_config import load_modality, load_site
from ld_common.core.config import from_mapping
from ld_common.core.errors import LdError
from ld_common.diffusion.training import DivergedError
from ld_common.protocol import messages
from ld_common.protocol.secagg.messages import SecaggSetting, Stage, pack
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import read_release
from ld_server.server_app import run_study
from tests.conftest import PLANTED_ROWS
from tests.simulations.test_secure_federation import Nodes
from tests.support.site_homes import approved, asked, make_home, node_of, task_of, wire_bytes

NAME = "PLANTED-ANNA"
PLANTED = sorted({word for row in PLANTED_ROWS for word in row.split(",")[:2]} | {"PLANTED", "planted", "Planted"})
OPTIONS: dict[str, Any] = {
    "name": "demo",
    "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
    "training": {"steps": 1, "batch_size": 2},
    "federation": {"rounds": 2, "sites": ["aster", "birch", "cedar"], "weighting": "equal", "wait_seconds": 0},
}
SECURE_KINDS = ["query.join", "train", "query.keys", "query.shares", "query.unmask"]
KINDS = [*SECURE_KINDS, "evaluate"]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def planted_yaml(site_yaml: Path, tmp_path: Path) -> Path:
    """The site, with the name in each of its paths, in a column's name and in a word of its table."""
    folder = tmp_path / NAME
    folder.mkdir()
    for name in ("scans", "visits.csv", "site.yaml"):
        shutil.move(str(tmp_path / name), folder / name)
    table = folder / "visits.csv"
    table.write_text(table.read_text().replace("gender", NAME).replace("Female", f"{NAME}-F"))
    text = (folder / "site.yaml").read_text().replace("sex: gender", f"sex: {NAME}").replace("{Female", f"{{{NAME}-F")
    (folder / "site.yaml").write_text(text.replace("store: store", f"store: {NAME}-store"))
    return folder / "site.yaml"


@pytest.fixture
def home(planted_yaml: Path) -> SiteHome:
    return approved(make_home(planted_yaml.parent, planted_yaml, from_mapping(StudyConfig, OPTIONS)))


def content_of(home: SiteHome, kind: str) -> RecordDict:
    """A request that a site would answer, or for a later stage one out of turn."""
    if kind in ("train", "evaluate"):
        return messages.pack_task(task_of(home))
    setting = SecaggSetting(home.study().digest(), 1, 3, 3, 10, 1.0)
    return RecordDict() if kind == "query.join" else messages.pack_secure(pack(setting))


def clean(reply: Message) -> None:
    """No byte of a reply holds what was planted."""
    assert not reply.has_error()
    sent = wire_bytes(reply)
    assert len(sent) > 20
    for word in PLANTED:
        assert word.encode() not in sent
        assert word not in repr(reply.metadata)


def ask(node: Context, home: SiteHome, kind: str) -> Message:
    reply: Message = app.app(asked(content_of(home, kind), kind), node)
    clean(reply)
    return reply


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError(NAME)

    __repr__ = __str__


class UnprintableLdError(LdError):
    def __str__(self) -> str:
        raise RuntimeError(NAME)


class CodedError(LdError):
    code = f"code-of-{NAME}"


class TupleCodeError(LdError):
    code = (NAME,)  # type: ignore[assignment]


class EndError(BaseException):
    """No `Exception`, as some libraries raise."""


def _subclasses(kind: type[LdError]) -> Iterator[type[LdError]]:
    for one in kind.__subclasses__():
        if one.__module__.startswith("ld_"):
            yield one
            yield from _subclasses(one)


def _own(kind: type[LdError]) -> LdError:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{NAME}: '/scans/{NAME}/1.dcm' of {PLANTED[0]}")
    error.__dict__["code"] = NAME  # the class says the code, not somebody's attribute
    return error


def _noted(error: Exception) -> Exception:
    error.add_note(NAME)
    error.__cause__ = ValueError(NAME)
    return error


def _missing_attribute() -> AttributeError:
    try:
        getattr(object(), NAME)
    except AttributeError as error:
        return error
    raise AssertionError


ERRORS: dict[str, Callable[[], BaseException]] = {
    **{kind.__name__: lambda kind=kind: _own(kind) for kind in {LdError, *_subclasses(LdError)}},  # type: ignore[misc]
    "OSError with a path": lambda: FileNotFoundError(2, NAME, f"/scans/{NAME}/1.dcm"),
    "PermissionError": lambda: PermissionError(13, NAME, f"/scans/{NAME}"),
    "ValueError": lambda: ValueError(NAME),
    "RuntimeError": lambda: _noted(RuntimeError(NAME)),
    "KeyError": lambda: KeyError(NAME),
    "AttributeError": _missing_attribute,
    "TypeError": lambda: TypeError(NAME),
    "MemoryError": lambda: MemoryError(NAME),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", NAME.encode(), 0, 1, NAME),
    "ExceptionGroup": lambda: ExceptionGroup(NAME, [ValueError(NAME)]),
    "a class of that name": lambda: type(NAME, (Exception,), {})(NAME),
    "UnprintableError": lambda: UnprintableError(NAME),
    "UnprintableLdError": lambda: UnprintableLdError(NAME),
    "a code": lambda: CodedError(NAME),
    "a code that is no text": lambda: TupleCodeError(NAME),
    "SystemExit": lambda: SystemExit(NAME),
    "GeneratorExit": lambda: GeneratorExit(NAME),
    "no Exception": lambda: EndError(NAME),
}
FOREIGN = {type(make()).__name__ for make in ERRORS.values() if not isinstance(make(), LdError)}
SCORED = messages.TrainResult("aster", 1, {}, None, None, scores={"loss": 1.0, "visits": 5.0})
PLACES: dict[str, list[tuple[Any, str]]] = {
    "query.join": [(app, "handle_join"), (SiteHome, "site"), (messages, "pack_name")],
    "train": [
        (SiteHome, "site"),
        (messages, "unpack_task"),
        (app, "check_approved"),
        (app, "handle_train"),
        (AuditRecorder, "record_training"),
        (AuditRecorder, "sign_result"),
        (messages, "pack_result"),
    ],
    "evaluate": [
        (SiteHome, "site"),
        (messages, "unpack_task"),
        (app, "check_approved"),
        (app, "handle_validate"),
        (AuditRecorder, "sign_result"),
        (messages, "pack_result"),
    ],
    **{
        f"query.{stage.value}": [
            (SecaggSiteRound, "answer"),
            (messages, "unpack_secure"),
            (AuditRecorder, "record_sent_payload"),
        ]
        for stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK)
    },
}


def test_every_error_of_ours_is_tried() -> None:
    assert {"StoreError", "PrivacyError", "ApprovalError", "DivergedError", "AuditError", "ScanRejected"} <= set(ERRORS)
    assert {DivergedError, ld_client.audit.statistics.AuditError} <= set(_subclasses(LdError))
    assert set(PLACES) == set(KINDS)


def tried(place: int, places: int, whole: bool) -> dict[str, Callable[[], BaseException]]:
    """A share of the errors that depends on the place: a kind's places together try them all, `whole` twice or more."""
    stride = min(2 if whole else 5, places)
    return {name: make for number, (name, make) in enumerate(ERRORS.items()) if number % stride == place % stride}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.attack
def test_no_errors_text_leaves_wherever_a_handler_fails(
    planted_yaml: Path, kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secure = {"secure_aggregation": kind == "query.keys"}
    study = from_mapping(StudyConfig, OPTIONS | {"federation": OPTIONS["federation"] | secure})
    home = approved(make_home(planted_yaml.parent, planted_yaml, study))
    node, content, trained = node_of(home), content_of(home, kind), None
    if kind == "train":
        trained = messages.unpack_result(app.app(asked(content, kind), node).content)
    count = 0
    for number, (place, name) in enumerate(PLACES[kind]):
        for what, make in tried(number, len(PLACES[kind]), whole).items():
            count += 1

            def fail(*_: object, make: Callable[[], BaseException] = make, **__: object) -> None:
                raise make()

            with monkeypatch.context() as patched:
                if name in ("sign_result", "pack_result"):
                    patched.setattr(app, "handle_train", lambda *_: trained)  # it need not be trained each time
                    patched.setattr(app, "handle_validate", lambda *_: SCORED)
                patched.setattr(place, name, fail)
                reply = app.app(asked(content, kind), node)
            clean(reply)
            said = messages.unpack_error(reply.content)
            # out of turn, the later stages are refused before they have anything to send
            early = name == "record_sent_payload" and kind != "query.keys"
            expected = "federation" if early else messages.error_code(make())
            assert said == messages.ERROR_SENTENCES[expected], (name, what)
    entries = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
    refused = [entry.details for entry in entries if entry.event == "refused"]
    assert len(refused) == count
    for entry in refused:  # in the site's own log stand our own words alone, and none that may quote a scan
        ours = entry["error"] not in ("ScanError", "ScanRejected", "TableError", *FOREIGN)
        assert ours or NAME not in entry["reason"], entry
    assert verify_home(home).problems == []
    assert NAME not in "".join(capfd.readouterr())


def test_a_person_who_interrupts_ends_the_process_and_tells_nobody_why(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt(NAME)

    monkeypatch.setattr(app, "handle_train", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        app.app(asked(content_of(home, "train"), "train"), node_of(home))
    assert caught.value.args == ()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def _break_index(site: Any) -> None:
    (site.store_path / INDEX).write_bytes(b"no database")


def _break_ledger(site: Any) -> None:
    site.ledger_path.write_bytes(b"no database" * 100)


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "no store": (lambda site: shutil.rmtree(site.store_path), "store"),
    "a store that is a file": (
        lambda site: (shutil.rmtree(site.store_path), site.store_path.write_text(NAME)),
        "store",
    ),
    "a damaged index": (_break_index, "store"),
    "no latents": (lambda site: [file.unlink() for file in site.store_path.glob("cache-*")], "store"),
    "a damaged ledger": (_break_ledger, "privacy"),
    "no modality": (lambda site: Path(site.modality).unlink(), "deployment"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.attack
def test_what_is_broken_at_the_site_leaves_as_a_code(home: SiteHome, kind: str) -> None:
    spoil, code = BROKEN[kind]
    content, node, site = content_of(home, "train"), node_of(home), home.site()
    if kind == "no modality":
        shutil.copy(site.modality, home.path / f"{NAME}.yaml")
        home.config_file.write_text(
            home.config_file.read_text().replace(site.modality, str(home.path / f"{NAME}.yaml"))
        )
        site, code = home.site(), "config"
    spoil(site)
    reply = app.app(asked(content, "train"), node)
    clean(reply)
    assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES[code]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.attack
def test_a_config_that_cannot_be_read_leaves_as_a_code(home: SiteHome, kind: str) -> None:
    content = content_of(home, kind)
    for text in (f"site: {NAME}/../x\n", f"{NAME}: 1\n", f"site: [{NAME}\n", ""):
        home.config_file.write_text(text)
        reply = app.app(asked(content, kind), node_of(home))
        clean(reply)
        assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES["config"], text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.attack
def test_a_node_without_a_site_says_so_by_a_code(home: SiteHome, kind: str) -> None:
    node_configs: list[dict[str, Any]] = [{}, {"site-config": f"/{NAME}.yaml"}, {"home": f"/{NAME}"}, {"home": 3}]
    for node_config in node_configs:
        node = Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})
        reply = ask(node, home, kind)
        expected = "deployment" if "home" in node_config else "config"
        assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES[expected], node_config


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.attack
def test_what_does_leave_names_nobody(planted_yaml: Path, private: bool) -> None:
    privacy = {
        "enabled": private,
        "patients": 10,
        "expected_batch_size": 2,
        "target_delta": 1e-5,
        "augmentation_multiplicity": 1,
    }
    study = from_mapping(StudyConfig, OPTIONS | {"privacy": privacy})
    home = approved(make_home(planted_yaml.parent, planted_yaml, study))
    with home.config_file.open("a") as config:
        config.write("\nheld_out: 0.4\n")
    trained = ask(node_of(home), home, "train")
    assert messages.unpack_result(trained.content).attestation is not None
    scored = ask(node_of(home), home, "evaluate")
    assert (messages.unpack_error(scored.content) is None) != private  # a private study scores nothing
    joined = ask(node_of(home), home, "query.join")
    assert messages.unpack_name(joined.content) == "aster"
    assert b"aster" in wire_bytes(joined)  # else these bytes would hide a name as well
    assert NAME.encode() not in home.audit_log.read_bytes()


class Homes(Nodes):
    """Nodes of deployed sites."""

    def __init__(self, homes: dict[str, SiteHome]) -> None:
        super().__init__({name: home.config_file for name, home in homes.items()})
        self.contexts = {node: node_of(homes[name]) for node, (name, _) in self.sites.items()}
        self.replies: list[Message] = []

    def _reply(self, message: Message) -> Message | None:
        reply = super()._reply(message)
        if reply is not None:
            clean(reply)
            self.replies.append(reply)
        return reply


@pytest.mark.slow
@pytest.mark.attack
def test_a_secure_round_of_deployed_sites_names_nobody_and_is_in_their_logs(
    planted_yaml: Path, tiny_base: Path, tmp_path: Path
) -> None:
    federation = {**OPTIONS["federation"], "rounds": 1, "secure_aggregation": True}
    names = federation["sites"]
    options = OPTIONS | {"federation": federation, "base_model": str(tiny_base), "output": str(tmp_path / "study")}
    study, homes = from_mapping(StudyConfig, options), {}
    for name in names:
        file = planted_yaml.with_name(f"{name}.yaml")
        file.write_text(planted_yaml.read_text().replace("site: aster", f"site: {name}"))
        folder = planted_yaml.parent / name
        folder.mkdir()
        homes[name] = approved(make_home(folder, file, study))
    grid = Homes(homes)
    release = read_release(run_study(grid, study, load_modality(load_site(planted_yaml))))
    assert release.manifest["rounds"][0]["counted"]
    assert {kind for kind, _, _ in grid.sent} == set(SECURE_KINDS)
    for home in homes.values():
        entries = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
        assert verify_home(home).problems == []
        left = {entry.details["kind"]: entry.details for entry in entries if entry.event == "left"}
        assert list(left) == ["join", "keys", "shares", "train", "unmask"]
        assert left["keys"]["payload"]["sealing_key"]["bytes"] == 32
        assert left["train"]["payload"]["vector"]["bytes"] == left["train"]["bytes"]
        assert left["train"]["tensors"] == []
        assert NAME not in json.dumps([entry.details for entry in entries])
