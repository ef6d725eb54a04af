"""A release's model card: YAML front matter for the hub, and what a person reads before using it.

Every number in it comes from the manifest, which is signed.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from ld_common.protocol.study_config import FEDSA
from ld_common.release.abilities import all_abilities

USAGE = {
    "pytorch_lora_weights.safetensors": "`pipe.load_lora_weights(folder)` in diffusers, "
    "`PeftModel.from_pretrained(pipe.unet, folder)` in peft",
    "unet/diffusion_pytorch_model.safetensors": "`UNet2DConditionModel.from_pretrained(folder, subfolder='unet')` "
    "in diffusers",
    "learned_embeds.safetensors": "`pipe.load_textual_inversion(folder, weight_name=...)` in diffusers, once for each "
    "`learned_embeds*.safetensors`",
    "pytorch_custom_diffusion_weights.safetensors": "`pipe.unet.load_attn_procs(folder, weight_name="
    "'pytorch_custom_diffusion_weights.safetensors', _pipeline=pipe)` in diffusers",
}
"""How the weights load without this software, by the name of their file."""
BASELINE_WEIGHTS = "conv_in_baseline.safetensors"


def release_card(manifest: dict[str, Any]) -> str:
    """The card as Markdown; raises `KeyError` for a manifest that lacks an entry."""
    study, base = manifest["study"], manifest["base_model"]
    parameters = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"].values())
    adapter = study["adapter"]["name"].replace("_", " ")
    software = ", ".join(f"{name} {number}" for name, number in sorted(manifest["software"].items()))
    lines = [
        _front_matter(manifest),
        f"# {study['name']}: a counterfactual image generator",
        "",
        f"A {adapter} adapter ({parameters:,} parameters) of the base model `{base['name']}` "
        f"(sha256 `{base['sha256'][:16]}`). {_origin(manifest)}",
        "",
        *_site_table(manifest),
        f"Images: {manifest['modality']['name']}; prompts: `{manifest['modality']['prompt_template']}`.",
        _privacy_sentence(manifest["privacy"]),
        *_start_sentences(manifest.get("start")),
    ]
    if study["federation"]["secure_aggregation"]:
        lines.append(
            "Secure aggregation: the server saw the sum over each round's sites, never the update of one site."
        )
    lines += [
        "For research. Counterfactual images are model output, not observations of a patient.",
        "",
        *_usage(manifest),
        *_evaluation(manifest.get("evaluation", {})),
        "| SHA-256 of | |",
        "|---|---|",
        f"| the adapter | `{manifest['files'][manifest['weights']]}` |",
        f"| the base model | `{base['sha256']}` |",
        f"| the study | `{manifest['study_digest']}` |",
        "",
        *_issue(manifest.get("release")),
        f"Software: {software}.",
        "",
    ]
    return "\n".join(lines)


def _front_matter(manifest: dict[str, Any]) -> str:
    adapter = manifest["study"]["adapter"]["name"].replace("_", "-")
    is_lora = "pytorch_lora_weights.safetensors" in manifest["files"]
    tags = ["diffusers", "stable-diffusion", "medical", "counterfactual", "federated-learning", adapter]
    fields = {
        "base_model": manifest["base_model"]["hub_id"] or manifest["base_model"]["name"],
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "license": "other",
        "license_name": "set-by-the-study",
        "tags": list(dict.fromkeys([*tags, *(["lora"] if is_lora else [])])),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _origin(manifest: dict[str, Any]) -> str:
    if "imported" in manifest:
        return f"Imported from `{manifest['imported']['file']}` (sha256 `{manifest['imported']['sha256'][:16]}`)."
    rounds = manifest["rounds"]
    sites = {name for record in rounds for name in record["sites"]}
    counts = f"{len(sites)} site{'s'[: len(sites) != 1]} in {len(rounds)} round{'s'[: len(rounds) != 1]}"
    return f"Trained by {counts}; no scan left a site."


def _site_table(manifest: dict[str, Any]) -> list[str]:
    if "imported" in manifest:
        return []
    rounds, drift = manifest["rounds"], manifest["drift"]
    rows = []
    for name in sorted({name for record in rounds for name in record["sites"]}):
        records = [record["sites"][name] for record in rounds if name in record["sites"]]
        shown = _shown_drift(drift["sites"].get(name), "none" if drift["mean"] is None else "hidden in the sum")
        patients, visits = (records[-1][key] or "withheld" for key in ("patients", "visits"))
        rows.append(f"| {name} | {patients} | {visits} | {len(records)} | {shown} |")
    if not drift["sites"] and drift["mean"] is not None:
        rows.append(f"| mean of the sites | | | | {_shown_drift(drift['mean'], '')} |")
    options = manifest["study"]["drift"]
    return [
        "| site | patients | visits | rounds | drift μ, mean by latent channel |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Drift: formulation {options['formulation']}, estimator {options['estimator']}.",
        *_own_parts(manifest),
        *_validation(manifest),
    ]


def _own_parts(manifest: dict[str, Any]) -> list[str]:
    """Whose factors the adapter has, where the study left some at the sites."""
    aggregation = manifest["study"]["federation"]["aggregation"]
    if aggregation.get("name") != FEDSA:
        return []
    factor, released = str(aggregation.get("keeps", "b")).upper(), manifest["own_parts"]
    if not released:
        lost = "the adapter changes nothing" if factor == "B" else f"its {factor} is the study's first"
        return ["", f"Each site kept its own {factor} of the adapter and released none: without a site's file, {lost}."]
    names = ", ".join(released)
    return ["", f"Each site has its own {factor} of the adapter; it is the mean of {names}, or one (`--site NAME`)."]


def _validation(manifest: dict[str, Any]) -> list[str]:
    """The mean loss on the sites' held-out patients, first and last, and the round that was chosen by it."""
    losses = {record["round"]: record.get("validation_mean", {}).get("loss") for record in manifest["rounds"]}
    scored = {number: loss for number, loss in losses.items() if loss is not None}
    if not scored:
        return []
    first, last = min(scored), max(scored)
    line = f"Loss on held-out patients: {scored[first]:.4g} after round {first}, {scored[last]:.4g} after round {last}."
    if manifest["study"]["federation"].get("keep") == "best":
        line += f" The release is of round {min(scored, key=lambda number: (scored[number], number))}, the lowest."
    return ["", line]


