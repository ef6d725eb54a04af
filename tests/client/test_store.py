from __future__ import annotations

import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import typer

from ld_client.cli import app
from ld_client.data.exclusions import Reason, read_exclusions
from ld_client.data.indexing import build_store
from ld_client.data.store import open_store, split_store
from ld_client.site_config import load_modality, load_site
from ld_common.core.command import run_cli
from ld_common.core.errors import LdError, ModelError, StoreError
from ld_common.diffusion.base_model import load_base
from ld_common.imaging.geometry import to_model
from ld_common.imaging.scan_reader import decode_scan
from tests.conftest import HEADER, PLANTED_ROWS, write_mr_slice, write_table


def build(site_yaml: Path, *overrides: str) -> Path:
    """Index the site and return its store."""
    site = load_site(site_yaml, overrides)
    build_store(site)
    return site.store_path


def run(*arguments: str) -> int:
    """The exit code of `ld-client`."""
    with pytest.raises(SystemExit) as caught:
        run_cli(app, arguments)
    return caught.value.code


def test_a_store_holds_each_visits_latent_and_prompt(site_yaml: Path, tiny_base: Path) -> None:
    site = load_site(site_yaml)
    stages: dict[str, tuple[int, int]] = {}
    summary = build_store(site, lambda stage, done, total: stages.update({stage: (done, total)}))
    assert (summary.patients, summary.visits, summary.pairs, summary.exclusions) == (3, 6, 8, [])
    assert stages == {"reading headers": (18, 18), "encoding scans": (6, 6), "looking for faces": (6, 6)}
    store, base, modality = open_store(site.store_path), load_base(str(tiny_base)), load_modality(site)
    assert (store.base_digest, store.modality_digest) == (base.digest, modality.digest())
    assert (store.latents.shape, store.latents.dtype) == ((6, *base.latent_shape), torch.float32)
    torch.testing.assert_close(store.base_latent_mean, base.latent_mean)
    assert store.prompts == [modality.prompt(attributes) for attributes in store.attributes]
    order = list(zip(store.pseudonyms, store.days, strict=True))
    assert order == sorted(order)
    assert sorted(store.days) == [0, 0, 0, 366, 1096, 1096]
    row = next(row for row, attributes in enumerate(store.attributes) if attributes["age"] == 80)
    scan = decode_scan(site_yaml.parent / "scans/planted-carl/2020-11-12/1.dcm", modality)
    picture, _ = to_model(scan, base.resolution, modality.image)
    torch.testing.assert_close(store.latents[row], base.encode(picture[None])[0], atol=1e-5, rtol=1e-5)
    mirror_image = base.encode(picture.flip(-1)[None])[0]
    torch.testing.assert_close(store.mirrored[row], mirror_image, atol=1e-5, rtol=1e-5)
    assert (store.mirrored[row] - store.latents[row]).abs().max() > 0.01
    trained, held_out = split_store(store, 1 / 3)
    assert [len(part.mirrored) for part in (trained, held_out)] == [len(trained.days), len(held_out.days)]


def test_a_store_of_scans_whose_sides_differ_has_no_mirror_images(site_yaml: Path, tmp_path: Path) -> None:
    modality = Path(load_site(site_yaml).modality).read_text().replace("symmetric: true", "symmetric: false")
    (tmp_path / "one_sided.yaml").write_text(modality)
    store = open_store(build(site_yaml, f"modality={tmp_path / 'one_sided.yaml'}"))
    assert len(store.latents) == 6 and not len(store.mirrored)
    assert not len(split_store(store, 1 / 3)[0].mirrored)


@pytest.mark.slow
def test_indexing_again_gives_the_same_bytes_and_leaves_nothing_over(site_yaml: Path) -> None:
    store = build(site_yaml)
    (first,) = store.glob("cache-*.safetensors")
    content = first.read_bytes()
    build(site_yaml)
    (second,) = store.glob("cache-*.safetensors")
    assert (second.name, second.read_bytes()) == (first.name, content)
    write_table(site_yaml, PLANTED_ROWS[:5])
    build(site_yaml)
    assert len(open_store(store).days) == 5
    assert len(list(store.glob("cache-*.safetensors"))) == 1
    assert sorted(path.name for path in store.iterdir() if "cache" not in path.name) == [
        "index.sqlite",
        "memory.sqlite",
        "pseudonyms.key",
    ]
    assert {path.stat().st_mode & 0o077 for path in store.iterdir()} == {0}


