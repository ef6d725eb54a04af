"""A second index reads what changed and nothing else, and gives what a first one would give."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch

from ld_client.data import faces, ingest, memory, site_base
from ld_client.data.exclusions import Reason, read_exclusions
from ld_client.data.indexing import IndexSummary, build_store
from ld_client.data.memory import MEMORY
from ld_client.data.site_base import SiteBase
from ld_client.data.store import open_store
from ld_client.data.store_key import KEY_FILE
from ld_client.site_config import load_site
from ld_common.core.errors import ModelError, StoreError
from ld_common.diffusion.base_model import base_digest, load_base
from tests.conftest import PLANTED_ROWS, write_mr_slice, write_table, write_visit

GREY = np.random.default_rng(0).integers(0, 1000, (32, 32), dtype=np.uint16)


@dataclass
class Reads:
    """Names of the files that an index read, by what was read of them."""

    headers: list[str] = field(default_factory=list)
    scans: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Reads]:
    """Gives the reads since it was called last. Files count as settled at once."""
    monkeypatch.setattr(memory, "SETTLED_SECONDS", 0.0)
    noted = Reads()
    read_headers, read_scan, read_volume = ingest.read_headers, ingest.read_scan, faces.read_volume

    def headers(files: Any, *rest: Any) -> Any:
        noted.headers += [path.name for path, _ in files]
        return read_headers(files, *rest)

    def scan(source: Any, *rest: Any, **options: Any) -> Any:
        noted.scans.append((source if isinstance(source, Path) else source[0]).name)
        return read_scan(source, *rest, **options)

    def volume(path: Path, *rest: Any, **options: Any) -> Any:
        noted.volumes.append(path.name)
        return read_volume(path, *rest, **options)

    monkeypatch.setattr(ingest, "read_headers", headers)
    monkeypatch.setattr(ingest, "read_scan", scan)
    monkeypatch.setattr(faces, "read_volume", volume)

    def take() -> Reads:
        taken = Reads(noted.headers[:], noted.scans[:], noted.volumes[:])
        for names in (noted.headers, noted.scans, noted.volumes):
            names.clear()
        return taken

    return take


def build(site_yaml: Path, *overrides: str, anew: bool = False) -> IndexSummary:
    return build_store(load_site(site_yaml, overrides), anew=anew)


def files_of(site_yaml: Path) -> list[Path]:
    return sorted(path for path in (site_yaml.parent / "scans").rglob("*.dcm"))


def remembered(site_yaml: Path) -> int:
    """Entries of the memory."""
    with closing(sqlite3.connect(load_site(site_yaml).store_path / MEMORY)) as database:
        return int(database.execute("SELECT count(*) FROM entries").fetchone()[0])


def test_of_unchanged_files_none_is_read(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    first = build(site_yaml)
    assert (first.visits, first.unchanged) == (6, 0)
    assert (len(reads().headers), len(files_of(site_yaml))) == (18, 18)
    before = open_store(load_site(site_yaml).store_path)
    second = build(site_yaml)
    assert (second.visits, second.unchanged, reads()) == (6, 6, Reads())
    assert open_store(load_site(site_yaml).store_path).digest() == before.digest()
    again = build(site_yaml, anew=True)
    taken = reads()
    assert (again.unchanged, len(taken.headers), len(taken.scans), len(taken.volumes)) == (0, 18, 6, 6)


def test_one_new_visit_and_one_changed_file_are_read_alone(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    build(site_yaml)
    reads()
    scans, store = site_yaml.parent / "scans", load_site(site_yaml).store_path
    before = open_store(store)
    changed = scans / "planted-carl/2020-11-12/1.dcm"
    content = bytearray(changed.read_bytes())
    content[-200:] = bytes(200)  # pixels
    changed.write_bytes(content)
    summary = build(site_yaml)
    taken = reads()
    assert (taken.headers, len(taken.scans), summary.unchanged) == (["1.dcm"], 1, 5)
    moved = (open_store(store).latents - before.latents).abs().flatten(1).amax(1) > 0
    assert moved.sum() == 1
    anna = "PLANTED-ANNA"
    new = write_mr_slice(scans / "new.dcm", GREY, PatientID=anna, StudyDate="20230101", PatientSex="F")
    write_table(site_yaml, [*PLANTED_ROWS, PLANTED_ROWS[0].replace(PLANTED_ROWS[0].split(",")[1], "2023-01-01")])
    summary = build(site_yaml)
    taken = reads()
    assert taken.headers == [new.name]
    assert summary.unchanged == 6


@pytest.mark.slow
def test_a_store_that_was_made_in_steps_is_the_one_made_at_once(
    site_yaml: Path, tmp_path: Path, reads: Callable[[], Reads]
) -> None:
    write_table(site_yaml, PLANTED_ROWS[:3])
    build(site_yaml)
    write_table(site_yaml, PLANTED_ROWS)
    build(site_yaml)
    in_steps = open_store(load_site(site_yaml).store_path)
    listed = read_exclusions(load_site(site_yaml).store_path)
    build(site_yaml, anew=True)
    at_once = open_store(load_site(site_yaml).store_path)
    rows = (in_steps.pseudonyms, in_steps.days, in_steps.attributes, in_steps.prompts)
    assert rows == (at_once.pseudonyms, at_once.days, at_once.attributes, at_once.prompts)
    torch.testing.assert_close(in_steps.latents, at_once.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(in_steps.mirrored, at_once.mirrored, atol=1e-5, rtol=1e-5)
    assert listed == read_exclusions(load_site(site_yaml).store_path)


def test_other_words_in_the_table_change_the_store_without_a_read(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    build(site_yaml)
    reads()
    store = load_site(site_yaml).store_path
    before = open_store(store)
    write_table(site_yaml, [row.replace(",Dementia", ",Normal") for row in PLANTED_ROWS])
    assert build(site_yaml).unchanged == 6
    assert reads() == Reads()
    after = open_store(store)
    assert {attributes["diagnosis"] for attributes in after.attributes} == {"CN"}
    assert {attributes["diagnosis"] for attributes in before.attributes} == {"AD", "CN"}
    torch.testing.assert_close(after.latents, before.latents, atol=0, rtol=0)


@pytest.mark.slow
def test_another_modality_or_a_checked_file_is_read_again(
    site_yaml: Path, tmp_path: Path, reads: Callable[[], Reads]
) -> None:
    build(site_yaml)
    reads()
    text = Path(load_site(site_yaml).modality).read_text()
    (tmp_path / "lower.yaml").write_text(text.replace("slice_position: 0.", "slice_position: 0.1"))
    assert (tmp_path / "lower.yaml").read_text() != text
    assert build(site_yaml, f"modality={tmp_path / 'lower.yaml'}").unchanged == 0
    assert (len(reads().scans), reads()) == (6, Reads())
    assert build(site_yaml, "data.burned_in_text_checked=['*']").unchanged == 0
    taken = reads()
    assert (len(taken.headers), len(taken.scans)) == (18, 6)


def test_an_index_that_was_stopped_goes_on(
    site_yaml: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], Reads]
) -> None:
    encode = SiteBase.encode
    batches: list[int] = []

    def stop_at_third(base: SiteBase, pictures: list[torch.Tensor], modality: Any) -> Any:
        batches.append(len(pictures))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return encode(base, pictures, modality)

    with monkeypatch.context() as patch:
        patch.setattr(SiteBase, "encode", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            build(site_yaml, "batch_size=1", "processes=1")
    assert batches == [1, 1, 1]
    reads()
    summary = build(site_yaml)
    assert (summary.visits, summary.unchanged, reads().headers) == (6, 2, [])
    resumed = remembered(site_yaml)
    build(site_yaml, anew=True)
    assert resumed == remembered(site_yaml)  # nothing of the stopped index is left


def test_a_refusal_is_remembered_unless_another_try_may_mend_it(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    scans = site_yaml.parent / "scans"
    write_mr_slice(scans / "text.dcm", GREY, BurnedInAnnotation="YES")
    (scans / "cut.dcm").write_bytes(bytes(128) + b"DICM" + b"\xfe" * 200)
    (scans / "notes.txt").write_text("no image")
    build(site_yaml)
    reads()
    store = load_site(site_yaml).store_path
    first = read_exclusions(store)
    assert {Reason.BURNED_IN, Reason.TOO_LARGE, Reason.NOT_AN_IMAGE} <= {one.reason for one in first}
    build(site_yaml)
    assert reads().headers == ["cut.dcm"]
    assert read_exclusions(store) == first


def test_a_scan_without_contrast_is_not_read_twice(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    for path in (site_yaml.parent / "scans/planted-carl/2020-11-12").iterdir():
        header = pydicom.dcmread(path)
        header.PixelData = bytes(len(header.PixelData))
        header.save_as(path)
    build(site_yaml)
    assert len(reads().scans) == 6
    first = read_exclusions(load_site(site_yaml).store_path)
    assert Reason.NO_CONTRAST in {one.reason for one in first}
    summary = build(site_yaml)
    assert (reads().scans, summary.exclusions) == ([], first)


def test_a_file_that_was_just_written_is_not_believed(site_yaml: Path) -> None:
    build(site_yaml)
    assert build(site_yaml).unchanged == 0


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("content", [b"", b"not a database" * 100, None])
def test_a_damaged_or_foreign_memory_is_read_past(
    content: bytes | None, site_yaml: Path, tmp_path: Path, reads: Callable[[], Reads]
) -> None:
    build(site_yaml)
    store = load_site(site_yaml).store_path
    digest = open_store(store).digest()
    reads()
    if content is None:  # of a store with another key
        with sqlite3.connect(store / MEMORY) as database:
            database.execute("UPDATE entries SET value = (SELECT value FROM entries LIMIT 1)")
    else:
        (store / MEMORY).write_bytes(content)
    build(site_yaml)
    assert len(reads().headers) >= 17
    assert open_store(store).digest() == digest


def test_the_memory_of_another_store_says_nothing_here(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    build(site_yaml)
    store = load_site(site_yaml).store_path
    other = store.with_name("other")
    other.mkdir()
    shutil.copy(store / MEMORY, other / MEMORY)
    reads()
    build(site_yaml, f"store={other}")
    assert len(reads().headers) == 18
    assert (other / KEY_FILE).read_bytes() != (store / KEY_FILE).read_bytes()


def test_an_index_beside_another_is_refused(
    site_yaml: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], Reads]
) -> None:
    build(site_yaml)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *where, **options: connect(*where, **options | {"timeout": 0.1}))
    other = connect(load_site(site_yaml).store_path / MEMORY)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="another ld-client index"):
        build(site_yaml)
    other.close()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_the_number_of_processes_changes_nothing(processes: int, site_yaml: Path, reads: Callable[[], Reads]) -> None:
    (site_yaml.parent / "scans/notes.txt").write_text("no image")
    build(site_yaml)
    first, listed = open_store(load_site(site_yaml).store_path), read_exclusions(load_site(site_yaml).store_path)
    build(site_yaml, f"processes={processes}", anew=True)
    assert open_store(load_site(site_yaml).store_path).digest() == first.digest()
    assert read_exclusions(load_site(site_yaml).store_path) == listed


UNCHANGED = """\
import sys
sys.modules.update(dict.fromkeys({libraries}))  # importing one of them now fails
from pathlib import Path
from ld_client.data import memory
from ld_client.data.indexing import build_store
from ld_client.site_config import load_site
memory.SETTLED_SECONDS = 0.0
print(build_store(load_site(Path({site!r}))).unchanged)
"""


@pytest.mark.slow
def test_an_index_of_unchanged_files_needs_no_model_library(site_yaml: Path, reads: Callable[[], Reads]) -> None:
    build(site_yaml)
    store = load_site(site_yaml).store_path
    before = {path.name: path.read_bytes() for path in store.glob("cache-*")}
    code = UNCHANGED.format(libraries=("torch", "diffusers", "transformers", "scipy.ndimage"), site=str(site_yaml))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
    assert {path.name: path.read_bytes() for path in store.glob("cache-*")} == before


def test_another_base_in_the_same_folder_encodes_every_scan_anew(
    site_yaml: Path, tmp_path: Path, reads: Callable[[], Reads]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(load_site(site_yaml).base_model, base)
    store = load_site(site_yaml).store_path
    build(site_yaml, f"base_model={base}")
    first = open_store(store)
    statistics = base / "latent_statistics.json"
    mean = json.loads(statistics.read_text())["mean"] if statistics.exists() else [0.0] * first.latents.shape[1]
    statistics.write_text(json.dumps({"mean": [value + 1 for value in mean]}))
    assert build(site_yaml, f"base_model={base}").unchanged == 0
    second = open_store(store, base_digest=base_digest(str(base)))
    assert second.base_digest != first.base_digest
    torch.testing.assert_close(second.base_latent_mean, first.base_latent_mean + 1)
    assert build(site_yaml, f"base_model={base}").unchanged == 6
    (base / "unet/config.json").unlink()
    with pytest.raises(ModelError):
        build(site_yaml, f"base_model={base}")


def test_a_base_that_changes_while_an_index_runs_makes_no_store(
    site_yaml: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[], Reads]
) -> None:
    build(site_yaml)
    store = load_site(site_yaml).store_path
    before = open_store(store).digest()
    monkeypatch.setattr(site_base, "_load", lambda name: dataclasses.replace(load_base(name), digest="another"))
    write_visit(site_yaml.parent / "scans", "PLANTED-CARL", "2020-11-12", SeriesNumber=2)
    with pytest.raises(ModelError, match="changed while the index ran"):
        build(site_yaml)
    assert open_store(store).digest() == before


def test_a_prompt_that_became_too_long_is_refused_though_no_scan_changed(
    site_yaml: Path, tmp_path: Path, reads: Callable[[], Reads]
) -> None:
    build(site_yaml)
    text = Path(load_site(site_yaml).modality).read_text()
    (tmp_path / "wordy.yaml").write_text(text.replace("brain MRI,", "brain MRI," + " of a patient" * 40))
    for _ in range(2):
        with pytest.raises(ModelError, match="shorten it"):
            build(site_yaml, f"modality={tmp_path / 'wordy.yaml'}")
