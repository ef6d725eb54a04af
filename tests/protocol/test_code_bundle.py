"""The code bundle is the import closure of the ClientApp, and the client's wheel asks for what it imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection, Iterable
from importlib.metadata import packages_distributions, requires
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import pytest

from ld_client.deployment.bundle import read_bundle
from ld_common.adapters.registry import ADAPTERS
from ld_common.core.registry import normalized
from ld_common.editing.registry import EDITORS
from ld_common.protocol.code_bundle import (
    PACKAGES,
    bundle_roots,
    bundle_unreached_lines,
    import_closure,
    imported_modules,
    installed_sources,
    package_sources,
)
from ld_server.deployment.bundle import build_bundle, bundle_files

ROOT = Path(__file__).parents[2]
NEVER_IN_A_BUNDLE = (
    r"ld_common/editing/(?!__init__|registry)",
    r"ld_common/imaging/(?!__init__|modality)",
    r"ld_common/metrics/(?!__init__|registry)",
    r"ld_common/release/(?!__init__|data_ranges)",
    r"ld_common/core/(command|processes|version)",
    r"ld_common/protocol/(kit_archive|code_bundle)",
    r"ld_client/(audit|privacy_report)/",
    r"ld_client/(cli|site_commands|drift_report)\.py",
    r"ld_client/data/(indexing|ingest|table|pseudonyms|exclusions)",
    r"ld_client/deployment/(approve|approval_summary|bundle|check|dry_run|executor|join|launcher|node|pull|release)",
    r"ld_client/privacy/budget",
)


def test_the_bundle_holds_what_the_client_app_imports_and_no_line_more() -> None:
    bundled = bundle_files()
    assert bundle_unreached_lines(bundled) == 0
    assert bundle_unreached_lines(package_sources()) > 1000  # so the measure tells the two apart
    for name in bundled:
        assert not any(re.match(pattern, name) for pattern in NEVER_IN_A_BUNDLE), name
    assert {f"{module.replace('.', '/')}.py" for module in ADAPTERS.builtin_modules()} <= set(bundled)


def test_the_closure_follows_functions_parents_and_relative_imports_but_no_type_checking() -> None:
    sources = {
        "a/__init__.py": b"from .b import one\n",
        "a/b.py": b"def one():\n    import c.d\n",
        "c/__init__.py": b"",
        "c/d.py": b"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n",
        "e.py": b"",
        "f.py": b"from a import b as renamed\n",
        "g.py": b"",
        "c/broken.py": b"import e \xff",
    }
    assert import_closure(["a.b", "c.broken"], sources) == {
        "c/broken.py",
        "a/__init__.py",
        "a/b.py",
        "c/__init__.py",
        "c/d.py",
        "f.py",
    }


@pytest.mark.slow
def test_every_module_that_the_client_app_really_imports_is_in_the_bundle() -> None:
    """In a process of its own: all adapters are loaded, as a study's name would, and what came in is compared."""
    code = (
        "import sys, ld_client.client_app\nfrom ld_common.adapters.registry import ADAPTERS\n"
        "for name in ADAPTERS: ADAPTERS.load(name)\n"
        f"print(*(name for name in sys.modules if name.split('.')[0] in {PACKAGES}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    sources = package_sources()
    reached = {name.removesuffix(".py").removesuffix("/__init__") for name in import_closure(bundle_roots(), sources)}
    imported = {name.replace(".", "/") for name in done.stdout.split()}
    assert imported <= reached


@pytest.mark.slow
def test_the_client_app_starts_from_the_bundle_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(BytesIO(build_bundle())) as archive:
        archive.extractall(tmp_path)
    roots = {"", *(str(ROOT / folder) for folder in ("", "server", "client", "simulations"))}
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if p not in {roots!r})]\n"
        "import ld_client.client_app as app\nfrom ld_common.adapters.registry import ADAPTERS\n"
        "[ADAPTERS.load(name) for name in ADAPTERS]\nprint(app.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "ld_client/client_app.py")


def test_the_bundle_is_a_fab_of_format_one_that_a_site_accepts() -> None:
    bundled = read_bundle(build_bundle())
    project = tomllib.loads(bundled["pyproject.toml"].decode())
    assert project["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert project["project"]["license"] == {"file": "LICENSE"}
    assert "LICENSE" in bundled
    assert {name for name in bundled if name.split("/")[0] in PACKAGES} == set(installed_sources())


def imported_distributions(files: Collection[str]) -> set[str]:
    """Normalized names of the distributions that these sources of ours import, our own among them."""
    sources, owners = package_sources(), packages_distributions()
    found: set[str] = set()
    for file in files:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in imported_modules(module, file.endswith("/__init__.py"), sources[file]):
            found |= {normalized(owner) for owner in owners.get(name.split(".")[0], [])}
    return found - OURS


def requirement_names(requirements: Iterable[str]) -> set[str]:
    return {normalized(re.split(r"[\[(<>=!~; ]", text)[0]) for text in requirements}


OURS = {"latent-drift-federation", "latent-drift-client", "latent-drift-generate"}
LOADED_BY_OTHERS = {"click", "onnxruntime", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg", "python-gdcm"}
"""Typer parses with the first, rapidocr reads with the second; the others are pydicom's decoders."""


@pytest.mark.slow
def test_the_clients_wheel_asks_for_the_distributions_that_it_imports_and_for_no_other() -> None:
    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
    asked = requirement_names(project["dependencies"])
    extra = requirement_names(project["optional-dependencies"]["generate"])
    sources = package_sources()
    client = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources]
    roots = [name for name in client if name.startswith("ld_client")]
    roots += [*ADAPTERS.builtin_modules(), *EDITORS.builtin_modules()]  # loaded by name
    used = imported_distributions(import_closure(roots, sources))
    assert asked - used == LOADED_BY_OTHERS
    indirect = requirement_names(text for name in asked for text in requires(name) or [])
    assert used - asked <= indirect  # such as huggingface-hub, which comes with diffusers
    assert imported_distributions(sources) - used == extra - {
        "scikit-image"
    }  # monai finds the connected components with it


@pytest.mark.slow
def test_the_clients_wheel_holds_its_two_packages_and_their_templates(tmp_path: Path) -> None:
    for name in ("client", "ld_common"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "./client"]
    subprocess.run([*command, "--wheel-dir", "dist"], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert {"ld_client/privacy_report/report.html.j2", "ld_common/py.typed"} <= set(names)
    assert set(package_sources()) <= set(names)


def test_the_report_template_lies_in_its_package() -> None:
    assert (files("ld_client.privacy_report") / "report.html.j2").is_file()
