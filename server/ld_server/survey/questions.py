"""The engineer's questions, from a YAML file, and the survey that they make."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from ld_common.core.config import load_config, nearest, require
from ld_common.imaging.modality import AttributeConfig, Modality
from ld_common.protocol.survey import VISITS, YEARS_FOLLOWED, CohortSurvey, SurveyAxis, SurveyTable

DEFAULT_CELLS = 10
"""Cells of a number without `bins`, at most."""
SMALL_TABLE = 100
"""Most cells of the table of all attributes together that is asked for by default."""
PATIENT_CUTS = {VISITS: (2.0, 3.0, 4.0), YEARS_FOLLOWED: (1.0, 2.0, 3.0, 5.0)}
"""Default cuts of what is counted over a patient's visits."""


@dataclass
class TableQuestion:
    """One table of patients."""

    by: list[str] = field(default_factory=list)
    """Attributes of the modality, `visits` (of a patient) or `years_followed` (between the first and the last visit);
    with several, a cell for each combination. A short last one is printed across."""
    visit: str = "first"
    """Whose attributes count: `first` or `last` visit of each patient."""


@dataclass
class SurveyQuestions:
    """Questions of `ld-server survey new`."""

    modality: str = MISSING
    """YAML file of the modality, relative to this file. Its attributes and their categories can be asked for."""
    bins: dict[str, list[float]] = field(default_factory=dict)
    """Numeric attribute, `visits` or `years_followed` -> cuts between its cells: `age: [60, 70]` makes the cells below
    60, 60 to <70, and 70 or more. By default up to 10 cells of equal round width, visits 1, 2, 3 and 4 or more, and
    years below 1, 2, 3 and 5."""
    tables: list[TableQuestion] = field(default_factory=list)
    """Tables to count; empty for one of each attribute, one of all attributes together if it has at most 100 cells, and
    ones of `visits` and `years_followed`."""

    def located(self, folder: Path) -> SurveyQuestions:
        """The questions with the modality's file in `folder`."""
        return dataclasses.replace(self, modality=str(folder / self.modality))


def load_questions(path: Path, overrides: Sequence[str] = ()) -> tuple[SurveyQuestions, Modality]:
    """Read the questions and their modality; raises `ConfigError`."""
    questions = load_config(SurveyQuestions, path, overrides)
    require(questions.modality != MISSING, f"'{path}' needs modality: the YAML file of the kind of scan")
    return questions, load_config(Modality, Path(questions.modality))


def make_survey(questions: SurveyQuestions, modality: Modality, sites: Sequence[str]) -> CohortSurvey:
    """A new survey of these sites.

    Raises:
        ConfigError: bins or tables that the modality does not allow, or what `CohortSurvey` refuses.
    """
    for name in PATIENT_CUTS:
        require(name not in modality.attributes, f"{modality.name} has an attribute '{name}', which a survey counts")
    known = [*modality.attributes, *PATIENT_CUTS]
    for name, cuts in questions.bins.items():
        require(name in known, f"bins names '{name}', which {modality.name} lacks: {nearest(name, known)}")
        config = modality.attributes.get(name)
        require(config is None or not config.categories, f"bins has '{name}', which has categories: remove it")
        within = config is None or all(config.minimum < cut <= config.maximum for cut in cuts)
        bounds = "" if config is None else f"{config.minimum:g} to {config.maximum:g} {config.unit}".strip()
        require(within, f"bins.{name} has a cut that is not within the modality's {bounds}")
    axes = [_attribute_axis(name, config, questions) for name, config in modality.attributes.items()]
    for name, default in PATIENT_CUTS.items():
        numbers = tuple(map(float, questions.bins.get(name, default)))
        axes.append(SurveyAxis(name, cuts=numbers))
    for table in questions.tables:
        for name in table.by:
            require(name in known, f"a table names '{name}', which {modality.name} lacks: {nearest(name, known)}")
    tables = [SurveyTable(tuple(table.by), table.visit) for table in questions.tables]
    tables = tables or _default_tables(axes, list(modality.attributes))
    used = {name for table in tables for name in table.axes}
    return CohortSurvey(
        id=secrets.token_hex(16),
        modality=modality.name,
        sites=tuple(sorted(sites)),
        axes=tuple(axis for axis in axes if axis.name in used),
        tables=tuple(tables),
    )


def _attribute_axis(name: str, config: AttributeConfig, questions: SurveyQuestions) -> SurveyAxis:
    if config.categories:
        return SurveyAxis(name, config.unit, categories=tuple(config.categories))
    cuts = questions.bins.get(name) or _round_cuts(config.minimum, config.maximum)
    return SurveyAxis(name, config.unit, cuts=tuple(map(float, cuts)))


def _round_cuts(minimum: float, maximum: float) -> list[float]:
    """Cuts of one round width (1, 2 or 5 times a power of ten) strictly between the bounds, in few cells."""
    exponent = math.floor(math.log10((maximum - minimum) / DEFAULT_CELLS))
    for factor in (1, 2, 5, 10, 20):
        width = factor * 10.0**exponent
        multiples = range(math.floor(minimum / width) + 1, math.ceil(maximum / width))
        if 1 <= len(multiples) < DEFAULT_CELLS:
            # a division by a power of ten gives 0.3 where a product gives 0.30000000000000004
            power = 10 ** abs(exponent)
            return [n * factor / power if exponent < 0 else float(n * factor * power) for n in multiples]
    return [(minimum + maximum) / 2]


def _default_tables(axes: Sequence[SurveyAxis], attributes: Sequence[str]) -> list[SurveyTable]:
    cells = {axis.name: len(axis.labels) for axis in axes}
    tables = [SurveyTable((name,)) for name in attributes]
    if len(attributes) > 1 and math.prod(cells[name] for name in attributes) <= SMALL_TABLE:
        tables.append(SurveyTable(tuple(sorted(attributes, key=lambda name: -cells[name]))))
    return [*tables, *(SurveyTable((name,)) for name in PATIENT_CUTS)]
