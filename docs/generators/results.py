"""Result tables, from docs/benchmarks/*.json, between markers of hand-written pages."""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from generators import ROOT, table
from generators.aggregators import aggregation_table
from generators.source import modules

EDITS = {
    "age_plus_10": "10 years older",
    "age_plus_20": "20 years older",
    "disease_added": "with the disease",
    "disease_removed": "without it",
    "other_sex": "of the other sex",
}
RIDGES = ("cross_sectional", "longitudinal")
DRIFT = "editor drift"
ATTRIBUTES_RULE = "age, sex and diagnosis alone"
INDIVIDUAL_ROWS = (
    "same change for all",
    ATTRIBUTES_RULE,
    "cross-sectional ridge",
    "longitudinal ridge",
    DRIFT,
    "perfect answer",
)
HISTORY_ROWS = (
    "same change for all",
    ATTRIBUTES_RULE,
    "longitudinal ridge",
    "own history",
    "own line of areas",
    DRIFT,
    f"{DRIFT}, history",
    "perfect answer",
)
DISTANCE, MATCHED = "frechet_efficientnet_lite0", "frechet_matched_efficientnet_lite0"
DRIFTS = {
    "drift, one value per latent channel": ("prior", None),
    "drift as a map": ("prior-map", None),
    "drift as a map that follows the prompt": ("prior-conditional", None),
    "*offset noise in training, no drift*": ("none", "offset_noise"),
    "*zero-terminal-SNR base, no drift*": ("none", "zero_terminal_snr"),
}
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def fill(text: str, tables: Mapping[str, str], name: str) -> str:
    """A page with the content of its markers replaced; raises `KeyError` for an unknown table."""
    if not MARKER.search(text):
        raise ValueError(f"{name} has no table marker")
    return MARKER.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", text)


def tables() -> dict[str, str]:
    """Every table by the name in its marker."""
    return {
        "readme": readme(),
        "demo": demo(),
        "demo_edits": demo_edits(),
        "drift": drift(),
        "editors": editors(),
        "privacy": privacy(),
        "individual_brain": individual("brain"),
        "individual_chest": individual("chest"),
        "individual_history": individual_history(),
        "aggregators": aggregation_table(),
    }


@functools.cache
def load(name: str) -> Any:
    """A JSON file under docs/."""
    return json.loads((ROOT / Path("docs") / name).read_text(encoding="utf-8"))


def readme() -> str:
    """The README's table: what was measured beside the simplest rival that was measured."""
    numbers, recorded = load("benchmarks/individual.json"), load("benchmarks/demo.json")
    deployed, trained = load("benchmarks/deployment.json"), load("benchmarks/demo_long.json")
    gains = {name: float(np.mean(list(seeds.values()))) for name, seeds in private_gains().items()}
    ridges = [max(numbers[f"{chest}raw_gain_db_{rule}_ridge"] for rule in RIDGES) for chest in ("", "chest_")]
    aged, later = ("age_plus_10", "age_plus_20"), ("history_5", "history_10")
    rows = [
        [
            "Nearer to the true counterfactual than the unedited scan, brain / chest",
            f"**{numbers['raw_gain_db']:.1f} / {numbers['chest_raw_gain_db']:.1f} dB**",
            f"best ridge regression: {ridges[0]:.1f} / {ridges[1]:.1f} dB",
        ],
        [
            "The trained network, best editor, demo of 5 rounds",
            f"{trained['network']['raw_gain_db']:.1f} dB",
            f"closed form, same patients: {trained['raw_gain_db']:.1f} dB",
        ],
        [
            "Correlation with the patient's own growth from one scan, 10 / 20 years on",
            f"**{_two(DRIFT, 'r', aged)}**",
            f"ridge: {_two('longitudinal ridge', 'r', aged)}; perfect answer: {_two('perfect answer', 'r', aged)}",
        ],
        [
            "The same with three or four visits, 5 / 10 years on",
            f"**{_two(f'{DRIFT}, history', 'r', later)}**",
            f"straight line through the measured areas, no picture: {_two('own line of areas', 'r', later)}",
        ],
        [
            "Error of the single patient's growth over *same change for all*, a rule without a picture",
            f"one scan, 10 / 20 years: {_two(DRIFT, 'error_over_same_for_all', aged)}; with visits, 5 / 10 years: "
            f"**{_two(f'{DRIFT}, history', 'error_over_same_for_all', later)}**",
            f"age, sex, diagnosis alone: {_two(ATTRIBUTES_RULE, 'error_over_same_for_all', aged)}",
        ],
        [
            "Fréchet distance cut by drift, brain / chest",
            f"map: {' / '.join(drift_cuts(*DRIFTS['drift as a map']))}; "
            f"by channel: {' / '.join(drift_cuts('prior', None))}",
            f"offset noise: {' / '.join(drift_cuts('none', 'offset_noise'))}; zero-terminal-SNR base: "
            f"{' / '.join(drift_cuts('none', 'zero_terminal_snr'))}",
        ],
        [
            "Gain of DP-SGD at ε = 8, one hospital of 3,000 patients",
            f"{gains['private']:.2f} dB",
            f"without privacy {gains['plain']:.2f} dB; public start alone {gains['start']:.2f} dB",
        ],
        [
            "Sent by a site in a round: adapter, and the sums of the longitudinal drift",
            f"{recorded['uplink_bytes_per_site_round'] / 1e6:.1f} MB",
            f"{recorded['full_model_bytes'] / 1e6:.1f} MB for full fine-tuning",
        ],
        [
            f"Deployed study: {deployed['kills']} processes killed, {deployed['unauthorised_attempts']} intrusions",
            f"{deployed['rounds_lost']} rounds lost; {deployed['unauthorised_accepted']} accepted",
            "aim: 0 and 0",
        ],
    ]
    return table(["Question", "Measured", "Compared with"], rows)


