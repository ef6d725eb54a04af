"""The demo's report: one self-contained HTML file, images before numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ld_client.data.store import open_store
from ld_client.site_config import load_modality, load_site
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.drift import at_designs
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_reader import decode_scan
from ld_common.release.release import AnyDrift, Release
from ld_evaluate.files import COPY, PERFECT, SAME
from ld_evaluate.patient_tables import edit_cells
from ld_evaluate.report import format_number
from ld_simulations.aims import aim_met
from ld_simulations.demo import Demo
from ld_simulations.evaluation import ALL_VISITS, ONE_SCAN
from ld_simulations.phantoms.base import HEALTHY
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.report.patients import ShownPatient, growth_plots
from ld_simulations.report.pictures import difference_legend, difference_url, figure_url, picture_url
from ld_simulations.summary import AIMS, COST, TITLES

matplotlib.use("Agg")
SHOWN_VISITS = 8
SAMPLES = 6
SAMPLE_STEPS = 30
COLOURS = ("#1b6ca8", "#c8553d", "#4f8a4b", "#7b5ea7", "#b8860b")


def write_report(
    path: Path, demo: Demo, release: Release, base: BaseModel, patients: Sequence[ShownPatient], summary: dict[str, Any]
) -> Path:
    """Write the report of a finished run; `patients` are of `shown_patients`. Returns `path`."""
    phantom = find_phantom(demo.hospitals.phantom)
    loader = jinja2.PackageLoader("ld_simulations", "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "picture": picture_url, "difference": difference_url}
    text = environment.get_template("report.html.j2").render(
        study=release.study,
        edits=_edits(release.modality, summary),
        histories=_histories(release.modality, summary),
        rules=(COPY, SAME, PERFECT),
        aims=[
            (key, TITLES[key], summary[key], aim.text, aim_met(key, summary, AIMS))
            for key, aim in AIMS.items()
            if key not in COST
        ],
        summary=summary,
        hospitals=[_hospital(demo, name, base.resolution) for name in release.study.federation.sites],
        losses=_losses(release),
        withheld=release.study.withholds_numbers,
        drifts=_drifts(release),
        rounds=release.manifest["rounds"],
        samples=_samples(release, base),
        patients=patients,
        growth={title: figure_url(figure) for title, figure in growth_plots(patients).items()},
        legend=difference_legend(),
        titles=phantom.edit_titles(),
        terms=phantom.terms,
        manifest=json.dumps({key: release.manifest[key] for key in ("base_model", "files", "software")}, indent=2),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _hospital(demo: Demo, name: str, resolution: int) -> dict[str, Any]:
    """The first visits of some patients as the model sees them, and a summary of all patients and of the scanner."""
    site = load_site(demo.sites / f"{name}.yaml")
    store, modality = open_store(site.store_path), load_modality(site)
    folders = sorted(path for path in Path(site.data.root).iterdir() if path.is_dir())[:SHOWN_VISITS]
    images = [
        to_model(decode_scan(sorted(folder.iterdir())[0], modality), resolution, modality.image)[0]
        for folder in folders
    ]
    scanner = next(hospital.scanner for hospital in demo.hospitals.hospitals if hospital.name == name)
    ages = [float(attributes["age"]) for attributes in store.attributes]
    ill = [attributes["diagnosis"] != HEALTHY for attributes in store.attributes]
    return {
        "name": name,
        "images": [picture_url(image) for image in images],
        "patients": len(set(store.pseudonyms)),
        "visits": len(ages),
        "ages": f"{min(ages):.0f} to {max(ages):.0f}, mean {np.mean(ages):.0f}",
        "ill": f"{100 * np.mean(ill):.0f} %",
        "scanner": f"{scanner.rows}x{scanner.columns} at {scanner.spacing_mm} mm, {scanner.bits_stored} bit"
        + (", MONOCHROME1" if scanner.monochrome1 else ""),
    }


def _losses(release: Release) -> str:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    rounds = release.manifest["rounds"]
    for colour, name in zip(itertools.cycle(COLOURS), sorted(release.study.federation.sites), strict=False):
        seen = [record for record in rounds if name in record["sites"]]
        numbers = [record["round"] for record in seen]
        if any(record["sites"][name]["loss_last"] is None for record in seen):
            continue  # withheld under differential privacy
        first = [record["sites"][name]["loss_first"] for record in seen]
        last = [record["sites"][name]["loss_last"] for record in seen]
        axes.plot(numbers, last, color=colour, marker="o", label=f"{name}, last fifth of the round")
        axes.plot(numbers, first, color=colour, marker="o", ls=":", alpha=0.5)
    axes.set(xlabel="round (dotted: first fifth of the round)", ylabel="denoising loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure_url(figure)


def _drifts(release: Release) -> str:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    recorded = release.manifest["drift"]
    drawn = {**recorded["sites"], **({} if recorded["mean"] is None else {"mean": recorded["mean"]})}
    for index, (name, values) in enumerate(sorted(drawn.items())):
        place = np.arange(len(values)) + (index - (len(drawn) - 1) / 2) * 0.2
        axes.bar(place, values, 0.18, label=name, color="#999999" if name == "mean" else COLOURS[index % len(COLOURS)])
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="latent channel", ylabel="drift μ (scaled latents)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4)
    return figure_url(figure)


@torch.no_grad()
def _samples(release: Release, base: BaseModel) -> list[dict[str, Any]]:
    """Images from the same noise: without drift, with the mean drift and with each site's drift."""
    shown_attributes = _sample_attributes(release.modality)
    prompts = [release.modality.prompt(attributes) for attributes in shown_attributes]
    designs = [release.modality.design_vector(attributes) for attributes in shown_attributes]
    context = base.embed(prompts)
    noise = torch.randn((len(prompts), *base.latent_shape), generator=torch_generator(release.study.seed, "samples"))
    sampler = make_sampler(base.scheduler, steps=SAMPLE_STEPS)
    kinds: dict[str, AnyDrift | None] = {"no drift": None}
    if release.drift is not None:
        kinds["mean drift"] = release.drift
    kinds |= {f"drift of {name}": drift for name, drift in sorted(release.site_drifts.items())}
    rows = []
    for name, drift in kinds.items():
        images = base.decode(sample(base, context, noise, sampler, at_designs(drift, designs)))
        rows.append({"name": name, "images": list(zip(map(picture_url, images), prompts, strict=True))})
    return rows


