"""The page of the federation benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ld_evaluate.bootstrap import bootstrap_interval
from ld_simulations.benchmarks.federation.judge import (
    ALONE,
    FEDERATED,
    GLOBAL_DRIFT,
    LOCAL_DRIFT,
    POOLED,
    POOLED_BATCH,
    POOLED_STEPS,
    UNTRAINED,
)
from ld_simulations.benchmarks.federation.plan import FederationBenchmark
from ld_simulations.benchmarks.individual.report import EDITS

Parts = Mapping[str, Any]
EXACTNESS = "exactness"
"""Part of the errors of `exact_aggregation_error`."""
SPLIT_TITLES = {"iid": "Five hospitals of one kind (IID)", "non-iid": "Five hospitals that differ (non-IID)"}
DRIFTS = {LOCAL_DRIFT: "local_drift", GLOBAL_DRIFT: "global_drift"}
"""Rows that are centred, and their names in keys."""
METHOD_TITLES = {
    "mean": "mean of A and of B (FedAvg)",
    "fedprox": "FedProx",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "median": "median",
    "ffa": "FFA-LoRA",
    "rolora": "RoLoRA",
    "flexlora": "FlexLoRA",
    "fedex": "FedEx-LoRA",
    "flora": "FLoRA",
    "fedsa": "FedSA-LoRA, each site's own B on its own patients",
    LOCAL_DRIFT: "mean, centred on each site's own drift",
    GLOBAL_DRIFT: "mean, centred on the mean drift of the sites",
}


def answer_gains(config: FederationBenchmark, parts: Parts, split: str, row: str) -> dict[int, dict[str, list[float]]]:
    """Seed -> hospital -> gains of the answers."""
    found = {seed: parts.get(f"answers/{split}/{seed}/{row}") for seed in config.seeds}
    return {seed: gains for seed, gains in found.items() if gains is not None}


def whole_seeds(config: FederationBenchmark, parts: Parts, split: str) -> list[int]:
    """The seeds of which all rows of the network are there: others are not shown, as rows of fewer seeds mislead."""
    rows = (UNTRAINED, POOLED_BATCH, POOLED_STEPS, ALONE, *DRIFTS, *config.methods)
    return [seed for seed in config.seeds if all(f"network/{split}/{seed}/{row}" in parts for row in rows)]


def losses(config: FederationBenchmark, parts: Parts, split: str, row: str) -> dict[int, dict[str, float]]:
    """Seed -> hospital -> loss, of `whole_seeds`."""
    return {seed: parts[f"network/{split}/{seed}/{row}"] for seed in whole_seeds(config, parts, split)}


def improvement_shares(config: FederationBenchmark, parts: Parts, split: str, row: str) -> list[float]:
    """For each seed, a row's improvement on the base over that of the better pooled training."""
    shares = []
    for seed, by_hospital in losses(config, parts, split, row).items():
        names = [f"network/{split}/{seed}/{name}" for name in (UNTRAINED, POOLED_BATCH, POOLED_STEPS)]
        untrained, *pooled = [float(np.mean(list(parts[name].values()))) for name in names]
        improved = untrained - float(np.mean(list(by_hospital.values())))
        shares.append(improved / (untrained - min(pooled)))
    return shares


def sites_better(config: FederationBenchmark, parts: Parts, split: str) -> list[tuple[int, str, float, float]]:
    """Seed, hospital, and the mean gain of its patients federated and alone."""
    rows = []
    together, alone = (answer_gains(config, parts, split, row) for row in (FEDERATED, ALONE))
    for seed in sorted(set(together) & set(alone)):
        for hospital, gains in together[seed].items():
            rows.append((seed, hospital, float(np.mean(gains)), float(np.mean(alone[seed][hospital]))))
    return rows


