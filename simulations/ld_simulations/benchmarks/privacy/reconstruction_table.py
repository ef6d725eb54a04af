"""Results of the reconstructions: flat numbers, tables and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ld_common.adapters.state_dict import read_tensors
from ld_simulations.benchmarks.privacy.reconstruction import ATTACKS, TRIVIAL, gap, interval, picture_file
from ld_simulations.benchmarks.privacy.reconstruction_plan import (
    CRAFTED,
    FULL,
    GATE,
    HONEST,
    LEAST_ROUNDS,
    LORA,
    STRONGEST_ALLOWED,
    Request,
    passes_default_policy,
)

Result = dict[str, Any]
TITLES = {HONEST: "the weights that the study's seed gives", CRAFTED: "crafted weights"}


def best_request(results: Sequence[Result]) -> Request | None:
    """The LoRA request within the default policy with the largest mean gap; None without results."""
    best = _best_promised(results)
    return None if best is None else Request(**best["request"])


def reconstruction_numbers(results: Sequence[Result], confirmed: Result | None) -> dict[str, Any]:
    """Flat numbers: the best mean gap by adapter and weights, within the default policy and without its floors.

    Args:
        results: of all requests.
        confirmed: of the fresh rounds of the best one within the default policy, if they were run.
    """
    numbers: dict[str, Any] = {}
    counted = _counted(results)
    for adapter in (LORA, FULL):
        for weights in (HONEST, CRAFTED):
            for floors in (True, False):
                rows = [row for row in counted if _is(row, weights, adapter, floors)]
                if rows:
                    best = max(rows, key=lambda row: _mean_gap(row, _attack(row)))
                    place = "default_policy" if floors else "no_floors"
                    name = f"reconstruction_gap_db_{place}_{adapter}_{weights}"
                    numbers |= _with_interval(name, _gaps(best, _attack(best)))
    promised = _best_promised(results)
    if promised is not None:
        numbers["best_reconstruction_request"] = Request(**promised["request"]).name
        numbers |= _with_interval("selected_reconstruction_gap_db", _gaps(promised, _attack(promised)))
    if confirmed is not None:
        numbers |= _with_interval("best_reconstruction_gap_db", _gaps(confirmed, _attack(confirmed)))
    return numbers


def _best_promised(results: Sequence[Result]) -> Result | None:
    promised = [row for row in _counted(results) if _passes(row) and row["request"]["adapter"] == LORA]
    return max(promised, key=lambda row: _mean_gap(row, _attack(row)), default=None)


def reconstruction_lines(results: Sequence[Result], confirmed: Result | None, picture: str) -> list[str]:
    """The section of the page; empty without results."""
    if not results:
        return []
    lines = [
        "## Reconstruction by a malicious server",
        "",
        "Without differential privacy and secure aggregation, at a site whose rows, timesteps and noise the server "
        "does not know. *Gap*: PSNR of the reconstruction to the best-matching scan of those drawn in the round, less "
        "that to the best-matching of as many patients of the same hospital outside it (equal numbers, as the best of "
        "more would be better by chance), mean over the rounds with its 95 % bootstrap interval; the better of the two "
        f"attacks ({' and '.join(ATTACKS)}). A gap of 0 is what an answer that knows nothing of the round gets. "
        "*Right*: mean PSNR to the best-matching scan drawn. *Named*: share of rounds in which a scan drawn matches "
        "better than all those outside; 50 % is chance. *Gallery*: mean AUC of ranking candidate scans by their "
        "gradient, drawn against outside; for one scan, the share of rounds in which it ranks above one outside. Rows "
        "in bold pass the default policy (`min_batch_size` 4, `min_visits` 64, `max_distance` 100); crafted weights "
        "pass it from the second round on, within that distance of the study's first ones. They let one visit of a "
        "round through on average, so a round shows one scan, a mixture, or none. Several steps at the study's own "
        "weights are attacked weakly: Adam keeps little but signs, and the right scan is matched no better than by a "
        "mean image, so a gap near 0 there shows no safety. Requests of fewer than "
        f"{LEAST_ROUNDS} rounds have no interval and are not in the summary.",
        "",
    ]
    for adapter in (LORA, FULL):
        for weights in (HONEST, CRAFTED):
            rows = [row for row in _main(results) if _is(row, weights, adapter)]
            if rows:
                title = "LoRA" if adapter == LORA else "All weights of the network"
                lines += [f"### {title}, {TITLES[weights]}", "", *_table(rows), ""]
    for blocks in sorted({row["request"].get("blocks", 0) for row in _allowed(results)}):
        rows = [row for row in _allowed(results) if row["request"].get("blocks", 0) == blocks]
        where = f"a gate in {blocks} of the network's ResNet blocks" if blocks else "a gate in every ResNet block"
        lines += [f"### LoRA, crafted weights within the default `policy.max_distance`, {where}", "", *_table(rows), ""]
    if confirmed is not None:
        lines += [
            "### The best request within the default policy, in fresh rounds",
            "",
            "The largest of many gaps is high by chance too, so this request was attacked again in rounds that chose "
            "nothing.",
            "",
            *_table([confirmed]),
            "",
        ]
    lines += _gates(results) + _trivial(results)
    if picture:
        lines += [f"![right scan, reconstruction and best-matching scan outside of some rounds]({picture})", ""]
    return lines


def reconstruction_picture(results: Sequence[Result], folder: Path) -> bytes | None:
    """Right scan, reconstruction and best-matching scan outside of the best round of some requests; None without."""
    shown: list[tuple[str, Result]] = []
    for adapter, weights, floors, title in (
        (FULL, CRAFTED, False, "all weights, crafted,\nno floors"),
        (LORA, CRAFTED, False, "LoRA, crafted,\nno floors"),
        (LORA, CRAFTED, True, "LoRA, crafted,\ndefault policy"),
        (LORA, HONEST, True, "LoRA, study's weights,\ndefault policy"),
    ):
        rows = [row for row in _counted(results) if _is(row, weights, adapter, floors)]
        rows = [row for row in rows if picture_file(folder, Request(**row["request"])).exists()]
        if rows:
            shown.append((title, max(rows, key=lambda row: _mean_gap(row, _attack(row)))))
    if not shown:
        return None
    figure = Figure(figsize=(4.8, 1.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for number, (line, (title, row)) in enumerate(zip(axes, shown, strict=True)):
        request = Request(**row["request"])
        pictures = read_tensors(picture_file(folder, request))[0]["pictures"]
        for place, values, name in zip(line, pictures, ("right scan", "reconstruction", "outside"), strict=True):
            place.imshow(values.numpy(), cmap="gray", vmin=-1, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
            if not number:
                place.set_title(name, fontsize=8)
        line[0].set_ylabel(f"{title}\n{request.steps} × {request.batch_size}", fontsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _main(results: Sequence[Result]) -> list[Result]:
    return [row for row in results if row["request"]["gate"] == GATE]


def _allowed(results: Sequence[Result]) -> list[Result]:
    return [row for row in results if row["request"]["gate"] == STRONGEST_ALLOWED]


def _counted(results: Sequence[Result]) -> list[Result]:
    rows = [*_main(results), *_allowed(results)]
    return [row for row in rows if len(_gaps(row, _attack(row))) >= LEAST_ROUNDS]


def _passes(row: Result) -> bool:
    return passes_default_policy(Request(**row["request"]), row["moved"])


def _is(row: Result, weights: str, adapter: str, floors: bool | None = None) -> bool:
    request = row["request"]
    fits = request["weights"] == weights and request["adapter"] == adapter
    return fits and floors in (None, _passes(row))


def _attack(row: Result) -> str:
    """The attack with the larger mean gap, each over the rounds that it was run on."""
    known = [name for name in ATTACKS if any(name in played["answers"] for played in row["rounds"])]
    return max(known, key=lambda name: _mean_gap(row, name))


def _gaps(row: Result, attack: str) -> list[float]:
    return [gap(played, attack) for played in row["rounds"] if attack in played["answers"]]


def _mean_gap(row: Result, attack: str) -> float:
    return float(np.mean(_gaps(row, attack)))


def _with_interval(name: str, gaps: Sequence[float]) -> dict[str, float]:
    low, high = interval(gaps)
    return {name: float(np.mean(gaps)), f"{name}_low": low, f"{name}_high": high}


def _cell(gaps: Sequence[float]) -> str:
    if len(gaps) < LEAST_ROUNDS:
        return f"{np.mean(gaps):.2f}"
    low, high = interval(gaps)
    return f"{np.mean(gaps):.2f} ({low:.2f} to {high:.2f})"


def _table(rows: Sequence[Result]) -> list[str]:
    lines = [
        "| steps × batch | visits | rounds | attack | gap, dB | largest gap | right, dB | named | gallery |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        request, attack = Request(**row["request"]), _attack(row)
        played = [round_ for round_ in row["rounds"] if attack in round_["answers"]]
        gaps = _gaps(row, attack)
        right = np.mean([round_["answers"][attack]["right_db"] for round_ in played])
        areas = [round_["gallery_auc"] for round_ in row["rounds"]]
        if any(area is None for area in areas):
            areas = [float(round_["gallery_names_a_member"]) for round_ in row["rounds"]]
        share, area = np.mean(np.array(gaps) > 0), np.mean(areas)
        bold = "**" if _passes(row) else ""
        lines.append(
            f"| {bold}{request.steps} × {request.batch_size}{bold} | {request.visits} | {len(played)} | {attack} | "
            f"{_cell(gaps)} | {max(gaps):.2f} | {right:.1f} | {share:.0%} | {area:.2f} |"
        )
    return lines


def _gates(results: Sequence[Result]) -> list[str]:
    request = {"adapter": LORA, "weights": CRAFTED, "steps": 1, "batch_size": 64}
    rows = [row for row in results if request.items() <= row["request"].items() and not row["request"].get("blocks")]
    if len(rows) < 2:
        return []
    lines = [
        "### How far crafted weights must be",
        "",
        "LoRA, 1 × 64, gates in every ResNet block: distance of the weights from the study's first ones, which the "
        "start check limits to `max_update_norm` a round and `policy.max_distance`.",
        "",
        "| distance | attack | gap, dB | named |",
        "|---" * 4 + "|",
    ]
    for row in sorted(rows, key=lambda row: float(row["moved"])):
        attack = _attack(row)
        gaps = _gaps(row, attack)
        lines.append(f"| {row['moved']:.0f} | {attack} | {_cell(gaps)} | {np.mean(np.array(gaps) > 0):.0%} |")
    return [*lines, ""]


def _trivial(results: Sequence[Result]) -> list[str]:
    played = [round_ for row in results for round_ in row["rounds"]]
    many = [round_ for round_ in played if round_["drawn"] > 1]
    lines = [
        "### Answers that know nothing of the round",
        "",
        "| answer | gap, dB | right, dB, one scan drawn | right, dB, several drawn |",
        "|---" * 4 + "|",
    ]
    for name in TRIVIAL:
        gaps = [gap(round_, name) for round_ in played]
        alone = [round_["answers"][name]["right_db"] for round_ in played if round_["drawn"] == 1]
        several = [round_["answers"][name]["right_db"] for round_ in many]
        cells = [f"{np.mean(values):.1f}" if values else "" for values in (alone, several)]
        lines.append(f"| {name} | {_cell(gaps)} | {' | '.join(cells)} |")
    return [*lines, ""]
