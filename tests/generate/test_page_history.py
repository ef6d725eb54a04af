"""The page of a release with a longitudinal drift: earlier scans, the editor's controls, the gauge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.registry import EDITORS
from ld_common.release.release import read_release
from ld_generate.web.appearance import familiarity_gauge
from ld_generate.web.drawing import EditForm, draw
from ld_generate.web.editor_controls import offered_editors
from ld_generate.web.scans import earlier_scans
from ld_simulations.benchmarks.seen.browser import opened
from tests.generate.test_page import free_port, serving
from tests.support.brains import brain, whole_head, write_brain

SOURCE_VALUES: dict[str, Any] = {"age": "74", "sex": "F", "diagnosis": "CN"}


@pytest.fixture(scope="module")
def page(browser: Browser, model: BaseModel, informed: Path) -> Iterator[Page]:
    with (
        serving(model, read_release(informed), {}, "127.0.0.1", free_port()) as address,
        opened(browser, address, {"width": 1440, "height": 900}) as page,
    ):
        yield page


@pytest.fixture
def visits(tmp_path: Path) -> list[Path]:
    """Scans of 2016, 2018 and 2020 of one patient of 74 years, the last one."""
    elements = {"PatientID": "P1", "PatientSex": "F"}
    return [
        write_brain(
            tmp_path / f"{year}.dcm", brain(600, age), StudyDate=f"{year}0101", PatientAge=f"0{age}Y", **elements
        )
        for year, age in ((2016, 70), (2018, 72), (2020, 74))
    ]


def drop_scan(page: Page, path: Path) -> None:
    """Drop a scan of a healthy patient of 74 years, and ask for an age of 80."""
    page.locator("#files input[type=file]").set_input_files(path)
    expect(page.locator(".preview img")).to_be_visible(timeout=30_000)
    expect(page.locator("#target-age input[type=number]")).to_have_value("74")
    page.locator("#source-diagnosis label", has_text="healthy").click()
    page.locator("#target-age input[type=number]").fill("80")


def choose_editor(page: Page, name: str) -> None:
    page.locator("#editor input").click()
    page.get_by_role("option", name=name, exact=True).click()


@pytest.mark.slow
def test_only_editors_that_work_are_offered_and_only_what_they_use_is_shown(page: Page) -> None:
    page.get_by_text("Editor and its options").click()
    expect(page.locator("#guidance-scale")).to_be_visible()
    expect(page.locator("#history")).to_be_visible()
    for hidden in ("#delta", "#noise-fraction", "#seed"):
        expect(page.locator(hidden)).to_be_hidden()
    page.locator("#editor input").click()
    offered = [text.split()[-1] for text in page.get_by_role("option").all_inner_texts()]  # one has a tick before it
    assert offered == [name for name in EDITORS if name != "instruct_pix2pix"]
    page.get_by_role("option", name="ddpm", exact=True).click()
    for shown in ("#delta", "#noise-fraction", "#seed", "#guidance-scale"):
        expect(page.locator(shown)).to_be_visible()
    expect(page.locator("#history")).to_be_hidden()
    choose_editor(page, "ddim")
    expect(page.locator("#seed")).to_be_hidden()
    expect(page.locator("#noise-fraction input[type=number]")).to_have_value("0.7")
    choose_editor(page, "drift")
    expect(page.locator("#delta")).to_be_hidden()
    expect(page.locator("#history")).to_be_visible()
    expect(page.locator("#guidance-scale input[type=number]")).to_have_value("1")


@pytest.mark.slow
def test_earlier_scans_are_dropped_and_a_gauge_says_whether_the_scan_is_familiar(
    page: Page, visits: list[Path], tmp_path: Path
) -> None:
    drop_scan(page, visits[2])
    page.get_by_text("Earlier scans of the patient").click()
    page.locator("#history-files input[type=file]").set_input_files(visits[:2])
    expect(page.locator("#history-files")).to_contain_text("2018")
    ages = page.locator("#history-ages :is(input, textarea)")
    ages.fill("70")
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("1 ages for 2 earlier scans", timeout=30_000)
    ages.fill("")
    page.locator("#draw").click()
    expect(page.locator(".caption")).to_contain_text("drift, guidance 1, 2 earlier scans", timeout=30_000)
    expect(page.locator("#familiarity .gauge.familiar")).to_contain_text("Familiar scan")
    head = write_brain(tmp_path / "head.dcm", whole_head(600), PatientID="P2", PatientSex="F", PatientAge="074Y")
    page.locator("#files button[aria-label='Clear']").click()
    expect(page.locator("#answer")).to_be_hidden(timeout=30_000)
    drop_scan(page, head)
    expect(page.locator("#history-files")).not_to_contain_text("2018")  # the next patient's are others
    page.locator("#draw").click()
    expect(page.locator("#familiarity .gauge.unfamiliar")).to_contain_text("do not trust", timeout=30_000)
    expect(page.locator(".message.warning")).to_contain_text("remove the skull")
    page.locator("#history-files input[type=file]").set_input_files(visits[:1])
    expect(page.locator("#history-files")).to_contain_text("2016")
    page.locator("#draw").click()
    expect(page.locator(".message.error")).to_contain_text("another patient", timeout=30_000)


def form(**changes: Any) -> EditForm:
    options = {"delta": 0.1, "editor": "drift", "guidance_scale": 1.0, "noise_fraction": 0.3, "seed": 0}
    return EditForm(**{"source": SOURCE_VALUES, "target": SOURCE_VALUES | {"age": 80.0}, **options, **changes})


@pytest.mark.slow
def test_what_an_editor_does_not_use_plays_no_part(
    model: BaseModel, informed: Path, visits: list[Path], tmp_path: Path
) -> None:
    release = read_release(informed)
    drawn = draw(model, release, visits[2], form(), tmp_path / "drift", lambda share: None)
    assert drawn.settings == "drift, guidance 1"
    assert drawn.familiarity is not None and not drawn.familiarity["unfamiliar"]
    told = draw(model, release, visits[2], form(history=visits[:2]), tmp_path / "told", lambda share: None)
    assert told.settings == "drift, guidance 1, 2 earlier scans"
    assert told.pictures["counterfactual"].read_bytes() != drawn.pictures["counterfactual"].read_bytes()
    other = form(editor="ddpm", history=visits[:2], history_ages="not read")
    assert draw(model, release, visits[2], other, tmp_path / "ddpm", lambda share: None).settings == (
        "ddpm, δ +0.1, guidance 1, noise 0.3, seed 0"
    )


def test_a_strict_page_refuses_what_the_release_does_not_cover(
    model: BaseModel, informed: Path, visits: list[Path], tmp_path: Path
) -> None:
    release = read_release(informed)
    head = write_brain(tmp_path / "head.dcm", whole_head(600), PatientID="P1", StudyDate="20180101")
    for number, (scan, changes, words) in enumerate(
        (
            (head, {}, "unlike the scans"),
            (visits[2], {"target": SOURCE_VALUES | {"age": 95.0}}, "beyond is extrapolated"),
            (visits[2], {"history": [head]}, "an earlier scan"),
        )
    ):
        out = tmp_path / str(number)
        with pytest.raises(RequestError, match="strict refuses") as refused:
            draw(model, release, scan, form(**changes), out, lambda share: None, strict=True)
        assert words in str(refused.value)
        assert not out.exists()
        draw(model, release, scan, form(**changes), out, lambda share: None)
    draw(model, release, visits[2], form(), tmp_path / "drawn", lambda share: None, strict=True)


@pytest.mark.slow
def test_a_strict_page_says_so_and_why_it_refuses(page: Page, model: BaseModel, informed: Path, tmp_path: Path) -> None:
    browser = page.context.browser
    assert browser is not None
    head = write_brain(tmp_path / "head.dcm", whole_head(600), PatientSex="F", PatientAge="074Y")
    with serving(model, read_release(informed), {}, "127.0.0.1", free_port(), True) as address:
        strict_page = browser.new_page(viewport={"width": 1440, "height": 900})
        strict_page.goto(address)
        expect(strict_page.locator("#title")).to_contain_text("strict")
        drop_scan(strict_page, head)
        strict_page.locator("#draw").click()
        message = strict_page.locator(".message.error")
        expect(message).to_contain_text("strict refuses 'head.dcm'", timeout=30_000)
        expect(message).to_contain_text("remove the skull")
        expect(strict_page.locator("#answer")).to_be_hidden()
        strict_page.screenshot(path=tmp_path / "strict.png")
        strict_page.close()


def test_a_release_without_a_longitudinal_drift_offers_no_editor_that_needs_one(release: Path, informed: Path) -> None:
    plain, longitudinal = (offered_editors(read_release(folder)) for folder in (release, informed))
    assert set(longitudinal) - set(plain) == {"drift"}
    assert "instruct_pix2pix" not in longitudinal
    assert "ddim" in plain


def test_ages_belong_to_the_files_in_their_order() -> None:
    files = [Path("a.png"), Path("b.png")]
    assert [file.age for file in earlier_scans(files, " 70.5, ")] == [70.5, None]
    assert [file.age for file in earlier_scans(files, "")] == [None, None]
    assert earlier_scans([], "") == []
    for ages, words in (("70", "1 ages for 2"), ("70,5,72", "3 ages for 2"), ("70,old", "'old'"), ("70,-1", "'-1'")):
        with pytest.raises(RequestError, match=words):
            earlier_scans(files, ages)


def test_the_gauge_stays_on_its_bar_and_a_release_without_moments_has_none() -> None:
    limits = {"parts": 2.0, "outside": 1.25}
    near = familiarity_gauge({"parts": 1.0, "outside": 0.5, "limits": limits, "unfamiliar": False})
    far = familiarity_gauge({"parts": 1.0, "outside": 50.0, "limits": limits, "unfamiliar": True})
    assert "left: 25.0%" in near and "Familiar scan" in near
    assert "left: 100.0%" in far and "40.00 times the limit" in far and "do not trust" in far
    assert familiarity_gauge(None) == ""
