"""Checks a study against the site's policy before it trains."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, time
from pathlib import Path
from typing import Any

from torch import Tensor

from ld_client.data.store import Store
from ld_client.site_config import PolicyConfig
from ld_common.adapters.base import AdaptedModel
from ld_common.adapters.registry import read_adapter
from ld_common.core.errors import PolicyError, PrivacyError
from ld_common.protocol.study_config import StudyConfig


def check_study(policy: PolicyConfig, study: StudyConfig) -> None:
    """Check a study's config; raises `PolicyError`."""
    for key, requested, limit in (
        ("training.steps", study.training.steps, policy.max_steps),
        ("training.learning_rate", study.training.learning_rate, policy.max_learning_rate),
        ("visits in a step", _visits_in_a_step(study), policy.max_batch_size),
        ("network evaluations before training", _evaluations(study), policy.max_evaluations),
        ("federation.rounds", study.federation.rounds, policy.max_rounds),
    ):
        if requested > limit:
            raise PolicyError(f"the study asks for {key}={requested}, this site allows {limit}")
    training = study.training
    for key, requested, least in (
        ("visits in a step (training.batch_size)", training.visits_in_a_step, policy.min_batch_size),
        (
            "visits in a round (training.steps times training.batch_size)",
            training.steps * training.visits_in_a_step,
            policy.min_visits,
        ),
    ):
        if requested < least and not study.privacy.enabled:
            raise PolicyError(
                f"the study asks for {key}={requested}, this site asks for {least} or more: the update of few visits "
                "can show them"
            )
    if study.drift.shape not in policy.drift:
        raise PolicyError(f"the study asks for drift.shape={study.drift.shape}, this site allows {policy.drift}")
    if policy.private_only and not study.privacy.enabled:
        raise PolicyError("this site trains under differential privacy only (policy.private_only): set privacy.enabled")


def check_hours(policy: PolicyConfig, now: time | None = None) -> None:
    """Raise `PolicyError` outside the site's hours; `now` is the local time."""
    if not policy.hours:
        return
    now = now or datetime.now().time()
    begin, end = (time.fromisoformat(part) for part in policy.hours.split("-"))
    over_night = end <= begin
    within = (now >= begin or now < end) if over_night else begin <= now < end
    if not within:
        raise PolicyError(f"it is {now:%H:%M} here: this site begins rounds in {policy.hours} only (policy.hours)")


@contextmanager
def within_memory(policy: PolicyConfig) -> Iterator[None]:
    """Limit this process's memory to `policy.max_memory_gb` in the block.

    Raises:
        PolicyError: it uses more already, or needed more.
    """
    if not policy.max_memory_gb:
        yield
        return
    limit, used = int(policy.max_memory_gb * 2**30), _private_bytes()
    setting = f"policy.max_memory_gb is {policy.max_memory_gb:g}"
    if used >= limit:
        raise PolicyError(f"{setting}: the process uses {used / 2**30:.2f} GiB before the round begins")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *bounds]), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise PolicyError(f"{setting}: the round needs more") from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private_bytes() -> int:
    """This process's memory that RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise PolicyError("policy.max_memory_gb works on Linux only: set it to 0")


def check_store(policy: PolicyConfig, store: Store, study: StudyConfig) -> None:
    """Raise `PolicyError` for too few patients, `PrivacyError` for a δ that is not below one over their number."""
    patients = store.patients
    if patients < policy.min_patients:
        raise PolicyError(f"the store has fewer patients than policy.min_patients {policy.min_patients}")
    if study.drift.shape == "longitudinal" and not study.privacy.enabled:
        _check_pairs(policy, store)
    if study.privacy.enabled:
        for key, delta in (
            ("the study's privacy.target_delta", study.privacy.target_delta),
            ("policy.delta", policy.delta),
        ):
            if delta * patients >= 1:
                raise PrivacyError(f"{key} is {delta:g}: with {patients} patients use less than {1 / patients:.2g}")


def _check_pairs(policy: PolicyConfig, store: Store) -> None:
    """Raise `PolicyError` where few patients have visits on two days: sums over pairs of visits would show them."""
    days: dict[str, set[int]] = {}
    for patient, day in zip(store.pseudonyms, store.days, strict=True):
        days.setdefault(patient, set()).add(day)
    patients = sum(len(visits) > 1 for visits in days.values())
    if patients < policy.min_patients:
        raise PolicyError(
            f"drift.shape longitudinal sums over pairs of visits, and fewer patients than policy.min_patients "
            f"{policy.min_patients} have visits on two days"
        )


def rounded_count(policy: PolicyConfig, count: int) -> int:
    """A count of patients or visits as it leaves: a multiple of `policy.count_step`, at least one step."""
    step = policy.count_step
    return max(step, step * round(count / step))


def rounded_drift(policy: PolicyConfig, drift: Tensor) -> Tensor:
    """A drift as it leaves, and as the site trains with it: multiples of `policy.drift_step`."""
    return drift if not policy.drift_step else (drift / policy.drift_step).round() * policy.drift_step


def check_drawn(policy: PolicyConfig, patients: set[str]) -> None:
    """Raise `PolicyError` for a round whose scans were of too few patients."""
    if len(patients) < policy.min_patients:
        raise PolicyError(
            f"the round drew scans of fewer patients than policy.min_patients {policy.min_patients}: the study needs "
            "more steps, or more visits in a step"
        )


def check_size(policy: PolicyConfig, adapted: AdaptedModel[Any]) -> None:
    """Raise `PolicyError` for an adapter with more trainable parameters than the site allows."""
    count = sum(parameter.numel() for parameter in adapted.trainable.values())
    if count > policy.max_parameters:
        raise PolicyError(
            f"the study's adapter has {count} trainable parameters, this site allows {policy.max_parameters}"
        )


def _visits_in_a_step(study: StudyConfig) -> int:
    private = study.privacy.expected_batch_size * study.privacy.augmentation_multiplicity
    return private if study.privacy.enabled else study.training.visits_in_a_step


def _evaluations(study: StudyConfig) -> int:
    prior, search = read_adapter(study.adapter).prior, study.drift.search
    drawn = 0 if prior is None else prior.samples * prior.steps
    return drawn + (search.images * search.steps * search.count if study.drift.estimator == "grid" else 0)
