"""A site's own configuration: its scans and table, the meaning of columns and values, and its policy.

Paths in the YAML file (and in `key=value` overrides) are relative to the folder of the YAML file.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from ld_common.core.config import load_config, nearest, require
from ld_common.core.errors import ConfigError, RequestError
from ld_common.core.tables import is_encoding
from ld_common.imaging.modality import AGE, Modality
from ld_common.protocol.site_name import check_site_name

LEDGER = "ledger.sqlite"
HOURS = re.compile(r"(?:(?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d)?")
CONTRADICTIONS = ("patient", "date", "sex", "age", "sex-over-visits", "age-over-visits", "one-scan")
"""Kinds that `data.accept` may name."""
FROM_HEADER = (AGE, "sex")
"""Attributes that a DICOM header may supply where the table does not."""
YAML_WORDS = {
    True: ("yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"),
    False: ("no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"),
}
"""Words that YAML 1.1 reads as one of two values, unless they are quoted."""
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
"""A name in a pattern."""


@dataclass
class ColumnsConfig:
    """Names of the table's columns; a column may also come from `data.joined` or `data.extract`."""

    patient: str = "patient"
    """Column with the patient's identifier, which for DICOM series is their PatientID."""
    date: str = "date"
    """Column with the visit's date. Empty for a table without dates: it has one visit of each patient. A column whose
    name has the word day or days may hold what `day` holds."""
    file: str = ""
    """Column with a scan's path relative to `data.root`; needed for NIfTI and PNG, unless `data.file_pattern` finds
    them. Empty when all scans are DICOM series, which are matched by PatientID and StudyDate."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the modality -> its column."""
    day: str = ""
    """Column with the days from the patient's entry to the visit (OASIS-3's `days_to_visit`), in place of `date`; a
    visit before entry has a negative number. The order of sessions alone is not enough: change is learnt per year."""
    age_at_baseline: str = ""
    """Column with the patient's age at baseline, the same in all rows of a patient (ADNIMERGE's `AGE`). The age of a
    visit is this plus the years since baseline, in place of an age in `attributes`."""
    baseline_date: str = ""
    """Column with the date of baseline (ADNIMERGE's `EXAMDATE_bl`); empty for the patient's first date in the table.
    With `day`, baseline is day 0."""

    def __post_init__(self) -> None:
        require(bool(self.patient), "data.columns.patient is empty: name the column with the patient's identifier")
        if self.day and self.date == "date":
            self.date = ""  # the default
        require(not (self.day and self.date), "data.columns has date and day: name one of them")
        timed = bool(self.date or self.day)
        require(timed or not self.age_at_baseline, "data.columns.age_at_baseline needs data.columns.date or day")
        fits = bool(self.age_at_baseline and self.date) or not self.baseline_date
        require(fits, "data.columns.baseline_date needs data.columns.age_at_baseline and date")
        once = not self.age_at_baseline or AGE not in self.attributes
        require(once, f"data.columns has age_at_baseline and attributes.{AGE}: name one of them")


@dataclass
class JoinedConfig:
    """A further table, whose columns are added to the rows of `data.table`."""

    table: str = MISSING
    """CSV or TSV file."""
    by: dict[str, str] = field(default_factory=dict)
    """Column of `data.table` -> the column of this table that holds the same (`{participant_id: participant_id}`). A
    row without a partner has empty cells; of a row with partners that disagree, the scan is excluded."""
    prefix: str = ""
    """Put before the names of this table's columns, to tell them from those of the same name in another table."""
    encoding: str = ""
    """As `data.encoding`."""

    def __post_init__(self) -> None:
        require(bool(self.by), "data.joined has no `by`: name the columns by which the tables belong together")
        _require_encoding("data.joined.encoding", self.encoding)


@dataclass
class RuleConfig:
    """One value of an attribute that several columns decide."""

    where: dict[str, Any] = field(default_factory=dict)
    """Column -> the cell, or a list of cells, of rows with this value. All columns must fit."""
    value: str = MISSING
    """The modality's value."""

    def __post_init__(self) -> None:
        require(bool(self.where), "a rule of data.rules has no `where`: name a column and its cells")
        self.where = _accepted("data.rules", self.where)


@dataclass
class SeriesConfig:
    """Which DICOM series, and which images of a series, are scans; all rules must fit. Patterns have `*` and ignore
    case; an empty one takes all."""

    description: str = ""
    """Pattern of SeriesDescription (`*t1*`)."""
    echo_ms: float = 0.0
    """Echo time, of a series with several; 0 takes all."""
    image_type: str = ""
    """Pattern of ImageType, its words separated by slashes (`*/m/*` for magnitude)."""
    time_point: str = ""
    """Pattern of what tells time points apart, as the exclusions name it (`time point 1*`)."""


