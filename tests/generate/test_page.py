"""`ld-generate serve` as a researcher uses it, in a browser that notes whom the page speaks to."""

from __future__ import annotations

import json
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ld_common.core.errors import ConfigError, LdError, RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from ld_common.page.token import is_loopback
from ld_common.release.release import Release, read_release
from ld_generate.cli import main
from ld_generate.web import drawing
from ld_generate.web.drawing import EditForm, draw
from ld_generate.web.scans import Example, find_examples, one_scan
from ld_simulations.benchmarks.seen.browser import PHONE, cut_text, opened, violations, width
from tests.conftest import write_mr_slice
from tests.support.releases import write_scan

LOOPBACK = ("127.0.0.1", "localhost")
SOURCE_VALUES: dict[str, Any] = {"age": "74", "sex": "F", "diagnosis": "CN"}


@pytest.fixture(scope="module")
def loaded(release: Path) -> Release:
    return read_release(release)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, brain_mri: Modality) -> dict[str, Example]:
    folder = tmp_path_factory.mktemp("examples")
    write_scan(folder / "one/series/a.dcm", PatientAge="074Y", PatientSex="F")
    write_scan(folder / "two/series/a.dcm")
    write_scan(folder / "three/series/a.dcm", PatientAge="074Y", PatientSex="F")
    rows = "input,age,sex,diagnosis\ntwo/series,71,M,AD\nthree/series,75,,CN\nfour/series,50,M,CN\n"
    (folder / "scans.csv").write_text(rows)
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


def serving(*arguments: Any) -> AbstractContextManager[str]:
    """The page's server; gradio takes seconds to import, which a worker without these tests need not spend."""
    from ld_generate.web import server

    return server.serving(*arguments)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def address(model: BaseModel, loaded: Release, examples: dict[str, Example], reached: list[str]) -> Iterator[str]:
    with serving(model, loaded, examples, "127.0.0.1", free_port()) as opened:
        yield opened


@pytest.fixture(scope="module")
def requested() -> list[str]:
    """Whom the browser asked."""
    return []


@pytest.fixture(scope="module")
def page(browser: Browser, address: str, requested: list[str]) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()


def choose(page: Page, number: int) -> None:
    page.locator("#example input").click()
    page.get_by_role("option").nth(number).click()
    page.locator("#example input").blur()


def pick(page: Page, number: int) -> None:
    """Choose an example that can be read."""
    choose(page, number)
    expect(page.locator(".preview img")).to_be_visible(timeout=30_000)  # the first scan starts the decoder


@pytest.mark.slow
def test_an_example_is_edited_and_downloaded_and_nobody_else_is_asked(
    page: Page, requested: list[str], reached: list[str], tmp_path: Path
) -> None:
    pick(page, 0)
    age = page.locator("#source-age :is(input, textarea)")
    expect(age).to_have_value("74")
    expect(age).to_be_disabled()
    expect(page.locator("#target-age input[type=number]")).to_have_value("74")
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("diagnosis")
    page.locator("#source-diagnosis label", has_text="healthy").click()
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("nothing changes yet")
    page.locator("#target-diagnosis label", has_text="Alzheimer").click()
    page.locator("#draw").click()
    expect(page.locator(".caption")).to_contain_text("diagnosis healthy → Alzheimer's disease", timeout=30_000)
    expect(page.locator("#answer .picture img")).to_have_count(4)
    page.wait_for_function("[...document.querySelectorAll('#answer .picture img')].every(image => image.naturalWidth)")
    expect(page.locator("#biomarkers")).to_contain_text("ventricles, mm²")
    for ending in ("png", "pdf"):
        expect(page.locator(f"#card-{ending}")).to_be_enabled(timeout=30_000)
    with page.expect_download() as download:
        page.locator("#card-pdf").click()
    assert Path(download.value.path()).read_bytes().startswith(b"%PDF")
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


@pytest.mark.slow
def test_a_table_of_the_examples_fills_in_what_the_files_do_not_say(page: Page) -> None:
    pick(page, 2)
    expect(page.locator("#source-age :is(input, textarea)")).to_have_value("71")
    expect(page.locator("#source-age :is(input, textarea)")).to_be_enabled()
    expect(page.locator("#source-diagnosis input:checked")).to_have_value("AD")
    expect(page.locator("#target-diagnosis input:checked")).to_have_value("AD")
    pick(page, 1)  # its file says 74, and nothing of the diagnosis
    expect(page.locator(".message.warning")).to_have_text("age is 74 in the scan's file and 75 in scans.csv")
    expect(page.locator("#source-age :is(input, textarea)")).to_have_value("74")
    expect(page.locator("#source-diagnosis input:checked")).to_have_value("CN")
    pick(page, 0)  # not in the table
    expect(page.locator("#source-diagnosis input:checked")).to_have_count(0)
    assert page.locator(".message.warning").count() == 0