def flat_numbers(config: FederationBenchmark, parts: Parts) -> dict[str, Any]:
    """The numbers of the issue, and each split's own; None where nothing is done."""
    ratios, better = [], []
    for split in config.splits:
        together, pooled = (answer_gains(config, parts, split, row) for row in (FEDERATED, POOLED))
        for seed in sorted(set(together) & set(pooled)):
            ratios.append(_mean_gain(together[seed]) / _mean_gain(pooled[seed]))
        better += [federated > alone for _, _, federated, alone in sites_better(config, parts, split)]
    numbers: dict[str, Any] = {
        "federated_over_pooled": float(np.mean(ratios)) if ratios else None,
        "sites_better_than_alone": float(np.mean(better)) if better else None,
        "exact_aggregation_error": max(parts[EXACTNESS].values()) if EXACTNESS in parts else None,
        "methods_compared": sum(
            bool(improvement_shares(config, parts, config.splits[0], row)) for row in config.methods
        ),
    }
    for split in config.splits:
        for row in (POOLED, FEDERATED, ALONE):
            gains = answer_gains(config, parts, split, row)
            if gains:
                numbers[f"raw_gain_db_{split}_{row}"] = float(np.mean([_mean_gain(each) for each in gains.values()]))
        for row in (*config.methods, *DRIFTS, ALONE):
            shares = improvement_shares(config, parts, split, row)
            if shares:
                numbers[f"improvement_share_{split}_{DRIFTS.get(row, row)}"] = float(np.mean(shares))
    return numbers


