"""The notice about head volumes that seem to show a face."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ld_client.data.faces import FaceCount, count_faces, read_face_count
from ld_client.data.indexing import build_store
from ld_client.data.ingest import survey
from ld_client.data.store_index import INDEX
from ld_client.deployment.check_data import face_results
from ld_client.site_config import load_modality, load_site
from tests.conftest import HEADER, write_table
from tests.support.heads import SPACING_MM, head


def test_an_index_counts_the_volumes_that_show_a_face(site_yaml: Path) -> None:
    site_yaml.write_text(site_yaml.read_text().replace("date: seen", "date: seen\n    file: path"))
    rows = []
    for number, voxels in enumerate((head(), head(face=False), head(lowest_mm=120))):
        affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
        nibabel.save(nibabel.Nifti1Image(voxels, affine), site_yaml.parent / "scans" / f"{number}.nii")
        rows.append(f"PLANTED-NINA,2018-01-{number + 1:02d},60,Female,Normal,{number}.nii")
    write_table(site_yaml, rows, f"{HEADER},path")
    site = load_site(site_yaml)
    assert count_faces(survey(site, load_modality(site), bytes(32), lambda *_: None), lambda *_: None) == FaceCount(
        2, 1
    )
    summary = build_store(site)
    assert summary.faces == read_face_count(site.store_path) == FaceCount(2, 1)
    assert str(summary.faces).startswith("1 of 2 head volumes")


@pytest.mark.parametrize(("faces", "status"), [(1, "warning"), (0, "ok")])
def test_a_check_says_what_faces_mean_here_and_in_whole_volumes(faces: int, status: str, site_yaml: Path) -> None:
    site = load_site(site_yaml)
    build_store(site)
    with sqlite3.connect(site.store_path / INDEX) as index:
        index.execute("UPDATE meta SET value = ? WHERE key = 'faces'", (f'{{"volumes": 4, "faces": {faces}}}',))
    (result,) = face_results(site.store_path)
    assert (result.status.value, result.detail[:6]) == (status, f"{faces} of 4")
    assert ("ld-generate volume" in result.remedy) == bool(faces)


def test_an_index_without_heads_has_no_notice(site_yaml: Path) -> None:
    site = load_site(site_yaml)
    build_store(site)
    assert face_results(site.store_path) == []
