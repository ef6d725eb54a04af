"""A release: the folder with all that a counterfactual needs beside the base model.

    manifest.json       study, modality, base model, privacy, rounds, and the hash of every other file
    manifest.sig        signature over the manifest (`ld_common.release.signature`)
    README.md           model card with YAML front matter
    drift.safetensors   latent drift: `mean`, and `site.<name>` for each site
    preparation/        files that the modality's `preprocessing` names
    weights             in diffusers' format for the adapter: `Adapter.export_files`
    sites/              factors that sites have of their own, in place of the adapter's (aggregator `fedsa`)

A LoRA's weights load by `pipe.load_lora_weights(folder)` and by `PeftModel.from_pretrained(pipe.unet, folder)`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ld_common.adapters.base import DRIFT, inject
from ld_common.adapters.lora import DIFFUSERS_WEIGHTS
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import check_state, read_tensors, write_tensors
from ld_common.core.atomic_files import file_digest, write_bytes
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError, ConfigError, ReleaseError
from ld_common.core.state import State
from ld_common.core.strict_json import read_json, read_limited
from ld_common.diffusion.base_model import BaseModel, checked_dtype, load_base
from ld_common.diffusion.drift import ConditionalDrift, LatentDrift, by_channel, entering
from ld_common.diffusion.longitudinal import PREFIX, LongitudinalDrift
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.registry import editor_options, read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.modality_steps import PREPARATION
from ld_common.imaging.preparation.files import step_files
from ld_common.protocol.site_name import OWN_PART, check_site_name
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.base_reference import base_reference, find_base, read_unet_config
from ld_common.release.model_card import release_card
from ld_common.release.privacy_statement import privacy_statement

ADAPTER, MANIFEST, CARD = DIFFUSERS_WEIGHTS, "manifest.json", "README.md"
"""`ADAPTER` holds the weights of a LoRA; the manifest's `weights` names the file of other adapters."""
SIGNATURE, ENVELOPE = "manifest.sig", "sealed.json"
SEALED_SUFFIX = ".sealed"
"""Ending of encrypted files (`ld_common.release.encryption`)."""
SAFETENSORS = ".safetensors"
SEALED = ADAPTER + SEALED_SUFFIX
FORMAT = 2
FILE_NAME = re.compile(r"([A-Za-z0-9][\w-]{0,60}/)?[A-Za-z0-9][\w.-]{0,100}", re.ASCII)
LOCAL_PATHS = ("output", "modality", "start")
"""Options of a study that name files of the server; a release does not repeat them."""
MEAN = "mean"
"""Name of the drift of all sites; a longitudinal one has tensors that begin with its `PREFIX`."""
OWN_PARTS = "sites"
"""Folder of the sites' own factors."""
LIBRARIES = ("torch", "diffusers", "peft", "opacus", "flwr", "safetensors", "monai", "SimpleITK")

AnyDrift = LatentDrift | ConditionalDrift | LongitudinalDrift


