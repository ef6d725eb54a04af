"""How a network computes while it trains: in float32 or bfloat16, as it is or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Computing:
    """Options of whoever trains; what is learned and sent is float32 with all of them."""

    precision: str = "float32"
    """`bfloat16` runs the network under autocast; on a CPU its attention stays float32, where it is faster."""
    compiled: bool = False
    """Whether `torch.compile` compiles the network: its first step then takes minutes, and a CPU needs a C++
    compiler."""

    checkpointing: bool = False
    """Whether the network's blocks are computed again in the backward pass, for a fraction of the memory."""

    def network(self, network: Network) -> Network:
        """The network as it is called."""
        if self.checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        return torch.compile(network) if self.compiled else network  # type: ignore[return-value]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The context in which a network on a device is called."""
        if self.precision != "bfloat16":
            yield
            return
        with torch.autocast(device.type, torch.bfloat16):
            if device.type != "cpu":
                yield
                return
            with Float32Attention():
                yield


class Float32Attention(TorchFunctionMode):
    """Runs `scaled_dot_product_attention` in float32 and returns the dtype that it was asked in.

    PyTorch's attention on a CPU is slower in bfloat16 than in float32, even where matrix products are faster.
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
