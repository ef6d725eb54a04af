"""Secure aggregation as both halves know it: the server learns the sum of the sites' updates and no single one.

Double masking of Bonawitz et al. (CCS 2017, ePrint 2017/281), in four stages:

keys    -> setting of the round                    <- two fresh public keys
shares  -> all public keys                         <- shares of two secrets, sealed to each other site
vector  -> the shares dealt to the site            <- quantised update + own mask + a mask per other site, mod 2**32
unmask  -> whose vectors came and whose did not    <- own-mask shares of those, mask-key shares of these

Every site masks towards every other, at most `MOST_SITES` of them. The sparser graph of SecAgg+ (Bell et al. 2020,
ePrint 2020/704) pays from some hundreds of sites; here 49 masks of 200,000 numbers take a site 30 ms, and a complete
graph lets the threshold speak for the whole round instead of for neighbourhoods that the server draws.

Of Flower's building blocks only the sharing (pycryptodome's Shamir over GF(2^128)) is used: its masks
(`secaggplus_utils.pseudo_rand_gen`) fold each key to 32 bits, which one machine can search. Ours are in
`ld_common.protocol.secagg.crypto`, where every key is derived for one study, round, roster and pair of sites: nothing
of one round opens another's.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ld_common.core.errors import FederationError
from ld_common.core.state import State
from ld_common.diffusion.options import largest_drift
from ld_common.protocol.secagg.crypto import digest

if TYPE_CHECKING:
    from ld_common.protocol.study_config import FederationConfig

Payload = dict[str, int | float | str | bytes | list[str] | list[bytes]]
"""What one message of a stage holds; each value fits Flower's `ConfigRecord`."""
P = TypeVar("P")

FEWEST_SITES, MOST_SITES = 3, 100
LEVELS = 2**24
"""Default number of quantisation levels: as fine as float32, and the sum over `MOST_SITES` stays below 2**32."""
CHECK_WORDS = 4
"""Numbers after a site's own, each 1: unless they sum to the number of sites, some mask was not what was agreed."""


class Stage(StrEnum):
    """A request to each site and its answer."""

    KEYS = "keys"
    SHARES = "shares"
    VECTOR = "vector"
    UNMASK = "unmask"


def require(condition: bool, problem: str) -> None:
    """Raise `FederationError(problem)` unless the condition holds."""
    if not condition:
        raise FederationError(problem)


def default_threshold(sites: int) -> int:
    """Two thirds of the sites, rounded up, at least 3: in a sum of two each site knows the other's share."""
    return max(FEWEST_SITES, math.ceil(2 * sites / 3))


def fewest_summed(sites: int, federation: FederationConfig) -> int:
    """Threshold of a round of `sites` sites, as the study has it; both halves compute it."""
    return max(federation.secure_threshold or default_threshold(sites), federation.min_train_nodes)


def drift_unit(clip: float, shape: str) -> float:
    """The unit in which a drift of this shape travels, so that the largest accepted one fits the clipping range."""
    return largest_drift(shape) / clip


@dataclass(frozen=True)
class SecaggSetting:
    """What all sites of one round agree on; the request of stage `keys`.

    The threshold must be a majority. A site reveals either the own-mask share or the mask-key share of another, never
    both, but it takes the server's word for who dropped out. With `threshold <= sites / 2` the server could tell one
    half that a site is in and the other half that it is not, collect enough shares of both kinds, and unmask that
    site alone. Sites that collude with the server reveal both kinds: `threshold` of `sites` withstands fewer than
    `2 * threshold - sites` of them, so two thirds withstand fewer than a third.

    Raises:
        FederationError: a number is out of range, or the sum would not fit 32 bits.
    """

    study: str
    """Digest of the study config."""
    round: int
    sites: int
    """How many sites are asked."""
    threshold: int
    """Fewest sites that the sum may be over, and fewest that together can unmask it."""
    length: int
    """Numbers in a site's vector."""
    clip: float
    """Each number of an update is clipped to [-clip, clip]."""
    levels: int = LEVELS

    def __post_init__(self) -> None:
        few = f"secure aggregation over {self.sites} sites: use {FEWEST_SITES} to {MOST_SITES}"
        require(FEWEST_SITES <= self.sites <= MOST_SITES, few)
        majority = 2 <= self.threshold <= self.sites < 2 * self.threshold
        remedy = f"use a majority, such as {default_threshold(self.sites)}"
        require(majority, f"secure aggregation with threshold {self.threshold} of {self.sites} sites: {remedy}")
        require(self.round >= 0 and self.length >= 1, f"round {self.round} of {self.length} numbers: use at least 0, 1")
        require(0 < self.clip < math.inf, f"secure aggregation clips at {self.clip:g}: use a positive number")
        fits = self.levels >= 2 and self.sites * (self.levels - 1) < 2**32
        require(fits, f"{self.levels} levels of {self.sites} sites: use 2 or more, their product at most 2**32")

    @property
    def step(self) -> float:
        """Distance of two levels. A mean over sites is off by at most half of it, a sum of n sites by n halves."""
        return 2 * self.clip / (self.levels - 1)

    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        return digest(json.dumps(asdict(self), sort_keys=True))


