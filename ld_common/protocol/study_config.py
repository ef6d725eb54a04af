"""The study config: what the server decides and every site is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.adapters.registry import complete
from ld_common.core.config import from_mapping, load_config, require, to_mapping
from ld_common.core.errors import ConfigError
from ld_common.diffusion.drift import FORMULATIONS, SHAPES
from ld_common.diffusion.drift_search import SearchConfig
from ld_common.editing.pipeline import EditConfig
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import DpConfig, PrivacyPlan, plan
from ld_common.protocol.keys import MAX_LINE, is_line
from ld_common.protocol.site_name import check_site_name

CHOICES = ("moments", "grid")
AGGREGATES = ("mean", "median", "trimmed_mean")
PLACES = ("output", "base_model", "modality", "start")
"""Fields that say where files lie."""


@dataclass
class DriftConfig:
    """How a site's latent drift μ is found and how it enters."""

    formulation: str = "prior"
    """`prior`, `centred`, `noise`, `per-step` or `per-step-literal`: see `ld_common.diffusion.drift`."""
    choice: str = "moments"
    """`moments`: the mean of the site's latents; `grid`: a scalar δ, by the paper's search over `search`."""
    mean: str = "channel"
    """Shape of μ: `none`, `scalar`, `channel` (C,1,1), `map` (C,h,w), or `conditional`: a map that follows age, sex and
    diagnosis. A search finds a scalar."""
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for key, value, known in (
            ("mean", self.mean, SHAPES),
            ("formulation", self.formulation, FORMULATIONS),
            ("choice", self.choice, CHOICES),
        ):
            require(value in known, f"drift.{key} is '{value}': known: {', '.join(known)}")
        fits = self.mean != "conditional" or self.formulation == "prior"
        require(fits, "drift.mean conditional says where sampling starts: set drift.formulation to prior")
        fits = self.choice == "moments" or self.mean == "scalar"
        require(fits, f"drift.choice {self.choice} finds a scalar: set drift.mean to scalar")


@dataclass
class TrainingConfig:
    """One site's work in one round."""

    steps: int = 100
    batch_size: int = 16
    """Visits drawn for a step. Under privacy.enabled `privacy.batch_patients` and `privacy.draws` decide that, and this
    is how many of them pass the network at once: what fits into memory."""
    learning_rate: float = 2e-3
    """At the first step of the study; falls by a half cosine to a twentieth of it at the last."""
    offset_noise: float = 0.1
    """Deviation of a noise that is constant over each latent channel, added to the noise; 0 is off."""
    prompt_dropout: float = 0.1
    """Share of visits that learn without their prompt."""
    timestep_power: float = 1.0
    """1 draws timesteps uniformly; above 1 favours noisy ones, where prompts decide (3 is T2I-Adapter's)."""

    def __post_init__(self) -> None:
        require(self.steps > 0 and self.batch_size > 0, "training.steps and training.batch_size must be above 0")
        require(self.learning_rate > 0, f"training.learning_rate is {self.learning_rate}: it must be above 0")
        require(self.offset_noise >= 0, "training.offset_noise must not be negative")
        require(0 <= self.prompt_dropout < 1, "training.prompt_dropout must lie in [0, 1)")
        require(self.timestep_power > 0, f"training.timestep_power is {self.timestep_power}: it must be above 0")


