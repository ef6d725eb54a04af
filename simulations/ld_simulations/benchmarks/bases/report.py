"""The page of the benchmark of bases."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
EXACT = (
    "null_edit_max_error",
    "per_sample_gradient_error",
    "two_process_adapter_difference",
    "pipeline_max_difference",
)


def page(found: dict[str, Any]) -> str:
    """The numbers as a Markdown page."""
    rows, amx = found["rows"], "has" if found["cpu_has_amx"] else "has no"
    lines = [
        "# Bases",
        "",
        "Written by `make benchmark-bases`. Each row is a folder of the base's real classes and config keys, of small "
        "width, with random weights: what is shown is that the arithmetic is right, not what a trained base draws. "
        "Choose a base in [Your own base model](../howto/own-base-model.md).",
        "",
        f"Processor: {found['processor']}, threads: {found['threads']}.",
        "",
        "| number | measured | aim |",
        "|---|---|---|",
        f"| `bases_supported` (rows that meet every aim below) | {found['bases_supported']} of {len(rows)} | >= 5 |",
        f"| `null_edit_max_error` | {found['null_edit_max_error']:.1e} | <= 1e-3 |",
        f"| `per_sample_gradient_error` | {found['per_sample_gradient_error']:.1e} | <= 1e-5 |",
        f"| `drift_target_error` | {found['drift_target_error']:.1e} | <= 0.05 |",
        f"| `two_process_adapter_difference` | {found['two_process_adapter_difference']:.1e} | <= 1e-6 |",
        f"| `cpu_bf16_over_fp32` (median of the rows) | {found['cpu_bf16_over_fp32']:.2f} | >= 1.1 where the "
        f"processor has AMX; this one {amx} |",
    ]
    return "\n".join([*lines, *_exactness(rows), *_drift(rows), *_what_fits(rows), ""])


def _exactness(rows: list[Row]) -> list[str]:
    lines = [
        "",
        "## Exactness",
        "",
        "- **Null edit**: largest difference of latents between two scans and what `belm`, `ddpm` and `flowedit` "
        "return of them with nothing changed, 8 steps, from noise fractions .6 and 1. Doing nothing scores 0; the "
        "point is that the editors' own way through the network comes back.",
        "- **Single gradients**: distance of opacus's gradients of four single examples from autograd's, as a share "
        "of their length.",
        "- **Two processes**: largest difference of a LoRA's numbers after three steps of five examples at a learning "
        "rate of 1e-4 over gloo, from that of one process. AdamW's steps are as long as the rate even where a gradient "
        "is rounding alone, so the difference grows with the rate.",
        "- **Pipeline**: largest difference of six-step samples from those of diffusers' own pipeline, from the same "
        "noise and prompts. For bases of β both take DDIM's steps.",
        "",
        "| base | latents | null edit | single gradients | two processes | pipeline | bf16 / fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = " × ".join(map(str, row["latent_shape"]))
        numbers = " | ".join(f"{row[key]:.1e}" for key in EXACT)
        lines.append(f"| {row['base']} | {shape} | {numbers} | {row['cpu_bf16_over_fp32']:.2f} |")
    return lines


def _drift(rows: list[Row]) -> list[str]:
    steps = list(rows[0]["drift"]["by_steps"])
    lines = [
        "",
        "## Drift",
        "",
        f"How far the mean of samples is from that of the data, as a share of it, after {', '.join(steps)} steps. The "
        "network is replaced by one that is exactly right for Gaussian data of that mean, so only the base's own "
        "schedule decides; *without* is the same without a drift. Where the schedule ends without signal nothing "
        "leaks, a `prior` drift changes no number, and `centred`, with a network that is right for centred data, is "
        "measured in its place. Without a drift a perfect network comes within 5 % by itself at 50 steps: it finds "
        "its way back from a wrong start, which [trained ones do not](latent_drift.md).",
        "",
        "| base | formulation | `prior` is inert | "
        + " | ".join(f"{step} steps: with / without" for step in steps)
        + " |",
        "|---|---|---|" + "---|" * len(steps),
    ]
    for row in rows:
        drift = row["drift"]
        cells = [f"{values['error']:.4f} / {values['error_without']:.4f}" for values in drift["by_steps"].values()]
        inert = "yes" if drift["prior_is_inert"] else "no"
        lines.append(f"| {row['base']} | `{drift['formulation']}` | {inert} | {' | '.join(cells)} |")
    return lines


def _what_fits(rows: list[Row]) -> list[str]:
    lines = [
        "",
        "## What fits",
        "",
        "Adapters trained for two steps, were saved and read again without a change; editors answered another prompt. "
        "`drift` fits every base, as it asks no network.",
        "",
        "| base | adapters | editors | refused |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [", ".join(f"`{name}`" for name in row[key]) or "none" for key in ("adapters", "editors", "refused")]
        lines.append(f"| {row['base']} | {' | '.join(cells)} |")
    sentences = {sentence for row in rows for sentence in row["refused"].values()}
    return [*lines, "", "What is refused says why:", "", *(f"- {sentence}" for sentence in sorted(sentences))]
