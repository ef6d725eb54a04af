"""The patient card: one page of a scan's answers, as PNG and PDF."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.cohort import CohortCurve
from ld_common.release.release import Release, read_release, release_editor
from ld_generate.card import NOTICE, _Card, write_card
from ld_generate.request import RequestOptions, make_folders, read_requests
from ld_generate.writer import run_edits
from tests.support.releases import SOURCE, GenerateRunner, write_scan

CURVE = CohortCurve({"sex": "F", "diagnosis": "CN"}, [900.0, 20.0], -300.0, 300.0, 0.9, 50.0, 95.0, 40)


STEPS = ("num_inference_steps=4",)


def words(folder: Path, opened: Release, changes: Mapping[str, Any] | None = None) -> str:
    """All texts of a folder's card, with entries of the record changed."""
    record: Mapping[str, Any] = json.loads((folder / "record.json").read_text()) | (changes or {})
    figure = _Card(folder, record, opened).draw()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def with_cohort(release: Release) -> Release:
    evaluation = {"editor": "ddim", "cohort": {"biomarker": "ventricles", "curves": [CURVE.state()]}}
    return replace(release, manifest=release.manifest | {"evaluation": evaluation})


@pytest.fixture(scope="module")
def drawn(model: BaseModel, release: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, opened = tmp_path_factory.mktemp("card"), read_release(release)
    options = RequestOptions(folder / "out", brain_mri.parse_all(SOURCE))
    targets: list[Attributes] = [{"age": 84.0}, {"diagnosis": "AD"}]
    requests = read_requests(model, opened, [write_scan(folder / "scan.dcm")], targets, options)
    make_folders(requests)
    editor = replace(release_editor(opened), num_inference_steps=4)
    run_edits(model, opened, requests, editor, [0.0], lambda done: None)
    write_card(requests[0].folder, opened)
    return requests[0].folder


def test_a_card_says_it_is_synthetic(drawn: Path) -> None:
    with Image.open(drawn / "card.png") as card:
        assert card.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
        assert min(card.size) > 1000
    document = (drawn / "card.pdf").read_bytes()
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", document)) == 1
    assert NOTICE.encode("ascii") in document


def test_it_shows_each_answer_its_change_and_where_it_comes_from(drawn: Path, release: Path) -> None:
    opened = read_release(release)
    record = json.loads((drawn / "record.json").read_text())
    text = words(drawn, opened)
    before = record["biomarkers_mm2"]["scan"]["ventricles"]
    for entry in record["counterfactuals"]:
        assert f"{entry['biomarkers_mm2']['ventricles'] - before:+,.0f} mm²" in text
    assert opened.adapter_sha256[:16] in text
    assert "not signed" in text
    assert "the answer rests on this scan alone" in text
    assert record["warnings"]
    assert all(line.split(":")[0][:40] in text for line in record["warnings"])


def test_it_shows_band_history_and_gauge_where_there_are_any(drawn: Path, release: Path) -> None:
    opened = read_release(release)
    record = json.loads((drawn / "record.json").read_text())
    area = record["counterfactuals"][0]["biomarkers_mm2"]["ventricles"]
    band = {"biomarker": "ventricles", "low_mm2": area - 90, "high_mm2": area + 90, "level": 0.9, "kind": "judged"}
    record["counterfactuals"][0]["band"] = band
    visits = [{"years_before": 3.2, "hmac_of_picture": "", "biomarkers_mm2": {"ventricles": 700.0}}]
    familiarity = {"whole": 3.0, "limits": {"whole": 2.0}, "unfamiliar": True}
    text = words(drawn, opened, record | {"history": visits, "familiarity": familiarity})
    before = record["biomarkers_mm2"]["scan"]["ventricles"]
    assert f"90 % band: {area - 90 - before:+,.0f} to {area + 90 - before:+,.0f}" in text
    assert "90 % band" in text
    assert "earlier scans" in text
    assert "taken 3.2 years before" in text
    assert "do not trust this card" in text
    familiar = words(drawn, opened, {"familiarity": familiarity | {"unfamiliar": False}})
    assert "Familiar scan" in familiar


def test_a_scan_without_spacing_has_a_card_without_areas(drawn: Path, release: Path) -> None:
    record = json.loads((drawn / "record.json").read_text())
    for entry in [*record["counterfactuals"], {"biomarkers_mm2": None}]:
        entry["biomarkers_mm2"] = {}
    record["biomarkers_mm2"] = {"scan": {}, "reconstruction": {}}
    text = words(drawn, read_release(release), record)
    assert "no area is known" in text
    assert "mm²" not in text


@pytest.mark.slow
def test_of_a_long_sweep_four_answers_are_shown_and_all_are_in_the_curve(
    run: GenerateRunner, scan: Path, release: Path, tmp_path: Path
) -> None:
    code, printed = run(
        "sweep", "--input", scan, "--source", SOURCE, "age=60:90:5", "--card", "--out", tmp_path / "out", *STEPS
    )
    assert code == 0, printed
    (folder,) = (path.parent for path in (tmp_path / "out").rglob("card.png"))
    text = words(folder, read_release(release))
    assert "cohort" not in text
    assert "90 % of the cohort" in words(folder, with_cohort(read_release(release)))
    assert "4 of 7\nanswers" in text
    assert "90 years" in text
    assert "65 years" not in text
    with (folder / "sweep_age.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    redrawn = float(rows[1]["ventricles_mm2"])
    for row in rows:
        change = float(row["ventricles_change_from_reconstruction_mm2"])
        assert change == pytest.approx(float(row["ventricles_mm2"]) - redrawn, abs=0.01)


def test_a_card_is_made_again_from_the_folder_alone(drawn: Path, release: Path) -> None:
    before = (drawn / "card.png").read_bytes()
    (drawn / "card.png").unlink()
    opened = read_release(release)
    assert [file.name for file in write_card(drawn, opened)] == ["card.png", "card.pdf"]
    assert (drawn / "card.png").read_bytes() == before
    signed = replace(opened, signed_by="study office")
    assert "signed by study office" in words(drawn, signed)
