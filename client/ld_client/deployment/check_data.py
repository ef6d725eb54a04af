"""Whether a site's machine, base model, data, budget and policy can bear a study."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import psutil
import torch

from ld_client.data.store import Store, open_store, split_store
from ld_client.deployment.check_result import CheckResult, failed, good, warning
from ld_client.policy import check_hours, check_size, check_store, check_study
from ld_client.privacy.budget import still_to_charge
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
"""Times the size of a base's weights that training takes at least: weights, activations, an optimizer's moments."""


@dataclass(frozen=True)
class Checked:
    """A site with a readable kit, config and study."""

    site: SiteConfig
    kit: KitManifest
    study: StudyConfig

    @cached_property
    def store(self) -> Store:
        """What would be trained on; raises `StoreError`."""
        store = open_store(
            self.site.store_path, base_digest=self.kit.base_digest, modality_digest=self.kit.modality_digest
        )
        return split_store(store, self.site.held_out)[0]


def check_data(checked: Checked) -> list[CheckResult]:
    """Everything that needs no network."""
    checks: list[tuple[str, str, Callable[[Checked], list[CheckResult]]]] = [
        ("disk", "make the folder of `store` writable", _disk),
        ("base model", "point base_model at the study's base", _base),
        ("memory", "use a machine that can hold the base", _memory),
        ("modality", "point modality at kit/modality.yaml", _modality),
        ("index", "run ld-client index with this home's site.yaml", _index),
        ("policy", "talk to the study, or change the site's policy", _policy),
        ("budget", "talk to the study, or change policy.max_epsilon", _budget),
    ]
    findings: list[CheckResult] = []
    for name, remedy, check in checks:
        found = guarded(name, remedy, partial(check, checked))
        if any(one.name == "base model" and one.said == found[0].said for one in findings):  # it is told already
            found = [warning(name, "not checked: it needs the base model", "mend the base model first")]
        findings += found
    return findings


def guarded(name: str, remedy: str, check: Callable[[], list[CheckResult]]) -> list[CheckResult]:
    """A check's findings; one that cannot be made has failed."""
    try:
        return check()
    except (LdError, OSError) as error:
        return [failed(name, str(error), remedy)]


def _disk(checked: Checked) -> list[CheckResult]:
    folder = checked.site.store_path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said, remedy = f"{free / GIB:.1f} GiB free at the store", "free some space: latents, logs and updates need it"
    if free < LEAST_DISK:
        return [failed("disk", said, remedy)]
    return [warning("disk", said, remedy) if free < LITTLE_DISK else good("disk", said)]


def _base(checked: Checked) -> list[CheckResult]:
    found, wanted = base_digest(checked.site.base_model), checked.kit.base_digest
    if found != wanted:
        remedy = "point base_model at the study's base: the same files, byte for byte"
        return [failed("base model", f"it is {found[:16]}, the study's is {wanted[:16]}", remedy)]
    return [good("base model", f"{found[:16]}, as the study's")]


def _memory(checked: Checked) -> list[CheckResult]:
    site = checked.site
    folder = locate_base(site.base_model)
    parts = [file for part in ("unet", "text_encoder") for file in (folder / part).glob("*.safetensors")]
    needed = MEMORY_SHARE * sum(file.stat().st_size for file in parts)
    if site.device == "cuda":
        if not torch.cuda.is_available():
            return [failed("GPU", "there is none that PyTorch can use", "install its driver, or set device: cpu")]
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return [_room("GPU", free, needed, f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free")]
    available, limit = psutil.virtual_memory().available, site.policy.max_memory_gb
    said = f"{available / GIB:.1f} GiB available"
    if limit:
        return [_room("memory", min(available, int(limit * GIB)), needed, f"{said}, policy.max_memory_gb {limit:g}")]
    return [_room("memory", available, needed, said)]


def _room(name: str, free: int, needed: int, said: str) -> CheckResult:
    if free < needed:
        remedy = "end other programs, or use a larger machine; ld-client dry-run shows the real need"
        return warning(name, f"{said}; this base takes some {needed / GIB:.1f}", remedy)
    return good(name, said)


def _modality(checked: Checked) -> list[CheckResult]:
    found, wanted = load_modality(checked.site).digest(), checked.kit.modality_digest
    if found != wanted:
        said = f"it is {found[:16]}, the study's is {wanted[:16]}"
        return [failed("modality", said, "point modality at kit/modality.yaml, then run ld-client index again")]
    return [good("modality", f"{found[:16]}, as the study's")]


def _index(checked: Checked) -> list[CheckResult]:
    store, visits = checked.store, defaultdict[str, set[int]](set)
    for patient, day in zip(store.pseudonyms, store.days, strict=True):
        visits[patient].add(day)
    counts = f"{len(visits)} patients, {len(store.latents)} visits to train on"
    try:
        check_store(checked.site.policy, store, checked.study)
        findings = [good("index", counts)]
    except LdError as error:
        findings = [failed("index", f"{counts}: {error}", "index more scans, or lower policy.min_patients")]
    again = sum(len(days) > 1 for days in visits.values())
    said = f"{again} patients were seen at two dates or more"
    remedy = "nothing shows how a patient changes: see ld-client left-out"
    findings.append(good("pairs", said) if again else warning("pairs", said, remedy))
    ages = sum("age" in attributes for attributes in store.attributes)
    said = f"{ages} of {len(store.latents)} visits have an age"
    whole = ages == len(store.latents)
    remedy = "name the age's column in data.columns.attributes"
    return [*findings, good("ages", said) if whole else warning("ages", said, remedy)]


def _policy(checked: Checked) -> list[CheckResult]:
    site, study = checked.site, checked.study
    check_study(site.policy, study)
    check_size(site.policy, inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed))
    done = by_study(Ledger(site.ledger_path).entries()).get(study.digest(), [])
    rounds = sum(entry.purpose == "training" for entry in done)
    left = site.policy.max_rounds - rounds
    findings = [good("policy", "the study asks for no more than this site allows")]
    if left < study.federation.rounds:
        said = f"{rounds} rounds of the study are trained, policy.max_rounds leaves {left}"
        findings = [warning("policy", said, "raise policy.max_rounds if the study is to begin anew")]
    try:
        check_hours(site.policy)
    except PolicyError as error:
        findings.append(warning("hours", str(error), "wait, or change policy.hours"))
    return findings


def _budget(checked: Checked) -> list[CheckResult]:
    site, study = checked.site, checked.study
    if not study.privacy.enabled:
        return [good("budget", "the study has no differential privacy: no ε can be said, none is charged")]
    delta, limit = site.policy.delta, site.policy.max_epsilon
    entries = Ledger(site.ledger_path).entries()
    held, (next_round, every_round) = private_charges(entries), still_to_charge(site, checked.store, study, entries)
    spent = epsilon(held, delta) if held else 0.0
    one, whole = (epsilon([*held, *charges], delta) for charges in (next_round, every_round))
    said = f"ε {spent:.3g} of {limit:g} is spent; all rounds of the study bring it to {whole:.3g} (δ {delta:g})"
    remedy = "raise policy.max_epsilon, or ask the study for a smaller privacy.target_epsilon"
    if one > limit:
        return [failed("budget", f"{said}: not one round fits", remedy)]
    if whole > limit:
        return [warning("budget", f"{said}: some rounds fit, the last do not", remedy)]
    return [good("budget", said)]
