"""Checks of a site's machine, base model, data, policy and budget for a study."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch

from ld_client.data.faces import REMEDY, read_face_count
from ld_client.data.store import Store, open_store, split_store
from ld_client.deployment.check_result import CheckResult, failed, good, warning
from ld_client.policy import check_hours, check_size, check_store, check_study
from ld_client.privacy.budget import remaining_charges
from ld_client.privacy.ledger import Ledger, by_study, private_charges
from ld_client.site_config import SiteConfig, load_modality
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.errors import LdError, PolicyError
from ld_common.diffusion.base_model import base_digest, load_denoiser, locate_base
from ld_common.protocol.dp_accounting import epsilon
from ld_common.protocol.enrollment_kit import KitManifest
from ld_common.protocol.study_config import StudyConfig

GIB = 2**30
LEAST_DISK, LITTLE_DISK = 1 * GIB, 5 * GIB
MEMORY_SHARE = 2
"""Least memory of training over the size of the base's weights: weights, activations, moments of the optimizer."""


@dataclass(frozen=True)
class CheckedSite:
    """A site with a readable kit, config and study."""

    site: SiteConfig
    kit: KitManifest
    study: StudyConfig

    @cached_property
    def store(self) -> Store:
        """The visits to train on; raises `StoreError`."""
        return self.split[0]

    @cached_property
    def split(self) -> tuple[Store, Store]:
        """The visits to train on, and those that are held out; raises `StoreError`."""
        store = open_store(
            self.site.store_path, base_digest=self.kit.base_digest, modality_digest=self.kit.modality_digest
        )
        return split_store(store, self.site.held_out, self.study.privacy.enabled)


def check_data(checked: CheckedSite) -> list[CheckResult]:
    """Results of the checks that need no network."""
    checks: list[tuple[str, str, Callable[[CheckedSite], list[CheckResult]]]] = [
        ("disk", "make the folder of `store` writable", _disk),
        ("base model", "point base_model at the study's base", _base),
        ("memory", "use a machine that can hold the base", _memory),
        ("modality", "point modality at kit/modality.yaml", _modality),
        ("index", "run ld-client index with this home's site.yaml", _index),
        ("policy", "ask the study to change, or change the site's policy", _policy),
        ("budget", "ask the study for a smaller budget, or change policy.max_epsilon", _budget),
    ]
    results: list[CheckResult] = []
    for name, remedy, check in checks:
        outcome = guarded(name, remedy, partial(check, checked))
        base_failed = any(result.name == "base model" and result.detail == outcome[0].detail for result in results)
        if base_failed:  # with the same message, which is not repeated
            outcome = [warning(name, "not checked: it needs the base model", "correct the base model first")]
        results += outcome
    return results


def guarded(name: str, remedy: str, check: Callable[[], list[CheckResult]]) -> list[CheckResult]:
    """A check's results; one that raises has failed."""
    try:
        return check()
    except (LdError, OSError) as error:
        return [failed(name, str(error), remedy)]


def _disk(checked: CheckedSite) -> list[CheckResult]:
    folder = checked.site.store_path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail, remedy = f"{free / GIB:.1f} GiB free at the store", "free some space for latents, logs and updates"
    if free < LEAST_DISK:
        return [failed("disk", detail, remedy)]
    return [warning("disk", detail, remedy) if free < LITTLE_DISK else good("disk", detail)]


def _base(checked: CheckedSite) -> list[CheckResult]:
    digest, expected = base_digest(checked.site.base_model), checked.kit.base_digest
    if digest != expected:
        remedy = "point base_model at the study's base: the same files, byte for byte"
        return [failed("base model", f"it is {digest[:16]}, the study's is {expected[:16]}", remedy)]
    return [good("base model", f"{digest[:16]}, the study's")]


