"""The page and the flat numbers of the benchmark on real latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ld_simulations.benchmarks.real_latents.rows import (
    BASE,
    CENTRED_ROW,
    CHANNEL,
    EVERYDAY,
    FLOOR,
    GAUSSIAN,
    MAP,
    MATCHED,
    METRICS,
    NO_DRIFT,
    ROWS,
    SITE,
    WITHOUT_TRAINING,
)
from ld_simulations.benchmarks.real_latents.statistics import seeds_interval

Parts = Mapping[str, Any]
SOURCES = (
    "Radiographs: COVID-19 Image Repository, Institute for Diagnostic and Interventional Radiology, Hannover Medical "
    "School, 2020/21, [doi 10.25835/0090041](https://doi.org/10.25835/0090041), CC BY 3.0. MR volumes: Lesjak et al., "
    "Neuroinformatics 2016, CC BY. Autoencoder: TAEF2 of "
    "[madebyollin/taesd](https://github.com/madebyollin/taesd), MIT licence. Everyday pictures: those that the wheels "
    "of scikit-image, Matplotlib and scikit-learn hold. None of them is part of this project; the figures show "
    "generated samples and means over several patients, no patient's scan."
)
FACTORS = {"kernel": 1000}
"""By which a metric's numbers are multiplied in the tables."""
SEEN = (
    "Looked at: none of the network's samples would pass for a radiograph. All rows have learned the black bars and a "
    "bright body between them; inside there are patches and stripes, with a hint of lungs here and there. The "
    "Gaussian's samples look more like chests. A drift does not turn a bad sample into a good one: the same picture "
    "comes again, its grey a little more even. The rows' means tell more: lungs are hardly there without drift and "
    "visible with the drift by map."
)
"""What was seen in the sheet of samples, on 2026-11-30."""


