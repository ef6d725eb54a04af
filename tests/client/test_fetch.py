"""`ld-client fetch`: from a real PACS, and from services that lie."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import ipaddress
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom import dcmread
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from ld_client.cli import app
from ld_client.data.store import open_store
from ld_client.pacs.query import mismatch, read_query, value_matches
from ld_common.core.errors import ConfigError, LdError
from ld_common.imaging import dicomweb
from ld_common.imaging.dicomweb_errors import PacsError
from ld_common.imaging.dicomweb_multipart import split_parts
from ld_common.imaging.dicomweb_options import PASSWORD, PacsOptions, check_address
from tests.conftest import PLANTED_ROWS, write_visit
from tests.support.fake_pacs import FakePacs, Handler, fake_pacs, multipart, part
from tests.support.orthanc import PASSWORD as ORTHANC_PASSWORD
from tests.support.orthanc import USER, Orthanc, running_orthanc, tls_front


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Two series of three images."""
    root = tmp_path / "scans_of_pacs"
    first = write_visit(root, "PLANTED-ANNA", "2019-03-04", SeriesDescription="sag T1 mprage")
    return first + write_visit(root, "PLANTED-BERT", "2018-07-09", SeriesDescription="T2 flair")


@pytest.fixture
def pacs(scans: list[Path]) -> Iterator[FakePacs]:
    with fake_pacs(scans) as service:
        yield service


class Fetched:
    """A run of `ld-client fetch`."""

    def __init__(self, arguments: list[str], out: Path) -> None:
        result = CliRunner().invoke(app, ["fetch", "--out", str(out), *arguments])
        self.code, self.text, self.error = result.exit_code, result.output, result.exception
        if isinstance(self.error, SystemExit):
            self.error = None
        assert self.error is None or isinstance(self.error, LdError), result.exc_info
        self.out = out

    @property
    def images(self) -> list[Path]:
        """Whole series only, as ld-client index sees them."""
        paths = [path for path in self.out.rglob("*.dcm") if ".fetch" not in path.parts]
        return sorted(paths)


@pytest.fixture
def fetch(pacs: FakePacs, tmp_path: Path) -> Callable[..., Fetched]:
    """Fetches all series of the fake PACS, or what arguments say."""

    def run(*arguments: str) -> Fetched:
        query = [] if "--query" in arguments else ["--query", "Modality=MR"]
        return Fetched(["--pacs", pacs.url, *query, "--timeout", "2", *arguments], tmp_path / "quarantine")

    return run


def series_of(file: Path) -> str:
    return str(dcmread(file).SeriesInstanceUID)


def test_a_fetch_brings_every_byte_and_names_no_patient(
    pacs: FakePacs, fetch: Callable[..., Fetched], scans: list[Path]
) -> None:
    done = fetch()
    assert done.code == 0, done.text
    assert sorted(path.read_bytes() for path in done.images) == sorted(path.read_bytes() for path in scans)
    assert all((path.stat().st_mode & 0o777) in (0o600, 0o644) for path in done.images)
    paths = " ".join(str(path.relative_to(done.out)) for path in done.out.rglob("*"))
    manifests = " ".join(path.read_text() for path in done.out.rglob("*.json"))
    for planted in ("PLANTED", "Family", "2019", "1.2.826"):
        assert planted not in paths
    assert "PLANTED" not in manifests + done.text
    assert "3 of 3 images" in done.text
    assert "data.root=" in done.text


