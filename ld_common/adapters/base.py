"""What a fine-tuning scheme is: which parameters learn, what it does to prompts, whether it keeps the base's prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ld_common.diffusion.base_model import Denoiser

State = dict[str, Tensor]
"""Named tensors, float32 on the CPU, in the order of their names: what travels and what a release holds."""

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth, arXiv 2208.12242, Eq. 2): the base's own pictures, learned beside the site's."""

    prompt: str
    """What the base is asked to draw."""
    samples: int
    steps: int
    """Sampler steps for each of them."""
    weight: float
    """Weight of their loss."""


class Scheme(ABC):
    """One scheme; subclasses are dataclasses whose fields are the study's options under `scheme`."""

    private_defaults: ClassVar[Mapping[str, object]] = {}
    """Options whose default is another under differential privacy."""

    @property
    def prior(self) -> Prior | None:
        """The prior that training preserves, if any."""
        return None

    @property
    def sees_baseline(self) -> bool:
        """Whether the network also takes another visit of the same patient, from which it draws a visit."""
        return False

    @abstractmethod
    def attach(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Make the scheme's parameters in `model` and name them as they travel; those that learn require a gradient.

        The same seed starts them alike on every side, and a prompt that is not decorated is read as the base reads it
        until they are trained.
        """

    def decorate(self, prompt: str) -> str:
        """The prompt as the adapted model shall read it."""
        return prompt


def learn(parameters: Iterable[Named], prefix: str) -> Iterable[Named]:
    """Let the base's own parameters learn, under the names `prefix` + their own."""
    for name, parameter in parameters:
        yield prefix + name, parameter.requires_grad_(True)
