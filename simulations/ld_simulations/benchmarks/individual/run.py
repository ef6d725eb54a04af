"""`ld-benchmark individual`: tunes the rules on some patients, judges them once on others, and writes the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config, to_mapping
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan, json_bytes
from ld_simulations.benchmarks.individual.answers import RELEASE, TEST, TUNE, Answerer, Choice, Part, Record, choose
from ld_simulations.benchmarks.individual.attributes_rule import (
    Predicted,
    predict_by_attributes,
    with_attributes_rule,
)
from ld_simulations.benchmarks.individual.closed_form import drift_editor, pooled_difference
from ld_simulations.benchmarks.individual.people import BETWEEN, FOLLOW_UP, YEARS_ON
from ld_simulations.benchmarks.individual.plan import IndividualConfig
from ld_simulations.benchmarks.individual.private_report import PrivateResults, private_lines
from ld_simulations.benchmarks.individual.private_run import private_output, run_private
from ld_simulations.benchmarks.individual.report import (
    GROWING,
    anatomy_lines,
    flat_numbers,
    numbers_by_question,
    patients_picture,
    with_same_change,
)
from ld_simulations.hospitals import draw_visits, held_out_population, scan
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from ld_simulations.phantoms.registry import find_phantom

NUMBERS, PAGE = "individual.json", "individual.md"
DECIDES = (
    "anatomies",
    "base_model",
    "training",
    "tuning",
    "test",
    "components",
    "scales",
    "own_shares",
    "time_scales",
    "effect_scales",
    "own_slope_halves",
    "own_growth_halves",
)


def run(config: IndividualConfig, only_report: bool, console: Console) -> list[Path]:
    """Do what has no result yet, and write the page; returns its files."""
    output = Path(config.output).resolve()
    store = ResultStore(output)
    if not only_report:
        plan: dict[str, Any] = to_mapping(config)
        claim_plan(output, {key: plan[key] for key in DECIDES})
        harness = Harness(store, console, config.workers)
        make = partial(Answerer, config)
        harness.run("tuning", parts(config, TUNE), make, Answerer.tune)
        choices = {anatomy: _choice(config, store, anatomy) for anatomy in config.anatomies}
        harness.run("test patients", parts(config, TEST), make, partial(_test, choices))
        harness.run("releases", parts(config, RELEASE), make, Answerer.release)
        for anatomy in config.anatomies:
            harness.once(f"facts/{anatomy}", partial(_facts, config, anatomy))
            harness.once(f"attributes/{anatomy}", partial(_by_attributes, config, anatomy))
            harness.once(f"drift/{anatomy}", partial(_drift_facts, config, anatomy, choices[anatomy]))
        run_private(config, choices[next(iter(config.anatomies))], console)
    return write_page(config, store)


def parts(config: IndividualConfig, group: str) -> list[Part]:
    """The patients of a group, some at a time."""
    found = []
    for anatomy, chosen in config.anatomies.items():
        tested = chosen.test_patients or config.test.patients
        patients = {TUNE: config.tuning.patients, TEST: tested, RELEASE: config.release_patients}[group]
        if group != RELEASE or chosen.release:
            found += [
                Part(anatomy, group, first, min(first + config.patients_in_task, patients))
                for first in range(0, patients, config.patients_in_task)
            ]
    return found


def write_page(config: IndividualConfig, store: ResultStore) -> list[Path]:
    """Write page, numbers and pictures of the results that there are."""
    folder, sections = Path(config.results), list[str]()
    numbers: dict[str, Any] = {}
    files = [folder / NUMBERS, folder / PAGE]
    for anatomy in config.anatomies:
        records = _records(config, store, anatomy, TEST) + _records(config, store, anatomy, RELEASE)
        facts = store.read(f"facts/{anatomy}")
        if not records or facts is None:
            sections += [f"## {anatomy.capitalize()}", "", "Not run yet.", ""]
            continue
        records = with_same_change(records, facts["mean_growth_mm2"])
        records = with_attributes_rule(records, store.read(f"attributes/{anatomy}") or {})
        choice = _choice(config, store, anatomy)
        prefix = "" if anatomy == next(iter(config.anatomies)) else f"{anatomy}_"
        numbers |= {f"{prefix}{key}": value for key, value in flat_numbers(records).items()}
        numbers |= {f"{prefix}{key}": value for key, value in (store.read(f"drift/{anatomy}") or {}).items()}
        numbers[f"{anatomy}_choice"] = asdict(choice)
        numbers[f"{anatomy}_ceilings"] = facts["ceilings"]
        numbers[f"{anatomy}_rows"] = numbers_by_question(records)
        sections += anatomy_lines(records, choice, facts["ceilings"], anatomy.capitalize(), facts["structure"])
        picture = folder / f"individual_{anatomy}.png"
        write_bytes(picture, patients_picture(records, anatomy.capitalize()))
        sections += [f"![Drawn against true growth of each test patient]({picture.name})", ""]
        files.append(picture)
    if config.private.patients:
        private = PrivateResults(config.private, ResultStore(private_output(config)))
        numbers |= private.flat() | {"private_drift": private.rows()}
        sections += private_lines(private)
    write_bytes(folder / NUMBERS, json_bytes(numbers))
    write_bytes(folder / PAGE, "\n".join([*_head(config), *sections]).encode())
    return files


def _head(config: IndividualConfig) -> list[str]:
    return [
        "# Individual answers",
        "",
        "Written by `make benchmark-individual`. What an answer for a single patient is worth, and what rules without "
        "a network reach: each is fitted on the patients of one seed, its options are chosen on those of a second, and "
        "it is reported once on those of a third, whom nothing was chosen on "
        f"(seeds {config.training.seed}, {config.tuning.seed} and {config.test.seed}).",
        "",
        "*Gain*: dB nearer to the true counterfactual than the unedited scan, in the pixels of the file that is "
        "written. *r*: correlation of drawn and true growth over patients within one question. *Error*: mean over "
        "patients of the absolute error of growth. Brackets are 95 % intervals over patients. Questions with a history "
        "begin at the last of three or four visits; *follow up* is the real last visit, asked from the first.",
        "",
        "*Same change for all* gives everybody the mean true growth of the tuning patients, without a picture. *Age, "
        "sex and diagnosis alone* is a linear fit to the growth of the training patients, without a picture too. *Own "
        "line of areas* is a straight line through the patient's own measured areas. *Editor drift* is ld-generate's "
        "closed form, a longitudinal drift fitted by the sums of three sites; with a history where the row says so. "
        "*Perfect answer* is the true counterfactual after the VAE, written like the others.",
        "",
    ]


def _test(choices: Mapping[str, Choice], answerer: Answerer, part: Part) -> list[Record]:
    return answerer.test(part, choices[part.anatomy])


def _choice(config: IndividualConfig, store: ResultStore, anatomy: str) -> Choice:
    return choose(_records(config, store, anatomy, TUNE))


def _records(config: IndividualConfig, store: ResultStore, anatomy: str, group: str) -> list[Record]:
    names = [part.name for part in parts(config, group) if part.anatomy == anatomy]
    return [record for records in store.collect(names).values() for record in records]


def _drift_facts(config: IndividualConfig, anatomy: str, choice: Choice) -> dict[str, Any]:
    """What is measured once of editor `drift`: its equality to a pooled fit, and its time on an idle machine."""
    answerer = Answerer(config)
    people, training = answerer.people(anatomy), answerer.training(anatomy)
    person = next(people.draw(config.tuning.seed, 1, 0, 1, questions=True))
    editor = drift_editor(choice.drift)
    answerer.drift(anatomy).seconds_per_answer(person, editor, choice.drift_rendering)  # imports
    return {
        "federated_drift_equals_pooled": pooled_difference(training, people.modality, answerer.base),
        "seconds_per_answer_closed_form": answerer.drift(anatomy).seconds_per_answer(
            person, editor, choice.drift_rendering
        ),
    }


def _by_attributes(config: IndividualConfig, anatomy: str) -> Predicted:
    answerer, chosen = Answerer(config), config.anatomies[anatomy]
    patients = chosen.test_patients or config.test.patients
    return predict_by_attributes(answerer.training(anatomy), answerer.people(anatomy), config.test.seed, patients)


def _facts(config: IndividualConfig, anatomy: str) -> dict[str, Any]:
    """Mean true growth of the tuning patients by question, of a follow-up a year; and the ceilings of r."""
    hospitals = load_config(HospitalsConfig, Path(config.anatomies[anatomy].hospitals))
    phantom = find_phantom(hospitals.phantom)
    growth: dict[str, list[float]] = {}
    for hospital in hospitals.hospitals:
        sized = HospitalConfig(**{**vars(hospital), "test_patients": config.tuning.patients})
        for drawn in draw_visits(phantom, config.tuning.seed, sized, held_out=True):
            first, last = drawn[0], drawn[-1]
            asked = {name: (first, target) for name, target in phantom.edits_of(first.attributes).items()}
            age = float(last.attributes["age"])
            asked |= {f"history_{years}": (last, {"age": round(age + years, 1)}) for years in YEARS_ON}
            start = float(first.attributes["age"])
            asked |= {name: (first, {"age": round(start + years, 1)}) for name, years in BETWEEN.items()}
            for name, (visit, target) in asked.items():
                areas = [
                    scan(phantom, visit, attributes, phantom.shown_view, hospital.scanner)[1].area_mm2
                    for attributes in (visit.attributes, visit.attributes | target)
                ]
                growth.setdefault(name, []).append(areas[1] - areas[0])
            if age > start:
                ends = [
                    scan(phantom, visit, visit.attributes, phantom.shown_view, hospital.scanner)[1].area_mm2
                    for visit in (first, last)
                ]
                growth.setdefault(FOLLOW_UP, []).append((ends[1] - ends[0]) / (age - start))
    populations = [held_out_population(hospital.population) for hospital in hospitals.hospitals]
    return {
        "mean_growth_mm2": {name: float(np.mean(values)) for name, values in growth.items() if name in GROWING},
        "ceilings": growth_ceiling(populations, phantom=phantom).by_edit,
        "structure": phantom.terms.structure,
    }