def test_a_whole_series_is_not_fetched_again(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    fetch()
    pacs.requests.clear()
    done = fetch()
    assert done.code == 0
    assert "2 series already here" in done.text
    assert not pacs.asked("/series/[0-9.]+")


def test_a_series_that_has_grown_is_completed(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    late = pacs.files.pop()
    assert len(fetch().images) == 5
    pacs.files.append(late)
    pacs.requests.clear()
    assert len(fetch().images) == 6
    assert len(pacs.asked("/instances/")) == 1


def test_a_stopped_fetch_continues_with_what_is_missing(
    pacs: FakePacs, fetch: Callable[..., Fetched], scans: list[Path]
) -> None:
    pacs.lies["GET .*/series/[0-9.]+$"] = lambda handler: handler.reply_objects(
        [file.read_bytes() for file in scans if series_of(file) in handler.path], end=False
    )
    broken = fetch()
    assert broken.code == 1
    assert broken.images == []  # ld-client index never sees half a series
    assert broken.text.count("2 of 3 images") == 2
    pacs.lies.clear()
    pacs.requests.clear()
    whole = fetch()
    assert whole.code == 0, whole.text
    assert len(whole.images) == 6
    assert len(pacs.asked("/instances/[0-9.]+$")) == 2  # the third of each


def test_an_interrupted_last_step_costs_no_transfer(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    done = fetch()
    for manifest in done.out.rglob("*.json"):
        manifest.write_text("{")  # as if the machine had stopped before it was written
    pacs.requests.clear()
    assert len(fetch().images) == 6
    assert not pacs.asked("/instances/[0-9.]+$")


def test_a_lost_file_is_fetched_again(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    fetch().images[0].unlink()
    pacs.requests.clear()
    assert len(fetch().images) == 6
    assert len(pacs.asked("/instances/[0-9.]+$")) == 1


def test_list_counts_and_transfers_nothing(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    done = fetch("--list", "--json")
    assert json.loads(done.text[done.text.index("{") :]) == {
        "studies": 2,
        "series": 2,
        "groups": [
            {"modality": "MR", "description": name, "studies": 1, "series": 1, "images": 3}
            for name in ("T2 flair", "sag T1 mprage")
        ],
    }
    assert not done.out.exists()
    assert not pacs.asked("/series/")
    assert "sag T1 mprage" in fetch("--list").text


def test_json_has_a_line_for_each_series(fetch: Callable[..., Fetched]) -> None:
    done = fetch("--json", "--query", "PatientID=PLANTED-ANNA")
    (entry,) = json.loads(done.text[done.text.index("{") :])["series"]
    assert (entry["outcome"], entry["images"], entry["announced"], entry["problem"]) == ("fetched", 3, 3, "")


def test_what_the_query_does_not_name_is_not_asked_for(
    pacs: FakePacs, fetch: Callable[..., Fetched], scans: list[Path]
) -> None:
    """The fake PACS heeds no filter."""
    done = fetch(
        "--query", "StudyDate=20190101-", "--query", "ModalitiesInStudy=MR", "--query", "SeriesDescription=*t1*"
    )
    assert len(done.images) == 3
    assert not pacs.asked(f"/series/{series_of(scans[-1])}")
    assert "ignored: another StudyDate" in done.text
    (asked,) = pacs.asked("/studies[?].*offset=0")
    assert "StudyDate=20190101-" in asked
    (asked,) = pacs.asked("/series[?].*offset=0")
    assert "SeriesDescription=*t1*" in asked
    unknown = fetch("--query", "BodyPartExamined=HEAD")
    assert isinstance(unknown.error, PacsError)
    assert "cannot search by it" in unknown.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda handler: handler.reply(200, "text/html", b"<html>log in</html>"), "text/html in place of DICOM"),
        (lambda handler: handler.reply(302, "text/html", b"", Location="http://other.example/"), "redirects"),
        (lambda handler: handler.reply(500, "text/plain", b"\x1b[2J"), "HTTP 500"),
        (lambda handler: handler.reply_objects([b"MZ" * 1000]), "not DICOM"),
        (lambda handler: handler.reply_objects([b"", b""]), "not DICOM"),
        (lambda handler: handler.reply_objects([]), "0 of 3 images"),
        (lambda handler: handler.reply_objects([_other_series(handler)]), "another series"),
        (lambda handler: handler.reply_objects([_with_sop(handler, "../../../../etc/passwd")]), "UID is none"),
        (lambda handler: handler.reply_objects([_with_sop(handler, f"1.2.{n}") for n in range(9)]), "announced"),
        (lambda handler: handler.reply(200, "application/dicom", b"x" * 200), "not DICOM"),
        (lambda handler: handler.reply(200, multipart(), b"x" * 200), "ends in its middle"),
        (lambda handler: handler.reply(200, multipart(), b"--the-boundary\r\n" + b"x" * 10**5), "no header"),
        (lambda handler: handler.reply(200, "multipart/related; boundary=", b""), "in place of DICOM"),
        (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "connection"),
        (lambda handler: time.sleep(2.5), "in time"),
        (lambda handler: _drip(handler), "too slowly"),
        (lambda handler: _endless(handler), "more than the"),
        (lambda handler: _short(handler), "it broke"),
        (lambda handler: _endless_preamble(handler), "does not begin"),
        (lambda handler: _same_again(handler), "announced"),
        (lambda handler: _compressed(handler), "more than the"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_lie_is_one_line_and_the_other_series_comes(
    lie: Callable[[Handler], None],
    words: str,
    pacs: FakePacs,
    fetch: Callable[..., Fetched],
    scans: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("ld_common.imaging.dicomweb", "ld_client.pacs.fetcher"):
        monkeypatch.setattr(f"{module}.MAX_FILE_BYTES", 2**20)
    monkeypatch.setattr(dicomweb, "SLOWEST_BYTES_PER_S", 10**6)
    before = {path for path in tmp_path.rglob("*") if "quarantine" not in path.parts}
    pacs.lies[f"GET .*/series/{series_of(scans[0])}$"] = lie
    done = fetch("--timeout", "1")
    assert done.code == 1
    assert len(done.images) == 3
    (line,) = [line for line in done.text.splitlines() if line.startswith("failed: ")]
    assert words in line
    assert "\x1b" not in done.text
    assert "1 series failed, 1 series fetched" in done.text
    outside = {path for path in tmp_path.rglob("*") if "quarantine" not in path.parts}
    assert outside == before
    names = {path.name for path in (tmp_path / "quarantine").rglob("*") if path.suffix not in (".json", "")}
    assert all(name in ("incoming.part",) or len(name) == 36 for name in names)


def _other_series(handler: Handler) -> bytes:
    return next(file.read_bytes() for file in handler.pacs.files if series_of(file) not in handler.path)


def _with_sop(handler: Handler, uid: str) -> bytes:
    file = next(file for file in handler.pacs.files if series_of(file) in handler.path)
    copy = file.with_name("lie.tmp")
    dataset = dcmread(file)
    dataset.SOPInstanceUID = uid
    dataset.save_as(copy)
    content = copy.read_bytes()
    copy.unlink()
    return content


def _drip(handler: Handler) -> None:
    handler.start(multipart())
    for sign in part(b"x" * 1000).strip()[:40]:
        try:
            handler.wfile.write(bytes([sign]))
        except OSError:
            return
        time.sleep(0.1)


def _endless(handler: Handler) -> None:
    handler.start(multipart())
    try:
        handler.wfile.write(part(b"").removeprefix(b"\r\n"))
        for _ in range(2000):
            handler.wfile.write(b"x" * 2**16)
    except OSError:
        return
    raise AssertionError("it was read to its end")


def _endless_preamble(handler: Handler) -> None:
    handler.start(multipart())
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"x" * 2**16)


def _same_again(handler: Handler) -> None:
    object_of_series = _with_sop(handler, "1.2.3")
    handler.start(multipart())
    handler.wfile.write(part(b"")[2:-4] + b"\r\n\r\n" + object_of_series)
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(part(object_of_series))


def _compressed(handler: Handler) -> None:
    body = part(b"x" * 2**23).strip()
    handler.reply(200, multipart(), gzip.compress(body, 1), Content_Encoding="gzip")


def _short(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", multipart())
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(part(b"x").strip())
    handler.close_connection = True


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "does not answer as DICOMweb"),
        (b'"text"', "does not answer as DICOMweb"),
        (b"[[]]", "does not answer as DICOMweb"),
        (b"[" * 10**5, "does not answer as DICOMweb"),
        (b"\xff\xfe", "does not answer as DICOMweb"),
        (b"[" + b"1," * 2**23 + b"1]", "more than the"),
        (b"[]", "no series that matches"),
        (b'[{"0020000D": 1, "0020000E": {"Value": "x"}}]', "no series that matches"),
        (b"", "no series that matches"),
    ],
)
def test_a_search_that_is_answered_with_nonsense_is_one_error(
    answer: bytes, words: str, pacs: FakePacs, fetch: Callable[..., Fetched]
) -> None:
    pacs.lies["GET "] = lambda handler: handler.reply(200, "application/dicom+json", answer)
    done = fetch()
    assert isinstance(done.error, PacsError)
    assert words in str(done.error)


@pytest.mark.parametrize("uid", ["../../etc", "1.2/../../x", "1.2?x=1", "", "1.2@other.example", "x" * 4000])
def test_a_path_in_place_of_a_uid_is_ignored(uid: str, pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    def lie(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lying = [{**result, "0020000E": {"vr": "UI", "Value": [uid]}} for result in results[:1]]
        return lying + results[1:]

    pacs.alter = lie
    done = fetch()
    assert done.code == 0
    assert len(done.images) == 3
    assert "no valid UID" in done.text
    assert not pacs.asked("etc|other[.]example")


def test_a_description_cannot_write_to_the_terminal(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    def lie(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**result, "0008103E": {"vr": "LO", "Value": ["\x1b[2J[red]\n"]}} for result in results]

    pacs.alter = lie
    for arguments in ([], ["--list"]):
        text = fetch(*arguments).text
        assert "\\x1b" in text
        assert "\x1b" not in text


def test_a_pacs_that_stops_is_not_asked_for_every_series(
    pacs: FakePacs, fetch: Callable[..., Fetched], tmp_path: Path
) -> None:
    for day in range(1, 5):
        pacs.files += write_visit(tmp_path / "more", "PLANTED-CARL", f"2020-01-0{day}")
    pacs.lies["GET .*/series/[0-9.]+$"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    done = fetch()
    assert done.code == 1
    assert "3 series failed, 3 series not tried" in done.text
    assert not done.images


def test_a_busy_pacs_is_asked_again(pacs: FakePacs, fetch: Callable[..., Fetched]) -> None:
    busy = iter([1, 1])

    def lie(handler: Handler) -> None:
        if next(busy, 0):
            handler.reply(503, "text/plain", b"", Retry_After="86400")
        else:
            handler._get()

    pacs.lies["GET .*/series/[0-9.]+$"] = lie
    assert len(fetch().images) == 6


def test_two_fetches_do_not_share_a_folder(fetch: Callable[..., Fetched], tmp_path: Path) -> None:
    from ld_common.core.atomic_files import held

    (tmp_path / "quarantine/.fetch").mkdir(parents=True)
    with held(tmp_path / "quarantine/.fetch/lock"):
        assert "another fetch" in str(fetch().error)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://pacs.example/dicom-web", "clear text"),
        ("http://127.0.0.1.example/dicom-web", "clear text"),
        ("https://user:secret@pacs.example/", "--user NAME"),
        ("ftp://pacs.example", "is not an address"),
        ("pacs.example/dicom-web", "is not an address"),
        ("https://pacs.example/?x=1", "is not an address"),
        ("https://pacs.example:port/", "is not an address"),
        ("https://", "is not an address"),
    ],
)
def test_an_address_that_would_show_patients_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_address(url)
    assert "secret" not in str(refused.value)


def test_an_address_on_this_machine_may_be_plain() -> None:
    for url in ("http://localhost:8042/dicom-web/", "http://[::1]:8042", "http://127.0.0.1"):
        assert check_address(url) == url.rstrip("/")


def test_a_password_comes_from_a_private_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = "https://pacs.example", tmp_path / "password"
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(ConfigError, match=PASSWORD):
        PacsOptions(user="anna").access(url)
    monkeypatch.setenv(PASSWORD, "of the environment")
    access = PacsOptions(user="anna").access(url)
    assert access.login == ("anna", "of the environment")
    assert "of the environment" not in repr(access)
    file.write_text("of the file\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        PacsOptions(user="anna", password_file=file).access(url)
    file.chmod(0o600)
    assert PacsOptions(user="anna", password_file=file).access(url).login == ("anna", "of the file")
    for content in ("", "two\nlines\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="one line"):
            PacsOptions(user="anna", password_file=file).access(url)
    for wrong in ({"password_file": file}, {"cert": file}, {"ca": tmp_path}, {"user": "a:b"}, {"timeout": 0}):
        with pytest.raises(ConfigError):
            PacsOptions(**wrong)  # type: ignore[arg-type]


def test_no_proxy_and_no_netrc_are_used(
    fetch: Callable[..., Fetched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b")
    assert len(fetch().images) == 6


def test_no_connection_is_one_error(fetch: Callable[..., Fetched]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = fetch("--pacs", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "no connection" in str(done.error)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SeriesDescripton=x", "SeriesDescription"),
        ("Modality", "ATTRIBUTE=VALUE"),
        ("Modality=", "ATTRIBUTE=VALUE"),
        ("SOPInstanceUID=1.2", "studies and series"),
        ("RequestAttributesSequence=x", "plain value"),
        ("00091001=x", "no DICOM attribute"),
    ],
)
def test_a_wrong_query_is_refused_before_the_pacs_is_asked(
    query: str, words: str, pacs: FakePacs, fetch: Callable[..., Fetched]
) -> None:
    assert words in str(fetch("--query", query).error)
    assert not pacs.requests


def test_queries_are_split_by_level() -> None:
    query = read_query(["00080060=MR", "StudyDate=2019-", "SeriesDescription=*"])
    assert query.of_study == {"StudyDate": "2019-"}
    assert query.of_series == {"Modality": "MR", "SeriesDescription": "*"}
    with pytest.raises(ConfigError, match="twice"):
        read_query(["Modality=MR", "00080060=CT"])
    with pytest.raises(ConfigError, match="missing"):
        read_query([])


@pytest.mark.parametrize(
    ("vr", "pattern", "value", "matches"),
    [
        ("LO", "*T1*", "sag t1 mprage", True),
        ("LO", "T1", "sag T1", False),
        ("LO", "T?", "T2", True),
        ("LO", "[T]1", "T1", False),
        ("LO", "a.b", "axb", False),
        ("DA", "20150101-20201231", "20201231", True),
        ("DA", "20150101-20201231", "20210101", False),
        ("DA", "-2015", "20151231", True),
        ("DA", "20150101-", "", False),
        ("DA", "20150101", "20150101", True),
        ("UI", "1.2,1.3", "1.3", True),
        ("UI", "1.*", "1.3", False),
        ("PN", "müller^*", "Müller^Anna^^", True),
    ],
)
def test_values_match_as_in_a_search(vr: str, pattern: str, value: str, matches: bool) -> None:
    assert value_matches(vr, pattern, value) is matches


def test_one_of_several_modalities_suffices() -> None:
    result = {"00080061": {"vr": "CS", "Value": ["CT", "MR"]}}
    assert mismatch(result, {"ModalitiesInStudy": "MR"}) == ""
    assert mismatch(result, {"ModalitiesInStudy": "PT"}) == "another ModalitiesInStudy"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_parts_do_not_depend_on_how_they_arrive(size: int) -> None:
    parts = [b"", b"a\r\n--bound", b"\r\n\r\n--x", bytes(range(256))]
    body = b"preamble" + b"".join(part(content) for content in parts) + b"\r\n--the-boundary--\r\nepilogue"
    chunks = (body[start : start + size] for start in range(0, len(body), size))
    found, current = [], b""
    for piece in split_parts(chunks, b"the-boundary"):
        if piece is None:
            found.append(current)
            current = b""
        else:
            current += piece
    assert found == parts


# with a real PACS


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


def password_file(folder: Path, password: str = ORTHANC_PASSWORD) -> str:
    path = folder / "password"
    path.write_text(password)
    path.chmod(0o600)
    return str(path)


@pytest.mark.slow
def test_pacs_roundtrip_from_orthanc_to_a_store(orthanc: Orthanc, site_yaml: Path, tmp_path: Path) -> None:
    """Scans of a PACS are fetched into the store's quarantine, and ld-client index reads them there."""
    scans = site_yaml.parent / "scans"
    orthanc.clear()
    for row in PLANTED_ROWS:
        patient, date = row.split(",")[:2]
        study = generate_uid(entropy_srcs=[patient, date])
        for number, description in enumerate(("scout", "sag T1 mprage"), start=1):
            series = {"StudyInstanceUID": study, "SeriesDescription": description, "SeriesNumber": number}
            orthanc.add(write_visit(tmp_path / description, patient, date, **series))
    for file in scans.rglob("*.dcm"):
        file.unlink()
    login = ["--user", USER, "--password-file", password_file(tmp_path)]
    command = ["fetch", "--config", str(site_yaml), "--pacs", orthanc.url, *login, "--query", "ModalitiesInStudy=MR"]
    listed = CliRunner().invoke(app, [*command, "--list", "--query", "StudyDate=20190101-20201231"])
    assert "3 studies, 6 series, 18 images" in listed.output, listed.output
    command += ["--query", "SeriesDescription=sag T1*"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "6 series fetched" in done.output
    quarantine = site_yaml.parent / "store/quarantine"
    assert len(list(quarantine.glob("*/*.dcm"))) == 18
    again = CliRunner().invoke(app, command)
    assert "6 series already here" in again.output
    indexed = CliRunner().invoke(
        app, ["index", "--config", str(site_yaml), f"data.root={quarantine}", "data.burned_in_text_checked=['*']"]
    )
    assert indexed.exit_code == 0, indexed.output
    store = open_store(site_yaml.parent / "store")
    assert (store.patients, len(store.days)) == (3, 6)
    assert len(list(quarantine.glob("*/*.dcm"))) == 18


@pytest.mark.slow
def test_orthanc_refuses_a_wrong_password(orthanc: Orthanc, tmp_path: Path) -> None:
    arguments = ["--pacs", orthanc.url, "--query", "Modality=MR"]
    wrong = Fetched([*arguments, "--user", USER, "--password-file", password_file(tmp_path, "x")], tmp_path / "out")
    for done in (wrong, Fetched(arguments, tmp_path / "out")):
        assert "does not accept the login" in str(done.error)
        assert not done.images


class Authority:
    """A certificate authority of the tests, and what it signed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self._name, self._key, [], is_authority=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Files of a certificate for 127.0.0.1 and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, addresses)
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, names: list[Any], is_authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )
        if is_authority:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.mark.slow
def test_certificates_of_both_sides_are_checked(orthanc: Orthanc, scans: list[Path], tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "hospital"), Authority(tmp_path, "stranger")
    server, client, other = authority.issue("pacs"), authority.issue("site"), stranger.issue("site-of-stranger")
    orthanc.clear()
    orthanc.add(scans)
    with tls_front(orthanc.port, server, authority.file) as port:
        url = f"https://127.0.0.1:{port}/dicom-web"
        login = ["--user", USER, "--password-file", password_file(tmp_path)]
        arguments = ["--pacs", url, "--query", "Modality=MR", *login]
        ours = ["--cert", str(client[0]), "--key", str(client[1])]
        theirs = ["--cert", str(other[0]), "--key", str(other[1])]
        for wrong in (
            ours,  # an authority that is not a public one
            [*ours, "--ca", str(stranger.file)],
            ["--ca", str(authority.file)],
            ["--ca", str(authority.file), *theirs],
            ["--ca", str(authority.file), "--cert", str(client[0]), "--key", str(other[1])],
        ):
            done = Fetched([*arguments, *wrong], tmp_path / "out")
            assert "no TLS" in str(done.error) or "no connection" in str(done.error), wrong
        done = Fetched([*arguments, *ours, "--ca", str(authority.file)], tmp_path / "out")
        assert done.code == 0, done.text
        assert len(done.images) == 6