def _memory(checked: CheckedSite) -> list[CheckResult]:
    site = checked.site
    folder = locate_base(site.base_model)
    networks = ("unet", "text_encoder", "text_encoder_2")
    parts = [file for part in networks for file in (folder / part).glob("*.safetensors")]
    needed = MEMORY_SHARE * sum(file.stat().st_size for file in parts)
    if site.device == "cuda":
        if not torch.cuda.is_available():
            return [failed("GPU", "there is none that PyTorch can use", "install its driver, or set device: cpu")]
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return [_room("GPU", free, needed, f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free")]
    available, limit = psutil.virtual_memory().available, site.policy.max_memory_gb
    detail = f"{available / GIB:.1f} GiB available"
    if limit:
        return [_room("memory", min(available, int(limit * GIB)), needed, f"{detail}, policy.max_memory_gb {limit:g}")]
    return [_room("memory", available, needed, detail)]


def _room(name: str, free: int, needed: int, detail: str) -> CheckResult:
    if free < needed:
        remedy = "end other programs, or use a larger machine; ld-client dry-run measures the need"
        return warning(name, f"{detail}; this base needs about {needed / GIB:.1f}", remedy)
    return good(name, detail)


def _modality(checked: CheckedSite) -> list[CheckResult]:
    digest, expected = load_modality(checked.site).digest(), checked.kit.modality_digest
    if digest != expected:
        detail = f"it is {digest[:16]}, the study's is {expected[:16]}"
        return [failed("modality", detail, "point modality at kit/modality.yaml, then run ld-client index again")]
    return [good("modality", f"{digest[:16]}, the study's")]


def _index(checked: CheckedSite) -> list[CheckResult]:
    store, visits = checked.store, defaultdict[str, set[int]](set)
    for patient, day in zip(store.pseudonyms, store.days, strict=True):
        visits[patient].add(day)
    held_out = checked.split[1].patients
    counts = f"{len(visits)} patients with {len(store.latents)} visits to train on, {held_out} patients held out"
    try:
        check_store(checked.site.policy, store, checked.study)
        results = [good("index", counts)]
    except LdError as error:
        results = [failed("index", f"{counts}: {error}", "index more scans, or lower policy.min_patients")]
    again = sum(len(days) > 1 for days in visits.values())
    detail = f"{again} patients have visits at two dates or more"
    remedy = "no patient shows change over time; ld-client exclusions lists what was excluded"
    results.append(good("pairs", detail) if again else warning("pairs", detail, remedy))
    ages = sum("age" in attributes for attributes in store.attributes)
    detail = f"{ages} of {len(store.latents)} visits have an age"
    complete = ages == len(store.latents)
    remedy = "name the age's column in data.columns.attributes"
    results.append(good("ages", detail) if complete else warning("ages", detail, remedy))
    return [*results, *face_results(checked.site.store_path)]


def face_results(store: Path) -> list[CheckResult]:
    """The notice about head volumes with a face; none where the index looked at none. Raises `StoreError`."""
    count = read_face_count(store)
    if count is None or not count.volumes:
        return []
    return [warning("faces", str(count), REMEDY) if count.faces else good("faces", str(count))]


def _policy(checked: CheckedSite) -> list[CheckResult]:
    site, study = checked.site, checked.study
    check_study(site.policy, study)
    check_size(
        site.policy, inject(load_denoiser(site.base_model), read_adapter(study.site_adapter(site.site)), study.seed)
    )
    charged = by_study(Ledger(site.ledger_path).entries()).get(study.digest(), [])
    rounds = sum(entry.purpose == "training" for entry in charged)
    left = site.policy.max_rounds - rounds
    results = [good("policy", "the study asks for no more than this site allows")]
    if left < study.federation.rounds:
        detail = f"{rounds} rounds of the study were trained, policy.max_rounds leaves {left}"
        results = [warning("policy", detail, "raise policy.max_rounds if the study is to start again")]
    try:
        check_hours(site.policy)
    except PolicyError as error:
        results.append(warning("hours", str(error), "wait, or change policy.hours"))
    return results


def _budget(checked: CheckedSite) -> list[CheckResult]:
    site, study = checked.site, checked.study
    if not study.privacy.enabled:
        return [good("budget", "the study has no differential privacy: no ε is defined or charged")]
    delta, limit = site.policy.delta, site.policy.max_epsilon
    entries = Ledger(site.ledger_path).entries()
    charged, (next_round, all_rounds) = private_charges(entries), remaining_charges(site, checked.store, study, entries)
    spent = epsilon(charged, delta)
    after_next, after_all = (epsilon([*charged, *charges], delta) for charges in (next_round, all_rounds))
    detail = f"ε {spent:.3g} of {limit:g} is spent; all rounds of the study bring it to {after_all:.3g} (δ {delta:g})"
    remedy = "raise policy.max_epsilon, or ask the study for a smaller privacy.target_epsilon"
    if after_next > limit:
        return [failed("budget", f"{detail}: no round fits", remedy)]
    if after_all > limit:
        return [warning("budget", f"{detail}: some rounds fit, the last do not", remedy)]
    return [good("budget", detail)]
