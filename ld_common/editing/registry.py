"""Editors by name, and a study's `edit` section read into one. Importing this imports no algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ld_common.core.config import checked, require, to_mapping
from ld_common.core.registry import Registry

if TYPE_CHECKING:
    from ld_common.editing.base import Editor

EDITORS: Registry[type[Editor]] = Registry(
    "editor",
    "latent_drift.editors",
    {
        "ddim": "ld_common.editing.ddim:DdimInversion",
        "belm": "ld_common.editing.belm:Belm",
        "ddpm": "ld_common.editing.ddpm:EditFriendlyDdpm",
        "flowedit": "ld_common.editing.flowedit:FlowEdit",
        "pix2pix_zero": "ld_common.editing.pix2pix_zero:Pix2PixZero",
        "drift": "ld_common.editing.drift:DriftEditor",
        "sdedit": "ld_common.editing.sdedit:SdEdit",
        "instruct_pix2pix": "ld_common.editing.instruct_pix2pix:InstructPix2PixEditor",
    },
    renamed={"invert": "ddim", "pix2pix-zero": "pix2pix_zero", "instruct": "instruct_pix2pix"},
)
"""A new one is a file with a subclass of `Editor` and a line here, or an entry point of another package."""

DEFAULT_EDITOR = "ddim"


def read_editor(options: Mapping[str, Any], prefix: str = "edit.") -> Editor:
    """The editor of a study's `edit` section: its `name` (`ddim` if not given), and its options.

    Args:
        options: the section.
        prefix: where it stands, for messages.

    Raises:
        ConfigError: no such editor, an unknown option or a value out of range.
    """
    require("method" not in options, f"config key '{prefix}method' is now called '{prefix}name'")
    schema = EDITORS.load(str(options.get("name", DEFAULT_EDITOR)))
    editor = checked(schema, {key: value for key, value in options.items() if key != "name"}, prefix)
    for key in schema.unused:
        default = getattr(schema(), key)
        require(getattr(editor, key) == default, f"{prefix}{key} does nothing with editor {schema.name}: leave it out")
    return editor


def editor_options(editor: Editor) -> dict[str, Any]:
    """An editor as an `edit` section with every option filled in."""
    return {"name": editor.name, **to_mapping(editor)}


def change_editor(editor: Editor, name: str) -> Editor:
    """Another editor with the options that both have; raises `ConfigError`."""
    schema = EDITORS.load(name)
    known = {field.name for field in dataclasses.fields(schema)} - {*schema.unused, *editor.unused}
    return read_editor({"name": name, **{key: value for key, value in to_mapping(editor).items() if key in known}})