@dataclass(frozen=True, eq=False)
class ReleaseContent:
    """What a study trained."""

    base_digest: str
    state: State
    drift: AnyDrift | None = None
    """That of all sites."""
    site_drifts: dict[str, AnyDrift] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Record of each round."""
    start: dict[str, Any] | None = None
    """Hash, privacy and sites of the release that the study began with."""
    imported: dict[str, Any] | None = None
    """File name and hash of the LoRA that `import_lora` read; None for what a study trained."""
    adapter: dict[str, Any] | None = None
    """The study's adapter section, where the state has another rank than the study's (aggregators `fedex`, `flora`)."""
    own_parts: dict[str, State] = field(default_factory=dict)
    """Tensors of the adapter as single sites have them, where a study leaves them there and the site releases them."""
    round: int | None = None
    """The round after which the state was taken."""


@dataclass(frozen=True)
class Release:
    """A release as it was read, checked against its own hashes."""

    folder: Path
    study: StudyConfig
    modality: Modality
    base_name: str
    """Hub id of the base, or the name of its folder; `find_release_base` says where it is."""
    base_digest: str
    state: State
    drift: AnyDrift | None
    """That of all sites, or None."""
    site_drifts: dict[str, AnyDrift]
    manifest: dict[str, Any]
    own_parts: dict[str, State] = field(default_factory=dict)
    """Tensors that single sites have in place of `state`'s."""
    site: str = ""
    """The site whose own part and drift `state` and `drift` are; empty for those of all sites."""
    signed_by: str | None = None
    """Fingerprint of the trusted key that signed it, if `trusted_keys` checked that."""

    @property
    def adapter_sha256(self) -> str:
        """SHA-256 of the file of the adapter's weights."""
        return str(self.manifest["files"][self.manifest["weights"]])

    def of_site(self, site: str) -> Release:
        """The release as one of its sites has it: with the factors (aggregator `fedsa`) and the drift of its own.

        Args:
            site: its name; or, at a site that does not release its factors, the file in which it keeps them
                (`own/<study digest>/<round>.safetensors` beside its ledger).

        Raises:
            ReleaseError: the release holds nothing of this site's own, or the file does not fit it.
        """
        if site.endswith(SAFETENSORS):
            return self._with_own_part(Path(site))
        kept = self.study.leaves_parts
        known = sorted(self.own_parts if kept else self.site_drifts)
        if site not in known:
            held = ", ".join(known) or "no site"
            what = "factors" if kept else "drift"
            raise ReleaseError(f"the release does not hold the {what} of '{site}', but of {held}")
        state = {**self.state, **self.own_parts.get(site, {})}
        return replace(self, site=site, state=state, drift=self.site_drifts.get(site, self.drift))

    def _with_own_part(self, file: Path) -> Release:
        try:
            own, metadata = read_tensors(file)
            _check_own_part(own, self.state, self.study)
            site = metadata.get("site", "")
            check_site_name(site)
        except (AdapterError, ConfigError) as error:
            raise ReleaseError(f"'{file}' holds no factors of a site for this release: {error}") from error
        if metadata.get("study_digest") != self.manifest["study_digest"] or metadata.get("kind") != OWN_PART:
            raise ReleaseError(f"'{file}' is of another study than the release, or no factors of its own")
        number, released = metadata.get("round", ""), self.manifest.get("round")
        if released is not None and not (number.isdecimal() and int(number) <= int(released)):
            raise ReleaseError(
                f"'{file}' is of round {number}, the release of round {released}: give the file of that round, or of "
                "the last one before it"
            )
        return replace(self, own_parts={**self.own_parts, site: own}).of_site(site)


def write_release(folder: Path, study: StudyConfig, modality: Modality, content: ReleaseContent) -> Path:
    """Write a release folder; the manifest is written last, so a folder with a manifest is complete.

    Raises:
        ConfigError: a file of the modality's `preprocessing` is missing, or another one.
    """
    names = []
    options = study.adapter if content.adapter is None else content.adapter
    adapter = read_adapter(options)
    for name, file in adapter.export_files(content.state, lambda: read_unet_config(study.base_model)):
        write_bytes(folder / name, file)
        names.append(name)
    for name, file in step_files(modality.preprocessing).items():
        write_bytes(folder / PREPARATION / name, file)
        names.append(f"{PREPARATION}/{name}")
    drifts = {f"site.{name}": drift for name, drift in sorted(content.site_drifts.items())}
    drifts |= {} if content.drift is None else {MEAN: content.drift}
    if drifts:
        # clones, because safetensors refuses tensors that share memory
        tensors = {
            name: value.contiguous().clone()
            for place, drift in drifts.items()
            for name, value in _named(place, drift).items()
        }
        write_tensors(folder / DRIFT, tensors, {"formulation": study.drift.formulation})
    for site, own in sorted(content.own_parts.items()):
        write_tensors(folder / own_file(site), {name: value.contiguous().clone() for name, value in own.items()}, {})
        names.append(own_file(site))
    base = base_reference(study.base_model, content.base_digest, folder)
    manifest = {
        "format": FORMAT,
        "study": {key: value for key, value in to_mapping(study).items() if key not in LOCAL_PATHS}
        | {"edit": editor_options(read_editor(study.edit)), "base_model": base["name"], "adapter": options},
        "study_digest": study.digest(),
        "modality": modality.shared(),
        "base_model": base,
        "privacy": privacy_statement(study),
        "start": content.start,
        "drift": {
            "mean": None if content.drift is None else _by_channel(content.drift),
            "sites": {name: _by_channel(value) for name, value in sorted(content.site_drifts.items())},
        },
        "own_parts": sorted(content.own_parts),
        "round": content.round,
        "rounds": content.rounds,
        "tensors": {name: {"shape": list(value.shape), "dtype": "float32"} for name, value in content.state.items()},
        "software": software(),
        "weights": names[0],
        "files": dict.fromkeys([*names, *([DRIFT] if drifts else [])], ""),
    }
    write_manifest(folder, manifest if content.imported is None else {**manifest, "imported": content.imported})
    return folder


