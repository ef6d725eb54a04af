"""`ld-generate serve` as a researcher uses it, in a browser that notes whom the page speaks to."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, LdError, RequestError
from ld_common.diffusion.base_model import BaseModel, base_digest, load_denoiser
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import ScanRefused
from ld_common.imaging.scan_reader import read_scan
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release, ReleaseContent, load_release_base, read_release, write_release
from ld_generate.cli import main
from ld_generate.web import drawing, layout
from ld_generate.web.appearance import message
from ld_generate.web.drawing import EditForm, draw
from ld_generate.web.scans import find_examples, one_scan
from ld_generate.web.server import MOST_BYTES, is_loopback, serving
from tests.conftest import random_state, write_mr_slice

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOPBACK = ("127.0.0.1", "localhost")
SHOWN = {"age": "74", "sex": "F", "diagnosis": "CN"}


def write_scan(path: Path, **elements: Any) -> Path:
    pixels = np.zeros((110, 100), np.uint16)
    pixels[20:90, 20:80] = np.random.default_rng(0).integers(300, 900, (70, 60))
    return write_mr_slice(path, pixels, PatientName="Secret^Name", **elements)


@pytest.fixture(scope="module")
def release(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Release:
    asked = {"base_model": str(tiny_base), "adapter": {"rank": 2}, "edit": {"steps": 4}}
    study = from_mapping(StudyConfig, asked)
    adapted = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 0.1)
    folder = tmp_path_factory.mktemp("release")
    return read_release(write_release(folder, study, brain_mri, ReleaseContent(base_digest(str(tiny_base)), state)))


@pytest.fixture(scope="module")
def model(release: Release) -> BaseModel:
    return load_release_base(release)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, brain_mri: Modality) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("examples")
    write_scan(folder / "one/series/a.dcm", PatientAge="074Y", PatientSex="F")
    write_scan(folder / "two/series/a.dcm")
    return find_examples(folder, brain_mri)


@pytest.fixture(scope="module")
def reached() -> Iterator[list[str]]:
    """Whom this process connects to."""
    hosts: list[str] = []
    plain = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        hosts.append(address[0])
        plain(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield hosts


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def address(model: BaseModel, release: Release, examples: dict[str, Path], reached: list[str]) -> Iterator[str]:
    with serving(model, release, examples, "127.0.0.1", free_port()) as opened:
        yield opened


@pytest.fixture(scope="module")
def requested() -> list[str]:
    """Whom the browser asked."""
    return []


@pytest.fixture(scope="module")
def page(address: str, requested: list[str]) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to drive the page")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1440, "height": 900})
        opened.on("request", lambda request: requested.append(request.url))
        opened.goto(address)
        yield opened
        browser.close()


def pick(page: Page, number: int) -> None:
    page.locator("#example input").click()
    page.get_by_role("option").nth(number).click()
    expect(page.locator(".preview img")).to_be_visible()


def test_an_example_is_edited_and_downloaded_and_nobody_else_is_asked(
    page: Page, requested: list[str], reached: list[str], tmp_path: Path
) -> None:
    pick(page, 0)
    age = page.locator("#shows-age :is(input, textarea)")
    expect(age).to_have_value("74")
    expect(age).to_be_disabled()
    expect(page.locator("#wanted-age input[type=number]")).to_have_value("74")
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("what the file does not: diagnosis")
    page.locator("#shows-diagnosis label", has_text="healthy").click()
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("nothing should be different yet")
    page.locator("#wanted-diagnosis label", has_text="Alzheimer").click()
    page.locator("#draw").click()
    expect(page.locator(".caption")).to_contain_text("diagnosis healthy → Alzheimer's disease", timeout=30_000)
    expect(page.locator("#answer .picture img")).to_have_count(4)
    expect(page.locator("#areas")).to_contain_text("ventricles, mm²")
    assert page.locator(".message.error").count() == 0
    with page.expect_download() as download:
        page.locator("#dicom").click()
    download.value.save_as(tmp_path / "answer.dcm")
    synthetic = pydicom.dcmread(tmp_path / "answer.dcm")
    assert (synthetic.SyntheticData, synthetic.Rows, synthetic.Columns) == ("YES", 110, 100)
    page.mouse.wheel(0, 5000)
    expect(page.locator("#notice")).to_be_in_viewport()
    expect(page.locator("#notice")).to_contain_text("Not for diagnosis")
    assert {urlsplit(url).hostname for url in requested if not url.startswith(("data:", "blob:"))} <= set(LOOPBACK)
    assert set(reached) <= set(LOOPBACK)


def test_what_is_no_scan_is_one_line_and_the_page_goes_on(
    page: Page, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pick(page, 0)
    text = tmp_path / "secret.dcm"
    text.write_text("Anna Example")
    page.locator("#files input[type=file]").set_input_files(text)
    line = page.locator(".message.error")
    expect(line).to_contain_text("'secret.dcm'")
    assert "/" not in line.inner_text()
    expect(page.locator(".preview img")).to_be_hidden()
    pick(page, 1)
    assert page.locator(".message.error").count() == 0
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_more_than_may_be_dropped_is_refused_and_the_page_goes_on(page: Page, address: str, tmp_path: Path) -> None:
    large = tmp_path / "large.dcm"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 2**20)
    page.locator("#files input[type=file]").set_input_files(large)
    expect(page.get_by_text("exceed")).to_be_visible()
    with large.open("rb") as file:  # a client that does not ask beforehand
        assert httpx.post(f"{address}gradio_api/upload", files={"files": file}, timeout=60).status_code == 413
    pick(page, 1)


def arguments(files: list[Any], age: int) -> list[Any]:
    """What `/draw` takes, in the order of the page."""
    words = [SHOWN["diagnosis"], SHOWN["sex"]]
    how = [0.0, "belm", 2.0, 1.0, 0]
    return [files, None, None, False, SHOWN["age"], *words, age, *words, *how, "no", None, None, None]


def test_ten_requests_at_once_are_all_answered(address: str, tmp_path: Path) -> None:
    client = Client(address, verbose=False, download_files=False)
    scan = handle_file(write_scan(tmp_path / "scan.dcm"))
    ages = range(80, 90)
    jobs = [client.submit(*arguments([scan], age), api_name="/draw") for age in ages]
    told = [" ".join(str(part) for part in job.result(timeout=60)) for job in jobs]
    assert all(f"age 74 → {age} years" in line for age, line in zip(ages, told, strict=True))
    client.close()


def test_what_was_dropped_is_deleted_after_a_while_and_at_the_end(
    model: BaseModel, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "KEPT_SECONDS", 1)
    monkeypatch.setattr(layout, "SWEEP_SECONDS", 1)
    with serving(model, release, {}, "127.0.0.1", free_port()) as opened:
        (first,) = upload(opened, b"first")
        assert first.exists()
        while first.exists():
            time.sleep(0.1)
        (second,) = upload(opened, b"second")
    assert not second.parent.parent.exists()


def upload(address: str, content: bytes) -> list[Path]:
    answered = httpx.post(f"{address}gradio_api/upload", files={"files": ("scan.dcm", content)})
    return [Path(path) for path in answered.json()]


def wish(**changes: Any) -> EditForm:
    how: dict[str, Any] = {"drift": 0.0, "method": "belm", "strength": 2.0, "depth": 1.0, "seed": 0}
    return EditForm(**({"shows": SHOWN, "wanted": SHOWN | {"age": 80.0}} | how | changes))


def test_a_volume_comes_back_as_one_with_a_trajectory_and_the_seed_that_was_asked_for(
    model: BaseModel, release: Release, tmp_path: Path
) -> None:
    volume = np.random.default_rng(1).random((40, 50, 9)).astype(np.float32)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([3.0, 3.0, 8.0, 1.0])), path)
    shares: list[float] = []
    asked = wish(trajectory="age=60:90:15", seed=7, drift=0.1)
    drawn = draw(model, release, path, asked, tmp_path / "out", shares.append)
    assert (drawn.title, shares[-1]) == ("age 74 → 80 years", 1.0)
    assert nibabel.load(drawn.nifti).shape[2] == 1  # type: ignore[arg-type]
    assert [row[0] for row in drawn.trajectory[3:]] == ["counterfactual"] * 3
    record = json.loads(drawn.record.read_text())
    assert (record["seeds"], record["counterfactuals"][0]["drift"]) == ([7], 0.1)
    with zipfile.ZipFile(drawn.archive) as archive:
        assert {drawn.dicom.name, "record.json", "trajectory_age.gif"} <= set(archive.namelist())
    assert set(drawn.areas) == {"ventricles"}


def test_without_a_scale_nothing_is_measured(model: BaseModel, release: Release, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (60, 50)).astype(np.uint8)).save(tmp_path / "scan.png")
    drawn = draw(model, release, tmp_path / "scan.png", wish(), tmp_path / "out", lambda share: None)
    assert (drawn.areas, drawn.nifti) == ({}, None)


def test_what_the_record_warns_of_is_shown_as_text(
    model: BaseModel, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = drawing.answer

    def warned(*asked: Any) -> list[Path]:
        files = plain(*asked)
        record = json.loads(files[-1].read_text())
        files[-1].write_text(json.dumps(record | {"warnings": ["contrast < usual"]}))
        return files

    monkeypatch.setattr(drawing, "answer", warned)
    drawn = draw(model, release, write_scan(tmp_path / "scan.dcm"), wish(), tmp_path / "out", lambda share: None)
    assert drawn.warnings == ["contrast < usual"]
    assert "contrast &lt; usual" in message("warning", drawn.warnings[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wanted": SHOWN | {"age": 74.4}}, "nothing should be different"),
        ({"shows": SHOWN | {"age": ""}}, "what the file does not: age"),
        ({"shows": SHOWN | {"age": "abc"}}, "age=abc"),
        ({"wanted": SHOWN | {"age": 180.0}}, "18 to 100 years"),
        ({"trajectory": "age=90:60:5"}, "0 values"),
        ({"method": "none"}, "method is 'none'"),
    ],
)
def test_a_wish_that_cannot_be_drawn_is_named(
    model: BaseModel, release: Release, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    scan = write_scan(tmp_path / "scan.dcm")
    with pytest.raises(LdError, match=words):
        draw(model, release, scan, wish(**changes), tmp_path / "out", lambda share: None)


def test_a_series_may_be_dropped_as_its_files_or_as_an_archive(brain_mri: Modality, tmp_path: Path) -> None:
    files = [
        write_mr_slice(
            tmp_path / f"series/{number}.dcm",
            np.random.default_rng(number).integers(0, 900, (24, 20)).astype(np.uint16),
            ImagePositionPatient=[0, 0, 5.0 * number],
        )
        for number in range(3)
    ]
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for file in files:
            archive.write(file, f"../{file.name}")
    middle = read_scan(tmp_path / "series", brain_mri).pixels
    for number, dropped in enumerate((files, [tmp_path / "scan.zip"])):
        (tmp_path / str(number)).mkdir()
        assert (read_scan(one_scan(dropped, tmp_path / str(number)), brain_mri).pixels == middle).all()
    (tmp_path / "bad.zip").write_bytes((tmp_path / "scan.zip").read_bytes()[:-30])
    with pytest.raises(ScanRefused, match="unreadable"):
        one_scan([tmp_path / "bad.zip"], tmp_path)
    with pytest.raises(RequestError, match="drop one"):
        one_scan([], tmp_path)
    with pytest.raises(RequestError, match="drop it again"):
        one_scan([tmp_path / "swept.dcm"], tmp_path)


def test_examples_are_named_by_what_tells_them_apart(examples: dict[str, Path], tmp_path: Path) -> None:
    assert set(examples) == {"one", "two"}
    with pytest.raises(ConfigError, match="holds no scan"):
        find_examples(tmp_path, Modality(prompt="a scan"))


def test_another_name_that_leads_to_loopback_is_not_answered(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    for name, status in ((f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200), (f"rebound.example:{port}", 400)):
        assert httpx.get(address, headers={"Host": name}).status_code == status


def test_only_loopback_is_taken_for_private() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.1.2", "box")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_without_gradio_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["ld-generate", "serve", "--release", "r"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert "pip install" in said
