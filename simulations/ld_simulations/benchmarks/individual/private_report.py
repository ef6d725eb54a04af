"""The section on private longitudinal drifts: gain by patients and ε, beside the public start alone and no privacy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ld_evaluate.bootstrap import bootstrap_interval
from ld_simulations.benchmarks.harness import ResultStore, read_table
from ld_simulations.benchmarks.individual.answers import Record
from ld_simulations.benchmarks.individual.private_plan import (
    DELTA_PATIENTS,
    PrivateDriftConfig,
    PrivateSetting,
    noise_multiplier,
)
from ld_simulations.benchmarks.individual.report import EDITS

AIMS = {(8.0, 300): 0.9, (3.0, 1000): 0.95, (1.0, 1000): 0.75}
"""Least share of the gain without privacy, by ε and patients of a site."""
REFERENCE_PATIENTS = 1000
"""Of the drift without privacy, for rows without patients of their own."""
MOST = 0.5
ADOPTED = "†"
TABLE = "private_drift"
"""Key of the rows in individual.json."""
NOT_RUN = "not run"
Gains = dict[tuple[str, str], float]
"""Gain in dB by patient and edit."""


def mean_gain(gains: Mapping[tuple[str, str], float]) -> float:
    """Mean over the edits of the mean over their patients, dB."""
    return sum(share * gains[key] for key, share in edit_shares(gains).items())


def edit_shares(gains: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Share of each patient's answer in `mean_gain`: all edits that somebody was asked count alike."""
    asked = {edit: sum(question == edit for _, question in gains) for edit in EDITS}
    edits = sum(count > 0 for count in asked.values())
    return {key: 1 / (edits * asked[key[1]]) for key in gains}