@pytest.mark.slow
def test_a_stopped_run_leaves_the_old_store_whole(site_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(site_yaml)
    write_table(site_yaml, PLANTED_ROWS[:5])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ld_client.data.indexing._write_index", stop)
    with pytest.raises(KeyboardInterrupt):
        build_store(load_site(site_yaml))
    assert len(open_store(store).days) == 6


def test_nothing_in_the_store_names_a_patient(site_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_client.data.memory.SETTLED_SECONDS", 0.0)  # so that the memory holds every header
    stray = write_mr_slice(site_yaml.parent / "scans/stray.dcm", np.eye(4, dtype=np.uint16), PatientID="PLANTED-ZOE")
    store = build(site_yaml)
    index = sqlite3.connect(store / "index.sqlite")
    assert index.execute("SELECT name FROM exclusions").fetchall() == [(stray.name,)]
    rows = [list(index.execute(f"SELECT * FROM {table}")) for table in ("visits", "meta", "sqlite_schema")]
    index.execute("DELETE FROM exclusions")
    index.commit()
    index.execute("VACUUM")
    index.close()
    content = repr(rows).encode() + b"".join(path.read_bytes() for path in store.iterdir())
    # of the year of birth alone, hashes in the store would hold the digits by chance
    born = {"19490102", "1949-01-02", "490102"}
    planted = {"planted", "family", "anna", "bert", "carl", "zoe", "scans", ".dcm", "aster"} | born
    planted.add(str(site_yaml.parent))
    for row in PLANTED_ROWS:
        patient, date = row.split(",")[:2]
        planted |= {patient, date, date.replace("-", "")}
    readable = b"\n".join(re.findall(rb"[\x20-\x7e]{4,}", content))
    assert [word for word in sorted(planted) if word.lower().encode() in readable.lower()] == []


def test_a_site_of_niftis_gives_a_store_as_well(site_yaml: Path) -> None:
    site_yaml.write_text(site_yaml.read_text().replace("date: seen", "date: seen\n    file: path"))
    folder = site_yaml.parent / "volumes"
    folder.mkdir()
    rows = []
    for number, row in enumerate(PLANTED_ROWS):
        data = np.random.default_rng(number).integers(0, 900, (20, 24, 3)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(data, np.diag([2, 2, 5, 1.0])), folder / f"{number}.nii.gz")
        rows.append(f"{row},{number}.nii.gz")
    write_table(site_yaml, rows, f"{HEADER},path")
    store = open_store(build(site_yaml, "data.root=volumes"))
    assert (len(store.days), len(set(store.pseudonyms))) == (6, 3)


def test_a_store_that_cannot_be_used_is_refused(site_yaml: Path) -> None:
    folder = site_yaml.parent / "store"
    with pytest.raises(StoreError, match="ld-client index"):
        open_store(folder)
    build(site_yaml)
    store = open_store(folder)
    open_store(folder, base_digest=store.base_digest, modality_digest=store.modality_digest)
    with pytest.raises(StoreError, match="another base"):
        open_store(folder, base_digest="0")
    with pytest.raises(StoreError, match="another modality"):
        open_store(folder, modality_digest="0")
    (cache,) = folder.glob("cache-*.safetensors")
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged"):
        open_store(folder)
    cache.unlink()
    with pytest.raises(StoreError, match="damaged"):
        open_store(folder)
    (folder / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="damaged"):
        open_store(folder)


def test_an_ingest_without_visits_still_tells_why(site_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(site_yaml, [])
    assert run("index", "--config", str(site_yaml)) == 2
    assert "error: no visit could be used" in capsys.readouterr().err
    folder = site_yaml.parent / "store"
    assert {one.reason for one in read_exclusions(folder)} == {Reason.NO_TABLE_ROW}
    with pytest.raises(StoreError, match="holds no visit"):
        open_store(folder)


def test_a_store_that_has_visits_outlives_a_table_that_has_none(
    site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("index", "--config", str(site_yaml)) == 0
    before = open_store(site_yaml.parent / "store")
    write_table(site_yaml, [])
    assert run("index", "--config", str(site_yaml)) == 2
    assert "stays as it was" in capsys.readouterr().err
    assert open_store(site_yaml.parent / "store").pseudonyms == before.pseudonyms


def test_the_command_counts_lists_and_says_where(site_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        (site_yaml.parent / f"scans/note{number:02}.txt").write_text("no scan")
    assert run("index", "--config", str(site_yaml), "batch_size=2") == 0
    said = capsys.readouterr().out
    assert re.search(r"3\s+│ 3\s+│ 0\s+│ 6\s+│ 8\s+│ 25", said)
    assert re.search(r"not an image\s+│ 25", said)
    assert "note00.txt: not an image" in said
    assert "note20.txt" not in said
    assert f"5 more: ld-client exclusions --config {site_yaml}" in said
    assert said.rstrip().endswith(f"wrote {site_yaml.parent / 'store'}")
    assert run("exclusions", "--config", str(site_yaml)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25
    assert lines[24] == "note24.txt\t1\tnot an image\tnot a DICOM file"


def test_an_error_is_one_line_and_exit_code_2(site_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", "--config", str(site_yaml), "data.tabel=x") == 2
    assert capsys.readouterr().err == "error: unknown config key 'data.tabel': did you mean 'table'?\n"
    assert run("index", "--config", str(site_yaml), "base_model=absent") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run("exclusions", "--config", str(site_yaml)) == 2
    assert "there is no store" in capsys.readouterr().err


def test_other_exceptions_are_not_hidden() -> None:
    broken = typer.Typer()

    @broken.command()
    def fail(expected: bool = False) -> None:
        raise LdError("two\nlines") if expected else ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(broken, [])
    with pytest.raises(SystemExit):
        run_cli(broken, ["--expected"])


def test_held_out_patients_are_the_same_whoever_else_is_there_and_never_trained_on(site_yaml: Path) -> None:
    site = load_site(site_yaml)
    build_store(site)
    store = open_store(site.store_path)
    nobody, everybody = split_store(store, 0.0), split_store(store, 1 - 1e-12)
    assert (len(nobody[0].prompts), len(nobody[1].prompts)) == (6, 0)
    assert (len(everybody[0].prompts), len(everybody[1].prompts)) == (0, 6)
    made_up = replace(store, pseudonyms=[f"p{row}" for row in range(6)])
    trained, held_out = split_store(made_up, 0.5)
    assert not set(trained.pseudonyms) & set(held_out.pseudonyms)
    assert len(trained.latents) == len(trained.days) == len(trained.attributes) == len(trained.pseudonyms)
    fewer = replace(
        made_up,
        **{key: getattr(made_up, key)[:4] for key in ("latents", "prompts", "pseudonyms", "attributes", "days")},
    )
    assert set(split_store(fewer, 0.5)[1].pseudonyms) == set(held_out.pseudonyms) & set(fewer.pseudonyms)
    share = (
        sum(
            len(split_store(replace(made_up, pseudonyms=[f"{n}-{row}" for row in range(6)]), 0.2)[1].prompts)
            for n in range(200)
        )
        / 1200
    )
    assert share == pytest.approx(0.2, abs=0.04)


def test_a_prompt_that_the_base_cannot_read_whole_is_refused_before_any_scan_is_read(
    site_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(load_site(site_yaml).modality).read_text()
    (tmp_path / "wordy.yaml").write_text(text.replace("brain MRI,", "brain MRI," + " of a patient" * 40))
    read: list[object] = []
    monkeypatch.setattr("ld_client.data.ingest.read_scan", lambda *scan, **_: read.append(scan))
    with pytest.raises(ModelError, match="tokens, the base reads 32: shorten it"):
        build(site_yaml, f"modality={tmp_path / 'wordy.yaml'}")
    assert read == []
