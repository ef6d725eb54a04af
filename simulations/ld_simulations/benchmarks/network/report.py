"""The page of the trained network: what it adds to the closed form, and what not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ld_evaluate.bootstrap import bootstrap_interval
from ld_simulations.benchmarks.individual.answers import Record
from ld_simulations.benchmarks.network.judge import CLOSED, COPY, GAUSSIAN, NETWORK, OTHERS, TRUE
from ld_simulations.benchmarks.network.plan import PLAIN, NetworkConfig

CENTRAL = 1.645
"""Deviations of a normal distribution between which 90 % lie."""
EXPLAINED = {
    PLAIN: "trained network",
    "centred": "trained network, centred",
    "mirrored": "trained network, mirror images too",
}
DISTANCES = {
    "frechet_efficientnet_lite0": "FD efficientnet_lite0",
    "kernel_efficientnet_lite0": "KD efficientnet_lite0",
    "frechet_gabor": "FD gabor",
    "kernel_gabor": "KD gabor",
}
Results = Mapping[str, Mapping[str, Any]]


def flat_numbers(results: Results) -> dict[str, Any]:
    """All numbers of the page, by table and row."""
    answers = {
        row: answer_numbers(result["records"]) | result["likeness"] for row, result in results["answers"].items()
    }
    return {
        "noise": dict(results["noise"]),
        "answers": answers,
        "draws": {row: draw_numbers(records) for row, records in results["draws"].items()},
    }


def answer_numbers(records: Sequence[Record]) -> dict[str, float]:
    """Gain with its interval, and r and the error of growth over the questions of time."""
    numbers: dict[str, float] = {}
    gained = [record for record in records if record["gain_db"] is not None]
    if gained:
        gains = np.array([record["gain_db"] for record in gained])
        numbers["gain_db"] = float(gains.mean())
        numbers |= bootstrap_interval("gain_db", np.array([record["patient"] for record in gained]), gains)
    for question in sorted({record["question"] for record in records}):
        of = [record for record in records if record["question"] == question]
        drawn, true = (np.array([record[key] for record in of]) for key in ("growth_mm2", "true_growth_mm2"))
        numbers[f"{question}_error_mm2"] = float(np.abs(drawn - true).mean())
        if all(record["gain_db"] is not None for record in of):
            numbers[f"{question}_gain_db"] = float(np.mean([record["gain_db"] for record in of]))
        if question.startswith("age") and np.ptp(drawn) > 0:
            numbers[f"{question}_r"] = float(np.corrcoef(drawn, true)[0, 1])
    return numbers


def draw_numbers(records: Sequence[Record]) -> dict[str, float]:
    """Whether the spread of several answers tells how wrong they are, and what their mean is worth."""
    several = np.array([record["growths_mm2"] for record in records])
    true = np.array([record["true_growth_mm2"] for record in records])
    deviations, errors = several.std(1, ddof=1), several.mean(1) - true
    return {
        "answers": len(records),
        "draws": several.shape[1],
        "deviation_mm2": float(np.sqrt((deviations**2).mean())),
        "error_mm2": float(np.sqrt((errors**2).mean())),
        "coverage_90": float((np.abs(errors) <= CENTRAL * deviations).mean()),
        "one_gain_db": float(np.mean([record["one_gain_db"] for record in records])),
        "mean_gain_db": float(np.mean([record["gain_db"] for record in records])),
    }


def page_lines(config: NetworkConfig, results: Results) -> list[str]:
    """The page as lines of Markdown; what has no result yet is left out."""
    numbers = flat_numbers(results)
    lines = [
        "# What the trained network adds",
        "",
        "Written by `make benchmark-network` (`ld-benchmark network`). The study's LoRA, trained in rounds of three "
        f"hospitals ({config.training.patients} patients each, seed {config.training.seed}), beside the closed form, "
        "the longitudinal drift fitted to the same patients. Test patients are of seed "
        f"{config.test.seed}, those they are compared with of seed {config.others.seed}; nothing was chosen on either.",
        "",
        *verdict_lines(numbers),
        "## Pictures from noise",
        "",
        f"{3 * config.test.patients} pictures for the attributes of the test patients, after the VAE, against as many "
        "other patients: Fréchet (FD) and kernel distance (KD) of two feature sets, lower is better; not comparable "
        "with the literature's FID. *Sharpness*: of real pictures' 1. *Size slope*: how the ventricles follow the "
        f"prompt, 1 as in real scans. {config.sampling_steps} steps of dpm-solver++ from the drift's mean for the "
        "attributes. *Centred*: trained on what the drift leaves of each visit.",
        "",
        "| | FD efficientnet_lite0 | KD efficientnet_lite0 | FD gabor | KD gabor | sharpness | size slope |",
        "|---" * 7 + "|",
        *(_noise_row(row, measured) for row, measured in numbers["noise"].items()),
        "",
        "## Answers for single patients",
        "",
        f"{3 * config.asked_patients} test patients, four edits each, written in the scan's own pixels. *Gain*: dB "
        "nearer to the true answer than the scan, with a 95 % interval over patients. *KD*: of efficientnet_lite0's "
        "features, written and decoded answers against the true answers of other patients: how real they look, whoever "
        "they show. *Redrawn*: the scan's edit-friendly DDPM state (arXiv 2304.06140) is shifted by the closed form's "
        "change, and the network denoises it.",
        "",
        "| answer | gain, dB | disease added, dB | removed, dB | other sex, dB | r, +10 years | r, +20 | KD written "
        "| KD decoded |",
        "|---" * 9 + "|",
        *(_answer_row(row, measured) for row, measured in numbers["answers"].items()),
        "",
    ]
    if drawn := numbers["draws"].get(NETWORK):
        lines += [
            "## Several answers",
            "",
            f"The network's answers to {drawn['answers']} questions of time under {drawn['draws']} seeds. If they were "
            "draws of what may happen, their spread would be as large as their error, and the true growth would lie "
            f"within ±{CENTRAL} of their deviations in 90 %.",
            "",
            "| deviation of the draws, mm² | error of their mean, mm² | true growth within 90 % | gain of one, dB "
            "| gain of their mean, dB |",
            "|---" * 5 + "|",
            f"| {drawn['deviation_mm2']:.0f} | {drawn['error_mm2']:.0f} | {drawn['coverage_90']:.0%} "
            f"| {drawn['one_gain_db']:.2f} | {drawn['mean_gain_db']:.2f} |",
            "",
            "How sure an answer is, the bands of the [individual answers](individual.md) tell, which are calibrated on "
            "held-back patients.",
            "",
        ]
    return lines


def verdict_lines(numbers: Mapping[str, Any]) -> list[str]:
    """Where the network wins and where it does not, in words that follow from the numbers."""
    noise, answers, lines = numbers["noise"], numbers["answers"], list[str]()
    if PLAIN in noise and GAUSSIAN in noise:
        plain, rule = noise[PLAIN], noise[GAUSSIAN]
        better = [label for key, label in DISTANCES.items() if plain[key] < rule[key]]
        said = f"wins by {', '.join(better)}" if better else "does not win by any distance"
        lines.append(f"- **Pictures from noise**: the trained network {said}, beside a Gaussian.")
    if CLOSED in answers and NETWORK in answers:
        closed, network = answers[CLOSED], answers[NETWORK]
        kinds = [key[: -len("_gain_db")] for key in closed if key.endswith("_gain_db")]
        wins = [kind.replace("_", " ") for kind in kinds if network[f"{kind}_gain_db"] > closed[f"{kind}_gain_db"]]
        lines.append(
            f"- **Answers for single patients**: {network['gain_db']:.2f} dB by the network, "
            f"{closed['gain_db']:.2f} dB by the closed form; the network is nearer to the truth in "
            f"{', '.join(wins) if wins else 'no kind of edit'}."
        )
        redrawn = {row: measured["gain_db"] for row, measured in answers.items() if "redrawn" in row}
        if redrawn:
            best = max(redrawn, key=lambda row: redrawn[row])
            lines.append(
                f"- **The closed form, redrawn by the network**: {redrawn[best]:.2f} dB at best, "
                f"{'more' if redrawn[best] > closed['gain_db'] else 'less'} than without."
            )
        key = "written_kernel_efficientnet_lite0"
        lines.append(
            f"- **Realism of what is written**: KD {network[key]:.4f} by the network, {closed[key]:.4f} by the closed "
            f"form, {answers[COPY][key]:.4f} of the scans themselves, {answers[TRUE][key]:.4f} of true answers."
        )
    if drawn := numbers["draws"].get(NETWORK):
        lines.append(
            f"- **Several answers**: their spread covers the true growth in {drawn['coverage_90']:.0%}, where 90 % "
            "would be right."
        )
    return [*lines, ""] if lines else ["Not run yet.", ""]


def _noise_row(row: str, measured: Mapping[str, float]) -> str:
    values = [f"{measured[key]:.3g}" for key in DISTANCES] + [
        f"{measured['sharpness_ratio']:.2f}",
        f"{measured['size_slope']:.2f}",
    ]
    return f"| {'real, *other patients*' if row == OTHERS else EXPLAINED.get(row, row)} | {' | '.join(values)} |"


def _answer_row(row: str, measured: Mapping[str, float]) -> str:
    def number(key: str, form: str = ".2f") -> str:
        return format(measured[key], form) if key in measured else ""

    gain = number("gain_db")
    if gain:
        gain += f" ({measured['gain_db_low']:.2f} to {measured['gain_db_high']:.2f})"
    edits = [number(f"{kind}_gain_db") for kind in ("disease_added", "disease_removed", "other_sex")]
    rates = [number(f"age_plus_{years}_r") for years in (10, 20)]
    kernel = [number(f"{kind}_kernel_efficientnet_lite0", ".4f") for kind in ("written", "decoded")]
    return f"| {row} | {gain} | {' | '.join([*edits, *rates, *kernel])} |"
