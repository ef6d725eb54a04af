"""Adapters by name, and a study's `adapter` section read into one. Importing this imports no algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ld_common.core.config import checked, require, to_mapping
from ld_common.core.registry import Registry

if TYPE_CHECKING:
    from ld_common.adapters.base import Adapter

ADAPTERS: Registry[type[Adapter]] = Registry(
    "adapter",
    "latent_drift.adapters",
    {
        "lora": "ld_common.adapters.lora:Lora",
        "full": "ld_common.adapters.full:Full",
        "textual_inversion": "ld_common.adapters.textual_inversion:TextualInversion",
        "dreambooth": "ld_common.adapters.dreambooth:DreamBooth",
        "custom_diffusion": "ld_common.adapters.custom_diffusion:CustomDiffusion",
        "instruct_pix2pix": "ld_common.adapters.instruct_pix2pix:InstructPix2Pix",
    },
    renamed={"basic": "full", "instruct": "instruct_pix2pix"},
)
"""To add an adapter, write a subclass of `Adapter` and list it here or as an entry point of another package."""


def read_adapter(options: Mapping[str, Any]) -> Adapter:
    """The adapter of a study's `adapter` section: its `name`, and its options.

    Raises:
        ConfigError: an unknown adapter or option, or a value out of range.
    """
    require("name" in options, f"adapter.name is missing: known: {', '.join(ADAPTERS)}")
    schema = ADAPTERS.load(str(options["name"]))
    return checked(schema, {key: value for key, value in options.items() if key != "name"}, "adapter.")


def complete_adapter(options: Mapping[str, Any], private: bool = False) -> dict[str, Any]:
    """A study's `adapter` section with every option filled in; raises `ConfigError`.

    With `private`, the adapter's defaults under differential privacy fill the options that are missing.
    """
    if private:
        options = {**read_adapter(options).private_defaults, **options}
    return {"name": str(options["name"]), **to_mapping(read_adapter(options))}