@dataclass
class FederationConfig:
    """Who takes part and when a round is good enough."""

    rounds: int = 5
    sites: list[str] = field(default_factory=list)
    """Names of the sites that are picked each round."""
    min_sites: int = 2
    """A round counts when this many replies pass the checks."""
    wait_seconds: float = 60.0
    """How long a round waits for absent sites before it goes on without them."""
    round_timeout_seconds: float = 3600.0
    weighting: str = "visits"
    """Weight of a site in the average: its number of `visits`, for which there is only its own word, or `equal`."""
    aggregate: str = "mean"
    """How the sites' adapters become one, number by number: `mean`; `median`; or `trimmed_mean`, without the highest
    and the lowest sites. The last two bear with a minority of sites that lie."""
    trim_share: float = 0.2
    """Share of the round's sites that `trimmed_mean` leaves out at each end, rounded up; two sites remain at least, of
    an odd number one."""
    clip_update_norm: float = 0.0
    """A site's change of the adapter is scaled down to this L2 norm before the average; 0 is off. Drifts are not."""
    max_update_norm: float = 100.0
    """A reply whose change of the adapter has a larger L2 norm is left out; under secure aggregation, a round whose
    mean change has."""
    secure_aggregation: bool = False
    """The server learns the sum over the round's sites and no site's own update, drift, counts or losses."""
    secure_threshold: int = 0
    """Fewest sites of a secure sum; 0 for two thirds of those in the round, at least 3."""
    secure_clip: float = 1.0
    """Under secure aggregation each number of an update is clipped to this, and rounded to 2**-23 of it."""

    def __post_init__(self) -> None:
        require(self.rounds > 0, f"federation.rounds is {self.rounds}: it must be above 0")
        require(bool(self.sites), "federation.sites is empty: name the sites of the study")
        for name in self.sites:
            check_site_name(name)
        require(len(set(self.sites)) == len(self.sites), "federation.sites names a site twice")
        require(
            1 <= self.min_sites <= len(self.sites),
            f"federation.min_sites is {self.min_sites}: use 1 to {len(self.sites)}, the number of sites",
        )
        require(self.weighting in ("visits", "equal"), "federation.weighting: use visits or equal")
        require(self.max_update_norm > 0, "federation.max_update_norm must be above 0")
        self._check_aggregate()
        require(self.secure_clip > 0, f"federation.secure_clip is {self.secure_clip}: it must be above 0")
        fits = 0 <= self.secure_threshold <= len(self.sites)
        require(fits, f"federation.secure_threshold is {self.secure_threshold}, of {len(self.sites)} sites")
        if self.secure_aggregation:
            equal = self.weighting == "equal"
            require(equal, "federation.secure_aggregation hides the number of visits: set weighting to equal")
            require(len(self.sites) >= 3, "federation.secure_aggregation needs 3 sites or more")

    def _check_aggregate(self) -> None:
        known, clip, most = AGGREGATES, self.clip_update_norm, self.max_update_norm
        require(self.aggregate in known, f"federation.aggregate is '{self.aggregate}': known: {', '.join(known)}")
        require(0 < self.trim_share < 0.5, f"federation.trim_share is {self.trim_share:g}: use a share below 0.5")
        require(0 <= clip <= most, f"federation.clip_update_norm is {clip:g}: use 0 to max_update_norm, {most:g}")
        hidden = "federation.secure_aggregation shows the server only the sum, each site clips to secure_clip: "
        require(not (self.secure_aggregation and clip), hidden + "set clip_update_norm to 0")
        if self.aggregate != "mean":
            name = f"federation.aggregate {self.aggregate}"
            require(not self.secure_aggregation, hidden + f"set aggregate to mean, not {self.aggregate}")
            require(self.weighting == "equal", f"{name} counts every site the same: set weighting to equal")
            enough = self.min_sites >= 3
            require(enough, f"{name} cannot tell which of two sites lies: set min_sites to 3 or more")


@dataclass
class StudyConfig:
    """A study: one base model, one modality, one scheme, several sites."""

    name: str = "study"
    seed: int = 0
    base_model: str = ""
    """Folder or hub id of the base at the server; sites name their own copy, compared by hash."""
    modality: str = ""
    """YAML file of the modality, relative to the study's file; sites name their own copy, compared by hash."""
    output: str = "runs/study"
    """Folder for checkpoint, round records and release."""
    start: str = ""
    """Release at the server whose adapter the study goes on from, trained on public data perhaps; empty for none. Its
    base is the study's, and so are its adapter's shapes: with `scheme.freeze_a`, A stays as the release has it."""
    scheme: dict[str, Any] = field(default_factory=lambda: {"name": "lora"})
    """What learns: a scheme's `name` and its options, the fields of its class in `ld_common.adapters.registry`."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: DpConfig = field(default_factory=DpConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    """How the release is best asked; `ld-generate` starts from it."""
    federation: FederationConfig = field(default_factory=lambda: FederationConfig(sites=["a", "b"]))

    def __post_init__(self) -> None:
        require(bool(self.name), "name is empty: a study needs a name")
        require(is_line(self.name), f"name: give one line of at most {MAX_LINE} printable characters")
        self.scheme = complete(self.scheme, self.privacy.enabled)
        if self.privacy.enabled:
            self._check_private()

    def _check_private(self) -> None:
        """Whatever would let a patient show beside the noise is refused."""
        equal = self.federation.weighting == "equal"
        require(equal, "privacy.enabled withholds the number of visits: set federation.weighting to equal")
        fits = self.drift.choice == "moments" and self.drift.mean != "conditional"
        require(fits, "privacy.enabled noises a mean of latents only: set drift.choice moments, drift.mean none to map")

    @property
    def withholds_numbers(self) -> bool:
        """Whether sites keep their counts and losses to themselves."""
        return self.privacy.enabled or self.federation.secure_aggregation

    def privacy_plan(self) -> PrivacyPlan:
        """The noise of a private study, the same on every side; some seconds the first time.

        Raises:
            PrivacyError: no noise is enough.
        """
        return plan(self.privacy, self.federation.rounds, self.training.steps, self.drift.mean != "none")

    def digest(self) -> str:
        """SHA-256 of the study's content. Where files lie on one machine is no part of it: base and modality have
        digests of their own."""
        content = {key: value for key, value in to_mapping(self).items() if key not in PLACES}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_study(path: Path, overrides: list[str] | None = None) -> tuple[StudyConfig, Modality]:
    """Read a study and its modality; raises `ConfigError`."""
    study = load_config(StudyConfig, path, overrides or [], variants=["scheme"])
    return study, load_config(Modality, path.parent / study.modality)


def study_from_json(text: str) -> StudyConfig:
    """The study as a message carries it; raises `ConfigError`."""
    try:
        content: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError("the study is not JSON") from error
    return from_mapping(StudyConfig, content)
