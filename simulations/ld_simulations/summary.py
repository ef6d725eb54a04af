"""The numbers of a demo run, and their aims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ld_client.data.store import Store
from ld_common.diffusion.base_model import load_denoiser
from ld_common.release.release import Release
from ld_evaluate.comparison import r_over_ceiling
from ld_simulations.aims import Aim
from ld_simulations.demo import Demo
from ld_simulations.evaluation import SimulatedEvaluation
from ld_simulations.hospitals import held_out_population
from ld_simulations.hospitals_config import HospitalsConfig
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from ld_simulations.phantoms.registry import find_phantom

AIMS = {
    "seconds_total": Aim("at most 240", at_most=240),
    "peak_rss_mb": Aim("at most 4,000", at_most=4000),
    "sites": Aim("3", 3, 3),
    "rounds": Aim("at least 3", at_least=3),
    "patients_per_site": Aim("at least 40", at_least=40),
    "uplink_share": Aim("at most 0.05 of the UNet", at_most=0.05),
    "vae_psnr_db": Aim("at least 35", at_least=35),
    "inversion_psnr_db": Aim("at least 38", at_least=38),
    "raw_gain_db": Aim("at least 2 over copying", at_least=2),
    "error_over_best_rule": Aim("at most 1", at_most=1),
    "within_edit_r_over_ceiling": Aim("at least 0.5", at_least=0.5),
}
"""A number that a rule without a picture reaches is no aim."""
COST = ("seconds_total", "peak_rss_mb")
"""Known only once the report is written, so the report has them not."""
TITLES = {
    "seconds_total": "seconds, from the start to the last file",
    "peak_rss_mb": "largest memory, MB",
    "sites": "hospitals in the release",
    "rounds": "rounds that count",
    "patients_per_site": "patients of the smallest hospital",
    "uplink_share": "sent by a hospital in a round, over the whole UNet",
    "vae_psnr_db": "scan through the VAE, PSNR, dB",
    "inversion_psnr_db": "reconstruction against the VAE's, PSNR, dB",
    "raw_gain_db": "gain over the unedited scan, dB",
    "error_over_best_rule": "error of growth over that of the better rule without a picture",
    "within_edit_r_over_ceiling": "r of growth over its ceiling",
}
"""What the keys of `AIMS` measure."""


def summarize_run(
    demo: Demo, release: Release, evaluation: SimulatedEvaluation, stores: Sequence[Store]
) -> dict[str, Any]:
    """The numbers of a run but for its cost: participants, traffic and the quality of the counterfactuals."""
    rounds = [record for record in release.manifest["rounds"] if record["counted"]]
    unet = load_denoiser(demo.study.base_model).unet
    full_bytes = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    uplink = max(site["uplink_bytes"] for record in rounds for site in record["sites"].values())
    patients = [len(set(store.pseudonyms)) for store in stores]
    ceilings, (structure, *_) = edit_ceilings(demo.hospitals), release.modality.biomarkers
    return {
        "sites": len({name for record in rounds for name in record["sites"]}),
        "rounds": len(rounds),
        "patients": sum(patients),
        "patients_per_site": min(patients),
        "visits": sum(len(store.latents) for store in stores),
        "uplink_bytes_per_site_round": uplink,
        "full_model_bytes": full_bytes,
        "uplink_share": uplink / full_bytes,
        "held_out_patients": len(evaluation.judged.scans),
        "counterfactuals": len(evaluation.judged.truths),
        **evaluation.summary,
        "ceilings": ceilings,
        "within_edit_r_over_ceiling": r_over_ceiling(structure, evaluation.summary["by_edit"], ceilings),
    }


def edit_ceilings(hospitals: HospitalsConfig) -> dict[str, float]:
    """By kind of edit, the highest r of growth over test patients that a prediction from one scan can have."""
    populations = [held_out_population(hospital.population) for hospital in hospitals.hospitals]
    return growth_ceiling(populations, phantom=find_phantom(hospitals.phantom)).by_edit
