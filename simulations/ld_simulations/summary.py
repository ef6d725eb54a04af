"""The numbers of a demo run, and their aims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ld_client.data.store import Store
from ld_common.diffusion.base_model import load_denoiser
from ld_common.release.release import Release
from ld_simulations.aims import Aim
from ld_simulations.demo import Demo
from ld_simulations.evaluation import SimulatedEvaluation
from ld_simulations.resources import ResourceMonitor

AIMS = {
    "seconds_total": Aim("at most 600", at_most=600),
    "peak_rss_mb": Aim("at most 4,000", at_most=4000),
    "sites": Aim("3", 3, 3),
    "rounds": Aim("at least 3", at_least=3),
    "patients_per_site": Aim("at least 40", at_least=40),
    "uplink_share": Aim("at most 0.05 of the UNet", at_most=0.05),
    "vae_psnr_db": Aim("at least 35", at_least=35),
    "inversion_psnr_db": Aim("at least 38", at_least=38),
    "edit_direction_rate": Aim("at least 0.95", at_least=0.95),
    "growth_ratio": Aim("0.7 to 1.3", 0.7, 1.3),
    "growth_correlation": Aim("at least 0.5", at_least=0.5),
    "copy_gain_db": Aim("at least 2", at_least=2),
    "identity_ratio": Aim("at most 2", at_most=2),
}


def summarize_run(
    demo: Demo, release: Release, evaluation: SimulatedEvaluation, monitor: ResourceMonitor, stores: Sequence[Store]
) -> dict[str, Any]:
    """All numbers of a run: cost, participants, traffic and the quality of the counterfactuals."""
    rounds = [record for record in release.manifest["rounds"] if record["counted"]]
    unet = load_denoiser(demo.study.base_model).unet
    full_bytes = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    uplink = max(site["uplink_bytes"] for record in rounds for site in record["sites"].values())
    patients = [len(set(store.pseudonyms)) for store in stores]
    return {
        "seconds_total": monitor.seconds,
        "peak_rss_mb": monitor.peak_rss_mb,
        "sites": len({name for record in rounds for name in record["sites"]}),
        "rounds": len(rounds),
        "patients": sum(patients),
        "patients_per_site": min(patients),
        "visits": sum(len(store.latents) for store in stores),
        "uplink_bytes_per_site_round": uplink,
        "full_model_bytes": full_bytes,
        "uplink_share": uplink / full_bytes,
        "held_out_patients": len(evaluation.scans),
        "counterfactuals": len(evaluation.truths),
        **evaluation.summary,
    }
