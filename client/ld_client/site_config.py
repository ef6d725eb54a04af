"""A site's own configuration: its scans and table, the meaning of columns and values, and its policy.

Paths in the YAML file (and in `key=value` overrides) are relative to the folder of the YAML file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from ld_client.data_config import DataConfig
from ld_common.core.ahead import available_processors
from ld_common.core.config import load_config, nearest, require
from ld_common.core.errors import ConfigError, RequestError
from ld_common.imaging.modality import AGE, Modality
from ld_common.protocol.site_name import OWN_PART, check_site_name

LEDGER = "ledger.sqlite"
RESIDUALS, OWN_PARTS = "residuals", OWN_PART
"""Folders beside the ledger: what rounding took from a site's updates (`federation.wire`), and the factors that are its
own (aggregator `fedsa`)."""
SINGLE, ACCELERATE = "single", "accelerate"
LAUNCHER, PROCESSES = "launcher", "training-processes"
"""Keys of a node's config that replace those of the site's."""
HOURS = re.compile(r"(?:(?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d)?")
FROM_HEADER = (AGE, "sex")
"""Attributes that a DICOM header may supply where the table does not."""


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
    release_own_part: bool = False
    """Let the release hold the factors that a study of aggregator `fedsa` leaves at each site, by this site's name, and
    their mean over the sites that do the same. Without it they never leave."""
    private_only: bool = False
    """Refuse studies without differential privacy, and surveys, whose counts are rounded but not noised."""
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
    does. With launcher `accelerate`, of each process. The limit is Linux's RLIMIT_DATA: heap and anonymous mappings,
    without mapped files and GPU memory."""

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
    processes: int = 0
    """Scans read side by side by `ld-client index`; 0 for one a processor. Each may take 1 GiB of memory."""
    device: str = "cpu"
    """`cpu`, or `cuda` on a machine with a GPU."""
    precision: str = "float32"
    """Arithmetic of training: `float32`, `bfloat16`, or `float16` for GPUs without bfloat16. Results leave as float32.
    Training under differential privacy is float32 and not compiled, since its gradients of single examples come from
    hooks."""
    compile: bool = False
    """Compile the network for training with `torch.compile`: the first step of each round takes minutes, the others
    less; on a CPU a C++ compiler is needed."""
    gradient_checkpointing: bool = False
    """Compute the network's blocks again in the backward pass instead of keeping what they computed: a fraction of the
    memory, about a third more time. Private rounds are refused with it: no gradient of single examples is left."""
    launcher: str = "single"
    """What trains a round: `single` for one process, or `accelerate` for several, which share each batch and end with
    the adapter of one but for rounding. `ld-client start --launcher` replaces it."""
    training_processes: int = 0
    """Processes that train a round with launcher `accelerate`, each on a GPU of its own with device `cuda`; 0 for one a
    GPU. `ld-client start --processes` replaces it."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        check_site_name(self.site)
        require(self.batch_size > 0, f"batch_size is {self.batch_size}: use 1 or more")
        require(self.processes >= 0, f"processes is {self.processes}: use 0 or more")
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        require(0 <= self.held_out < 1, f"held_out is {self.held_out}: use 0 or more, below 1")
        known = ("float32", "bfloat16", "float16")
        require(self.precision in known, f"precision is '{self.precision}': use {' or '.join(known)}")
        self._check_launcher()

    def _check_launcher(self) -> None:
        count, known = self.training_processes, (SINGLE, ACCELERATE)
        require(self.launcher in known, f"launcher is '{self.launcher}': use {' or '.join(known)}")
        require(count >= 0, f"training_processes is {count}: use 1 or more, or 0 for one a GPU")
        alone = self.launcher == SINGLE
        require(not alone or count == 0, f"training_processes is {count}: it needs launcher {ACCELERATE}")
        require(
            alone or count > 0 or self.device != "cpu", f"launcher {ACCELERATE} on device cpu needs training_processes"
        )

    def launched(self, launcher: str, training_processes: int) -> SiteConfig:
        """The config with another launcher and number of processes, "" and 0 for its own; raises `ConfigError`."""
        count = training_processes or self.training_processes
        return dataclasses.replace(self, launcher=launcher or self.launcher, training_processes=count)

    @property
    def workers(self) -> int:
        """Scans read side by side."""
        return self.processes or available_processors()

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
