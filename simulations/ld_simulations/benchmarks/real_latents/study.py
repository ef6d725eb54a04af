"""What the benchmark measures and draws, each part on its own; latents and networks are kept between calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift, drift_from_moments
from ld_common.diffusion.sampling import make_sampler
from ld_common.diffusion.signal_level import signal_level
from ld_common.metrics.histogram import match_grey_levels
from ld_common.metrics.image import psnr
from ld_simulations.benchmarks.real_latents.autoencoder import FACTOR, GROUPS, TinyAutoencoder
from ld_simulations.benchmarks.real_latents.judge import HeldOutJudge
from ld_simulations.benchmarks.real_latents.network import (
    LatentTraining,
    contexts,
    draw_latents,
    loaded_network,
    new_network,
    train_network,
)
from ld_simulations.benchmarks.real_latents.pictures import (
    SourcedPictures,
    everyday_crops,
    few_of_each,
    mr_slices,
    radiographs,
)
from ld_simulations.benchmarks.real_latents.plan import RADIOGRAPHS, VOLUMES, WEIGHTS, RealLatentsBenchmark
from ld_simulations.benchmarks.real_latents.rows import (
    BASE,
    CENTRED,
    DRAWN,
    EVERYDAY,
    EVERYDAY_MATCHED,
    FLOOR,
    GAUSSIAN,
    MATCHED,
    NO_DRIFT,
    TRAININGS,
    DrawnRow,
)
from ld_simulations.benchmarks.real_latents.statistics import (
    chance_of_halves,
    drift_estimate,
    paired_estimate,
    site_distances,
    split_patients,
    tell_sites,
)

OTHER_GROUPS = (1, 2, 8, 16, 32)
SHOWN = 8
"""Samples of each row that the figure shows."""
Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class EncodedPictures:
    """Pictures with their latents."""

    pictures: SourcedPictures
    latents: Tensor
    """Raw latents `(N,32,h,w)` of TAEF2."""

    @property
    def means(self) -> np.ndarray:
        """Means by channel of each picture `(N,32)`, float64."""
        return cast(np.ndarray, self.latents.double().mean((2, 3)).numpy())

    def rows(self, rows: list[int]) -> EncodedPictures:
        """Some of the pictures."""
        return EncodedPictures(self.pictures.rows(rows), self.latents[rows])

    def of_site(self, site: str) -> EncodedPictures:
        """Those of one site."""
        return self.rows([row for row, name in enumerate(self.pictures.sites) if name == site])


class RealLatentsStudy:
    """The parts of the benchmark."""

    def __init__(self, benchmark: RealLatentsBenchmark) -> None:
        self._benchmark, self._config = benchmark, benchmark.config
        torch.set_num_threads(benchmark.config.threads)

    def reconstruction(self) -> dict[str, Any]:
        """PSNR in dB through the autoencoder, by kind of picture and size, and with other numbers of groups."""
        sides: dict[str, dict[str, float]] = {}
        for side in (self._config.measured_side, self._config.drawn_side):
            kinds = {"everyday crops": everyday_crops(side, 2), "radiographs": self._scans("radiographs", side)}
            kinds["MR slices"] = self._scans("mr", side)
            for kind, found in kinds.items():
                some = few_of_each(found, 1 if kind == "radiographs" else 2)
                sides.setdefault(kind, {})[str(side)] = self._psnr(self._autoencoder, some.pictures)
        crops = everyday_crops(self._config.measured_side, 1).pictures
        folder = self._benchmark.data / WEIGHTS
        by_groups = {
            str(groups): self._psnr(TinyAutoencoder(folder, groups), crops)
            for groups in sorted((GROUPS, *OTHER_GROUPS))
        }
        return {"psnr_db": sides, "psnr_db_by_groups": by_groups, "groups": GROUPS}

    def drift(self) -> dict[str, Any]:
        """Drifts of the scans from everyday pictures, in deviations of these, with the chance level."""
        side, resamples = self._config.measured_side, self._config.resamples
        everyday = self._encoded("everyday", side)
        grey = self._encoded("everyday-grey", side)
        unit = everyday.latents.double().std((0, 2, 3)).numpy()

        def between(first: EncodedPictures, second: EncodedPictures) -> dict[str, Any]:
            groups = first.pictures.sources, second.pictures.sources
            return drift_estimate(first.means / unit, groups[0], second.means / unit, groups[1], resamples)

        scans = {"radiographs": self._encoded("radiographs", side), "MR slices": self._encoded("mr", side)}
        kinds = scans | {site: scans["radiographs"].of_site(site) for site in self._sites}
        found = {kind: between(encoded, everyday) for kind, encoded in kinds.items()}
        colourless = (grey.means - everyday.means) / unit
        found["everyday crops without colour"] = paired_estimate(colourless, grey.pictures.sources, resamples)
        for kind, name in (("radiographs", "radiographs"), ("MR slices", "mr")):
            found[f"{kind}, from grey crops"] = between(scans[kind], grey)
            matched = self._encoded(f"everyday-as-{name}", side)
            found[f"{kind}, from grey crops with their grey levels"] = between(scans[kind], matched)
        chance = chance_of_halves(everyday.means / unit, everyday.pictures.sources, resamples)
        return {
            "side": side,
            "drifts": found,
            **chance,
            "sources": sorted(set(everyday.pictures.sources)),
            "correlation_of_mr_and_radiographs": float(
                np.corrcoef(found["radiographs"]["by_channel"], found["MR slices"]["by_channel"])[0, 1]
            ),
        }

    def sites(self) -> dict[str, Any]:
        """How far the radiographs' sites lie apart, and how well the nearest mean tells a patient's site."""
        side, resamples = self._config.measured_side, self._config.resamples
        encoded, everyday = self._encoded("radiographs", side), self._encoded("everyday", side)
        unit = everyday.latents.double().std((0, 2, 3)).numpy()
        pictures = encoded.pictures
        values = encoded.means / unit
        levels = torch.stack([pictures.pictures.mean((1, 2, 3)), pictures.pictures.std((1, 2, 3))], 1).double()
        grey = ((levels - levels.mean(0)) / levels.std(0)).numpy()
        tell = partial(tell_sites, patients=pictures.sources, sites=pictures.sites, resamples=resamples)
        return {
            "images": {site: pictures.sites.count(site) for site in self._sites},
            "patients": {
                site: len({name for name, own in zip(pictures.sources, pictures.sites, strict=True) if own == site})
                for site in self._sites
            },
            "distances": site_distances(values, pictures.sources, pictures.sites, resamples),
            "told": {"latent means": tell(values), "mean and deviation of grey": tell(grey)},
        }

    def base(self, advance: Advance = lambda _: None) -> dict[str, Any]:
        """Train the base on the everyday crops; its weights are kept."""
        config = self._config
        training = LatentTraining(config.base_steps, config.batch_size, config.base_learning_rate, 0)
        network = new_network(config.drawn_side // FACTOR)
        everyday = self._encoded("base", config.drawn_side)
        loss = train_network(
            network, self._normal(everyday.latents), self._contexts(everyday.pictures.sites), training, None, advance
        )
        write_tensors(self._base_file, dict(network.unet.state_dict()), {})
        return {"loss": loss, "crops": len(everyday.pictures), "parameters": network.unet.num_parameters()}

    def drawn(self, seed: int) -> dict[str, Any]:
        """Fine-tune the base in every way with one seed, and measure the samples of every row."""
        rows: dict[str, Any] = {}
        losses = {}
        networks = {}
        for training in TRAININGS:
            networks[training], losses[training] = self._fine_tuned(training, seed)
        for row in DRAWN:
            pictures = self._draw(networks[row.training], row, seed)
            self._keep_for_figure(row.name, pictures, seed)
            rows[row.name] = self._judge.measure(pictures)
            if row.name == NO_DRIFT:
                matched = match_grey_levels(pictures, self._training.pictures.pictures)
                self._keep_for_figure(MATCHED, matched, seed)
                rows[MATCHED] = self._judge.measure(matched)
        return {"rows": rows, "losses": losses}

    def references(self) -> dict[str, Any]:
        """The rows that no fine-tuned network draws, and what the sets are."""
        config, judge = self._config, self._judge
        training = few_of_each(self._training.pictures, config.images_of_a_patient)
        own = training.rows(_spread(len(training), config.samples))
        crops = everyday_crops(config.drawn_side, config.crops).grey()
        crops = crops.rows(_spread(len(crops), config.samples))
        everyday = self._autoencoder.decode_grey(self._autoencoder.encode(crops.pictures))
        matched = match_grey_levels(everyday, self._training.pictures.pictures)
        floor = self._autoencoder.decode_grey(self._autoencoder.encode(own.pictures))
        rows = {
            FLOOR: judge.measure(floor, own.sources),
            EVERYDAY: judge.measure(everyday, crops.sources),
            EVERYDAY_MATCHED: judge.measure(matched, crops.sources),
            GAUSSIAN: judge.measure(self._gaussian()),
        }
        network = self._base_network()
        base_row = self._draw(network, DrawnRow(BASE), config.seeds[0], ["everyday"] * config.samples)
        rows[BASE] = judge.measure(base_row)
        self._keep_for_figure(BASE, base_row, config.seeds[0])
        self._keep_for_figure(GAUSSIAN, self._gaussian(), config.seeds[0])
        normal = self._normal(self._training.latents)
        sampler = make_sampler(network.scheduler, "ddim", config.sampling_steps)
        return {
            "rows": rows,
            "training_patients": len(set(self._training.pictures.sources)),
            "training_images": len(self._training.pictures),
            "held_out_patients": len(set(self._held_out.sources)),
            "held_out_images": len(self._held_out),
            "drift_rms_by_channel": float(normal.mean((0, 2, 3)).square().mean().sqrt()),
            "drift_rms_of_map": float(normal.mean(0).square().mean().sqrt()),
            "first_signal_level": signal_level(sampler, 0),
            "last_signal_level": float(network.scheduler.alphas_cumprod[-1]) ** 0.5,
        }

    def means_of_scans(self) -> dict[str, Tensor]:
        """Mean pictures `(1,S,S)` of the training patients' radiographs, a few of each, over all and by site."""
        pictures = few_of_each(self._training.pictures, self._config.images_of_a_patient)
        named = {"all sites": pictures} | {
            site: pictures.rows([row for row, own in enumerate(pictures.sites) if own == site]) for site in self._sites
        }
        return {f"{name}, {len(set(own.sources))} patients": own.pictures.mean(0) for name, own in named.items()}

    @property
    def figure_folder(self) -> Path:
        """Where the figure's samples are kept."""
        return self._benchmark.output / "figure"

    @cached_property
    def _autoencoder(self) -> TinyAutoencoder:
        return TinyAutoencoder(self._benchmark.data / WEIGHTS)

    @cached_property
    def _sites(self) -> list[str]:
        return sorted(set(self._scans("radiographs", self._config.drawn_side).sites))

    @cached_property
    def _held_patients(self) -> set[str]:
        every = self._scans("radiographs", self._config.drawn_side)
        return split_patients(every.sources, every.sites, self._config.held_out_share, 0)

    @cached_property
    def _training(self) -> EncodedPictures:
        """All radiographs of the patients who are not held out."""
        every = self._encoded("radiographs", self._config.drawn_side)
        names = every.pictures.sources
        return every.rows([row for row, name in enumerate(names) if name not in self._held_patients])

    @cached_property
    def _held_out(self) -> SourcedPictures:
        """Some radiographs of each held-out patient, through the autoencoder: a perfect network would draw these."""
        every = self._encoded("radiographs", self._config.drawn_side)
        numbered = SourcedPictures(
            torch.arange(len(every.latents)).view(-1, 1, 1, 1), every.pictures.sources, every.pictures.sites
        )
        held = numbered.rows([row for row, name in enumerate(numbered.sources) if name in self._held_patients])
        few = few_of_each(held, self._config.images_of_a_patient)
        rows = few.pictures.flatten().tolist()
        return replace(few, pictures=self._autoencoder.decode_grey(every.latents[rows]))

    @cached_property
    def _judge(self) -> HeldOutJudge:
        return HeldOutJudge(self._held_out, self._training.pictures.pictures)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation by channel `(32,1,1)` of the base's latents, by which all are normalised."""
        latents = self._encoded("base", self._config.drawn_side).latents.double()
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        return mean.float()[:, None, None], deviation.float()[:, None, None]

    def _normal(self, latents: Tensor) -> Tensor:
        mean, deviation = self._moments
        return (latents - mean) / deviation

    def _pictures_of(self, normal: Tensor) -> Tensor:
        """Grey pictures `(N,1,S,S)` of normalised latents."""
        mean, deviation = self._moments
        return self._autoencoder.decode_grey(normal * deviation + mean)

    def _contexts(self, kinds: list[str]) -> Tensor:
        return contexts(kinds, ["everyday", *self._sites])

    @property
    def _base_file(self) -> Path:
        return self._benchmark.output / "states" / "base.safetensors"

    def _base_network(self) -> Denoiser:
        """A fresh copy of the base, which is trained where its weights are absent."""
        if not self._base_file.exists():
            self.base()
        return loaded_network(self._config.drawn_side // FACTOR, read_tensors(self._base_file)[0])

    def _fine_tuned(self, training: str, seed: int) -> tuple[Denoiser, float]:
        config = self._config
        network = self._base_network()
        plan = LatentTraining(config.steps, config.batch_size, config.learning_rate, seed)
        drift = LatentDrift(self._mu(self._training, "channel"), CENTRED) if training == CENTRED else None
        latents, context = self._normal(self._training.latents), self._contexts(self._training.pictures.sites)
        return network, train_network(network, latents, context, plan, drift)

    def _mu(self, encoded: EncodedPictures, shape: str) -> Tensor:
        """μ of normalised latents; the base's mean is 0."""
        normal = self._normal(encoded.latents)
        return cast(Tensor, drift_from_moments(normal, torch.zeros(normal.shape[1]), shape))

    def _drift_of(self, row: DrawnRow, kinds: list[str]) -> LatentDrift | None:
        if row.shape == "none":
            return None
        formulation = CENTRED if row.training == CENTRED else "prior"
        if row.shape == "site":
            means = {site: self._mu(self._training.of_site(site), "channel") for site in self._sites}
            return LatentDrift(torch.stack([means[kind] for kind in kinds]), formulation)
        return LatentDrift(self._mu(self._training, row.shape), formulation)

    def _draw(self, network: Denoiser, row: DrawnRow, seed: int, kinds: list[str] | None = None) -> Tensor:
        """Pictures `(N,1,S,S)`; the sites as often as among the training pictures."""
        config = self._config
        if kinds is None:
            own = few_of_each(self._training.pictures, config.images_of_a_patient).sites
            kinds = [own[index] for index in _spread(len(own), config.samples)]
        drift = self._drift_of(row, kinds)
        latents = draw_latents(network, self._contexts(kinds), seed, config.sampling_steps, drift, row.spacing)
        return self._pictures_of(latents)

    def _gaussian(self) -> Tensor:
        """Pictures of latents from a normal distribution with the training latents' mean and covariance."""
        latents = self._normal(self._training.latents)
        mean = latents.mean(0)
        random = torch_generator(0, "real-latents-gaussian")
        weights = torch.randn(self._config.samples, len(latents), generator=random) / (len(latents) - 1) ** 0.5
        return self._pictures_of(mean + torch.einsum("nk,kchw->nchw", weights, latents - mean))

    def _scans(self, name: str, side: int) -> SourcedPictures:
        return self._encoded(name, side).pictures

    def _encoded(self, name: str, side: int) -> EncodedPictures:
        """A set of pictures and its latents, from the cache where it is there."""
        key = f"_encoded_{name}_{side}"
        if key not in self.__dict__:
            file = self._benchmark.output / "latents" / f"{name}-{side}.safetensors"
            if not file.exists():
                found = self._read(name, side)
                names = {"sources": json.dumps(found.sources), "sites": json.dumps(found.sites)}
                latents = self._autoencoder.encode(found.pictures)
                write_tensors(file, {"pictures": found.pictures.contiguous(), "latents": latents}, names)
            state, metadata = read_tensors(file)
            pictures = SourcedPictures(
                state["pictures"], *(json.loads(metadata[field]) for field in ("sources", "sites"))
            )
            self.__dict__[key] = EncodedPictures(pictures, state["latents"])
        return cast(EncodedPictures, self.__dict__[key])

    def _read(self, name: str, side: int) -> SourcedPictures:
        data, config = self._benchmark.data, self._config
        if name == "radiographs":
            return radiographs(data / RADIOGRAPHS, self._benchmark.radiographs, side)
        if name == "mr":
            return mr_slices(data / VOLUMES, self._benchmark.brain, side, config.slices)
        crops = everyday_crops(side, config.base_crops if name == "base" else config.crops)
        if name == "everyday-grey":
            return crops.grey()
        if name.startswith("everyday-as-"):
            scans = self._scans(name.removeprefix("everyday-as-"), side)
            return replace(crops.grey(), pictures=match_grey_levels(crops.grey().pictures, scans.pictures))
        return crops

    @staticmethod
    def _psnr(autoencoder: TinyAutoencoder, pictures: Tensor) -> float:
        through = autoencoder.decode(autoencoder.encode(pictures))
        return float(psnr(through, pictures.expand(-1, 3, -1, -1)).mean())

    def _keep_for_figure(self, name: str, pictures: Tensor, seed: int) -> None:
        if seed != self._config.seeds[0]:
            return
        shown = torch.cat([pictures.mean(0, keepdim=True), pictures[_spread(len(pictures), SHOWN)]])
        write_tensors(self.figure_folder / f"{name}.safetensors", {"pictures": shown.contiguous()}, {})


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` indices, evenly."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()
