"""Two hospitals of a deployed study, as real processes on loopback."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from ld_client.data.indexing import build_store
from ld_client.site_config import load_site
from ld_simulations.benchmarks.deployment.stage import Deployment

SITES = ["aster", "birch"]


def two_hospitals(site_yaml: Path, tmp_path: Path) -> Deployment:
    """Two hospitals with the same three patients; nothing is started."""
    site = load_site(site_yaml)
    build_store(site)
    configs = tmp_path / "configs"
    configs.mkdir()
    for name in SITES:
        content = yaml.safe_load(site_yaml.read_text()) | {"site": name, "store": str(tmp_path / f"store_{name}")}
        content["data"] |= {"root": site.data.root, "table": site.data.table}
        shutil.copytree(site.store_path, tmp_path / f"store_{name}")
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content))
    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "name": "deployed",
                "base_model": site.base_model,
                "modality": site.modality,
                "adapter": {"name": "lora", "rank": 2},
                "training": {"steps": 2, "batch_size": 2},
                "federation": {"rounds": 2, "sites": SITES, "min_train_nodes": 2, "round_timeout_seconds": 120},
            }
        )
    )
    return Deployment(study, [], configs, tmp_path / "deployed")