def read_release(folder: Path) -> Release:
    """Read a release folder and check it against its own hashes; `trusted_keys` checks who signed it.

    Raises:
        ReleaseError: no release, another format, or a file that differs from the manifest.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        study = from_mapping(StudyConfig, manifest["study"])
        drifts = read_tensors(folder / DRIFT)[0] if DRIFT in manifest["files"] else {}
        entered = _entered(drifts, study.drift.formulation)
        if (manifest["drift"]["mean"] is None) == (MEAN in entered):
            raise ValueError(f"{DRIFT} is not the drift that the manifest names")
        sites = {name.removeprefix("site."): drift for name, drift in entered.items() if name.startswith("site.")}
        own_parts = {name: read_tensors(folder / own_file(name))[0] for name in manifest.get("own_parts", [])}
        for name in {*sites, *own_parts}:
            check_site_name(name)
        state = read_adapter(study.adapter).read_files(folder)
        for own in own_parts.values():
            _check_own_part(own, state, study)
        return Release(
            folder=folder,
            study=study,
            modality=from_mapping(Modality, manifest["modality"]).located(folder.resolve() / PREPARATION),
            base_name=str(manifest["base_model"]["name"]),
            base_digest=str(manifest["base_model"]["sha256"]),
            state=state,
            drift=entered.get(MEAN),
            site_drifts=sites,
            manifest=manifest,
            own_parts=own_parts,
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, AdapterError, ConfigError) as error:
        raise ReleaseError(f"'{folder}' is not a complete release ({error}): copy it again") from error


def _check_own_part(own: State, state: State, study: StudyConfig) -> None:
    """Raise `AdapterError` unless these are the tensors that the study leaves at each site."""
    kept = {name: value for name, value in state.items() if study.keeps(name)}
    if not kept:
        raise AdapterError("the study leaves no factors at the sites")
    check_state(own, kept)


def own_file(site: str) -> str:
    """The file of a site's own factors, within a release."""
    return f"{OWN_PARTS}/{site}{SAFETENSORS}"


def _named(place: str, drift: AnyDrift) -> State:
    """A drift's tensors by their names in the file."""
    if isinstance(drift, LongitudinalDrift):
        return drift.state()
    return {place: drift.coefficients if isinstance(drift, ConditionalDrift) else drift.mean}


def _entered(tensors: State, formulation: str) -> dict[str, AnyDrift]:
    """The drifts of a file by place: `mean`, or `site.` and a site's name."""
    fitted = {name: value for name, value in tensors.items() if name.startswith(PREFIX)}
    drifts: dict[str, AnyDrift] = {
        name: entering(value, formulation) for name, value in tensors.items() if name not in fitted
    }
    return drifts | ({MEAN: LongitudinalDrift.from_state(fitted)} if fitted else {})


def _by_channel(drift: AnyDrift) -> list[float]:
    """What the manifest shows: the mean of μ by latent channel."""
    if isinstance(drift, LongitudinalDrift):
        return by_channel(drift.mean.view([int(size) for size in drift.latent_shape]))
    return by_channel(drift.coefficients if isinstance(drift, ConditionalDrift) else drift.mean)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A release's manifest; raises `ReleaseError` if there is none, or one of another format."""
    try:
        manifest = read_json(read_limited(folder / MANIFEST))
    except OSError as error:
        raise ReleaseError(f"'{folder}' holds no release: give the folder with {MANIFEST} in it") from error
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"'{folder / MANIFEST}' is not JSON: copy the release again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        written = manifest.get("format") if isinstance(manifest, dict) else None
        raise ReleaseError(f"'{folder}' is a release of format {written}, not {FORMAT}: use the version that wrote it")
    return manifest


