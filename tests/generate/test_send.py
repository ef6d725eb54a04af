"""Synthetic DICOM files go to a PACS, and no other file does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from ld_common.core.command import run_cli
from ld_common.core.errors import RequestError
from ld_common.imaging.dicomweb import PacsService, result_text
from ld_common.imaging.dicomweb_options import PASSWORD, PacsOptions
from ld_common.imaging.secondary_capture import Provenance, write_synthetic_dicom
from ld_generate.cli import cli
from ld_generate.sending import send_files, synthetic_files
from tests.support.fake_pacs import FakePacs, Handler, fake_pacs
from tests.support.orthanc import PASSWORD as ORTHANC_PASSWORD
from tests.support.orthanc import USER, running_orthanc
from tests.support.releases import SOURCE, GenerateRunner, write_scan

Send = Callable[..., tuple[int, str]]


@pytest.fixture
def pacs() -> Iterator[FakePacs]:
    with fake_pacs() as service:
        yield service


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with two synthetic files, as commands write them."""
    for number in range(2):
        folder = tmp_path / "results" / f"scan-{number}"
        folder.mkdir(parents=True)
        pixels = np.full((16, 12), number, np.float32)
        write_synthetic_dicom(folder / "age-80.dcm", pixels, (1.0, 1.0), "age 80", Provenance("m", "0" * 64, 0, "r"))
        (folder / "record.json").write_text("{}")
    return tmp_path / "results"


@pytest.fixture
def send(capsys: pytest.CaptureFixture[str]) -> Send:
    """Runs `ld-generate send`; returns the exit code and what both streams hold."""

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run_cli(cli, ["send", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


def test_every_synthetic_file_of_a_folder_is_sent(pacs: FakePacs, results: Path, send: Send) -> None:
    code, text = send(results, pacs.url)
    assert code == 0, text
    assert "sent 2 of 2" in text
    assert len({dataset.SOPInstanceUID for dataset in pacs.stored}) == 2
    assert all(dataset.SyntheticData == "YES" and dataset.PixelData for dataset in pacs.stored)
    code, text = send(results, pacs.url, "--json")
    files = json.loads(text[text.index("{") :])["files"]
    assert [file["problem"] for file in files] == ["", ""]


@pytest.mark.parametrize("flag", [None, "NO", ""])
def test_nothing_is_sent_where_one_file_may_be_a_patients(
    flag: str | None, pacs: FakePacs, results: Path, send: Send
) -> None:
    write_scan(results / "scan-1" / "original.DCM", SyntheticData=flag)
    code, text = send(results, pacs.url)
    assert code == 2
    assert "SyntheticData (0008,001C) is not YES" in text
    assert not pacs.requests


def test_a_file_that_is_swapped_before_it_is_sent_is_not_sent(
    pacs: FakePacs, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = synthetic_files(results)
    monkeypatch.setattr("ld_generate.sending.check_synthetic", lambda _: None)
    write_scan(files[0])
    with pytest.raises(RequestError, match="SyntheticData"):
        send_files(files, PacsOptions().access(pacs.url))
    assert not pacs.stored


def test_a_folder_without_dicom_is_refused(pacs: FakePacs, tmp_path: Path, send: Send) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no DICOM file" in send(tmp_path / "empty", pacs.url)[1]
    assert "there is no folder" in send(tmp_path / "absent", pacs.url)[1]
    (tmp_path / "empty" / "x.dcm").write_bytes(b"no DICOM")
    assert "no DICOM file that can be read" in send(tmp_path / "empty", pacs.url)[1]
    assert not pacs.requests


FAILED = b'{"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [43264]}}]}}'


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda handler: handler.reply(409, "application/dicom+json", b"{}"), "refuses the object (HTTP 409)"),
        (lambda handler: handler.reply(403, "text/plain", b""), "does not allow this user"),
        (lambda handler: handler.reply(202, "application/dicom+json", FAILED), "failure reason 43264"),
        (lambda handler: handler.reply(200, "text/html", b"<html>thanks</html>"), "does not confirm"),
        (lambda handler: handler.reply(200, "application/dicom+json", b"[1]"), "does not answer as DICOMweb"),
        (lambda handler: handler.reply(200, "application/dicom+xml", b"<x"), "does not answer as DICOMweb"),
        (lambda handler: handler.reply(307, "text/plain", b"", Location="http://other.example/"), "redirects"),
    ],
)
def test_a_refused_file_is_a_line_and_the_other_is_sent(
    answer: Callable[[Handler], None], words: str, pacs: FakePacs, results: Path, send: Send
) -> None:
    refused = str(dcmread(results / "scan-0/age-80.dcm").SOPInstanceUID)

    def lie(handler: Handler) -> None:
        if handler.sent().SOPInstanceUID == refused:
            answer(handler)
        else:
            pacs.stored.append(handler.sent())
            handler.reply(200, "text/plain", b"stored")  # in no form that is known, so it is searched for

    pacs.lies["POST"] = lie
    pacs.files = [results / "scan-1/age-80.dcm"]  # what a search finds
    code, text = send(results, pacs.url)
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("not sent: ")]
    assert words in line
    assert "scan-0" in line
    assert "sent 1 of 2" in text
    assert len(pacs.stored) == 1


