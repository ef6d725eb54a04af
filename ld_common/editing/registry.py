"""Ways to edit a scan. A new one is a file with a subclass of `Method` and a line in `METHODS`."""

from __future__ import annotations

from ld_common.editing.base import Guidance, Method, Setting
from ld_common.editing.belm import Belm
from ld_common.editing.ddim import Invert
from ld_common.editing.ddpm import Ddpm
from ld_common.editing.flowedit import FlowEdit
from ld_common.editing.instruct_pix2pix import Instruct
from ld_common.editing.pix2pix_zero import Pix2PixZero
from ld_common.editing.sdedit import SdEdit

__all__ = ["METHODS", "Guidance", "Method", "Setting"]

METHODS: dict[str, type[Method]] = {
    "invert": Invert,
    "belm": Belm,
    "ddpm": Ddpm,
    "flowedit": FlowEdit,
    "pix2pix-zero": Pix2PixZero,
    "sdedit": SdEdit,
    "instruct": Instruct,
}
