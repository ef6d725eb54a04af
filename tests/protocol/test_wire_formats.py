"""Rounded updates: how far off they are, and that a site's error feedback makes up for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from ld_common.adapters.state_dict import checked_update_norm, update_norm
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError, ConfigError
from ld_common.core.state import State, part_of, tensor_sizes
from ld_common.protocol import messages
from ld_common.protocol.study_config import WIRE_FORMATS, FederationConfig
from ld_common.protocol.wire_formats import FORMATS, SCALES, decode_state, encode_state

ROUNDED = [name for name, form in FORMATS.items() if form is not None]


def some_update(seed: int, size: float = 1e-3) -> State:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (4001,), "c": (2, 2, 2), "d": (), "e": (0, 4)}
    return {name: size * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def added(*states: State) -> State:
    return {name: torch.stack([state[name] for state in states]).sum(0) for name in states[0]}


REFERENCE = some_update(99, 0.02)


def sent_and_back(wire: str, state: State) -> State:
    """A state as the server has it after it was packed and unpacked."""
    tensors = encode_state(wire, state, REFERENCE, {}).tensors
    decoded = decode_state(wire, messages.unpack_tensors(messages.pack_tensors(tensors)), REFERENCE)
    return part_of(decoded, sorted(state))


def test_float32_travels_as_it_is() -> None:
    state = added(REFERENCE, some_update(0))
    sent = encode_state("float32", state, REFERENCE, {})
    assert sent.tensors is state
    assert not sent.residual
    assert decode_state("float32", state, REFERENCE) is state


@pytest.mark.parametrize("wire", ROUNDED)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e6])
def test_a_number_is_off_by_no_more_than_the_format_says(wire: str, size: float) -> None:
    update = some_update(1, size)
    sent = encode_state(wire, update, {name: torch.zeros_like(value) for name, value in update.items()}, {}).tensors
    form = FORMATS[wire]
    assert form is not None
    for name, value in form.decode(sent, sorted(update)).items():
        largest = float(update[name].abs().max()) if value.numel() else 0.0
        most = update[name].abs() / 256 if wire == "bfloat16" else torch.full_like(value, largest / 254)
        assert bool(((value - update[name]).abs() <= most * (1 + 1e-5)).all())


@pytest.mark.parametrize(("wire", "share"), [("bfloat16", 0.5), ("int8", 0.25)])
def test_a_rounded_update_takes_its_share_of_the_bytes(wire: str, share: float) -> None:
    update = {"w": torch.randn(1000, 1000)}
    sent = encode_state(wire, update, {"w": torch.zeros(1000, 1000)}, {}).tensors
    assert sum(tensor_sizes(sent).values()) == pytest.approx(4e6 * share, rel=1e-4)


@pytest.mark.parametrize("wire", ROUNDED)
def test_a_state_comes_back_near_what_it_was_with_names_shapes_and_norm(wire: str) -> None:
    state = added(REFERENCE, some_update(2))
    back = sent_and_back(wire, state)
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}
    assert update_norm(back, state) < 0.01 * update_norm(state, REFERENCE)
    decoded = decode_state(wire, encode_state(wire, state, REFERENCE, {}).tensors, REFERENCE)
    assert checked_update_norm(decoded, REFERENCE) == pytest.approx(update_norm(state, REFERENCE), rel=1e-2)
    assert len(decoded) == len(state)


@pytest.mark.parametrize("wire", ROUNDED)
def test_no_update_is_sent_as_none(wire: str) -> None:
    assert all(torch.equal(value, REFERENCE[name]) for name, value in sent_and_back(wire, REFERENCE).items())


def mean_error(rounds: int, feedback: bool, sites: int) -> float:
    """Relative error of the mean over rounds and sites of what the server decodes of constant updates."""
    updates = [{"w": 1e-3 * torch.randn(2000, generator=torch.Generator().manual_seed(seed))} for seed in range(sites)]
    zero, total = {"w": torch.zeros(2000)}, torch.zeros(2000, dtype=torch.float64)
    for update in updates:
        residual: State = {}
        for _ in range(rounds):
            sent = encode_state("int8", update, zero, residual if feedback else {})
            residual = sent.residual
            total += decode_state("int8", sent.tensors, zero)["w"].double()
    exact = torch.stack([update["w"] for update in updates]).double().mean(0)
    return float((total / (rounds * sites) - exact).norm() / exact.norm())


@pytest.mark.parametrize("sites", [1, 4])
def test_error_feedback_makes_the_mean_over_rounds_converge(sites: int) -> None:
    errors = [mean_error(rounds, True, sites) for rounds in (1, 4, 16, 64)]
    for before, after in pairwise(errors):
        assert after < 0.4 * before
    plain = mean_error(64, False, sites)
    assert plain == pytest.approx(errors[0], rel=1e-3)
    assert errors[-1] < plain / 30


def test_what_rounding_took_is_what_the_site_keeps() -> None:
    update, before = some_update(3), some_update(4, 1e-5)
    state = added(REFERENCE, update)
    sent = encode_state("int8", state, REFERENCE, before)
    back = decode_state("int8", sent.tensors, REFERENCE)
    for name, value in sent.residual.items():
        whole = state[name] - REFERENCE[name] + before[name]
        torch.testing.assert_close(back[name] - REFERENCE[name] + value, whole, atol=1e-8, rtol=0)
    assert not encode_state("bfloat16", state, REFERENCE, {}).residual


@pytest.mark.parametrize("wire", ROUNDED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_does_not_leave(wire: str, value: float) -> None:
    with pytest.raises(AdapterError, match="NaN or infinite"):
        encode_state(wire, REFERENCE | {"a": torch.full((3, 5), value)}, REFERENCE, {})


def int8(**changed: torch.Tensor) -> State:
    return encode_state("int8", added(REFERENCE, some_update(5)), REFERENCE, {}).tensors | changed


def scales(values: Sequence[float]) -> State:
    return int8(**{SCALES: torch.tensor(values)})


HOSTILE: dict[str, tuple[str, State, str]] = {
    "no scale": ("int8", {k: v for k, v in int8().items() if k != SCALES}, "no scales"),
    "NaN scale": ("int8", scales([float("nan"), 0, 0, 0, 0]), "scales"),
    "infinite scale": ("int8", scales([float("inf"), 0, 0, 0, 0]), "scales"),
    "negative scale": ("int8", scales([-1, 0, 0, 0, 0]), "scales"),
    "scales short": ("int8", scales([1.0]), "scales"),
    "double scales": ("int8", int8(**{SCALES: torch.zeros(5).double()}), "float64"),
    "float32": ("int8", added(REFERENCE, some_update(5)), "no scales"),
    "int16": ("int8", int8(b=torch.zeros(4001, dtype=torch.int16)), "int16, not torch.int8"),
    "shape": ("int8", int8(b=torch.zeros(1, dtype=torch.int8)), "shape"),
    "more": ("int8", int8(z=torch.zeros(1, dtype=torch.int8)), "unknown"),
    "less": ("int8", {k: v for k, v in int8().items() if k != "b"}, "missing"),
    "state for update": ("bfloat16", REFERENCE, "float32, not torch.bfloat16"),
    "bfloat16 NaN": ("bfloat16", {k: (v * float("nan")).bfloat16() for k, v in REFERENCE.items()}, "NaN"),
}


@pytest.mark.attack
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_does_not_fit_the_format_is_refused_with_its_reason(kind: str) -> None:
    wire, sent, words = HOSTILE[kind]
    with pytest.raises(AdapterError, match=words):
        checked_update_norm(decode_state(wire, sent, REFERENCE), REFERENCE)


def test_a_format_that_is_unknown_or_does_not_fit_is_refused() -> None:
    sites = {"sites": ["p", "q", "r"]}
    with pytest.raises(ConfigError, match="use float32, bfloat16, int8"):
        from_mapping(FederationConfig, {**sites, "wire": "int4"})
    with pytest.raises(ConfigError, match="set wire to float32"):
        from_mapping(FederationConfig, {**sites, "wire": "int8", "secure_aggregation": True})
    assert from_mapping(FederationConfig, {**sites, "wire": "int8"}).wire == "int8"


def test_a_study_names_every_format() -> None:
    assert tuple(FORMATS) == WIRE_FORMATS
