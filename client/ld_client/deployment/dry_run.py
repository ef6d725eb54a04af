"""`ld-client dry-run`: runs one round on the site's data as the study would; nothing is sent, charged or kept.

It runs on a temporary folder with links to the store's files and a copy of the ledger, which refuses a round as the
ledger itself would.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger
from ld_client.round import handle_train
from ld_client.several_processes import process_count
from ld_client.site_config import LEDGER, SiteConfig
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import to_mapping
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol.messages import TrainResult, TrainTask, tensor_record
from ld_common.protocol.secagg.messages import CHECK_WORDS
from ld_common.protocol.study_config import StudyConfig

SHOWN = 12
"""Tensors that are listed individually."""


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run."""

    study: StudyConfig
    result: TrainResult
    """The result without secure aggregation."""
    seconds: float
    peak_bytes: int
    """Peak memory of this process, or of the GPU; where several processes trained, of the largest."""


def dry_run(home: SiteHome) -> list[str]:
    """Run the round and record it in the audit log; returns lines to print.

    Raises:
        LdError: a round would be refused, for another reason than approval or hours.
    """
    kit, site, study = home.kit(), home.site(), home.study()
    log = AuditLog.of(home)
    log.append("dry-run", {"study": kit.study, "study_digest": study.digest(), "sent": False, "charged": False})
    return report(rehearse(site, study, kit.modality_digest), site)


def rehearse(site: SiteConfig, study: StudyConfig, modality_digest: str) -> DryRun:
    """Run round 1 of a study at a site on a copy of its store; raises `LdError`."""
    # masks need other sites; training is the same without them
    alone = replace(study, federation=replace(study.federation, secure_aggregation=False))
    state = inject(
        load_denoiser(site.base_model), read_adapter(study.site_adapter(site.site)), study.seed
    ).trainable_state()
    task = TrainTask(state, 1, json.dumps(to_mapping(alone)), base_digest(site.base_model), modality_digest)
    with _copy(site) as copied:
        started = time.monotonic()
        result = handle_train(copied, task)
        seconds = time.monotonic() - started
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(user).ru_maxrss for user in users) * 1024
    if site.device == "cuda" and process_count(site) == 1:
        peak = torch.cuda.max_memory_allocated()
    return DryRun(study, result, seconds, peak)


@contextmanager
def _copy(site: SiteConfig) -> Iterator[SiteConfig]:
    """The site with a temporary store and ledger."""
    with tempfile.TemporaryDirectory(prefix="ld-client-dry-run-") as name:
        folder = Path(name)
        for file in site.store_path.iterdir() if site.store_path.is_dir() else ():
            if file.is_file() and not file.name.startswith(LEDGER):
                (folder / file.name).symlink_to(file.resolve())
        if site.ledger_path.exists():
            Ledger(site.ledger_path).copy(folder / LEDGER)
        policy = replace(site.policy, hours="")
        yield replace(site, store=str(folder), ledger=str(folder / LEDGER), policy=policy)


def report(run: DryRun, site: SiteConfig) -> list[str]:
    """The dry run as text."""
    study = run.study
    where = "of the GPU" if site.device == "cuda" else "of this process"
    where = where if process_count(site) == 1 else "of the largest process"
    return [
        f"study {study.name}, round 1 of {study.federation.rounds} at {site.site}: {study.training.steps} steps in "
        f"{run.seconds:.1f} s, at most {run.peak_bytes / 2**30:.2f} GiB {where}",
        _losses(run),
        "Would have left:",
        *_leaving(run),
        "Nothing was sent, so nothing was charged to the privacy ledger. The trained tensors were discarded.",
    ]


def _losses(run: DryRun) -> str:
    numbers = run.result.numbers
    if numbers is None:
        return "loss: not computed, as an exact loss must not be released under differential privacy"
    withheld = "; it stays here, the study withholds it" if run.study.withholds_numbers else ""
    return f"loss: {numbers.loss_first:.4f} in the first fifth, {numbers.loss_last:.4f} in the last{withheld}"


def _leaving(run: DryRun) -> list[str]:
    study, result = run.study, run.result
    drift = [] if result.drift is None else [tensor_record("drift", result.drift)]
    tensors = [tensor_record(name, result.state[name]) for name in sorted(result.state)] + drift
    own = [tensor_record(name, result.own[name]) for name in sorted(result.own)]
    listed_own = ["  this site's own factors, in the clear (policy.release_own_part):", *_listed(own)] if own else []
    if study.federation.secure_aggregation:
        count = sum(record["bytes"] // 4 for record in tensors)
        size = 4 * (count + CHECK_WORDS)
        lines = [f"  one masked vector of {count:,} numbers, {size:,} bytes: only the sum of all sites is readable"]
        return [*lines, "  containing:", *_listed(tensors), *listed_own]
    lines = [*_listed(tensors), *listed_own]
    if result.numbers is not None and not study.withholds_numbers:
        numbers = result.numbers
        lines.append(f"  {numbers.visits} visits, {numbers.patients} patients, first and last loss, seconds")
        lines.append(f"  ranges and categories that enough patients have: {numbers.coverage}")
    return [*lines, f"  {result.uplink_bytes:,} bytes, the site's name, and a signature with the audit log's head"]


def _listed(tensors: list[dict[str, Any]]) -> list[str]:
    shown = tensors if len(tensors) <= SHOWN else tensors[: SHOWN - 1] + tensors[-1:]
    lines = [f"  {tensor['name']} {tensor['type']} {tensor['shape']}, {tensor['bytes']:,} bytes" for tensor in shown]
    hidden = len(tensors) - len(shown)
    return lines if not hidden else [*lines[:-1], f"  and {hidden} more tensors", lines[-1]]
