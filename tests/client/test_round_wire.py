"""What a site sends of a round in the study's wire format, and what it keeps for its next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ld_client.kept_tensors import KEPT_ROUNDS, KeptTensors
from ld_client.round import handle_train
from ld_client.site_config import RESIDUALS, SiteConfig
from ld_common.adapters.state_dict import state_digest
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import study_from_json
from ld_common.protocol.wire_formats import SCALES, decode_state
from tests.client.test_crafted_rounds import OPTIONS, site, task_of  # noqa: F401  (`site` is a fixture)


def int8_task(place: SiteConfig, round_number: int = 1, **federation: Any) -> TrainTask:
    return task_of(place, round_number, federation={**OPTIONS["federation"], "wire": "int8", **federation})


def residuals_of(place: SiteConfig, task: TrainTask) -> KeptTensors:
    return KeptTensors(place.ledger_path.parent, RESIDUALS, study_from_json(task.study).digest())


def test_float32_sends_the_trained_tensors_and_keeps_nothing(site: SiteConfig) -> None:  # noqa: F811
    sent = handle_train(site, task_of(site)).state
    assert {value.dtype for value in sent.values()} == {torch.float32}
    assert not (site.ledger_path.parent / RESIDUALS).exists()


def test_int8_sends_an_update_and_the_next_round_makes_up_for_what_it_lost(site: SiteConfig) -> None:  # noqa: F811
    task = int8_task(site)
    exact = handle_train(site, task_of(site)).state
    first = handle_train(site, task).state
    assert {value.dtype for name, value in first.items() if name != SCALES} == {torch.int8}
    residual = residuals_of(site, task).before(2, task.state)
    decoded = decode_state("int8", first, task.state)
    for name, value in residual.items():  # the draws depend on the study, so the two updates differ
        assert float((decoded[name] - exact[name]).abs().max()) < 0.1
        assert float(value.abs().max()) <= float((decoded[name] - task.state[name]).abs().max()) / 253
    assert [file.stat().st_mode & 0o077 for file in (site.ledger_path.parent / RESIDUALS).rglob("*.safetensors")] == [0]


@pytest.mark.slow
def test_a_repeated_round_sends_the_same_bytes_whatever_ran_after_it(site: SiteConfig) -> None:  # noqa: F811
    handle_train(site, int8_task(site))
    second = handle_train(site, int8_task(site, 2))
    handle_train(site, int8_task(site, 3))
    again = handle_train(site, replace(int8_task(site, 2), nonce="ab"))
    assert state_digest(dict(again.state)) == state_digest(dict(second.state))
    for file in (site.ledger_path.parent / RESIDUALS).rglob("1.safetensors"):
        file.unlink()
    assert state_digest(dict(handle_train(site, int8_task(site, 2)).state)) != state_digest(dict(second.state))


def test_a_round_finds_what_the_last_one_before_it_left(tmp_path: Path) -> None:
    kept, expected = KeptTensors(tmp_path, RESIDUALS, "ab"), {"w": torch.zeros(3)}

    def left(number: int) -> State:
        return {"w": torch.full((3,), float(number))}

    assert kept.before(1, expected) == {}
    for number in (1, 2, 4, 7, 11, 12):
        kept.write(number, left(number))
    assert sorted(int(file.stem) for file in tmp_path.rglob("*.safetensors")) == [4, 7, 11, 12]
    assert len([4, 7, 11, 12]) == KEPT_ROUNDS
    for number, before in ((13, 12), (12, 11), (10, 7), (5, 4)):
        assert float(kept.before(number, expected)["w"][0]) == before
    assert kept.before(4, expected) == {}
    kept.write(7, left(70))  # a round that runs again
    assert float(kept.before(8, expected)["w"][0]) == 70
    assert KeptTensors(tmp_path, RESIDUALS, "cd").before(13, expected) == {}


@pytest.mark.parametrize("content", [b"junk", None])
def test_a_damaged_or_foreign_residual_is_no_update(tmp_path: Path, content: bytes | None) -> None:
    kept = KeptTensors(tmp_path, RESIDUALS, "ab")
    kept.write(1, {"w": torch.zeros(2)})
    if content is not None:
        (tmp_path / RESIDUALS / "ab" / "1.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="delete it"):
        kept.before(2, {"w": torch.zeros(3)})
