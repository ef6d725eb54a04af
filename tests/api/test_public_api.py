"""`from ld_common import ...`: the names, their documentation, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import ld_common
from ld_common import adapters, editing
from ld_common.adapters.registry import ADAPTERS
from ld_common.editing.registry import EDITORS


@pytest.mark.parametrize("package", [ld_common, adapters, editing], ids=lambda package: package.__name__)
def test_every_public_name_is_there_listed_and_documented(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert set(package.__all__) == set(dir(package)) - {"__version__"}
    for name in package.__all__:
        value = getattr(package, name)
        documented = isinstance(value, ModuleType) or inspect.isclass(value) or inspect.isfunction(value)
        assert not documented or (value.__doc__ or "").strip(), f"{name} has no docstring"
        assert not inspect.isclass(value) or value.__module__.startswith("ld_common.")


@pytest.mark.parametrize("package", [ld_common, adapters, editing], ids=lambda package: package.__name__)
def test_type_checkers_and_the_interpreter_see_the_same_names(package: ModuleType) -> None:
    source = inspect.getsource(package)
    start = source.index("if TYPE_CHECKING:")
    checked: dict[str, object] = {}
    exec(inspect.cleandoc(source[start:].partition("\n\n")[0].partition("\n")[2]), checked)
    assert set(checked) - {"__builtins__"} == set(package.__all__)
    assert all(checked[name] is getattr(package, name) for name in package.__all__)


def test_each_adapter_and_editor_of_ours_is_exported() -> None:
    assert {ADAPTERS.load(name).__name__ for name in ADAPTERS} <= set(adapters.__all__)
    assert {EDITORS.load(name).__name__ for name in EDITORS} <= set(editing.__all__)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="CounterfactualPipelin"):
        _ = ld_common.CounterfactualPipelin
    with pytest.raises(ImportError):
        exec("from ld_common.adapters import Lroa")


def test_importing_the_package_imports_no_model_library() -> None:
    script = (
        "import sys, ld_common; from ld_common import ADAPTERS, EDITORS, BIOMARKERS, LdError, adapters, editing\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'opacus', 'monai', 'flwr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
