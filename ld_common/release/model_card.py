"""A release's card: what a person reads before using it. Every number in it is of the manifest, which is signed."""

from __future__ import annotations

import math
from typing import Any

import torch

from ld_common.diffusion.drift import by_channel


def release_card(manifest: dict[str, Any], adapter_digest: str) -> str:
    """The card as Markdown, from a manifest that may lack the hashes of its files."""
    study, rounds = manifest["study"], manifest["rounds"]
    sites = sorted({name for record in rounds for name in record["sites"]})
    rows = []
    for name in sites:
        seen = [record["sites"][name] for record in rounds if name in record["sites"]]
        drift = manifest["drift"]["sites"].get(name)
        shift = _shown_drift(drift, "none" if manifest["drift"]["mean"] is None else "hidden in the sum")
        patients, visits = (seen[-1][key] or "withheld" for key in ("patients", "visits"))
        rows.append(f"| {name} | {patients} | {visits} | {len(seen)} | {shift} |")
    if not manifest["drift"]["sites"] and manifest["drift"]["mean"] is not None:
        rows.append(f"| their mean | | | | {_shown_drift(manifest['drift']['mean'], '')} |")
    parameters = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"].values())
    software = ", ".join(f"{name} {number}" for name, number in sorted(manifest["software"].items()))
    return "\n".join(
        [
            f"# {study['name']}: a shared counterfactual generator",
            "",
            f"A {study['adapter']['name'].replace('_', ' ')} adapter ({parameters:,} numbers) of the base model "
            f"`{manifest['base_model']['name']}` (sha256 `{manifest['base_model']['sha256'][:16]}`), trained by "
            f"{len(sites)} sites in {len(rounds)} rounds. No scan left a site.",
            "",
            "| site | patients | visits | rounds | drift μ by latent channel (mean) |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Drift: {study['drift']['formulation']}, found by {study['drift']['estimator']}.",
            f"Images: {manifest['modality']['name']}; prompts: `{manifest['modality']['prompt_template']}`.",
            _privacy_sentence(manifest["privacy"]),
            *(
                ["Secure aggregation: the server learned the sum over each round's sites and no site's own update."]
                if study["federation"]["secure_aggregation"]
                else []
            ),
            "For research. Counterfactual images are model output, not observations of a patient.",
            "",
            *_evaluation(manifest.get("evaluation", {})),
            "| SHA-256 of | |",
            "|---|---|",
            f"| the adapter | `{adapter_digest}` |",
            f"| the base model | `{manifest['base_model']['sha256']}` |",
            f"| the study | `{manifest['study_digest']}` |",
            "",
            *_issue(manifest.get("release")),
            f"Software: {software}.",
            "",
        ]
    )


def _evaluation(evaluation: dict[str, Any]) -> list[str]:
    """The numbers of an evaluation that are not nested, as a table; the manifest has all of it."""
    numbers = {
        key: value
        for key, value in evaluation.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not numbers:
        return []
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in numbers.items()
    ]
    return ["| evaluation | |", "|---|---|", *rows, ""]


def _issue(issue: dict[str, Any] | None) -> list[str]:
    """Which release of its study this is, where it was issued and not only written by a run."""
    return [] if issue is None else [f"Release {issue['number']} of this study, {issue['released']}.", ""]


def _shown_drift(drift: list[Any] | None, otherwise: str) -> str:
    return otherwise if drift is None else ", ".join(f"{value:+.3f}" for value in by_channel(torch.tensor(drift)))


def _privacy_sentence(statement: dict[str, Any]) -> str:
    if not statement["differential_privacy"]:
        return "Trained without differential privacy: no ε is claimed, and images may reveal training patients."
    return (
        f"Differential privacy: ε = {statement['epsilon']:.3g} at δ = {statement['delta']:g} for {statement['unit']}, "
        f"over {statement['horizon']} (noise multiplier {statement['noise_multiplier']:.3g}, sampling rate "
        f"{statement['sampling_rate']:.3g}, {statement['steps']} steps, clip norm {statement['max_grad_norm']:g}; "
        f"{statement['accountant']}; {statement['epsilon_by_renyi']:.3g} by Rényi DP)."
    )