def _sample_attributes(modality: Modality) -> Sequence[Attributes]:
    """Attributes of the shown samples: numbers spread over the upper range, categories in turn."""
    samples = []
    for index in range(SAMPLES):
        attributes: Attributes = {}
        for name, attribute in modality.attributes.items():
            if attribute.categories:
                categories = sorted(attribute.categories)
                attributes[name] = categories[(index // (1 + len(attributes))) % len(categories)]
            else:
                share = 0.45 + 0.45 * index / (SAMPLES - 1)
                attributes[name] = round(attribute.minimum + share * (attribute.maximum - attribute.minimum))
        samples.append(attributes)
    return samples


def _edits(modality: Modality, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each kind of edit with the cells of its table, a row for each rule and for the editor."""
    rules, biomarker = summary["rules"], modality.biomarkers[0]
    tables = []
    for edit, numbers in summary["by_edit"].items():
        methods = {rule: rules[rule].get(edit) for rule in (COPY, SAME)} | {"this release": numbers}
        if summary["network"]:
            methods["its network alone"] = summary["network"]["by_edit"].get(edit)
        methods[PERFECT] = rules[PERFECT].get(edit)
        rows = {name: edit_cells(of_method, biomarker) for name, of_method in methods.items() if of_method}
        tables.append({"name": edit, "rows": rows, "ceiling": summary["ceilings"].get(edit)})
    return tables


def _histories(modality: Modality, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What comes after the last visit: a table for each number of years."""
    rows, biomarker = summary["with_history"], modality.biomarkers[0]
    if not rows:
        return []
    names = (COPY, SAME, ONE_SCAN, ALL_VISITS, PERFECT)
    return [
        {
            "years": int(edit.removeprefix("history_")),
            "rows": {name: edit_cells(rows[name][edit], biomarker) for name in names if edit in rows.get(name, {})},
        }
        for edit in rows[ALL_VISITS]
    ]