def _of_row(question: str, row: str, key: str, anatomy: str = "brain") -> float | None:
    """A number of docs/benchmarks/individual.json, or None."""
    value = load("benchmarks/individual.json")[f"{anatomy}_rows"].get(question, {}).get(row, {}).get(key)
    return None if value is None else float(value)


def _two(row: str, key: str, questions: tuple[str, str], form: str = ".2f", anatomy: str = "brain") -> str:
    values = [_of_row(question, row, key, anatomy) for question in questions]
    return " / ".join("" if value is None else f"{value:{form}}" for value in values).strip(" /")


def individual(anatomy: str) -> str:
    """Single patients' answers to the five edits, a row for each way of answering."""
    rows = []
    for row in INDIVIDUAL_ROWS:
        gains = [_of_row(edit, row, "raw_gain_db", anatomy) for edit in EDITS]
        known = [gain for gain in gains if gain is not None]
        rows.append(
            [
                row,
                f"{np.mean(known):.1f}" if known else "",
                _two(row, "raw_gain_db", ("age_plus_10", "age_plus_20"), ".1f", anatomy),
                _two(row, "raw_gain_db", ("disease_added", "disease_removed"), ".1f", anatomy),
                "" if gains[-1] is None else f"{gains[-1]:.1f}",
                _two(row, "r", ("age_plus_10", "age_plus_20"), anatomy=anatomy),
                _two(row, "error_over_same_for_all", ("age_plus_10", "age_plus_20"), anatomy=anatomy),
            ]
        )
    head = [
        "Answer",
        "Gain, five edits, dB",
        "+10 / +20 years, dB",
        "Disease added / removed, dB",
        "Other sex, dB",
        "r, +10 / +20 years",
        "Error over *same change for all*",
    ]
    return table(head, rows)


def individual_history() -> str:
    """What comes 5 and 10 years after the last of three or four visits."""
    later = ("history_5", "history_10")
    rows = [
        [
            row,
            _two(row, "raw_gain_db", later, ".1f"),
            _two(row, "r", later),
            _two(row, "error_over_same_for_all", later),
        ]
        for row in HISTORY_ROWS
    ]
    return table(["Answer, 5 / 10 years on", "Gain, dB", "r", "Error over *same change for all*"], rows)


def demo() -> str:
    """The demo's headline numbers beside their aims."""
    recorded = load("benchmarks/demo.json")
    rows = [
        [f"`{key}`", f"{recorded[key]:,.4g}", aim, "met" if low <= recorded[key] <= high else "**missed**"]
        for key, (aim, low, high) in demo_aims().items()
    ]
    area = recorded["area_validation"]
    rows.append(["mean absolute error of the area measure, mm²", f"{area['mean_absolute_error_mm2']:.0f}", "", ""])
    rows.append(["mean area, mm²", f"{area['mean_area_mm2']:,.0f}", "", ""])
    return table(["Number", "Measured", "Aim", ""], rows)


