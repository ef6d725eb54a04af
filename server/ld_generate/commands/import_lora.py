"""`ld-generate import`: a LoRA of diffusers or peft becomes a release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ld_common.core.command import loading
from ld_common.core.config import load_config
from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Modality
from ld_generate.console import status
from ld_generate.options import check_writable


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The LoRA, and what a release says beside its weights."""

    lora: Annotated[
        Path,
        typer.Argument(metavar="LORA", help="Folder or .safetensors file of the LoRA.", show_default=False),
    ]
    base: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Folder or hub id of the base model that it was trained on.", show_default=False
        ),
    ]
    modality: Annotated[
        Path,
        typer.Option(
            metavar="YAML",
            help="Attributes, prompt and pixels of its scans, as in configs/modalities/.",
            show_default=False,
        ),
    ]
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the new release.", show_default=False)]
    name: Annotated[str, typer.Option(help="Name of the study in the release.")] = "imported"

    def __post_init__(self) -> None:
        if not self.lora.exists():
            raise RequestError(f"there is no LoRA at '{self.lora}': give a folder or a .safetensors file")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise RequestError(f"--out '{self.out}' exists and is not an empty folder: choose another one")
        check_writable(self.out)


def import_release(options: ImportOptions) -> None:
    """Make a release of a LoRA that plain diffusers (`save_lora_weights`) or peft trained.

    Its alpha is folded into the weights; a LoRA that does not fit the base is refused. LORA is a folder
    or a .safetensors file.

    Example: ld-generate import pytorch_lora_weights.safetensors --base MODEL --modality brain_mri.yaml --out release
    """
    modality = load_config(Modality, options.modality)
    with loading(status):
        from ld_common.release.import_lora import import_lora

    folder = import_lora(options.lora, options.base, modality, options.out, options.name)
    print(f"wrote {folder}: a release of '{options.lora}', not signed")