@dataclass
class DataConfig:
    """A site's scans and the table that describes them."""

    RENAMED: ClassVar[dict[str, str]] = {
        "released": "burned_in_text_checked",
        "series_description": "series.description",
    }

    root: str = MISSING
    """Folder of the scans."""
    table: str = MISSING
    """CSV or TSV file with one row a visit. Its cells are separated by commas, semicolons, tabs or bars; a number may
    have a decimal comma where no comma separates cells."""
    encoding: str = ""
    """Encoding of the table, for example `windows-1252`; empty for UTF-8, or UTF-16 with a byte order mark. None is
    guessed: a row is excluded if a cell that is needed is not UTF-8."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    joined: list[JoinedConfig] = field(default_factory=list)
    """Further tables with more columns for the same patients or visits."""
    extract: dict[str, str] = field(default_factory=dict)
    """Column -> pattern of its cells. Each name in braces becomes a further column; it stands for anything but a slash,
    and so does `*` (`Path: "CheXpert-v1.0-small/*/{patient}/{study}/*"`)."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column -> the cell, or a list of cells, of the rows that are used (`Frontal/Lateral: Frontal`). Other rows are
    counted among the exclusions."""
    values: dict[str, dict[Any, Any]] = field(default_factory=dict)
    """Attribute -> the site's value -> the modality's value; a value that is not listed is taken as it is. A number
    stands for every way to write it (1 and 1.0), and an unquoted Yes, No, On, Off, True or False for all words that
    YAML reads as the same."""
    rules: dict[str, list[RuleConfig]] = field(default_factory=dict)
    """Attribute -> rules, in place of a column in `columns.attributes`; the first rule that fits gives the value, and
    without one it is missing (`diagnosis: [{where: {Cardiomegaly: 1}, value: HF}]`)."""
    date_format: str = ""
    """Format of the table's dates as in strptime (`%d.%m.%Y`); empty for ISO 8601."""
    date_tolerance_days: int = 0
    """Largest number of days between a scan and its row; the nearest row is taken."""
    file_pattern: str = ""
    """Pattern of a row's path relative to `root`, in place of `columns.file`: a column's name in braces stands for the
    row's cell, `*` for anything (`{OASIS_session_label}/anat*/*_T1w.nii.gz`). Exactly one file must match."""
    series: SeriesConfig = field(default_factory=SeriesConfig)
    accept: list[str] = field(default_factory=list)
    """Kinds of contradictions whose visits are kept: `patient`, `date`, `sex` and `age` of a table and a header,
    `sex-over-visits`, `age-over-visits`, `one-scan`. They are counted in the summary."""
    burned_in_text_checked: list[str] = field(default_factory=list)
    """Patterns of paths relative to `root` that a person has checked for burned-in text (`dicom/P007/*`)."""

    def __post_init__(self) -> None:
        require(self.date_tolerance_days >= 0, "data.date_tolerance_days must not be negative")
        unknown = sorted(set(self.accept) - set(CONTRADICTIONS))
        require(not unknown, f"data.accept: {', '.join(unknown)}: use {', '.join(CONTRADICTIONS)}")
        _require_encoding("data.encoding", self.encoding)
        _require_date_format(self.date_format)
        twice = bool(self.columns.file and self.file_pattern)
        require(not twice, "data has columns.file and file_pattern: each names a row's file, use one of them")
        for column, pattern in self.extract.items():
            names = PLACEHOLDER.findall(pattern)
            fits = bool(names) and len(names) == len(set(names))
            require(fits, f"data.extract.{column} is '{pattern}': put one name or more in braces, each once")
        self.where = _accepted("data.where", self.where)
        self.values = {name: _translations(name, values) for name, values in self.values.items()}
        for name in self.rules:
            taken = name in self.columns.attributes or name in self.values
            taken = taken or (name == AGE and bool(self.columns.age_at_baseline))
            require(not taken, f"data.rules.{name} stands beside a column or values of {name}: use one of them")


