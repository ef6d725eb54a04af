"""Result tables, from docs/benchmarks/*.json and docs/baselines.json, between markers of hand-written pages."""

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
from generators.source import modules

EDITS = {
    "age_plus_10": "10 years older",
    "age_plus_20": "20 years older",
    "disease_added": "with the disease",
    "disease_removed": "without it",
    "other_sex": "of the other sex",
}
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
        "population": population(),
        "rendering": rendering(),
        "history": history(),
        "large_sample": large_sample(),
        "private_ridge": private_ridge(),
    }


@functools.cache
def load(name: str) -> Any:
    """A JSON file under docs/."""
    return json.loads((ROOT / Path("docs") / name).read_text(encoding="utf-8"))


def readme() -> str:
    """The README's table: what was measured beside what a rule without a trained network reaches."""
    bars = {row["key"]: row for row in load("baselines.json")["population"]}
    recorded = load("benchmarks/demo.json")
    by_edit = [entry["growth_correlation"] for name, entry in recorded["by_edit"].items() if name.startswith("age")]
    ridge, deployed = bars["ridge_long"], load("benchmarks/deployment.json")
    gains = {name: float(np.mean(list(seeds.values()))) for name, seeds in private_gains().items()}
    cut = percent(editor_mean("ddpm, wider", "followup_ventricles_error_cut"))
    rows = [
        [
            "Nearer to the true counterfactual than the unedited scan, brain",
            f"{recorded['copy_gain_db']:.1f} dB (demo); "
            f"{editor_mean('flowedit, wider', 'copy_gain_db'):.1f} dB (best of the benchmark)",
            f"ridge regression on latents: **{ridge['gain_db']} dB**",
        ],
        [
            "Less error of the ventricles at a real follow-up than copying the baseline",
            f"{cut} (best)",
            "the mean change of all training patients, without a picture: "
            f"**{percent(load('baselines.json')['same_change_followup_error_cut'])}**",
        ],
        [
            "Correlation with the patient's own growth, 10 and 20 years on",
            " and ".join(f"{value:.2f}" for value in by_edit) + " (demo)",
            f"ridge regression: **{ridge['r_10']:.2f} and {ridge['r_20']:.2f}**",
        ],
        [
            "Fréchet distance cut by drift, brain / chest",
            f"map: {' / '.join(drift_cuts(*DRIFTS['drift as a map']))}; "
            f"by channel: {' / '.join(drift_cuts('prior', None))}",
            f"offset noise: {' / '.join(drift_cuts('none', 'offset_noise'))}; zero-terminal-SNR base: "
            f"{' / '.join(drift_cuts('none', 'zero_terminal_snr'))}",
        ],
        [
            "Gain under differential privacy, ε = 8, one hospital of 3,000 patients",
            f"{gains['private']:.2f} dB",
            f"without privacy {gains['plain']:.2f} dB; public start alone {gains['start']:.2f} dB",
        ],
        [
            "Sent by a site in a round",
            f"{recorded['uplink_share'] * 100:.1f} % of the UNet",
            "100 % for full fine-tuning",
        ],
        [
            f"Deployed study: {deployed['kills']} processes killed, {deployed['unauthorised_attempts']} intrusions",
            f"{deployed['rounds_lost']} rounds lost; {deployed['unauthorised_accepted']} accepted",
            "aim: 0 and 0",
        ],
    ]
    return table(["Question", "Measured", "Compared with"], rows)