def page_lines(config: FederationBenchmark, parts: Parts, options: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page, line by line."""
    yield "# What federating brings"
    yield ""
    yield (
        "Five simulated hospitals learn together, pooled and alone. Written by `.venv/bin/ld-benchmark federation` "
        "(`make benchmark-federation`; hospitals and options in `configs/benchmark_federation.yaml`). Options were "
        f"chosen on seed {config.tuning_seed}; the numbers below are of other seeds, named with each table, and of "
        f"{config.test_patients} test patients in each hospital, whom nobody learned from."
    )
    yield ""
    yield "## Answers by the recommended editor"
    yield ""
    yield (
        "The recommended editor asks the longitudinal drift. Raw gain: how much nearer to the true counterfactual a "
        "written answer is than the scan itself, in dB of the file's pixels, over the five edits. Copying the scan "
        "gives 0. Intervals (95 %) are over patients and seeds. The sites' sums add up exactly, so federated and "
        "pooled differ by the sites' intercepts alone: the comparison that says something is with training alone."
    )
    for split in config.splits:
        yield from _answer_table(config, parts, split)
    yield ""
    yield "## The network"
    yield ""
    yield (
        f"{config.rounds} rounds of {config.steps} steps at each site, the adapter of `configs/demo_study.yaml`. The "
        "loss is the network's mean squared error on the test patients' scans at eight timesteps and fixed noise. The "
        "share is a row's improvement on the untrained base over that of the better of two pooled trainings, which see "
        "as many scans: all sites' steps one after the other, or batches as large as all sites' together. `alone` "
        "trains a network at each site, on its own scans, and tests it on its own patients. Two rows centre the "
        "latents on a channel drift, in training and test: the error has the same unit with and without it. Ranges are "
        "of the seeds."
    )
    for split in config.splits:
        yield from _network_table(config, parts, split, options)
    if EXACTNESS in parts:
        errors = ", ".join(f"{METHOD_TITLES[name]} {value:.1e}" for name, value in parts[EXACTNESS].items())
        yield ""
        yield "## Exactness"
        yield ""
        yield (
            "Relative error of the mean product B·A of five sites, against the dense mean in float64, FlexLoRA at full "
            f"rank: {errors}. The mean of A and of B is off by some tenth of an update."
        )
    yield ""


def _answer_table(config: FederationBenchmark, parts: Parts, split: str) -> Iterator[str]:
    rows = {
        POOLED: "pooled: all scans as one site's",
        FEDERATED: "federated: sums of all sites, an intercept each",
        ALONE: "alone: each site's own drift, its own patients",
    }
    if not answer_gains(config, parts, split, FEDERATED):
        return
    yield ""
    yield f"### {SPLIT_TITLES.get(split, split)}"
    yield ""
    yield _of_seeds(list(answer_gains(config, parts, split, FEDERATED)))
    yield ""
    yield "| learned | raw gain, dB |"
    yield "|---|---|"
    for row, title in rows.items():
        found = answer_gains(config, parts, split, row)
        if found:
            values, patients = [], []
            for seed, by_hospital in found.items():
                for hospital, gains in by_hospital.items():
                    values += gains
                    patients += [f"{seed}/{hospital}/{index // len(EDITS)}" for index in range(len(gains))]
            bounds = bootstrap_interval("gain", np.array(patients), np.array(values))
            shown = f"{bounds['gain_low']:.2f} to {bounds['gain_high']:.2f}"
            yield f"| {title} | {np.mean(values):.2f} ({shown}) |"
    compared = sites_better(config, parts, split)
    if compared:
        yield ""
        yield "| hospital | federated, dB | alone, dB | difference of each seed |"
        yield "|---|---|---|---|"
        for name in dict.fromkeys(hospital for _, hospital, _, _ in compared):
            own = [(federated, alone) for _, hospital, federated, alone in compared if hospital == name]
            differences = ", ".join(f"{federated - alone:+.2f}" for federated, alone in own)
            means = [float(np.mean(column)) for column in zip(*own, strict=True)]
            yield f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {differences} |"


def _network_table(
    config: FederationBenchmark, parts: Parts, split: str, options: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    seeds = whole_seeds(config, parts, split)
    if not seeds:
        return
    yield ""
    yield f"### {SPLIT_TITLES.get(split, split)}"
    yield ""
    yield _of_seeds(seeds)
    yield ""
    yield "| trained | loss | share of pooled improvement (range) |"
    yield "|---|---|---|"
    first, *others = config.methods
    for row in (UNTRAINED, POOLED_BATCH, POOLED_STEPS, ALONE, first, *DRIFTS, *others):
        found = losses(config, parts, split, row)
        loss = np.mean([np.mean(list(by_hospital.values())) for by_hospital in found.values()])
        shares = improvement_shares(config, parts, split, row)
        shown = f"{np.mean(shares):.3f}" + (f" ({min(shares):.3f} to {max(shares):.3f})" if len(shares) > 1 else "")
        given = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in options.get(row, {}).items())
        title = METHOD_TITLES.get(row, row) + (f", {given}" if given else "")
        yield f"| {title} | {loss:.4f} | {shown} |"
    yield ""
    yield _drift_sentence(config, parts, split)
    best = max(config.methods, key=lambda row: float(np.mean(improvement_shares(config, parts, split, row))))
    reached, batch, alone = (
        float(np.mean(improvement_shares(config, parts, split, row))) for row in (best, POOLED_BATCH, ALONE)
    )
    yield ""
    yield (
        f"The best federated row, {METHOD_TITLES.get(best, best)}, has {reached:.2f} of the pooled improvement, "
        f"training alone {alone:.2f}. Pooled training in as few steps, with batches as large as all sites' together, "
        f"has {batch:.2f}: most of what is missing are optimizer steps, not the other sites' scans."
        if batch - reached < 1 - batch
        else f"The best federated row, {METHOD_TITLES.get(best, best)}, has {reached:.2f} of the pooled improvement, "
        f"training alone {alone:.2f}, and pooled training in as few steps {batch:.2f}."
    )


def _of_seeds(seeds: Sequence[int]) -> str:
    return f"Of {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}."


def _drift_sentence(config: FederationBenchmark, parts: Parts, split: str) -> str:
    """What centring brought, beside the same training without it."""
    plain, own, shared = (
        float(np.mean(improvement_shares(config, parts, split, row))) for row in (config.methods[0], *DRIFTS)
    )
    verdict = "lowers" if max(own, shared) > plain else "does not lower"
    return (
        f"Centring on a channel drift {verdict} this loss: {own:.2f} with each site's own drift and {shared:.2f} with "
        f"one of all sites, where training without has {plain:.2f}. The untrained base was not scored on centred "
        "latents, so this does not say whether centring or the training on it costs. Pictures drawn from noise, which "
        "a drift is for, are measured in [Latent drift](latent_drift.md)."
    )


def _mean_gain(gains: Mapping[str, list[float]]) -> float:
    return float(np.mean([gain for values in gains.values() for gain in values]))