@dataclass
class PolicyConfig:
    """Limits for every study; a study that asks for more is refused before it trains."""

    max_steps: int = 5000
    """Training steps in one round."""
    max_batch_size: int = 256
    """Visits in one step."""
    min_batch_size: int = 4
    """Fewest visits in a step without differential privacy: the gradient of one scan can show it."""
    min_visits: int = 64
    """Fewest visits drawn in a round without differential privacy, steps times visits in a step."""
    max_learning_rate: float = 0.1
    """Largest learning rate."""
    max_distance: float = 100.0
    """Largest L2 distance of the weights that a round starts from to the study's first ones, without differential
    privacy and secure aggregation, whatever `federation.max_update_norm` allows: far weights can be crafted to copy a
    scan into the update."""
    accept_unseen_start: bool = False
    """Take later rounds of a study with `start` whose first round this site missed, though it cannot tell how far their
    weights are from the first ones; without differential privacy and secure aggregation."""
    max_parameters: int = 50_000_000
    """Trainable parameters, which leave in each round; a larger adapter can memorise more. The UNet of Stable Diffusion
    1.4 has 860 million, a LoRA of rank 8 on its default layers 3.4 million."""
    max_evaluations: int = 100_000
    """Network evaluations of single images before training: for DreamBooth's class images and for the search of a
    drift."""
    drift: list[str] = field(default_factory=lambda: ["none", "scalar", "channel"])
    """Shapes of the drift that may leave. A `map` is a mean image and `conditional` several; of few visits, they show a
    patient's scan."""
    min_patients: int = 10
    """Fewest patients trained on for any result to leave, fewest that the scans drawn in a round are of, and fewest
    patients behind each end of a range or category that the site reports."""
    count_step: int = 5
    """Counts of patients and visits leave as multiples of this, without differential privacy; 1 for exact ones."""
    drift_step: float = 1 / 64
    """A drift leaves in multiples of this, without differential privacy; 0 for the exact one. One patient of a hundred
    moves a mean latent by about 0.003, so most changes of one patient do not show."""
    min_summed_sites: int = 3
    """Fewest sites in a secure sum that the server may learn."""
    private_only: bool = False
    """Refuse studies without differential privacy."""
    max_epsilon: float = 10.0
    """Largest ε of all studies together, for one patient over the lifetime of the data set."""
    delta: float = 1e-5
    """δ of that ε; below one over the number of patients."""
    max_rounds: int = 1000
    """Most rounds of one study; a round that runs again counts again."""
    repeated_rounds: int = 0
    """Rounds of a private study that may run again, after a crash for example. Each costs ε beyond what the study
    states; with 0, the study's ε holds whatever its server requests."""
    hours: str = ""
    """Local time in which a round may begin (`20:00-06:00`); empty for always. A round may end later."""
    max_memory_gb: float = 0.0
    """Most private memory of the training process, in GiB; 0 for no limit. A round that needs more is refused when it
    does. The limit is Linux's RLIMIT_DATA: heap and anonymous mappings, without mapped files and GPU memory."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "max_batch_size",
            "min_batch_size",
            "min_visits",
            "max_learning_rate",
            "max_distance",
            "max_parameters",
            "max_evaluations",
            "min_patients",
            "count_step",
            "min_summed_sites",
            "max_rounds",
        ):
            require(getattr(self, name) > 0, f"policy.{name} is {getattr(self, name)}: it must be above 0")
        require(self.drift_step >= 0, f"policy.drift_step is {self.drift_step}: use 0 or more")
        require(self.repeated_rounds >= 0, f"policy.repeated_rounds is {self.repeated_rounds}: use 0 or more")
        require(self.max_epsilon >= 0, f"policy.max_epsilon is {self.max_epsilon}: use 0 or more")
        require(0 < self.delta < 1, f"policy.delta is {self.delta}: it must lie between 0 and 1")
        fits = HOURS.fullmatch(self.hours) is not None
        require(fits, f"policy.hours is '{self.hours}': write two times, such as 20:00-06:00, or nothing")
        require(self.max_memory_gb >= 0, f"policy.max_memory_gb is {self.max_memory_gb}: use 0 or more")


@dataclass
class SiteConfig:
    """One hospital's side of a federation."""

    site: str = MISSING
    """The hospital's name in the study, public in the release."""
    modality: str = MISSING
    """The modality's YAML file, the same at every site of a study."""
    base_model: str = MISSING
    """Folder of the frozen base model, or its id in the hub's local cache."""
    store: str = MISSING
    """Folder of the index, the cached latents and the pseudonyms' key; it must not leave the hospital."""
    held_out: float = 0.0
    """Share of the patients who are not trained on, chosen by keyed hashes; `ld-client audit-privacy` needs them. The
    share is met to a patient, except in differentially private studies, where it is met on average."""
    ledger: str = ""
    """File of the data set's privacy ledger; empty for the store's own. Stores of the same patients must share one."""
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 16
    """Scans encoded at once."""
    device: str = "cpu"
    """`cpu`, or `cuda` on a machine with a GPU."""
    precision: str = "float32"
    """Arithmetic of training: `float32` or `bfloat16`. Results leave as float32."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        check_site_name(self.site)
        require(self.batch_size > 0, f"batch_size is {self.batch_size}: use 1 or more")
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        require(0 <= self.held_out < 1, f"held_out is {self.held_out}: use 0 or more, below 1")
        known = ("float32", "bfloat16")
        require(self.precision in known, f"precision is '{self.precision}': use {' or '.join(known)}")

    @property
    def store_path(self) -> Path:
        """The store's folder."""
        return Path(self.store)

    @property
    def ledger_path(self) -> Path:
        """The data set's privacy ledger."""
        return Path(self.ledger) if self.ledger else self.store_path / LEDGER


