"""Small options for every adapter."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "full": {},
    "textual_inversion": {"vectors": 2, "words": ["woman", "man", "Alzheimer's disease"]},
    "dreambooth": {"num_class_images": 3, "class_inference_steps": 2},
    "custom_diffusion": {},
    "instruct_pix2pix": {"rank": 2},
}
