"""The demo's config: simulated hospitals, the study that they run, and where everything lies.

Importing this module, and checking the keys of a config, loads no model library.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ld_common.core.config import load_config, require, to_mapping
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_simulations.hospitals_config import HospitalsConfig
from ld_simulations.overrides import split_overrides

RAY_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}")
REMOVED = {
    "overrides": "give the study's keys directly, for example federation.rounds=2",
    "hospital_overrides": "give the hospitals' keys directly, for example patients=8",
    "reuse": "the same command resumes a run and keeps what is complete; --fresh starts anew",
}


@dataclass
class DemoConfig:
    """A federation of simulated hospitals on one machine."""

    RENAMED: ClassVar[dict[str, str]] = {}

    output: str = "runs/demo"
    hospitals: str = "hospitals.yaml"
    """YAML of the hospitals, relative to the demo's file."""
    study: str = "demo_study.yaml"
    """YAML of the study, relative to the demo's file."""
    network: dict[str, Any] = field(default_factory=dict)
    """An editor of the trained network, with its options, that is judged beside the study's `edit`; empty for none."""
    cpus_per_site: int = 0
    """Processors that one site's training takes; as many sites train at once as there are processors for. 0 shares
    them out so that none is idle at the end of a round: 3 sites on 2 processors all train at once, at one thread each,
    as far as memory has room."""
    ray_address: str = ""
    """HOST:PORT of a Ray cluster that this machine is a node of, whose nodes train the sites; empty trains them on
    this machine alone."""
    held_out: float = 0.0
    """Share of each site's patients that its training leaves out; `ld-client audit-privacy` compares members with
    them."""

    def __post_init__(self) -> None:
        require(self.cpus_per_site >= 0, f"cpus_per_site is {self.cpus_per_site}: it must not be negative")
        require(
            not self.ray_address or RAY_ADDRESS.fullmatch(self.ray_address) is not None,
            f"ray_address is '{self.ray_address}': use HOST:PORT, as `ray start --head` prints it, on a node of the "
            "cluster",
        )
        require(
            0 <= self.held_out < 1,
            f"held_out is {self.held_out}: use a share, 0 or more and below 1; the number of patients whose true "
            "counterfactuals judge the release is test_patients",
        )


SCHEMAS: dict[str, type] = {"demo": DemoConfig, "study": StudyConfig, "hospitals": HospitalsConfig}


@dataclass(frozen=True)
class Demo:
    """A demo's config with every file that it names read."""

    config: DemoConfig
    study: StudyConfig
    study_file: Path
    study_overrides: list[str]
    """`key=value` that `study` has beside its file."""
    modality: Modality
    hospitals: HospitalsConfig

    @property
    def output(self) -> Path:
        """Folder of everything that the demo writes."""
        return Path(self.config.output).resolve()

    @property
    def sites(self) -> Path:
        """Folder of the site configs."""
        return self.output / "sites"

    @property
    def modality_file(self) -> Path:
        """YAML of the modality."""
        return self.study_file.parent / self.study.modality

    @property
    def release(self) -> Path:
        """Folder of the study's release."""
        return Path(self.study.output) / "release"

    def content(self) -> dict[str, Any]:
        """All that decides the demo's results, ready for JSON; no paths of outputs, nor what `cpus_per_site` and
        `ray_address` say of machines."""
        study = {key: value for key, value in to_mapping(self.study).items() if key != "output"}
        hospitals = {key: value for key, value in dataclasses.asdict(self.hospitals).items() if key != "output"}
        return {
            "demo": {"held_out": self.config.held_out},
            "study": study,
            "modality": to_mapping(self.modality),
            "hospitals": hospitals,
        }


def load_demo(path: Path, overrides: Sequence[str] = ()) -> Demo:
    """Read a demo's config and the files that it names.

    Args:
        path: YAML of a `DemoConfig`.
        overrides: `key=value` of the demo, of its study or of its hospitals, in this order of precedence.

    Raises:
        ConfigError: an unreadable file, an unknown key or a value out of range.
    """
    assigned = split_overrides(overrides, SCHEMAS, REMOVED)
    config = load_config(DemoConfig, path, assigned["demo"])
    output = Path(config.output).resolve()
    study_file = path.parent / config.study
    study, modality = load_study(study_file, [*assigned["study"], f"output={output / 'study'}"])
    hospitals_file = path.parent / config.hospitals
    hospitals = load_config(HospitalsConfig, hospitals_file, [*assigned["hospitals"], f"output={output / 'hospitals'}"])
    return Demo(config, study, study_file, assigned["study"], modality, hospitals)