def table_rows(parts: Parts) -> dict[str, dict[str, dict[str, float]]]:
    """By row and metric, mean and half width of the 95 % interval; `<metric>_change` is the change from *no drift*."""
    seeds = [parts[name] for name in parts if name.startswith("seed-")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ROWS:
        fixed = parts["references"]["rows"].get(name)
        measured = [fixed] if fixed is not None else [seed["rows"][name] for seed in seeds]
        cells: dict[str, dict[str, float]] = {
            "grey": {"mean": sum(float(row["grey"]) for row in measured) / len(measured)}
        }
        for metric in METRICS:
            values = [row[metric]["value"] for row in measured]
            left_out = [row[metric]["left_out"] for row in measured]
            cells[metric] = seeds_interval(values, left_out, measured[0][metric]["own_variance"])
            if name != NO_DRIFT:
                cells[f"{metric}_change"] = _change(measured, [seed["rows"][NO_DRIFT] for seed in seeds], metric)
        found[name] = cells
    return found


def flat_numbers(parts: Parts) -> dict[str, Any]:
    """Numbers by name, for other pages and tests."""
    numbers: dict[str, Any] = {
        "real_latents_chance_rms": parts["drift"]["chance"],
        "real_latents_psnr_radiographs_db": parts["reconstruction"]["psnr_db"]["radiographs"],
        "real_latents_seconds": sum(float(part["seconds"]) for part in parts.values()),
    }
    for kind, found in parts["drift"]["drifts"].items():
        numbers[f"real_latents_drift_rms/{kind}"] = found["corrected"]
    for name, cells in table_rows(parts).items():
        for metric in METRICS:
            numbers[f"real_latents_{metric}/{name}"] = round(cells[metric]["mean"], 4)
    return numbers


def page_lines(config: Any, parts: Parts) -> list[str]:
    """Lines of the Markdown page: sources, autoencoder, drifts, sites, samples, each with its controls."""
    seconds = sum(float(part["seconds"]) for part in parts.values())
    machines = sorted({part["machine"]["processor"] for part in parts.values()})
    return [
        "# Latent drift in a published latent space",
        "",
        "Written by `.venv/bin/ld-benchmark real-latents`, which reads images and weights that are not part of this "
        f"project and is skipped where they are absent. {', '.join(machines)}, {config.threads} thread, "
        f"{seconds / 60:.0f} minutes while the machine did other work.",
        "",
        SOURCES,
        "",
        *_autoencoder_lines(parts["reconstruction"]),
        *_drift_lines(parts["drift"]),
        *_site_lines(parts["sites"]),
        *_sample_lines(config, parts),
    ]


def _autoencoder_lines(part: Mapping[str, Any]) -> list[str]:
    kinds = part["psnr_db"]
    sides = list(next(iter(kinds.values())))
    groups = ", ".join(f"{number}: {value:.1f}" for number, value in part["psnr_db_by_groups"].items())
    return [
        "## The autoencoder",
        "",
        "TAEF2 imitates the autoencoder of FLUX.2: 32 channels, a latent pixel for 8x8 pixels. Its layers were read "
        "off the tensors of the weight files, which load strictly. PSNR through it:",
        "",
        f"| pictures | {' | '.join(f'{side}x{side} px, dB' for side in sides)} |",
        "|---" * (1 + len(sides)) + "|",
        *(f"| {kind} | {' | '.join(f'{found[side]:.1f}' for side in sides)} |" for kind, found in kinds.items()),
        "",
        f"The number of groups of its normalisation is in no tensor's shape. {part['groups']} reconstructs everyday "
        f"crops best (dB by number of groups: {groups}).",
        "",
    ]


def _drift_lines(part: Mapping[str, Any]) -> list[str]:
    drifts = part["drifts"]
    radiographs, slices = drifts["radiographs"], drifts["MR slices"]
    lines = [
        "## Drift of real scans",
        "",
        f"Pictures of {part['side']}x{part['side']} px. The drift is the difference of the latents' means by channel "
        f"from {drifts['everyday crops without colour']['pictures']} crops of {len(part['sources'])} everyday "
        f"pictures ({', '.join(part['sources'])}), in deviations of the channel over these. Intervals draw patients "
        "and source pictures anew; a channel is *off 0* where its interval excludes it, by chance one in twenty. "
        "Noise alone has an rms above 0: *corrected* has the estimate's own variance subtracted. The chance level is "
        f"the rms between random halves of the everyday pictures, no source in both: {part['chance']:.2f} in the "
        f"median, {part['chance_high']:.2f} in one of twenty. A half's mean is off by more than the whole's: from "
        f"{len(part['sources'])} pictures, that of all is off by about {part['chance'] / 2:.2f}.",
        "",
        "| drift of | pictures | patients or sources | rms over channels | corrected | channels off 0 |",
        "|---" * 6 + "|",
    ]
    for kind, found in drifts.items():
        lines.append(
            f"| {kind} | {found['pictures']} | {found['groups']} | {_rms(found)} | {found['channels_apart']} of "
            f"{found['channels']} |"
        )
    kept = drifts["radiographs, from grey crops with their grey levels"]["corrected"]
    kept_slices = drifts["MR slices, from grey crops with their grey levels"]["corrected"]
    return [
        *lines,
        "",
        f"The MR volumes are of {slices['groups']} patients, so their interval holds little more than the everyday "
        "pictures' uncertainty, and says nothing about other patients. The drifts of radiographs and MR slices by "
        f"channel correlate by {part['correlation_of_mr_and_radiographs']:.2f}.",
        "",
        "*From grey crops* compares with the same crops without colour; *with their grey levels* after one monotone "
        "map has also given those crops the scans' histogram. By that the corrected rms goes from "
        f"{radiographs['corrected']:.2f} to {kept:.2f} for radiographs and from {slices['corrected']:.2f} to "
        f"{kept_slices:.2f} for MR slices: what remains is neither colour nor brightness.",
        "",
        "![Drift of each latent channel with its interval](real_latents_channels.png)",
        "",
        "Drift by channel with 95 % intervals; the grey band is the chance level's rms.",
        "",
    ]


def _site_lines(part: Mapping[str, Any]) -> list[str]:
    sets = ", ".join(f"{site} {part['images'][site]} of {part['patients'][site]} patients" for site in part["images"])
    told = part["told"]
    lines = [
        "## Between sites",
        "",
        f"The radiographs are of one hospital; device and projection stand in for three sites ({sets}; some patients "
        "are seen at two). The chance level deals the labels out anew over patients. Who is ill lies on a bed and is "
        "taken ap, so a site's drift holds its patients as well as its device.",
        "",
        "| sites | rms between their drifts | corrected | chance, median | chance, one of twenty | p |",
        "|---" * 6 + "|",
    ]
    for found in part["distances"]:
        lines.append(
            f"| {' and '.join(found['sites'])} | {_rms(found)} | {found['chance']:.2f} | {found['chance_high']:.2f} | "
            f"{found['p']:.3f} |"
        )
    first = next(iter(told.values()))
    lines += [
        "",
        f"Told apart: the site of a patient is said to be the one with the nearest mean, where the means are of other "
        f"patients ({first['cases']} pairs of a patient and a site). Always the most frequent site is right in "
        f"{first['majority_accuracy']:.0%} of them; balanced over the sites, any constant answer scores 33 %.",
        "",
        "| told by | balanced accuracy | labels dealt anew, mean | one of twenty | plain accuracy | right, by site |",
        "|---" * 6 + "|",
    ]
    for name, found in told.items():
        by_site = ", ".join(f"{site} {share:.0%}" for site, share in found["right_by_site"].items())
        lines.append(
            f"| {name} | {found['balanced']:.0%} ({found['balanced_low']:.0%} to {found['balanced_high']:.0%}) | "
            f"{found['chance']:.0%} | {found['chance_high']:.0%} | {found['accuracy']:.0%} | {by_site} |"
        )
    latent, grey = told["latent means"], told["mean and deviation of grey"]
    apart = latent["balanced_low"] > grey["balanced_high"] or grey["balanced_low"] > latent["balanced_high"]
    return [
        *lines,
        "",
        f"Two numbers of the grey levels, a rule without latents, score {grey['balanced']:.0%}; 32 latent means score "
        f"{latent['balanced']:.0%}. Their intervals {'do not overlap' if apart else 'overlap'}.",
        "",
    ]


def _sample_lines(config: Any, parts: Parts) -> list[str]:
    of, base, table = parts["references"], parts["base"], table_rows(parts)
    seeds = [name for name in parts if name.startswith("seed-")]
    floor = table[FLOOR]["frechet"]["mean"]
    lines = [
        "## Samples with and without drift",
        "",
        f"A UNet of {base['parameters'] / 1e6:.1f} million parameters learns these latents at "
        f"{config.drawn_side}x{config.drawn_side} px ({config.drawn_side // 8}x{config.drawn_side // 8} latent "
        f"pixels): first a base, {config.base_steps} steps on {base['crops']} everyday crops, then {config.steps} "
        f"steps on the {of['training_images']} radiographs of {of['training_patients']} patients, batches of "
        f"{config.batch_size}, the site as its only condition. The schedule is Stable Diffusion's and leaks: a(T) = "
        f"{of['last_signal_level']:.3f}. DDIM with {config.sampling_steps} steps starts at a(t0) = "
        f"{of['first_signal_level']:.3f}. Latents are normalised by the everyday crops' mean and deviation by "
        "channel, as FLUX.2 does with its own, so the base's mean is 0 and the drift is the radiographs' mean: rms "
        f"{of['drift_rms_by_channel']:.2f} by channel, {of['drift_rms_of_map']:.2f} by map.",
        "",
        f"Every set has {config.samples} pictures or a little less and is compared with {of['held_out_images']} "
        f"pictures of {of['held_out_patients']} held-out patients through the autoencoder. Held-out patients decided "
        "nothing, and nothing was tuned on a distance. Two settings of the fine-tuning (400 steps at .001, 900 at "
        ".002) were looked at with another seed beside training patients' pictures; the better one was cut to what "
        "there was time for. The rest are first guesses.",
        "",
        "FD is the Fréchet, KD the kernel distance (times 1,000) of EfficientNet-Lite0 features, *matched* the "
        "former with the same grey levels on both sides, *Gabor* the Fréchet distance of filter energies, *grey* the "
        f"mean grey level minus the held-out pictures', of 255. Means over {len(seeds)} seeds of fine-tuning and "
        "sampling with 95 % intervals over held-out patients (jackknife) and seeds; another base or split is not in "
        "them, and few seeds tell their spread badly. FD of so few pictures is biased upwards: compare rows, not "
        "pages. Italic rows involve no network that saw a radiograph.",
        "",
        "| pictures | FD | KD x 1,000 | FD, matched | FD, Gabor | grey |",
        "|---" * 6 + "|",
    ]
    for name, cells in table.items():
        shown = f"*{name}*" if name in (*WITHOUT_TRAINING, BASE) else name
        distances = [_cell(cells[metric], 1, FACTORS.get(metric, 1)) for metric in METRICS]
        lines.append(f"| {shown} | {' | '.join(distances)} | {cells['grey']['mean']:+.0f} |")
    lines += [
        "",
        "Change from *no drift*, same seeds and same held-out patients on both sides (negative is nearer):",
        "",
        "| pictures | FD | KD x 1,000 | FD, matched | FD, Gabor |",
        "|---" * 5 + "|",
    ]
    for name, cells in table.items():
        if name in (*WITHOUT_TRAINING, BASE, NO_DRIFT):
            continue
        changes = [_cell(cells[f"{metric}_change"], 1, FACTORS.get(metric, 1), "+") for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(changes)} |")
    return [
        *lines,
        "",
        *_reading(table, floor),
        "![Mean pictures of real radiographs, and samples of each row](real_latents_samples.png)",
        "",
        "First seed, the same noise in every row of samples; the first picture of a row is the mean of its samples.",
        "",
        SEEN,
        "",
    ]


def _reading(table: Mapping[str, Any], floor: float) -> list[str]:
    """What the table says, where it says it."""
    said = [
        f"The floor, real pictures of other patients, is {floor:.1f}: a model that copied its training pictures would "
        f"score this. Without any training, the Gaussian scores {table[GAUSSIAN]['frechet']['mean']:.1f} and the "
        f"everyday crops {table[EVERYDAY]['frechet']['mean']:.1f}; matching grey levels of the samples without drift, "
        f"which needs no drift and no training, takes them from {table[NO_DRIFT]['frechet']['mean']:.1f} to "
        f"{table[MATCHED]['frechet']['mean']:.1f}."
    ]
    said.append(" ".join(_verdict(name, table[name]) for name in (CHANNEL, SITE, MAP, CENTRED_ROW)))
    best = min((CHANNEL, SITE, MAP), key=lambda name: float(table[name]["frechet"]["mean"]))
    level = float(table[MATCHED]["frechet"]["mean"])
    behind = [name for name in (CHANNEL, SITE, MAP, CENTRED_ROW) if table[name]["frechet"]["mean"] > level]
    if behind:
        said.append(f"By FD, matching the samples' grey levels does more than: {'; '.join(behind)}.")
    if table[GAUSSIAN]["frechet"]["mean"] < table[best]["frechet"]["mean"]:
        said.append(
            f"The Gaussian, which has no network at all, is nearer to real radiographs than the best drift, *{best}*: "
            "the network is too small or trained too briefly for its samples to be of use. What the table shows is "
            "the effect of a drift on a weak model, beside the distance that remains to the floor."
        )
    return [line for text in said for line in (text, "")]


def _verdict(name: str, cells: Mapping[str, Any]) -> str:
    words = []
    for metric, label in (("frechet", "FD"), ("kernel", "KD"), ("frechet_matched", "FD with matched grey levels")):
        change = cells[f"{metric}_change"]
        sign = "not distinguishable from no drift"
        if abs(change["mean"]) > change["half_width"]:
            sign = "better" if change["mean"] < 0 else "worse"
        words.append(f"{label} {sign}")
    return f"{name[0].upper()}{name[1:]}: {', '.join(words)}."


def _change(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """The change from `plain`, by seed where `rows` has as many."""
    pairs = list(zip(rows if len(rows) == len(plain) else [*rows] * len(plain), plain, strict=True))
    values = [row[metric]["value"] - other[metric]["value"] for row, other in pairs]
    left_out = [
        [a - b for a, b in zip(row[metric]["left_out"], other[metric]["left_out"], strict=True)] for row, other in pairs
    ]
    return seeds_interval(values, left_out, rows[0][metric]["own_variance"])


def _rms(found: Mapping[str, Any]) -> str:
    """Cells of an rms, and of the corrected one with its interval."""
    low, high = found["corrected_low"], found["corrected_high"]
    return f"{found['rms']:.2f} | {found['corrected']:.2f} ({low:.2f} to {high:.2f})"


def _cell(cell: Mapping[str, float], digits: int, factor: float = 1, sign: str = "") -> str:
    return f"{factor * cell['mean']:{sign}.{digits}f} ± {factor * cell['half_width']:.{digits}f}"
