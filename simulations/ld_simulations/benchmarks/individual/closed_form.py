"""The product's answers: a longitudinal drift fitted as the federation fits it, asked through editor `drift`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit, fit_tables
from ld_common.diffusion.longitudinal_sums import (
    DAYS_IN_YEAR,
    StructureSizes,
    VisitTable,
    added,
    basis_of,
    sketch,
    sums,
)
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to, past_of
from ld_common.editing.drift_fitting import sizes_of_latents
from ld_common.editing.history import ScanHistory, writing
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.rendering import render
from ld_simulations.benchmarks.individual.people import People, Person, ScannedVisit

SEED = 0
"""Of the sketch."""


def drift_editor(options: Mapping[str, float]) -> Editor:
    """Editor `drift` with these options."""
    return read_editor({"name": "drift", **options})


def fit_drift(people: Sequence[Person], modality: Modality, base: BaseModel) -> LongitudinalDrift:
    """The drift of some patients' sites: each site's sums, added up and solved."""
    tables = visit_tables(people, modality, base)
    return fit_tables(tables, modality.numeric_columns, base.latent_mean, base.latent_shape, SEED)[0]


def pooled_difference(people: Sequence[Person], modality: Modality, base: BaseModel) -> float:
    """Largest relative difference of a drift's numbers between the sum over sites and one regression on all rows.

    The pooled rows are centred on their site's mean, which is an intercept a site.
    """
    tables = visit_tables(people, modality, base)
    basis = basis_of(added([sketch(table, SEED) for table in tables]), SEED)
    names, latents = [name for table in tables for name in table.patients], [table.latents for table in tables]
    flags = [flag for table in tables for flag in table.mirrored]
    together = VisitTable(
        torch.cat(latents),
        torch.cat([table.features for table in tables]),
        names,
        torch.cat([table.years for table in tables]),
        all_sizes(tables),
        flags,
    )
    centred = VisitTable(
        torch.cat([table.latents - table.latents.mean(0) + together.latents.mean(0) for table in tables]),
        torch.cat([table.features - table.features.mean(0) + together.features.mean(0) for table in tables]),
        names,
        together.years,
        together.structure,
        flags,
    )
    pooled = sums(centred, basis)
    uncentred = sums(together, basis)
    pooled |= {name: value for name, value in uncentred.items() if not name.startswith("across")}
    summed = added([sums(table, basis) for table in tables])
    fitted = [
        fit(state, basis, modality.numeric_columns, base.latent_mean, base.latent_shape)[0].state()
        for state in (summed, pooled)
    ]
    differences = [
        float((value - fitted[1][name]).abs().max() / fitted[1][name].abs().max().clamp_min(1e-12))
        for name, value in fitted[0].items()
    ]
    return max(differences)


class DriftAnswers:
    """Answers of editor `drift` to the questions of one anatomy's patients."""

    def __init__(self, people: People, drift: LongitudinalDrift) -> None:
        self.people, self.drift = people, drift

    def draw(
        self,
        person: Person,
        visit: int,
        targets: Sequence[dict[str, Any]],
        editor: Editor,
        rendering: str,
        with_history: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction `(1,S,S)` and the answers `(M,1,S,S)` to one visit's questions.

        Args:
            person: the patient.
            visit: whose scan is edited.
            targets: all attributes of each answer.
            editor: how it is edited.
            rendering: by which answers are written, on which their growth is measured.
            with_history: whether the visits before it calibrate the answers.
        """
        people, modality, scanned = self.people, self.people.modality, person.visits[visit]
        edits = [edit_to(modality, 0, scanned.attributes, target) for target in targets]
        image = people.picture(scanned.scan.pixels, scanned)[None]
        past = past_of(modality, {0: self._known(person, visit, rendering, with_history)})
        prompts = [modality.prompt(scanned.attributes)]
        drawn = draw_counterfactuals(people.base, image, prompts, edits, editor, drift=self.drift, past=past)
        return drawn.reconstructions[0], drawn.images

    def seconds_per_answer(self, person: Person, editor: Editor, rendering: str) -> float:
        """Time of one answer with its rendering, mean over the questions of a patient's first visit."""
        targets = [question.target for question in person.questions if question.visit == 0]
        scanned = person.visits[0]
        started = time.perf_counter()
        for target in targets:
            reconstruction, answers = self.draw(person, 0, [target], editor, rendering)
            render(scanned.scan.pixels, scanned.frame, reconstruction, answers[0], rendering)
        return (time.perf_counter() - started) / len(targets)

    def _known(self, person: Person, visit: int, rendering: str, with_history: bool) -> ScanHistory:
        scanned, image, side = person.visits[visit], self.people.modality.image, self.people.base.resolution
        write = writing(scanned.scan, scanned.frame, rendering, side, image)
        now, earlier = float(scanned.attributes["age"]), person.visits[:visit]
        if not with_history or not earlier:
            return ScanHistory.without_visits(write)
        pictures = torch.stack([self.people.picture(seen.scan.pixels, seen) for seen in earlier])
        return ScanHistory(pictures, [now - float(seen.attributes["age"]) for seen in earlier], write)


def all_sizes(tables: Sequence[VisitTable]) -> StructureSizes | None:
    """What was measured in the visits of all tables; None where one has no measures."""
    found = [table.structure for table in tables if table.structure is not None]
    if len(found) < len(tables):
        return None
    return StructureSizes(torch.cat([sizes.areas for sizes in found]), torch.cat([sizes.edges for sizes in found]))


def visit_tables(people: Sequence[Person], modality: Modality, base: BaseModel | None = None) -> list[VisitTable]:
    """The visits of each site; with a base, what the modality measures in them."""
    tables = []
    for site in dict.fromkeys(person.hospital for person in people):
        rows: list[tuple[Person, ScannedVisit]] = [
            (person, visit) for person in people if person.hospital == site for visit in person.visits
        ]
        first = {person.identity: float(person.visits[0].attributes["age"]) for person, _ in rows}
        days = [
            round((float(visit.attributes["age"]) - first[person.identity]) * DAYS_IN_YEAR) for person, visit in rows
        ]
        latents = torch.stack([visit.latent for _, visit in rows])
        designs = [modality.design_vector(visit.attributes) for _, visit in rows]
        names = [person.identity for person, _ in rows]
        sizes = None if base is None else sizes_of_latents(base, modality, latents)
        twins = [visit.mirrored for _, visit in rows if visit.mirrored is not None]
        mirrored = torch.stack(twins) if twins else None
        tables.append(VisitTable.of(latents, designs, modality.numeric_columns, names, days, sizes, mirrored))
    return tables
