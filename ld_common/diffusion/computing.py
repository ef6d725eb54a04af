"""How a network computes while it trains: in float32 or half precision, as it is or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Computing:
    """Options of whoever trains; what is learned and sent is float32 with all of them."""

    precision: str = "float32"
    """`bfloat16` and `float16` run the network under autocast; on a CPU its attention stays float32, which is faster
    there. With `float16` the loss is scaled, and a step whose gradients overflow is left out."""
    compiled: bool = False
    """Whether `torch.compile` compiles the network: its first step then takes minutes, and a CPU needs a C++
    compiler."""

    checkpointing: bool = False
    """Whether the network's blocks are computed again in the backward pass, for a fraction of the memory."""

    def network(self, network: Network) -> Network:
        """The network as it is called."""
        if self.checkpointing:
            device = next(network.parameters()).device
            network.enable_gradient_checkpointing(  # type: ignore[operator]
                lambda block, *inputs: checkpoint(
                    block.__call__,
                    *inputs,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), self._attention(device)),  # blocks are computed again as before
                )
            )
        return torch.compile(network) if self.compiled else network  # type: ignore[return-value]

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Scales losses and gradients on a device; it does nothing but for `float16`."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "float16")

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The context in which a network on a device is called."""
        if self.precision == "float32":
            yield
            return
        with torch.autocast(device.type, getattr(torch, self.precision)), self._attention(device):
            yield

    def _attention(self, device: torch.device) -> AbstractContextManager[Any]:
        return Float32Attention() if device.type == "cpu" and self.precision != "float32" else nullcontext()


class Float32Attention(TorchFunctionMode):
    """Runs `scaled_dot_product_attention` in float32 and returns the dtype that it was asked in.

    PyTorch's attention on a CPU is slower in half precision than in float32, even where matrix products are faster.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, with float32 tensors where it is attention."""
        named = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        asked = (args[0] if args else named["query"]).dtype
        with torch.autocast("cpu", enabled=False):
            converted = {name: _float32(value) for name, value in named.items()}
            return func(*map(_float32, args), **converted).to(asked)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