def demo_aims() -> dict[str, tuple[str, float, float]]:
    """Each number's aim in words and its bounds, read from the source of `ld_simulations.summary`."""
    module = modules()[ROOT / "simulations/ld_simulations/summary.py"]
    (value,) = (
        statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "AIMS"
    )
    assert isinstance(value, ast.Dict)
    aims = {}
    for key, call in zip(value.keys, value.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(call, ast.Call)
        given = dict(zip(("text", "at_least", "at_most"), map(ast.literal_eval, call.args), strict=False))
        given |= {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        aims[str(key.value)] = (given["text"], given.get("at_least", -math.inf), given.get("at_most", math.inf))
    return aims


def demo_edits() -> str:
    """The demo's edits, one by one, by the closed form and by its network alone."""
    recorded, rows = load("benchmarks/demo_long.json"), []
    for name, entry in recorded["by_edit"].items():
        network = recorded["network"]["by_edit"][name]
        rows.append(
            [
                EDITS[name],
                f"{entry['cases']}",
                f"{entry['ventricles_true_growth_mm2']:.0f}",
                *(f"{each['ventricles_growth_mm2']:.0f} / {each['gain_db']:.1f}" for each in (entry, network)),
                f"{entry['ventricles_error_over_same']:.2f} / {network['ventricles_error_over_same']:.2f}",
            ]
        )
    head = [
        "Edit",
        "Cases",
        "True change, mm²",
        "Editor drift: change, mm² / gain, dB",
        "Network alone",
        "Error over *same change for all*: drift / network",
    ]
    return table(head, rows)


def drift() -> str:
    """Full fine-tuning with each form of drift and with its rivals."""
    rows = []
    for words, (form, control) in {"*no drift*": ("none", None), **DRIFTS}.items():
        slopes = [
            f"{np.mean(list(by_seed(modality, form, control, 'size_slope').values())):.2f}"
            for modality in ("brain", "chest")
        ]
        matched = drift_cuts(form, control, MATCHED)
        rows.append([words, " / ".join(drift_cuts(form, control)), " / ".join(matched), " / ".join(slopes)])
    head = ["Full fine-tuning, brain / chest", "Distance cut by", "With grey levels matched, cut by", "Prompt slope"]
    return table(head, rows)


def drift_cuts(formulation: str, control: str | None, metric: str = DISTANCE) -> list[str]:
    """By how much a distance falls from full fine-tuning without drift: mean over the seeds, brain and chest."""
    cuts = []
    for modality in ("brain", "chest"):
        before, after = (by_seed(modality, *which, metric) for which in (("none", None), (formulation, control)))
        cuts.append(percent(float(np.mean([1 - after[seed] / before[seed] for seed in after]))))
    return cuts


def by_seed(modality: str, formulation: str, control: str | None, metric: str = DISTANCE) -> dict[int, float]:
    """A metric of full fine-tuning by seed."""
    wanted = (modality, "full", formulation, control)
    keys = ("modality", "adapter", "formulation", "control")
    runs = [run for run in load("benchmarks/latent_drift.json") if tuple(run[key] for key in keys) == wanted]
    return {run["seed"]: run["metrics"][metric] for run in sorted(runs, key=lambda run: run["seed"])}


def editors() -> str:
    """Each row of the counterfactual table, brain, in short."""
    names = list(dict.fromkeys(run["editor"] for run in editor_runs("brain")))
    rows = []
    for name in names:
        keys = ("raw_gain_db", "growth_ratio", "error_over_best_rule", "followup_raw_gain_db")
        gain, ratio, error, later = (editor_mean(name, key) for key in keys)
        rows.append([name, f"{gain:.1f}", f"{ratio:.2f}", f"{error:.2f}", f"{later:.1f}"])
    titles = ["Editor, release", "Gain, dB", "Growth, share of the true", "Error of growth over the best rule's"]
    return table([*titles, "Gain at real follow-ups, dB"], rows)


def editor_runs(modality: str) -> list[dict[str, Any]]:
    """The runs of the counterfactual benchmark for a modality."""
    return [run for run in load("benchmarks/counterfactuals.json")["runs"] if run["modality"] == modality]


def editor_mean(editor: str, metric: str, modality: str = "brain") -> float:
    """A metric's mean over the seeds."""
    return float(np.mean([run["metrics"][metric] for run in editor_runs(modality) if run["editor"] == editor]))


def privacy() -> str:
    """What differential privacy leaves of the gain."""
    gains = private_gains()
    names = {"plain": "no differential privacy", "private": "ε = 8", "start": "the public start alone, nothing trained"}
    rows = [[words, f"{np.mean(list(gains[key].values())):.2f}"] for key, words in names.items()]
    added = [gain - gains["start"][seed] for seed, gain in gains["private"].items()]
    rows.append(["ε = 8, less the same seed's public start", f"{np.mean(added):.2f} ± {np.std(added, ddof=1):.2f}"])
    return table(["Training at one hospital of 3,000 patients", "Gain, dB"], rows)


def private_gains() -> dict[str, dict[int, float]]:
    """Gain by seed of the private setting, of the same without privacy, and of its public start."""
    runs = list(load("benchmarks/privacy.json")["runs"]["quality"].values())
    (private,) = {
        json.dumps(run["setting"], sort_keys=True)
        for run in runs
        if run["setting"]["epsilon"] == 8 and _is_default(run["setting"])
    }
    settings = {"private": json.loads(private)}
    settings["plain"] = {**settings["private"], "epsilon": 0.0}
    settings["start"] = {**settings["private"], "epsilon": 0.0, "steps": 0}
    return {
        name: {run["seed"]: run["copy_gain_db"] for run in runs if run["setting"] == setting}
        for name, setting in settings.items()
    }


def _is_default(setting: Mapping[str, Any]) -> bool:
    """Whether a setting is the one of which each table of configs/benchmark_privacy.yaml changes one thing."""
    config = yaml.safe_load((ROOT / "configs/benchmark_privacy.yaml").read_text(encoding="utf-8"))
    return all(setting[key] == value for key, value in config["setting"].items())


def percent(share: float) -> str:
    """A share as the pages write it."""
    return f"{share:.0%}".replace("%", " %")