@pytest.mark.slow
def test_what_edit_sweep_and_batch_wrote_is_sent(
    pacs: FakePacs, run: GenerateRunner, scan: Path, tmp_path: Path
) -> None:
    table = tmp_path / "scans.csv"
    table.write_text(f'input,target,source\n{scan.name},age=80;age=84,"{SOURCE}"\n')
    edit = ["--input", scan, "--source", SOURCE]
    for number, (command, count) in enumerate(
        ((["edit", *edit, "--target", "age=80"], 1), (["sweep", "age=70:80:10", *edit], 2), (["batch", table], 2))
    ):
        pacs.stored.clear()
        code, text = run(*command, "--out", tmp_path / f"out-{number}", "--send", pacs.url)
        assert code == 0, text
        assert f"sent {count} of {count} synthetic DICOM files" in text
        assert len(pacs.stored) == count
        assert all("SECRET" not in str(dataset) for dataset in pacs.stored)


def test_json_stays_json_and_a_refusal_is_the_exit_code(
    pacs: FakePacs, run: GenerateRunner, scan: Path, tmp_path: Path
) -> None:
    pacs.lies["POST"] = lambda handler: handler.reply(403, "text/plain", b"")
    arguments = ["--input", scan, "--source", SOURCE, "--target", "age=80", "--out", tmp_path / "out", "--json"]
    code, out, err = run.streams("edit", *arguments, "--send", pacs.url)
    assert code == 1
    assert json.loads(out)["results"]
    assert "sent 0 of 1" in err
    assert list((tmp_path / "out").rglob("*.dcm"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--send", "http://pacs.example/dicom-web"], "clear text"),
        (["--send", "https://pacs.example", "--user", "anna"], PASSWORD),
        (["--send", "https://pacs.example", "--ca", "absent.pem"], "not a file"),
        (["--user", "anna"], "--send URL"),
    ],
)
def test_a_mistake_costs_no_drawing(
    arguments: list[str],
    words: str,
    run: GenerateRunner,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    code, text = run("edit", "--input", scan, "--target", "age=80", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pacs_roundtrip_of_a_synthetic_answer(
    run: GenerateRunner, send: Send, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is stored in a real PACS by STOW-RS, found by QIDO-RS and retrieved by WADO-RS."""
    monkeypatch.setenv(PASSWORD, ORTHANC_PASSWORD)
    with running_orthanc(tmp_path / "orthanc") as orthanc:
        edit = ["--input", scan, "--source", SOURCE, "--target", "age=80", "--out", tmp_path / "out"]
        code, text = run("edit", *edit, "--send", orthanc.url, "--user", USER)
        assert code == 0, text
        (written,) = (tmp_path / "out").rglob("*.dcm")
        answer = dcmread(written)
        with PacsService(PacsOptions(user=USER).access(orthanc.url)) as pacs:
            (series,) = pacs.search_series({"PatientID": answer.PatientID, "StudyInstanceUID": answer.StudyInstanceUID})
            assert result_text(series, "SeriesInstanceUID") == answer.SeriesInstanceUID
            uids = answer.StudyInstanceUID, answer.SeriesInstanceUID
            assert pacs.instance_uids(*uids) == [answer.SOPInstanceUID]
            copies = [dcmread(tmp_path / "copy") for _ in pacs.retrieve(*uids, "", tmp_path / "copy")]
        assert copies == [answer]
        assert copies[0].SyntheticData == "YES"
        assert send(tmp_path / "out", orthanc.url, "--user", USER)[0] == 0  # again
        assert len(orthanc.ask("/instances")) == 1
        assert "does not accept the login" in send(tmp_path / "out", orthanc.url)[1]