def file_names(manifest: dict[str, Any]) -> list[str]:
    """The files that a manifest lists, card and weights first.

    Raises:
        ReleaseError: a name that could lead out of the folder, or no card or weights.
    """
    files = manifest.get("files")
    names = list(files) if isinstance(files, dict) else []
    wrong = [name for name in names if not FILE_NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE, ENVELOPE)]
    if wrong or manifest.get("weights") not in names or CARD not in names:
        raise ReleaseError(f"the manifest lists wrong files ({', '.join(wrong or names)}): copy the release again")
    return sorted(names, key=lambda name: (name != CARD, name != manifest["weights"], name))


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the files of a folder against the hashes in its manifest; raises `ReleaseError`."""
    names = file_names(manifest)
    if (folder / ENVELOPE).exists() and not (folder / str(manifest["weights"])).exists():
        raise ReleaseError(f"'{folder}' is encrypted to named sites: each opens it with ld-client pull")
    try:
        for name in names:
            if file_digest(folder / name) != manifest["files"][name]:
                raise ReleaseError(f"'{folder / name}' is not the file that was released: copy the release again")
    except OSError as error:
        raise ReleaseError(f"'{folder}' is not a complete release ({error}): copy it again") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write card and manifest of a folder that has the other files of `manifest["files"]`, with their hashes.

    Raises:
        ReleaseError: the manifest lacks an entry of the card, because another version wrote it.
    """
    names: Iterable[str] = [name for name in manifest["files"] if name != CARD]
    manifest["files"] = {name: file_digest(folder / name) for name in names}
    try:
        card = release_card(manifest)
    except KeyError as error:
        raise ReleaseError(f"the manifest lacks {error}: it was written by another version") from error
    write_bytes(folder / CARD, card.encode())
    manifest["files"][CARD] = file_digest(folder / CARD)
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def find_release_base(release: Release, base_name: str | None = None) -> str:
    """Path or hub id of a release's base on this machine: `base_name`, or the one that the release names.

    Raises:
        ReleaseError: the base is not on this machine, or is another one; the message names `--base`.
    """
    return find_base(release.manifest["base_model"], release.folder, base_name)


def load_release_base(
    release: Release, base_name: str | None = None, device: str = "cpu", precision: str = "float32"
) -> BaseModel:
    """Load a release's base and put the release's adapter into it, for inference.

    The adapter is merged into the weights in float32, before they are rounded to `precision`: of a small change little
    is left where it is added to rounded weights. Device and precision are those of `load_base`.

    Raises:
        ReleaseError: the base is not on this machine, or is not the one that the release was trained on.
        ModelError: the base cannot be loaded, or not on this device.
    """
    dtype = checked_dtype(device, precision)
    base = load_base(find_release_base(release, base_name))
    adapted = inject(base, read_adapter(release.study.adapter), release.study.seed)
    try:
        check_state(release.state, adapted.state())
    except AdapterError as error:
        raise ReleaseError(f"the release's adapter does not fit its base: {error}") from error
    adapted.load(release.state)
    for parameter in adapted.parameters.values():
        parameter.requires_grad_(False)
    adapted.adapter.merge(adapted.model)
    return adapted.model.move(device, dtype)


def edit_drift(release: Release) -> EditDrift | None:
    """The drift for edits; None for a conditional drift, which only affects sampling from noise."""
    return None if isinstance(release.drift, ConditionalDrift) else release.drift


def release_editor(release: Release) -> Editor:
    """The editor that the release recommends; raises `ConfigError` if it is not installed here."""
    return read_editor(release.study.edit)


def release_record(release: Release) -> dict[str, Any]:
    """Identifies a release in the record of an image: study, file hashes, base and signer."""
    return {
        "study": release.study.name,
        "files": release.manifest["files"],
        "base": release.base_digest,
        "signed_by": release.signed_by,
        **({"site": release.site} if release.site else {}),
    }


def software() -> dict[str, str]:
    """Versions of Python and of the libraries here that compute a release or a counterfactual."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # ld-generate alone needs neither flwr nor opacus
            versions[name] = version(name)
    return versions