class PrivateResults:
    """The results that there are: those of a folder, and the rows of the table that the config adopts."""

    def __init__(self, config: PrivateDriftConfig, store: ResultStore) -> None:
        self.config, self.store = config, store
        self.adopted: Mapping[str, Any] = {}
        if config.adopt:
            self.adopted = read_table(config.adopt, "private drift", (TABLE,))[TABLE]

    def adopts(self, setting: PrivateSetting) -> bool:
        """Whether the adopted table has the setting's row."""
        start, name = setting.row
        return name in self.adopted.get(start, {})

    def gains(self, start: str, patients: int, epsilon: float = 0.0) -> list[Gains]:
        """Of each draw of the noise."""
        draws = self.config.draws if epsilon else 1
        names = [PrivateSetting(start, patients, epsilon, draw).name for draw in range(draws)]
        return [_by_patient(records) for records in self.store.collect(names).values()]

    def numbers(self, start: str, patients: int, epsilon: float = 0.0) -> dict[str, Any] | None:
        """Mean, least and largest gain over draws; with intervals over patients, the share and what is over the start.

        None where nothing ran.
        """
        draws = self.gains(start, patients, epsilon)
        if not draws:
            group, name = PrivateSetting(start, patients, epsilon).row
            earlier = self.adopted.get(group, {}).get(name)
            return earlier and {**earlier, "adopted": True}
        gains = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
        by_draw = [mean_gain(draw) for draw in draws]
        numbers: dict[str, Any] = {
            "draws": len(draws),
            "patients": len({patient for patient, _ in gains}),
            "raw_gain_db": mean_gain(gains),
            "raw_gain_db_least_draw": min(by_draw),
            "raw_gain_db_largest_draw": max(by_draw),
        }
        if epsilon:
            numbers["noise_multiplier"] = noise_multiplier(epsilon, patients)
        shares = edit_shares(gains)
        numbers["raw_gain_db_by_edit"] = {
            edit: float(np.mean([gain for (_, asked), gain in gains.items() if asked == edit]))
            for edit in dict.fromkeys(edit for _, edit in gains)
        }
        names, weights = np.array([key[0] for key in shares]), np.array(list(shares.values()))
        values = weights * np.array([gains[key] for key in shares])
        for reference in self.gains("", patients or REFERENCE_PATIENTS):
            theirs = weights * np.array([reference[key] for key in shares])
            numbers["share"] = float(values.sum() / theirs.sum())
            numbers |= bootstrap_interval("share", names, values, theirs)
            numbers["share_least_draw"] = min(by_draw) / float(theirs.sum())
        for alone in self.gains(start, 0) if start and patients else []:
            theirs = weights * np.array([alone[key] for key in shares])
            numbers["over_start_db"] = float((values - theirs).sum())
            numbers |= bootstrap_interval("over_start_db", names, values - theirs, weights)
        return numbers

    def rows(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All numbers, by start and setting."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for start in ["", *self.config.starts]:
            for patients, epsilon in _settings_of(self.config, start):
                numbers = self.numbers(start, patients, epsilon)
                if numbers is not None:
                    group, name = PrivateSetting(start, patients, epsilon).row
                    found.setdefault(group, {})[name] = numbers
        return found

    def flat(self) -> dict[str, float]:
        """The keys of the aims, and the shares of the public starts alone."""
        main, *others = self.config.starts
        flat: dict[str, float] = {}
        for (epsilon, patients), _ in AIMS.items():
            numbers = self.numbers(main, patients, epsilon) or {}
            if "share" in numbers:
                flat[f"dp_drift_gain_share_eps{epsilon:g}_{patients}"] = numbers["share"]
                flat[f"dp_drift_over_start_db_eps{epsilon:g}_{patients}"] = numbers["over_start_db"]
        for start in (main, *others):
            numbers = self.numbers(start, 0) or {}
            if "share" in numbers:
                suffix = "" if start == main else f"_{start.replace(' ', '_')}"
                flat[f"dp_public_start_gain_share{suffix}"] = numbers["share"]
        return flat


def private_lines(results: PrivateResults) -> list[str]:
    """The section of the page."""
    config, flat = results.config, results.flat()
    main = next(iter(config.starts))
    lines = [
        "## Longitudinal drift under differential privacy",
        "",
        "Each of three sites sends one vector: its patients' sums in the directions of a public start, clipped by "
        f"patient and noised by the site, with a charge of its own (δ = 1/({DELTA_PATIENTS} · patients of a site), one "
        "Gaussian mechanism, no other query). Unit: a patient with all visits. *Gain*: raw pixels, mean over the five "
        "edits, with the options and the rendering that the tuning patients chose without privacy; in brackets the "
        "least and the largest draw of the noise. *Share*: of the gain of the drift fitted without privacy to the same "
        f"number of patients (rows without patients: to {REFERENCE_PATIENTS:,}). *Over the start*: dB over the public "
        "patients' own drift on the same test patients. Intervals are 95 % over the test patients. The clip norm and "
        "the ridge's weights are the product's and were chosen on patients of other seeds. Noise comes from the "
        "operating system, so another run draws other noise. The gain without privacy is not that of *editor drift* "
        "above: the patients differ, and no answer is scaled to the growth that the scan's edge tells.",
        "",
        *_start_sentences(config),
        *([f"Rows with {ADOPTED} are those of an earlier run of this benchmark."] if results.adopted else []),
        "",
        *_aim_lines(results, flat),
    ]
    lines += [
        "| public start | patients a site | ε | σ | draws | gain, dB | share of no privacy | over the start, dB |",
        "|---" * 8 + "|",
    ]
    for start in ["", *config.starts]:
        for patients, epsilon in _settings_of(config, start):
            numbers = results.numbers(start, patients, epsilon)
            if numbers is not None or start in ("", main):
                lines.append(_row(start, patients, epsilon, numbers))
    return [*lines, "", *_reading(results, flat), ""]


def _start_sentences(config: PrivateDriftConfig) -> list[str]:
    described = [
        f"*{name}* ({chosen.patients} patients in each hospital of `{chosen.hospitals}`, seed {chosen.seed})"
        for name, chosen in config.starts.items()
    ]
    return [
        f"Public starts: {', '.join(described)}. Sites: patients of seed {config.training_seed}; test patients: "
        f"{config.test_patients} in each hospital, seed {config.test_seed}. No option was chosen on "
        "the test patients. The sites' own patients were looked at: the first 48 of each were among those on whom "
        "`longitudinal_fit` got its rule for categories that act like years, and up to 1,000 showed that a private fit "
        "must correct how many years these are."
    ]


def _aim_lines(results: PrivateResults, flat: Mapping[str, float]) -> list[str]:
    alone, main = flat.get("dp_public_start_gain_share"), next(iter(results.config.starts))
    beside = "" if alone is None else f"{alone:.2f}"
    lines = ["| share of the gain without privacy | measured | aim | | public start alone |", "|---" * 5 + "|"]
    for (epsilon, patients), aim in AIMS.items():
        numbers = results.numbers(main, patients, epsilon) or {}
        share = numbers.get("share")
        if share is None:
            verdict = NOT_RUN
        elif share < aim:
            verdict = "**missed**"
        else:
            verdict = "held" if alone is None or alone < aim else "held, by the public start alone as well"
        measured = _interval(numbers, "share", ".2f")
        lines.append(
            f"| ε = {epsilon:g}, {patients:,} patients a site | {measured} | >= {aim:g} | {verdict} | {beside} |"
        )
    return [*lines, ""]


def _row(start: str, patients: int, epsilon: float, numbers: Mapping[str, Any] | None) -> str:
    if not start:
        budget = "no privacy"
    elif not patients:
        budget = "*public start alone*"
    else:
        budget = f"{epsilon:g}" if epsilon else "clipped, no noise"
    cells = [start or "none", f"{patients:,}" if patients else "0", budget]
    if numbers is None:
        return f"| {' | '.join([*cells, '', '', NOT_RUN, '', ''])} |"
    gain = f"{numbers['raw_gain_db']:.2f}"
    if numbers["draws"] > 1:
        gain += f" ({numbers['raw_gain_db_least_draw']:.2f} to {numbers['raw_gain_db_largest_draw']:.2f})"
    if numbers.get("adopted"):
        gain += f" {ADOPTED}"
    cells += [
        f"{numbers['noise_multiplier']:.2f}" if epsilon else "",
        f"{numbers['draws']}" if epsilon else "",
        gain,
        _interval(numbers, "share", ".2f") if start else "1",
        _interval(numbers, "over_start_db", "+.2f"),
    ]
    return f"| {' | '.join(cells)} |"


def _reading(results: PrivateResults, flat: Mapping[str, float]) -> list[str]:
    """What the public start has by itself, said in words."""
    share = flat.get("dp_public_start_gain_share")
    if share is None:
        return []
    text = f"The public start alone, which saw no patient of the sites, has {share:.0%} of the gain without privacy. "
    if share >= MOST:
        text += (
            "Most of what the shares above show is therefore the start's; read what the sites add in the last column."
        )
    adds = []
    for epsilon, patients in AIMS:
        numbers = results.numbers(next(iter(results.config.starts)), patients, epsilon) or {}
        if "over_start_db" in numbers:
            interval = _interval(numbers, "over_start_db", "+.2f")
            adds.append(f"{interval} dB at ε = {epsilon:g} with {patients:,} patients a site")
    text = text.strip() + (f" The sites add {', '.join(adds)}." if adds else "")
    worse = [
        f"{patients:,} patients at ε = {epsilon:g}"
        for start in results.config.starts
        for patients, epsilon in _settings_of(results.config, start)
        if (results.numbers(start, patients, epsilon) or {}).get("over_start_db_high", 0.0) < 0
    ]
    if worse:
        text += f" The noise makes the drift worse than its start with {', '.join(worse)}: keep the start there."
    return [text]


def _interval(numbers: Mapping[str, Any], key: str, shape: str) -> str:
    if key not in numbers:
        return ""
    value, low, high = (format(numbers[name], shape) for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value} ({low} to {high})"


def _settings_of(config: PrivateDriftConfig, start: str) -> list[tuple[int, float]]:
    """Patients and ε of a start's rows; without a start, those without privacy."""
    if not start:
        return [(patients, 0.0) for patients in config.patients]
    return [(0, 0.0), *((patients, epsilon) for patients in config.patients for epsilon in (0.0, *config.epsilons))]


def _by_patient(records: Sequence[Record]) -> Gains:
    return {(record["patient"], record["question"]): float(record["gain_db"]) for record in records}
