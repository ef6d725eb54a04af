"""The documentation is current, complete and linked; its numbers come from the recorded results."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import ld_common
from ld_client.site_config import SiteConfig
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from generate import generated  # noqa: E402  (docs/ is not a package)
from generators import results  # noqa: E402
from generators.source import classes, loaded_schemas  # noqa: E402

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OTHER_DOTTED = {
    "adapter.name",
    "edit.name",
    "data.latents",
    "drift.safetensors",
    "hospitals.yaml",
    "adapter.safetensors",
}
"""Names with a dot that begin like a section: the selection of an entry, Python attributes, files."""
REQUIREMENT = re.compile(r"[A-Za-z0-9_-]+")


def test_generated_pages_are_current() -> None:
    stale = [name for name, text in generated().items() if (ROOT / name).read_text(encoding="utf-8") != text]
    assert not stale, "run `make docs`"


def test_every_public_name_is_in_the_api_reference() -> None:
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    missing = [name for name in getattr(ld_common, "__all__", []) if f"## `{name}`\n" not in page]
    assert not missing


@pytest.mark.slow
def test_every_config_class_is_in_the_configuration_reference() -> None:
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    for name in loaded_schemas():
        assert re.search(rf"^### (`\w+` \()?{name}\)?$", page, re.MULTILINE), name
        for field in classes()[name].fields:
            assert re.search(rf"^\| `[\w.]*\b{field.name}` \|", page, re.MULTILINE), f"{name}.{field.name}"


def test_config_keys_in_the_text_exist() -> None:
    """Keys such as `policy.max_steps`, in code spans of the pages, stand in the configuration reference."""
    reference = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([\w.]+)`", reference, re.MULTILINE))
    sections = "|".join({key.partition(".")[0] for key in known if key.count(".") == 1})
    for page in (page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "reference"):
        text = page.read_text(encoding="utf-8")
        unknown = {key for key in re.findall(rf"`((?:{sections})\.[a-z_]+)\b(?!\.)", text) if key not in known}
        assert not unknown - OTHER_DOTTED, f"{page}: {unknown - OTHER_DOTTED}"


def test_the_readme_is_short() -> None:
    words = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8")).split()
    assert len(words) <= 900


def test_the_drift_table_is_what_the_benchmark_says() -> None:
    """The generator's reading of the JSON against the benchmark's own."""
    from ld_simulations.benchmarks.latent_drift.table import find, reduction, rows_of

    runs = results.load("benchmarks/latent_drift.json")
    for formulation, control in (("prior", None), ("prior-map", None), ("none", "zero_terminal_snr")):
        shares = []
        for modality in ("brain", "chest"):
            rows = rows_of(runs, modality)
            before, after = find(rows, "full", "none"), find(rows, "full", formulation, control)
            assert before
            assert after
            shares.append(results.percent(reduction(before, after, results.DISTANCE)))
        assert results.drift_cuts(formulation, control) == shares


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path), target


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    cleaned = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in cleaned}


def test_every_dependency_has_a_job() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(part for extra in project["optional-dependencies"].values() for part in extra),
    ]
    names = {_normalised(requirement) for requirement in declared} - {"latent-drift-federation"}
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs/dependencies.md").read_text().splitlines() if line[:2] == "| "
    ]
    cells = [row[-2] for row in rows if row[-1].strip() not in ("Job", "---")]
    described = {_normalised(name.strip()) for cell in cells for name in cell.split(",")}
    assert described == names


def _normalised(requirement: str) -> str:
    match = REQUIREMENT.match(requirement)
    assert match
    return match.group().lower().replace("_", "-")


def test_yaml_examples_use_keys_that_exist() -> None:
    blocks = [
        (page, yaml.safe_load(block))
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    for page, content in blocks:
        problems = [list(_unknown(schema, content)) for schema in (SiteConfig, StudyConfig, Modality)]
        assert [] in problems, f"{page}: {min(problems, key=len)}"


def _unknown(schema: Any, content: dict[str, Any]) -> list[str]:
    """Keys that a dataclass does not have, with those of its nested dataclasses."""
    hints, names = get_type_hints(schema), {field.name for field in dataclasses.fields(schema)}
    problems = []
    for key, value in content.items():
        if key not in names:
            problems.append(key)
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            problems += _unknown(hints[key], value)
    return problems


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == ld_common.__version__
    assert {"title", "message", "authors"} <= set(citation)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', index)
    assert not fetched, "the site fetches from another host"