def load_site(path: Path, overrides: Sequence[str] = ()) -> SiteConfig:
    """A site's checked configuration, every path absolute.

    Raises:
        ConfigError: as `load_config`.
    """
    config = load_config(SiteConfig, path, overrides)
    folder = path.resolve().parent
    base, data = folder / config.base_model, config.data
    joined = [dataclasses.replace(other, table=str(folder / other.table)) for other in data.joined]
    return dataclasses.replace(
        config,
        modality=str(folder / config.modality),
        store=str(folder / config.store),
        ledger=str(folder / config.ledger) if config.ledger else "",
        base_model=str(base) if base.exists() else config.base_model,
        data=dataclasses.replace(data, root=str(folder / data.root), table=str(folder / data.table), joined=joined),
    )


def load_modality(site: SiteConfig) -> Modality:
    """The site's modality, checked against its columns, values and rules.

    Raises:
        ConfigError: a bad modality file, an attribute that the modality does not know, one without a column, or a rule
            with a value that the modality does not know.
    """
    modality, data = load_config(Modality, Path(site.modality)), site.data
    known = list(modality.attributes)
    named = {
        "columns.attributes": list(data.columns.attributes),
        "values": list(data.values),
        "rules": list(data.rules),
    }
    if data.columns.age_at_baseline:
        named["columns.age_at_baseline"] = [AGE]
    for key, names in named.items():
        for name in names:
            require(name in known, f"data.{key} names '{name}', which {modality.name} lacks: {nearest(name, known)}")
    for name in known:
        supplied = name in data.columns.attributes or name in data.rules or name in FROM_HEADER
        require(supplied, f"data.columns.attributes has no column for '{name}', which {modality.name} needs")
    for name, rules in data.rules.items():
        for rule in rules:
            try:
                modality.parse(name, rule.value)
            except RequestError as error:
                raise ConfigError(f"data.rules.{name}: {error}") from error
    return modality


def _accepted(key: str, where: dict[str, Any]) -> dict[str, Any]:
    """Columns with lists of words, of which the site may have written one, numbers or YAML's booleans."""
    return {
        column: [word for cell in (cells if isinstance(cells, list) else [cells]) for word in _words(key, cell)]
        for column, cells in where.items()
    }


def _translations(name: str, values: dict[Any, Any]) -> dict[Any, Any]:
    """The site's words -> the modality's, of which the site may have written numbers or YAML's booleans."""
    translated: dict[Any, Any] = {}
    for written, value in values.items():
        require(not isinstance(value, bool), f"data.values.{name}: put quotes round {'Yes' if value else 'No'}")
        has_value = isinstance(value, (str, int, float))
        require(has_value, f"data.values.{name}: '{written}' has no value: name one of the modality's")
        words = _words(f"data.values.{name}", written)
        translated |= {word: str(value) for word in words if len(words) == 1 or word not in values}
    return translated


def _words(key: str, written: Any) -> Sequence[str]:
    """The cells that a word, number or boolean of the YAML file stands for."""
    if isinstance(written, bool):
        return YAML_WORDS[written]
    require(isinstance(written, (str, int, float)), f"{key}: '{written}' is no word and no number")
    return [str(written)]


def _require_encoding(key: str, encoding: str) -> None:
    require(
        not encoding or is_encoding(encoding),
        f"{key} is '{encoding}': name an encoding that extends ASCII, such as windows-1252, or leave it empty",
    )


def _require_date_format(date_format: str) -> None:
    try:
        datetime.datetime.strptime("", date_format)
    except re.error:
        problem = "a part occurs twice"
    except ValueError as error:
        problem = str(error) if "directive" in str(error) or "stray" in str(error) else ""
    else:
        problem = ""
    require(not problem, f"data.date_format is '{date_format}': {problem}; write it as for strptime, such as %d.%m.%Y")
