"""The page of the performance benchmark, and its flat numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_evaluate.report import format_number
from ld_simulations.aims import Aim, aim_met
from ld_simulations.benchmarks.harness import PART_RESULTS, ResultStore, json_bytes
from ld_simulations.benchmarks.performance.plan import PARTS
from ld_simulations.benchmarks.performance.wire import wire_table

NUMBERS, PAGE = "performance.json", "performance.md"
AIMS = {
    "peak_mb_1000_sites_rank4": Aim("<= 500", at_most=500),
    "aggregate_over_numpy_pass_100": Aim("<= 3", at_most=3),
    "aggregate_over_numpy_pass_1000": Aim("<= 3", at_most=3),
    "full_unet_3_sites_peak_gb": Aim("<= 8", at_most=8),
    "training_over_diffusers_loop": Aim(">= 1.5", at_least=1.5),
    "edits_per_second_over_pipeline_same_calls": Aim(">= 1.2", at_least=1.2),
    "edits_batch16_over_one": Aim(">= 3.5", at_least=3.5),
    "round_over_bare_loop": Aim("<= 1.10", at_most=1.10),
    "deployed_round_over_bare_loop": Aim("<= 1.25", at_most=1.25),
    "demo_seconds": Aim("<= 240", at_most=240),
    "first_picture_seconds": Aim("<= 60", at_most=60),
}
MEANING = {
    "peak_mb_1000_sites_rank4": "server's peak memory over that before the round, MB: 1,000 sites, rank 4",
    "aggregate_over_numpy_pass_100": "server's seconds for 100 sites, over one NumPy pass over the same bytes",
    "aggregate_over_numpy_pass_1000": "the same for 1,000 sites",
    "full_unet_3_sites_peak_gb": "server's peak memory for three sites that send a whole UNet of 860 million, GB",
    "training_over_diffusers_loop": "training steps a second, over those of diffusers' LoRA script",
    "edits_per_second_over_pipeline_same_calls": "edits a second, over images of StableDiffusionPipeline with as many "
    "evaluations of the network",
    "edits_batch16_over_one": "edits a second of 16 at once, over one at a time",
    "round_over_bare_loop": "a simulated round of two sites, over their bare training loops at the same time",
    "deployed_round_over_bare_loop": "a deployed round of one site, over its bare training loop",
    "demo_seconds": "seconds of `make demo` after install",
    "first_picture_seconds": "seconds until its first picture",
}


def write_report(store: ResultStore, folder: Path) -> list[Path]:
    """Write the page of the parts that have a result; returns the files."""
    parts = store.collect(PARTS)
    numbers = flat_numbers(parts)
    files = {
        folder / NUMBERS: json_bytes(numbers | {PART_RESULTS: parts}),
        folder / PAGE: ("\n".join(_page(numbers, parts)) + "\n").encode(),
    }
    for file, content in files.items():
        write_bytes(file, content)
    return list(files)


def flat_numbers(parts: dict[str, Any]) -> dict[str, Any]:
    """Every number by its key; None for a part without a result."""
    found: dict[str, Any] = {}
    for part in parts.values():
        found |= part
    found["demo_seconds"] = parts.get("demo", {}).get("seconds_total")
    return {key: found.get(key) for key in AIMS}


def _page(numbers: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    machine = next(iter(parts.values()), {"processor": "unknown", "threads": 0})
    lines = [
        "# Speed and memory",
        "",
        "Written by `make benchmark-performance`. Ratios are medians over repeats that were timed in turn, in one run, "
        f"on {machine['processor']}, {machine['threads']} threads.",
        "",
        "| number | what it is | measured | aim | |",
        "|---|---|---|---|---|",
    ]
    for key, aim in AIMS.items():
        if numbers[key] is None:
            lines.append(f"| `{key}` | {MEANING[key]} | not measured | {aim.text} | |")
            continue
        met = "met" if aim_met(key, numbers, AIMS) else "**missed**"
        lines.append(f"| `{key}` | {MEANING[key]} | {format_number(numbers[key])} | {aim.text} | {met} |")
    for part, section in SECTIONS.items():
        if part in parts:
            lines += ["", *section(parts[part])]
    return lines


def _training(part: dict[str, Any]) -> list[str]:
    steps, seconds = part["steps"], {name: median(values) for name, values in part["seconds"].items()}
    speed = part["gigaflops_a_step"] * steps / seconds["ours"]
    return [
        "## Training",
        "",
        f"{steps} steps of batch {part['batch_size']}, {len(part['seconds']['ours'])} repeats: "
        f"{seconds['ours']:.2f} s here, {seconds['diffusers']:.2f} s by diffusers' loop. A step is "
        f"{part['gigaflops_a_step']:.1f} billion operations of convolutions, products and attention, so ours runs at "
        f"{speed:.0f} billion a second. Both loops ask the same network with the same latents; what differs is the "
        "text encoder, which ours asks once, and the LoRA's sums, which ours makes in one product. No loop can be "
        "faster than the network's own forward and backward pass.",
    ]


def _generation(part: dict[str, Any]) -> list[str]:
    one = median(part["seconds"]["one edit"])
    return [
        "## Edits",
        "",
        f"Editor `ddpm` with 20 steps: {part['evaluations']} evaluations of the network an edit, {one:.2f} s; the "
        f"pipeline makes as many ({part['evaluations_of_pipeline']}). 16 edits at once run at "
        f"{part['edits_per_second']:.1f} a second. Batching brings the network alone "
        f"{part['evaluation_of_batch_over_one']:.1f}: the seconds of 16 pairs asked one after the other, over all at "
        "once. This is the most that a batch of edits can gain on this machine, and the inversion of one scan is "
        "already asked in a batch.",
    ]


def _simulated(part: dict[str, Any]) -> list[str]:
    rounds, bare = median(part["round_seconds"]), median(part["bare_seconds"])
    return [
        "## Rounds",
        "",
        f"{part['sites']} simulated sites, {part['steps']} steps: {rounds:.1f} s a round, {bare:.1f} s for the bare "
        "loops side by side at one thread each.",
    ]


def _deployed(part: dict[str, Any]) -> list[str]:
    return [
        "## Deployed rounds",
        "",
        f"A site behind TLS with an executor of its own: {part['round_seconds']:.1f} s a round, "
        f"{part['slowest_site_task_seconds']:.1f} s of them in its task, {part['bare_seconds']:.1f} s for the bare "
        "loop.",
    ]


def _scale(part: dict[str, Any]) -> list[str]:
    lines = [
        "## The server against the number of sites",
        "",
        "With the LoRA of all attention of Stable Diffusion 1.4, or its whole UNet; replies come in a random order. "
        "The round is from the packing of the tasks to the checkpoint. Of it, checks, sum and checkpoint stand beside "
        "one NumPy pass that adds the same bytes, from the same files, in float64.",
        "",
        "| case | round, s | checks, sum, checkpoint, s | over one NumPy pass | peak memory over base, MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in part["rounds"].items():
        numbers = [format_number(row[key]) for key in ("seconds", "aggregate_seconds", "over_numpy_pass")]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(numbers)} | {row['peak_mb']:,.0f} |")
    return lines


def _wire(part: dict[str, Any]) -> list[str]:
    return [
        "## What an update takes on the wire",
        "",
        "`federation.wire` of a study: the bytes of a reply, the error of the mean of all sites relative to that of "
        "float32, and a short training on the tiny base.",
        "",
        *wire_table(part),
    ]


def _nodes(part: dict[str, Any]) -> list[str]:
    peaks = ", ".join(
        f"{key.removesuffix('_peak_mb')} {value:,.0f} MB" for key, value in part.items() if key.endswith("_peak_mb")
    )
    return [
        "## A SuperLink with many nodes",
        "",
        f"`python -m ld_simulations.benchmarks.performance.stub_nodes`: {part['nodes']:,} nodes that train nothing, "
        f"through a real SuperLink over TLS. A round takes {part['round_seconds']:.0f} s, {part['replies']:,} replies "
        f"counted, peak memory: {peaks}.",
        "",
        "A round of 1,000 nodes, the command's default, was not brought to its end on two cores: 268 had replied after "
        "25 minutes beside other jobs. Most of the time passes in the SuperLink, which writes a transaction of SQLite "
        "for each of Flower's requests, some sixty a node.",
    ]


def _ray(part: dict[str, Any]) -> list[str]:
    return [
        "## Sites on a Ray cluster",
        "",
        f"`ld-simulate --ray-address` on a cluster of {part['nodes']} local nodes: {part['rounds']} rounds of "
        f"{part['sites']} sites, with Flower's start, in {part['seconds']:.0f} s.",
    ]


SECTIONS = {
    "training": _training,
    "generation": _generation,
    "simulated": _simulated,
    "deployed": _deployed,
    "scale": _scale,
    "wire": _wire,
    "nodes": _nodes,
    "ray": _ray,
}
