"""The study config, which the server sets and every site receives."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ld_common.adapters.registry import complete_adapter
from ld_common.core.config import from_mapping, load_config, require, to_mapping
from ld_common.core.errors import ConfigError
from ld_common.core.strict_json import read_json
from ld_common.diffusion.options import DriftConfig, TrainingConfig
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import DpConfig, PrivacyPlan, plan
from ld_common.protocol.keys import MAX_LINE, is_line
from ld_common.protocol.site_name import check_site_name

MAX_STUDY = 2**18
FLOAT32 = "float32"
WIRE_FORMATS = (FLOAT32, "bfloat16", "int8")
"""Values of `federation.wire`."""
LORA_A = ".lora_A."
"""Part of the name of a LoRA's A."""
FFA, ROLORA, FEDSA = "ffa", "rolora", "fedsa"
"""Aggregators that say which factors of a LoRA train, or which of them each site keeps."""
LAST, BEST = "last", "best"
"""Values of `federation.keep`."""
TRACKERS = ("mlflow", "wandb")
"""Values of `trackers`."""
NOT_DIGESTED = ("output", "base_model", "modality", "start", "edit", "trackers")
"""Fields outside a study's digest: paths, the editor's options and the server's trackers, which no site uses."""


@dataclass
class FederationConfig:
    """Who takes part, when a round counts, and how the sites' adapters are combined."""

    RENAMED: ClassVar[dict[str, str]] = {
        "aggregate": "aggregation.name",
        "trim_share": "aggregation.beta",
        "min_sites": "min_train_nodes",
    }

    rounds: int = 5
    """Number of rounds."""
    sites: list[str] = field(default_factory=list)
    """Names of the sites of each round."""
    min_train_nodes: int = 2
    """Number of valid replies that a round needs to count."""
    wait_seconds: float = 60.0
    """Time that a round waits for absent sites before it starts without them."""
    round_timeout_seconds: float = 3600.0
    """Time that a round waits for replies before it ends without the missing ones."""
    weighting: str = "equal"
    """Weight of a site in the average: `equal`, or `num_examples`, the number of visits that it reports."""
    max_weight_ratio: float = 10.0
    """With `num_examples`, most times the median site's weight that a site has: a false count does not own the mean."""
    aggregation: dict[str, Any] = field(default_factory=lambda: {"name": "mean"})
    """Aggregator of the sites' adapters: its `name` (`mean`, `median`, `trimmed_mean`, `fedavgm`, `fedadam`, `fedyogi`,
    `ffa`, `rolora`, `flexlora`, `fedex`, `flora`, `fedsa`) and its options, the fields of its class.
    docs/aggregation.md says which of them go with differential privacy, secure aggregation and ranks by site."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of a site's LoRA where it is below `adapter.rank`, for sites with less memory; aggregators `flexlora` and
    `flora` combine different ranks."""
    validate_every: int = 1
    """Rounds from one validation to the next, and after the last round: each site scores the new adapter on its
    held-out patients (`held_out` in its config), at fixed timesteps and noise. 0 is off. Withheld under differential
    privacy and secure aggregation."""
    keep: str = "last"
    """Round whose adapter is released: the `last`, or the `best` by mean validation loss."""
    patience: int = 0
    """End the study after so many validations without a new best mean loss; 0 is off."""
    clip_update_norm: float = 0.0
    """Largest L2 norm of a site's update; a larger one is scaled down before the average. 0 is off. Drifts are not
    clipped."""
    max_update_norm: float = 100.0
    """A reply whose update has a larger L2 norm is refused; under secure aggregation, a round whose mean update has."""
    wire: str = "float32"
    """How a site's update travels to the server: `float32`, the trained tensors as they are; `bfloat16`, the update
    rounded to 8 significant bits, half the bytes; `int8`, rounded to 255 steps a tensor, a quarter of the bytes, where
    each site adds what rounding took to its next update. The server's weights travel as float32 always, since all sites
    must start from the same ones."""
    secure_aggregation: bool = False
    """The server learns only the sum over the round's sites: no site's update, drift, counts or losses."""
    secure_threshold: int = 0
    """Smallest number of sites in a secure sum; 0 means two thirds of the round's sites, at least 3."""
    secure_clip: float = 1.0
    """Under secure aggregation, each number of an update is clipped to this and rounded to 2**-23 of it."""

    def __post_init__(self) -> None:
        require(self.rounds > 0, f"federation.rounds is {self.rounds}: it must be above 0")
        require(bool(self.sites), "federation.sites is empty: name the sites of the study")
        for name in self.sites:
            check_site_name(name)
        require(len(set(self.sites)) == len(self.sites), "federation.sites names a site twice")
        require(
            1 <= self.min_train_nodes <= len(self.sites),
            f"federation.min_train_nodes is {self.min_train_nodes}: use 1 to {len(self.sites)}, the number of sites",
        )
        require(self.weighting != "visits", "federation.weighting 'visits' is now called 'num_examples'")
        known = ("num_examples", "equal")
        require(self.weighting in known, f"federation.weighting is '{self.weighting}': use num_examples or equal")
        ratio = self.max_weight_ratio
        require(1 <= ratio < math.inf, f"federation.max_weight_ratio is {ratio:g}: use 1 or more")
        require(self.max_update_norm > 0, "federation.max_update_norm must be above 0")
        self._check_clipping()
        require(self.wire in WIRE_FORMATS, f"federation.wire is '{self.wire}': use {', '.join(WIRE_FORMATS)}")
        require(self.secure_clip > 0, f"federation.secure_clip is {self.secure_clip}: it must be above 0")
        fits = 0 <= self.secure_threshold <= len(self.sites)
        require(fits, f"federation.secure_threshold is {self.secure_threshold}, of {len(self.sites)} sites")
        self._check_validation()
        for name, rank in self.ranks.items():
            require(name in self.sites, f"federation.ranks names '{name}', which is not one of federation.sites")
            require(rank > 0, f"federation.ranks.{name} is {rank}: it must be above 0")
        if self.secure_aggregation:
            equal = self.weighting == "equal"
            require(equal, "federation.secure_aggregation hides the number of visits: set weighting to equal")
            require(len(self.sites) >= 3, "federation.secure_aggregation needs 3 sites or more")
            fits = self.wire == FLOAT32
            require(fits, "federation.secure_aggregation sends masked integers of its own: set wire to float32")

    def _check_validation(self) -> None:
        for name in ("validate_every", "patience"):
            require(getattr(self, name) >= 0, f"federation.{name} is {getattr(self, name)}: use 0 or more")
        require(self.keep in (LAST, BEST), f"federation.keep is '{self.keep}': use {LAST} or {BEST}")
        uses = "federation.keep best" if self.keep == BEST else "federation.patience"
        if self.keep == BEST or self.patience:
            require(self.validate_every > 0, f"{uses} needs validation: set federation.validate_every to 1 or more")
            require(not self.secure_aggregation, f"{uses} needs the sites' losses, which secure aggregation withholds")

    def _check_clipping(self) -> None:
        clip, most = self.clip_update_norm, self.max_update_norm
        require(0 <= clip <= most, f"federation.clip_update_norm is {clip:g}: use 0 to max_update_norm, {most:g}")
        if self.secure_aggregation:
            hidden = "federation.secure_aggregation shows the server only the sum, each site clips to secure_clip: "
            require(not clip, hidden + "set clip_update_norm to 0")