def _usage(manifest: dict[str, Any]) -> list[str]:
    usage = USAGE.get(manifest["weights"])
    lines = ["Loads with `CounterfactualPipeline.from_release(folder)` of latent-drift-federation."]
    if usage:
        lines.append(f"The weights load by {usage}.")
    if BASELINE_WEIGHTS in manifest["files"]:
        lines.append(
            "Without this software the adapter ignores the baseline scan, which only this software feeds to it."
        )
    return [*lines, ""]


def _evaluation(evaluation: dict[str, Any]) -> list[str]:
    """What the evaluation says of the release, then its numbers that are not nested; the manifest has all of them."""
    said = all_abilities(evaluation)
    lines = [f"Judged with editor {evaluation.get('editor', 'unknown')}:", "", *(f"- {line}" for line in said), ""]
    numbers = {
        key: value
        for key, value in evaluation.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in numbers.items()
    ]
    return [*(lines if said else []), *(["| evaluation | |", "|---|---|", *rows, ""] if rows else [])]


def _issue(issue: dict[str, Any] | None) -> list[str]:
    """Number and date of an issued release; nothing for the release of a run."""
    return [] if issue is None else [f"Release {issue['number']} of this study, {issue['released']}.", ""]


def _shown_drift(by_channel: list[float] | None, otherwise: str) -> str:
    return otherwise if by_channel is None else ", ".join(f"{value:+.3f}" for value in by_channel)


def _start_sentences(start: dict[str, Any] | None) -> list[str]:
    """What the study began with: its patients are covered by its own privacy, not by this study's ε."""
    if start is None:
        return []
    lines = [
        f"It began with a release of study '{start['study']}' (weights {start['weights_sha256'][:16]}), whose patients "
        f"this release's ε does not cover. {_privacy_sentence(start['privacy'])}"
    ]
    if start["sites_of_both"]:
        lines.append(
            f"{', '.join(start['sites_of_both'])} took part in both studies: there, a patient's ε adds up over them."
        )
    return lines + _start_sentences(start["start"])


def _privacy_sentence(statement: dict[str, Any]) -> str:
    if not statement["differential_privacy"]:
        return "No differential privacy: no ε is claimed, and images may reveal training patients."
    return (
        f"Differential privacy: ε = {statement['epsilon']:.3g} at δ = {statement['delta']:g} for {statement['unit']}, "
        f"over {statement['horizon']} (noise multiplier {statement['noise_multiplier']:.3g}, sampling rate "
        f"{statement['sampling_rate']:.3g}, {statement['steps']} steps, max_grad_norm {statement['max_grad_norm']:g}; "
        f"{statement['accountant']}; {statement['epsilon_by_renyi']:.3g} by Rényi DP). "
        "A patient whom several sites know pays at each: the ε add up."
    )