@dataclass(frozen=True)
class KeyOffer:
    """A site's answer to `keys`: public keys (X25519) of this round, one for shares, one for masks."""

    sealing_key: bytes
    masking_key: bytes
    signature: str = ""
    """By the site's signing key; empty in a simulation, whose sites have none."""


@dataclass(frozen=True)
class Roster:
    """Request of `shares`: sites, sorted, and their keys. A site's place here, from 1, is its share's index."""

    sites: list[str]
    sealing_keys: list[bytes]
    masking_keys: list[bytes]
    signatures: list[str]
    """`KeyOffer.signature` of each."""

    def check(self, setting: SecaggSetting) -> None:
        """Refuse fewer sites than the threshold, a name or key that stands twice; raises `FederationError`."""
        count = len(self.sites)
        require(
            setting.threshold <= count <= setting.sites, f"a roster of {count} sites, not {setting.threshold} or more"
        )
        require(self.sites == sorted(set(self.sites)), "a roster whose sites are not sorted or stand twice")
        keys = [*self.sealing_keys, *self.masking_keys]
        aligned = len(self.sealing_keys) == len(self.masking_keys) == len(self.signatures) == count
        require(aligned and len(set(keys)) == 2 * count, "a roster whose keys are not two of each site's own")

    def session(self, setting: SecaggSetting) -> bytes:
        """Digest of setting and roster, to which everything that follows is bound."""
        return digest(setting.digest(), *map(str.encode, self.sites), *self.sealing_keys, *self.masking_keys)


@dataclass(frozen=True)
class DealtShares:
    """A site's answer to `shares`, lists in the roster's order; its own place in `sealed` is empty.

    The marks (`mark`) let the server tell a false share, and whose, without learning any.
    """

    session: bytes
    sealed: list[bytes]
    seed_mark: bytes
    seed_share_marks: list[bytes]
    key_share_marks: list[bytes]
    signatures: list[str]
    """Of each sealed entry, by the site's signing key; empty strings in a simulation."""


@dataclass(frozen=True)
class RoutedShares:
    """Request of `vector`: all sites whose shares came, sorted, and what each sealed to this one."""

    session: bytes
    dealers: list[str]
    sealed: list[bytes]
    signatures: list[str]


@dataclass(frozen=True)
class MaskedVector:
    """A site's answer to `vector`: little-endian, unsigned 32 bits, `CHECK_WORDS` more than the setting's length."""

    session: bytes
    vector: bytes


@dataclass(frozen=True)
class UnmaskRequest:
    """Request of `unmask`: each site of `vector` stands in one of the lists, sorted."""

    session: bytes
    survivors: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class RevealedShares:
    """A site's answer to `unmask`: for each site of `vector`, sorted, the one share asked for; empty if it has none."""

    session: bytes
    shares: list[bytes]