@dataclass
class StudyConfig:
    """A study: one base model, one modality, one adapter, several sites."""

    RENAMED: ClassVar[dict[str, str]] = {"scheme": "adapter"}

    name: str = "study"
    """Name in releases and kits."""
    seed: int = 0
    """Seed of every random number that is not private."""
    base_model: str = ""
    """Folder or hub id of the base model at the server. Each site names its own copy; hashes must agree."""
    modality: str = ""
    """YAML file of the modality, relative to the study's file. Each site names its own copy; hashes must agree."""
    output: str = "runs/study"
    """Folder for checkpoint, log of the rounds and release."""
    start: str = ""
    """Release at the server whose adapter the study continues from, for example one trained on public data; empty for
    none. Base and adapter shapes must be the study's. With `adapter.freeze_a`, A stays as the release has it."""
    start_digest: str = ""
    """SHA-256 of the weights of `start`, which sites compare with those of round 1. The server fills it in."""
    start_drift_digest: str = ""
    """SHA-256 of the longitudinal drift of `start`, which sites compare with the basis of their private one. The server
    fills it in."""
    adapter: dict[str, Any] = field(default_factory=lambda: {"name": "lora"})
    """Adapter to train: its `name` and its options, the fields of its class in `ld_common.adapters`."""
    packages: list[str] = field(default_factory=list)
    """Packages of others that bring the study's adapter or aggregator, by distribution name. A deployed study lists
    each with its hash in the kits, and every site approves it."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: DpConfig = field(default_factory=DpConfig)
    edit: dict[str, Any] = field(default_factory=lambda: {"name": "ddim"})
    """The editor that the release recommends: its `name` and its options, the fields of its class in
    `ld_common.editing`. `ld-generate` uses it unless told otherwise."""
    federation: FederationConfig = field(default_factory=lambda: FederationConfig(sites=["a", "b"]))
    trackers: list[str] = field(default_factory=list)
    """Where the server also sends each round's numbers: `mlflow`, `wandb`. TensorBoard's files and `rounds.csv` are
    always written to `output`."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name is empty: a study needs a name")
        for tracker in self.trackers:
            require(tracker in TRACKERS, f"trackers: '{tracker}' is not one of {', '.join(TRACKERS)}")
        require(is_line(self.name), f"name: give one line of at most {MAX_LINE} printable characters")
        if self.federation.aggregation.get("name") == FFA:
            self.adapter = {"freeze_a": True, **self.adapter}
        self.adapter = complete_adapter(self.adapter, self.privacy.enabled)
        for name, rank in self.federation.ranks.items():
            most = self.adapter.get("rank", 0)
            fits = self.adapter["name"] == "lora" and rank <= most
            require(fits, f"federation.ranks.{name} is {rank}: it is a LoRA's, of at most adapter.rank, {most}")
            require(
                not self.start, "federation.ranks cuts fresh adapters, and a study with start has none: leave out one"
            )
        fits = not (self.federation.ranks and self.adapter.get("rank_pattern"))
        require(fits, "federation.ranks cuts the ranks of all layers alike: leave out adapter.rank_pattern")
        fits = self.federation.aggregation.get("name") != ROLORA or self.federation.wire != "int8"
        require(
            fits, "federation.wire int8 adds a rounding error to the next round, where rolora sends the other factor"
        )
        fits = self.drift.shape != "longitudinal" or self.federation.rounds > 1 or self.privacy.enabled
        require(fits, "drift.shape longitudinal takes two rounds: set federation.rounds to 2 or more")
        if self.privacy.enabled:
            self._check_private()

    def _check_private(self) -> None:
        """Refuse options that reveal patients apart from the noised update."""
        equal = self.federation.weighting == "equal"
        require(equal, "privacy.enabled withholds the number of visits: set federation.weighting to equal")
        fits = self.drift.estimator == "moments" and self.drift.shape != "conditional"
        require(
            fits,
            "privacy.enabled noises a mean of latents or a longitudinal drift: set drift.estimator to moments, and "
            "drift.shape to none, scalar, channel, map or longitudinal",
        )
        fits = not self.adapter.get("use_dora")
        require(
            fits,
            "privacy.enabled needs gradients of single patients, which a DoRA has not: set adapter.use_dora to false",
        )
        fits = not self.training.ema
        require(fits, "privacy.enabled averages noised weights: set training.ema to 0, and privacy.ema")
        near = self.training.proximal_mu
        require(
            not near, "privacy.enabled clips the gradients of patients, not FedProx's: set training.proximal_mu to 0"
        )
        batches = self.training.gradient_accumulation
        require(
            batches == 1,
            "privacy.enabled draws the patients of a step by privacy.expected_batch_size, whatever memory holds: set "
            "training.gradient_accumulation to 1",
        )
        scored = self.federation.keep == BEST or self.federation.patience > 0
        require(
            not scored, "privacy.enabled withholds losses: set federation.keep to last and federation.patience to 0"
        )
        fits = self.drift.shape != "longitudinal" or bool(self.start or self.start_digest)
        require(
            fits,
            "privacy.enabled with drift.shape longitudinal learns no directions from patients: set start to a release "
            "of public data with a longitudinal drift, or set drift.shape to none, scalar, channel or map",
        )

    @property
    def withholds_numbers(self) -> bool:
        """Whether sites withhold counts and losses."""
        return self.privacy.enabled or self.federation.secure_aggregation

    @property
    def validates(self) -> bool:
        """Whether sites score rounds on held-out patients."""
        return self.federation.validate_every > 0 and not self.withholds_numbers

    def site_adapter(self, site: str) -> dict[str, Any]:
        """The adapter section as a site uses it: with its own rank, where it has one."""
        rank = self.federation.ranks.get(site)
        return self.adapter if rank is None else {**self.adapter, "rank": rank, "drawn_rank": self.adapter["rank"]}

    @property
    def leaves_parts(self) -> bool:
        """Whether each site has factors of its own, which `fedsa` leaves there."""
        return self.federation.aggregation.get("name") == FEDSA

    def keeps(self, name: str) -> bool:
        """Whether each site has its own of a trainable tensor: B, or A."""
        return self.leaves_parts and (LORA_A in name) == (self.federation.aggregation.get("keeps") == "a")

    def sends(self, name: str, round_number: int) -> bool:
        """Whether sites send a trainable tensor in a round."""
        return self.trains(name, round_number) and not self.keeps(name)

    def trains(self, name: str, round_number: int) -> bool:
        """Whether a trainable tensor trains in a round: `rolora` alternates B, first, and A."""
        if self.federation.aggregation.get("name") != ROLORA:
            return True
        return (LORA_A in name) == (round_number % 2 == 0)

    def privacy_plan(self) -> PrivacyPlan:
        """The noise of a private study, the same on every side; takes seconds the first time.

        Raises:
            PrivacyError: no noise keeps the study within its target.
        """
        return plan(self.privacy, self.federation.rounds, self.training.steps, self.drift.shape != "none")

    def digest(self) -> str:
        """SHA-256 of the study's content, without `NOT_DIGESTED`; base and modality have digests of their own."""
        content = {key: value for key, value in to_mapping(self).items() if key not in NOT_DIGESTED}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_study(path: Path, overrides: list[str] | None = None) -> tuple[StudyConfig, Modality]:
    """Read a study and its modality; raises `ConfigError`."""
    study = load_config(StudyConfig, path, overrides or [], variants=["adapter", "edit"])
    return study, load_config(Modality, path.parent / study.modality)


def study_from_json(text: str) -> StudyConfig:
    """The study as a message carries it; raises `ConfigError`."""
    if len(text) > MAX_STUDY:
        raise ConfigError(f"the study has more than the {MAX_STUDY} characters that are read")
    try:
        content: dict[str, Any] = read_json(text)
    except ValueError as error:
        raise ConfigError("the study is not JSON") from error
    return from_mapping(StudyConfig, content)