def test_a_table_of_the_examples_with_an_impossible_value_is_refused(tmp_path: Path, brain_mri: Modality) -> None:
    write_scan(tmp_path / "one/a.dcm")
    (tmp_path / "scans.csv").write_text("input,sex\none,X\n")
    with pytest.raises(ConfigError, match=r"row 1: .*sex"):
        find_examples(tmp_path, brain_mri)


def test_a_jpeg_is_an_example(tmp_path: Path, brain_mri: Modality) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.JPG", "JPEG")
    assert [example.path for example in find_examples(tmp_path, brain_mri).values()] == [tmp_path / "a.JPG"]


@pytest.mark.slow
def test_empty_numbers_stay_empty(page: Page) -> None:
    """A number that nobody gave is none: not slice 0, and no sweep from 0."""
    page.get_by_text("About the file").click()
    page.get_by_text("Sweep", exact=True).click()
    names = ("slice", "sweep-from", "sweep-to", "sweep-of")
    fields = [page.locator(f"#{name} :is(input, textarea)") for name in names]
    for field in fields:
        expect(field).to_be_visible()
        expect(field).to_have_value("")
    fields[0].fill("one")
    choose(page, 0)
    expect(page.locator(".message.error")).to_contain_text("slice is 'one'")
    expect(page.locator(".preview img")).to_be_hidden()
    fields[0].fill("")
    pick(page, 0)
    expect(fields[0]).to_have_value("")
    assert page.locator(".message.error").count() == 0


@pytest.mark.slow
def test_on_a_phone_the_answer_comes_into_view_and_nothing_is_beside_the_screen(browser: Browser, address: str) -> None:
    with opened(browser, address, PHONE) as page:
        assert width(page) <= PHONE["width"]
        pick(page, 2)
        page.locator("#target-diagnosis label", has_text="healthy").click()
        page.locator("#draw").click()
        expect(page.locator(".caption")).to_contain_text("Alzheimer's disease → healthy", timeout=30_000)
        expect(page.locator("#answer .caption")).to_be_in_viewport(timeout=10_000)
        assert width(page) <= PHONE["width"]
        assert cut_text(page) == []