def pack(payload: Any) -> Payload:
    """One of the dataclasses above as a message's content."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(payload).items()}


def unpack(kind: type[P], content: Mapping[str, object]) -> P:
    """A message's content as one of the dataclasses above; raises `FederationError` unless names and types are its."""
    hints = typing.get_type_hints(kind)
    require(set(content) == set(hints), f"a message that is no {kind.__name__}: it needs {', '.join(hints)}")
    for name, hint in hints.items():
        value, items = content[name], typing.get_args(hint)
        good = type(value) is (typing.get_origin(hint) or hint)
        if good and items:
            good = all(type(item) is items[0] for item in typing.cast(list[object], value))
        require(good, f"'{name}' of a {kind.__name__} is not of type {hint}")
    return kind(**{name: content[name] for name in hints})


def quantise(update: NDArray[np.float64], setting: SecaggSetting) -> tuple[NDArray[np.uint32], int]:
    """The nearest level of each number, clipped to the setting's range, and how many numbers were clipped.

    Rounding to the nearest, not at random: off by at most half a `SecaggSetting.step`, and it needs no random numbers.

    Raises:
        FederationError: NaN or infinite numbers, or another length than the setting's.
    """
    require(update.shape == (setting.length,), f"an update of shape {update.shape}, not ({setting.length},)")
    require(bool(np.isfinite(update).all()), "an update with NaN or infinite numbers: it stays out of the sum")
    within = np.clip(update, -setting.clip, setting.clip)
    return np.rint((within + setting.clip) / setting.step).astype(np.uint32), int(np.count_nonzero(within != update))


def dequantise(total: NDArray[np.uint32], sites: int, setting: SecaggSetting) -> NDArray[np.float64]:
    """The sum of updates from the sum of their levels over `sites` sites.

    Raises:
        FederationError: a number that no sum of levels reaches.
    """
    largest = int(total.max())
    within = largest <= sites * (setting.levels - 1)
    require(within, f"a sum of {largest}, more than {sites} sites reach: one of them sent no quantised update")
    return total.astype(np.float64) * setting.step - sites * setting.clip


def drift_numbers(size: int, shape: str) -> int:
    """Numbers of a vector that a drift of `size` numbers takes: a longitudinal one travels as two, coarse and fine."""
    return size * (2 if shape == "longitudinal" else 1)


def flatten(update: State, drift: Tensor | None, shape: str, setting: SecaggSetting) -> NDArray[np.float64]:
    """Tensors in the order of their names, then the drift of this shape, as one vector.

    One clipping range holds for all of it, so a drift travels in `drift_unit`s. Sums of a longitudinal drift need more
    digits than `SecaggSetting.levels`: the nearest level and, magnified, what it leaves.
    """
    parts = [update[name].detach().double().reshape(-1) for name in sorted(update)]
    if drift is not None:
        scaled = drift.detach().double().reshape(-1) / drift_unit(setting.clip, shape)
        if shape == "longitudinal":
            coarse = ((scaled + setting.clip) / setting.step).round() * setting.step - setting.clip
            parts += [coarse, (scaled - coarse) * _magnification(setting)]
        else:
            parts.append(scaled)
    return typing.cast("NDArray[np.float64]", torch.cat(parts).cpu().numpy())


def restore(
    vector: NDArray[np.float64], reference: State, drift_shape: torch.Size | None, shape: str, setting: SecaggSetting
) -> tuple[State, Tensor | None]:
    """Undo `flatten` for the names and shapes of `reference`, in float64.

    Raises:
        FederationError: the vector has another length.
    """
    sizes = [reference[name].numel() for name in sorted(reference)]
    drift_size = 0 if drift_shape is None else drift_numbers(drift_shape.numel(), shape)
    expected = sum(sizes) + drift_size
    require(len(vector) == expected, f"a vector of {len(vector)} numbers for tensors of {expected}")
    *parts, rest = torch.from_numpy(vector.astype(np.float64)).split([*sizes, drift_size])
    drift = None
    if drift_shape is not None:
        if shape == "longitudinal":
            coarse, fine = rest.chunk(2)
            rest = coarse + fine / _magnification(setting)
        drift = rest.reshape(drift_shape) * drift_unit(setting.clip, shape)
    names = sorted(reference)
    return {name: part.reshape(reference[name].shape) for name, part in zip(names, parts, strict=True)}, drift


def _magnification(setting: SecaggSetting) -> float:
    """Factor that spreads half a level over the clipping range."""
    return 2 * setting.clip / setting.step