def demo() -> str:
    """The demo's headline numbers beside their aims."""
    recorded = load("benchmarks/demo.json")
    rows = [
        [f"`{key}`", f"{recorded[key]:,.4g}", aim, "met" if low <= recorded[key] <= high else "**missed**"]
        for key, (aim, low, high) in demo_aims().items()
    ]
    area = recorded["area_validation"]
    rows.append(["`growth_correlation_ceiling`", f"{recorded['growth_correlation_ceiling']:.3g}", "", ""])
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
    """The demo's edits, one by one."""
    rows = [
        [
            EDITS[name],
            f"{entry['cases']}",
            f"{entry['growth_mm2']:.0f}",
            f"{entry['true_growth_mm2']:.0f}",
            f"{entry['growth_correlation']:.2f}",
            f"{entry['copy_gain_db']:.1f}",
        ]
        for name, entry in load("benchmarks/demo.json")["by_edit"].items()
    ]
    head = ["Edit", "Cases", "Drawn change, mm²", "True change, mm²", "Correlation over patients", "Gain, dB"]
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
        keys = ("copy_gain_db", "growth_ratio", "growth_correlation", "followup_ventricles_error_cut")
        gain, ratio, correlation, cut = (editor_mean(name, key) for key in keys)
        rows.append([name, f"{gain:.1f}", f"{ratio:.2f}", f"{correlation:.2f}", percent(cut)])
    head = [
        "Editor, release",
        "Gain, dB",
        "Growth, share of the true",
        "Correlation, edits pooled",
        "Follow-up error cut",
    ]
    return table(head, rows)


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


def population() -> str:
    """What rules fitted to the population reach."""
    rows = [
        [
            row["answer"],
            row["gain_db"],
            row["growth_share"],
            f"{row['r_10']:.2f} / {row['r_20']:.2f}",
            f"{row['other_sex_db']:.1f}",
        ]
        for row in load("baselines.json")["population"]
    ]
    best = f"{editor_mean('flowedit, wider', 'copy_gain_db'):.1f}"
    share = f"{editor_mean('flowedit, wider', 'growth_ratio'):.2f}"
    rows.insert(1, ["best row of the benchmark (`flowedit, wider`)", best, share, "not reported", ""])
    return table(
        ["Answer", "Gain, dB", "Growth, share of the true", "r at +10 / +20 years", "Gain, other sex, dB"], rows
    )


def rendering() -> str:
    """What is gained in the pixels of the user's file."""
    rows = [
        [row["written"], row["gain_db"], f"{row['r_10']} / {row['r_20']}"]
        for row in load("baselines.json")["rendering"]
    ]
    return table(["Written", "Gain in raw pixels, dB", "r at +10 / +20 years"], rows)


def history() -> str:
    """What a patient's earlier visits add."""
    rows = [
        [
            row["answer"],
            " / ".join(filter(None, (row["gain_db_5"], row["gain_db_10"]))),
            " / ".join(filter(None, (row["r_5"], row["r_10"]))),
            f"{row['error_mm2_5']} / {row['error_mm2_10']}",
        ]
        for row in load("baselines.json")["history"]
    ]
    return table(["Answer, 5 / 10 years on", "Gain in raw pixels, dB", "r", "Error, mm²"], rows)


def large_sample() -> str:
    """The longitudinal ridge on many patients."""
    row = load("baselines.json")["large_sample"]
    rows = [
        [
            "longitudinal ridge × 1.5, warped",
            *_pairs(row, "gain_db", ".1f"),
            *_pairs(row, "r"),
            *_pairs(row, "error_mm2"),
        ],
        ["*same change for all*", "", "", *_pairs(row, "same_change_error_mm2")],
    ]
    head = [f"{row['patients']} patients, +10 / +20 years", "Gain in raw pixels, dB", "r", "Error, mm²"]
    return table(head, rows)


def _pairs(row: Mapping[str, Any], key: str, form: str = "") -> list[str]:
    return [f"{row[f'{key}_10']:{form}} / {row[f'{key}_20']:{form}}"]


def private_ridge() -> str:
    """The longitudinal ridge under differential privacy."""
    columns = ["none", "8", "3", "1"]
    rows = [[f"{row['patients']:,}", *(row[key] for key in columns)] for row in load("baselines.json")["private_ridge"]]
    return table(["Patients per site", "No privacy", "ε = 8", "ε = 3", "ε = 1"], rows)


def percent(share: float) -> str:
    """A share as the pages write it."""
    return f"{share:.0%}".replace("%", " %")
