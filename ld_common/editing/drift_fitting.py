"""Fits a longitudinal drift to visits at hand, as a federation fits it to the visits of its sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.diffusion.longitudinal_sums import DAYS_IN_YEAR, StructureSizes, VisitTable
from ld_common.imaging.modality import AGE, Modality, Value
from ld_common.metrics.structure import area_of, structure_sizes

DECODED_TOGETHER = 16


def fit_longitudinal_drift(
    latents: Tensor,
    attributes: Sequence[Mapping[str, Value]],
    patients: Sequence[str],
    days: Sequence[float] | None = None,
    *,
    modality: Modality,
    base: BaseModel,
    sites: Sequence[str] = (),
) -> LongitudinalDrift:
    """The longitudinal drift of visits at hand, as a federation of these sites would fit it.

    Args:
        latents: of the scans, scaled, `(N,C,h,w)`, as `base.encode(pictures)` gives them for pictures `(N,1,S,S)` in
            [-1, 1], or as `TrainingData.latents` holds them.
        attributes: for each scan, all attributes of the modality at its visit; others are ignored.
        patients: whose scan each is. What changes with the years is learned from patients with several visits.
        days: when each scan was taken, counted from any day of the patient's; None takes it from the attribute `age`.
        modality: what the attributes mean.
        base: the base that encoded the scans.
        sites: where each scan was taken: each site gets an intercept, so that scanners are not mistaken for change; a
            patient belongs to one site. Empty for one site.

    Raises:
        RequestError: lists of several lengths, latents of another base or not finite, a missing attribute or a wrong
            value, a patient of two sites, or no patient with two scans of different days.
        ConfigError: no two scans differ.
    """
    count, homes = len(latents), list(sites) or [""] * len(latents)
    for name, values in (("attributes", attributes), ("patients", patients), ("days", days), ("sites", homes)):
        if values is not None and len(values) != count:
            raise RequestError(f"{count} latents and {len(values)} {name}: give one a scan")
    if tuple(latents.shape[1:]) != tuple(base.latent_shape):
        raise RequestError(f"latents have shape {tuple(latents.shape)}: this base has (N, *{tuple(base.latent_shape)})")
    if not bool(torch.isfinite(latents).all()):
        raise RequestError("the latents hold a number that is not finite")
    designs = [_design_vector(row, named, modality) for row, named in enumerate(attributes)]
    times = _days_by_age(attributes, modality) if days is None else [float(day) for day in days]
    first: dict[str, float] = {}
    rows_of_sites: dict[str, list[int]] = defaultdict(list)
    home: dict[str, str] = {}
    for row, (patient, time, site) in enumerate(zip(patients, times, homes, strict=True)):
        first[patient] = min(time, first.get(patient, time))
        rows_of_sites[site].append(row)
        if home.setdefault(patient, site) != site:
            raise RequestError(f"patient {patient} is of the sites {home[patient]} and {site}: a patient has one site")
    tables = [
        VisitTable.of(
            latents[rows].detach().cpu(),
            [designs[row] for row in rows],
            modality.numeric_columns,
            [patients[row] for row in rows],
            [times[row] - first[patients[row]] for row in rows],
            sizes_of_latents(base, modality, latents[rows]),
            mirror_images(base, modality, latents[rows]),
        )
        for rows in rows_of_sites.values()
    ]
    if not any(table.pairs() for table in tables):
        raise RequestError(
            "no patient has two scans of different days: change with the years is learned from such pairs"
        )
    return fit_tables(tables, modality.numeric_columns, base.latent_mean, base.latent_shape)[0]


def sizes_of_latents(base: BaseModel, modality: Modality, latents: Tensor) -> StructureSizes | None:
    """What a modality measures in the pictures of latents `(N,C,h,w)`; None where it measures nothing."""
    if area_of(modality) is None:
        return None
    pictures = torch.cat([base.decode(batch) for batch in latents.split(DECODED_TOGETHER)])
    sizes = structure_sizes(modality, pictures)
    return None if sizes is None else StructureSizes(*sizes)


def mirror_images(base: BaseModel, modality: Modality, latents: Tensor) -> Tensor | None:
    """Latents of the mirror images of pictures of latents, both `(N,C,h,w)`; None where left and right are not alike.

    A base's latents have no mirror symmetry of their own: the pictures are decoded, mirrored and encoded again.
    """
    if not modality.image.symmetric:
        return None
    return torch.cat([base.encode(base.decode(batch).flip(-1)) for batch in latents.split(DECODED_TOGETHER)])


def _design_vector(row: int, attributes: Mapping[str, Value], modality: Modality) -> list[float]:
    if missing := [name for name in modality.attributes if name not in attributes]:
        raise RequestError(f"scan {row} lacks {', '.join(missing)}: give all attributes of {modality.name}")
    return modality.design_vector({name: modality.parse(name, str(attributes[name])) for name in modality.attributes})


def _days_by_age(attributes: Sequence[Mapping[str, Value]], modality: Modality) -> list[float]:
    if AGE not in modality.attributes or modality.attributes[AGE].categories:
        raise RequestError(f"{modality.name} has no age in years: give days, the time of each scan")
    return [float(named[AGE]) * DAYS_IN_YEAR for named in attributes]
