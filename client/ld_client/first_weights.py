"""How far a round's weights may be from the study's first ones: crafted weights can copy a scan into the update.

A study without `start` begins with the adapter that its seed gives. One with `start` begins with the weights of its
`start_digest`; a site keeps those that it saw in round 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ld_client.site_config import PolicyConfig
from ld_common.adapters.base import AdaptedModel
from ld_common.adapters.low_rank import product_norm
from ld_common.adapters.state_dict import check_state, read_tensors, state_digest, update_norm, write_tensors
from ld_common.core.errors import PolicyError
from ld_common.core.state import State
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig

STARTS = "starts"
"""Folder beside the ledger."""
ROUNDING = 1e-3
"""Distance of two machines' initial weights."""


def check_weights(
    policy: PolicyConfig, task: TrainTask, study: StudyConfig, adapted: AdaptedModel[Any], folder: Path, rounds: int
) -> None:
    """Refuse weights that no honest rounds lead to.

    Each round moves the weights by at most `federation.max_update_norm`, which the server accepts of a site, and all
    of them by `policy.max_distance`. What is not trained stays as it was. What is added to the base's weights counts by
    the norm of its products.

    Args:
        policy: the site's.
        task: the server's task.
        study: its study.
        adapted: the model with the adapter that the study's seed gives.
        folder: where first weights are kept.
        rounds: that were trained before.

    Raises:
        PolicyError: the weights are too far from the study's first ones, or those are not known here.
        AdapterError: tensors are missing or of other shapes.
    """
    check_state(task.state, adapted.trainable_state())
    if task.frozen:
        check_state(task.frozen, adapted.frozen_state())
    first = {**adapted.frozen_state(), **adapted.trainable_state()}
    if study.start_digest:
        known = _kept_start(policy, task, study, folder, rounds)
        if known is None:
            return
        first |= known
    trained = {name: first[name] for name in task.state}
    _check_distance(task.state, trained, _limit(policy, study, rounds), task.round)
    if task.frozen:
        _check_distance(task.frozen, {name: first[name] for name in task.frozen}, 0.0, task.round)
    if task.carried:
        added = product_norm(task.carried)
        if not added <= _limit(policy, study, rounds) + ROUNDING:
            raise PolicyError(
                f"round {task.round} adds {added:.3g} to the base's weights, more than its rounds can have"
            )


def _kept_start(policy: PolicyConfig, task: TrainTask, study: StudyConfig, folder: Path, rounds: int) -> State | None:
    """The first weights of a study with `start`; None where this site did not see them and need not."""
    file, weights = folder / f"{study.digest()}.safetensors", {**task.frozen, **task.state}
    if rounds == 0 and not task.carried:
        if state_digest(weights) != study.start_digest:
            raise PolicyError("round 1 starts from other weights than the study's start_digest: refused")
        write_tensors(file, weights, {})
        return weights
    if file.exists():
        kept, _ = read_tensors(file)
        if state_digest(kept) != study.start_digest:
            raise PolicyError(f"'{file}' no longer holds the study's first weights: restore it from a backup")
        return kept
    if study.withholds_numbers or policy.accept_unseen_start:
        return None
    raise PolicyError(
        "this site missed round 1 of a study with `start`, so it cannot tell whether the weights of a later round were "
        "crafted: begin the study again with this site, or set policy.accept_unseen_start if its people are trusted"
    )


def _limit(policy: PolicyConfig, study: StudyConfig, rounds: int) -> float:
    limit = study.federation.max_update_norm * rounds
    return limit if study.withholds_numbers else min(limit, policy.max_distance)


def _check_distance(state: State, first: State, limit: float, round_number: int) -> None:
    moved = update_norm(state, first)
    if moved > limit + ROUNDING:
        raise PolicyError(
            f"round {round_number} starts from weights {moved:.3g} away from the study's first ones, {limit:g} is the "
            "most that its rounds can have moved them"
        )