@pytest.mark.slow
def test_the_page_has_no_accessibility_violation(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        pick(page, 2)
        assert violations(page) == []
        page.locator("#target-diagnosis label", has_text="healthy").click()
        page.locator("#draw").click()
        expect(page.locator("#card-pdf")).to_be_enabled(timeout=30_000)
        assert violations(page) == []
        assert cut_text(page) == []


def reach(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


@pytest.mark.slow
def test_an_answer_is_drawn_by_keyboard_alone(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        reach(page, "#example input")
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        expect(page.locator(".preview img")).to_be_visible(timeout=30_000)
        reach(page, "#target-age input[type=number]")
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("84")
        reach(page, "#draw")
        shown = page.locator("#draw").evaluate("button => getComputedStyle(button).outlineStyle")
        shadow = page.locator("#draw").evaluate("button => getComputedStyle(button).boxShadow")
        assert shown != "none" or shadow != "none"  # one sees where the focus is
        page.keyboard.press("Enter")
        expect(page.locator(".caption")).to_contain_text("→ 84 years", timeout=30_000)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.attack
def test_more_than_may_be_dropped_is_refused_and_the_page_goes_on(page: Page, address: str, tmp_path: Path) -> None:
    from ld_generate.web.server import MAX_UPLOAD_BYTES

    large = tmp_path / "large.dcm"
    with large.open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 2**20)
    page.locator("#files input[type=file]").set_input_files(large)
    expect(page.get_by_text("exceed")).to_be_visible()
    with large.open("rb") as file:  # a client that does not ask beforehand
        assert httpx.post(**upload_to(address), files={"files": file}, timeout=60).status_code == 413
    pick(page, 1)


def arguments(files: list[Any], age: int) -> list[Any]:
    """What `/draw` takes, in the order of the page."""
    words = [SOURCE_VALUES["diagnosis"], SOURCE_VALUES["sex"]]
    how = [0.0, "belm", 2.0, 1.0, 0]
    earlier: list[Any] = [[], ""]
    return [files, None, None, False, SOURCE_VALUES["age"], *words, age, *words, *earlier, *how, "no", None, None, None]


@pytest.mark.slow
def test_ten_requests_at_once_are_all_answered(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    headers = upload_to(address)["headers"]
    client = Client(address.partition("?")[0], headers=headers, verbose=False, download_files=False)
    scan = handle_file(write_scan(tmp_path / "scan.dcm"))
    ages = range(80, 90)
    jobs = [client.submit(*arguments([scan], age), api_name="/draw") for age in ages]
    told = [" ".join(str(part) for part in job.result(timeout=60)) for job in jobs]
    assert all(f"age 74 → {age} years" in line for age, line in zip(ages, told, strict=True))
    client.close()


@pytest.mark.slow
def test_what_was_dropped_is_deleted_after_a_while_and_at_the_end(
    model: BaseModel, loaded: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ld_generate.web import layout

    monkeypatch.setattr(layout, "FILE_LIFETIME_SECONDS", 1)
    monkeypatch.setattr(layout, "SWEEP_SECONDS", 1)
    with serving(model, loaded, {}, "127.0.0.1", free_port()) as opened:
        (first,) = upload(opened, b"first")
        assert first.exists()
        while first.exists():
            time.sleep(0.1)
        (second,) = upload(opened, b"second")
    assert not second.parent.parent.exists()


def upload_to(address: str) -> dict[str, Any]:
    """Where a program sends a file, with the token of the page's address."""
    root, _, token = address.partition("?token=")
    return {"url": f"{root}gradio_api/upload", "headers": {"Authorization": f"Bearer {token}"}}


def upload(address: str, content: bytes) -> list[Path]:
    answered = httpx.post(**upload_to(address), files={"files": ("scan.dcm", content)})
    return [Path(path) for path in answered.json()]


def edit_form(**changes: Any) -> EditForm:
    options = {"delta": 0.0, "editor": "belm", "guidance_scale": 2.0, "noise_fraction": 1.0, "seed": 0}
    attributes = {"source": SOURCE_VALUES, "target": SOURCE_VALUES | {"age": 80.0}}
    return EditForm(**(attributes | options | changes))


@pytest.mark.slow
def test_a_volume_comes_back_as_one_with_a_trajectory_and_the_seed_that_was_asked_for(
    model: BaseModel, loaded: Release, tmp_path: Path
) -> None:
    volume = np.random.default_rng(1).random((40, 50, 9)).astype(np.float32)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([3.0, 3.0, 8.0, 1.0])), path)
    shares: list[float] = []
    form = edit_form(sweep="age=60:90:15", seed=7, delta=0.1)
    result = draw(model, loaded, path, form, tmp_path / "out", shares.append)
    assert (result.title, shares[-1]) == ("age 74 → 80 years", 1.0)
    assert nibabel.load(result.nifti).shape[2] == 1  # type: ignore[arg-type]
    assert [row[0] for row in result.sweep_table[3:]] == ["counterfactual"] * 3
    record = json.loads(result.record.read_text())
    assert (record["seeds"], record["counterfactuals"][0]["delta"]) == ([7], 0.1)
    with zipfile.ZipFile(result.archive) as archive:
        assert {result.dicom.name, "record.json", "sweep_age.gif"} <= set(archive.namelist())
    assert set(result.biomarkers) == {"ventricles"}


def test_without_a_scale_nothing_is_measured(model: BaseModel, loaded: Release, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (60, 50)).astype(np.uint8)).save(tmp_path / "scan.png")
    result = draw(model, loaded, tmp_path / "scan.png", edit_form(), tmp_path / "out", lambda share: None)
    assert (result.biomarkers, result.nifti) == ({}, None)


def test_what_the_record_warns_of_is_shown_as_text(
    model: BaseModel, loaded: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ld_generate.web.appearance import message

    plain = drawing.run_edits

    def warned(*arguments: Any) -> list[Path]:
        files = plain(*arguments)
        record = json.loads(files[-1].read_text())
        files[-1].write_text(json.dumps(record | {"warnings": ["contrast < usual"]}))
        return files

    monkeypatch.setattr(drawing, "run_edits", warned)
    result = draw(model, loaded, write_scan(tmp_path / "scan.dcm"), edit_form(), tmp_path / "out", lambda share: None)
    assert result.warnings == ["contrast < usual"]
    assert "contrast &lt; usual" in message("warning", result.warnings[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": SOURCE_VALUES | {"age": 74.4}}, "nothing changes"),
        ({"source": SOURCE_VALUES | {"age": ""}}, "does not say: age"),
        ({"source": SOURCE_VALUES | {"age": "abc"}}, "age=abc"),
        ({"target": SOURCE_VALUES | {"age": 180.0}}, "18 to 100 years"),
        ({"sweep": "age=90:60:5"}, "0 values"),
        ({"editor": "none"}, "unknown editor 'none'"),
    ],
)
def test_a_wish_that_cannot_be_drawn_is_named(
    model: BaseModel, loaded: Release, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    scan = write_scan(tmp_path / "scan.dcm")
    with pytest.raises(LdError, match=words):
        draw(model, loaded, scan, edit_form(**changes), tmp_path / "out", lambda share: None)


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
    middle = decode_scan(tmp_path / "series", brain_mri).pixels
    for number, dropped in enumerate((files, [tmp_path / "scan.zip"])):
        (tmp_path / str(number)).mkdir()
        assert (decode_scan(one_scan(dropped, tmp_path / str(number)), brain_mri).pixels == middle).all()
    (tmp_path / "bad.zip").write_bytes((tmp_path / "scan.zip").read_bytes()[:-30])
    with pytest.raises(ScanRejected, match="unreadable"):
        one_scan([tmp_path / "bad.zip"], tmp_path)
    with pytest.raises(RequestError, match="drop one"):
        one_scan([], tmp_path)
    with pytest.raises(RequestError, match="drop it again"):
        one_scan([tmp_path / "swept.dcm"], tmp_path)


@pytest.mark.attack
def test_an_archive_without_a_name_is_refused(tmp_path: Path) -> None:
    for name in ("..zip", "...zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(RequestError, match="rename it"):
            one_scan([tmp_path / name], tmp_path / "out")


@pytest.mark.attack
def test_examples_show_no_file_s_name(examples: dict[str, Example], tmp_path: Path) -> None:
    places = {name: example.path.parent.name for name, example in examples.items()}
    assert places == {"example 1": "one", "example 2": "three", "example 3": "two"}
    with pytest.raises(ConfigError, match="holds no scan"):
        find_examples(tmp_path, Modality(prompt_template="a scan"))


@pytest.mark.attack
def test_another_name_that_leads_to_loopback_is_not_answered(address: str) -> None:
    root, _, token = address.partition("?token=")
    port, bearer = root.rstrip("/").rpartition(":")[2], {"Authorization": f"Bearer {token}"}
    for name, status in ((f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200), (f"rebound.example:{port}", 400)):
        assert httpx.get(root, headers={"Host": name, **bearer}).status_code == status


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "config", "gradio_api/info", "gradio_api/upload", "gradio_api/queue/join"])
@pytest.mark.parametrize("token", ["", "?token=", "?token=guess"])
@pytest.mark.attack
def test_without_the_token_nothing_is_answered(address: str, path: str, token: str) -> None:
    root = address.partition("?")[0]
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        answered = httpx.request(method, f"{root}{path}{token}", cookies={"ld-page-1": "guess"})
        assert answered.status_code == 401, method
        assert "series" not in answered.text


def test_the_token_enters_once_and_leaves_the_address_line(address: str) -> None:
    with httpx.Client(follow_redirects=True) as browser:
        opened = browser.get(address)
        assert opened.status_code == 200
        assert "token" not in str(opened.url)
        assert browser.get(f"{opened.url}config").status_code == 200
        cookie = opened.history[0].headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://127.0.0.1:1", "http://localhost"])
@pytest.mark.attack
def test_another_web_page_s_request_is_refused_even_with_the_token(address: str, origin: str) -> None:
    asked = upload_to(address)
    refused = httpx.post(asked["url"], headers=asked["headers"] | {"Origin": origin}, files={"files": ("a.dcm", b"x")})
    assert refused.status_code == 403
    own = asked["headers"] | {"Origin": address.partition("/?")[0]}
    assert httpx.post(asked["url"], headers=own, files={"files": ("a.dcm", b"x")}).status_code == 200


def test_only_loopback_is_taken_for_private() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.1.2", "box")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_without_gradio_one_line_says_how_to_install_it(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["ld-generate", "serve", str(release)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert "pip install" in said
