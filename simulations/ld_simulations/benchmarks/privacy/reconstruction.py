"""How well a malicious server reconstructs scans from the update of one round, without differential privacy.

Patients: a hospital's, half of them in the site's store and half outside, split anew for each round; the first
`tuning_patients` of the hospital tuned the attacks and are in no result. The server has public scans of the other
hospitals. A round's *gap* is the PSNR of the reconstruction to the best-matching scan of those drawn, less that to the
best-matching one of as many patients outside: an answer that knows nothing of the round has a gap of 0 on average,
because the best of more candidates would be better by chance. A mean image has a high PSNR, and no gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ld_client.audit.statistics import area_under_curve
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.seeding import derive_seed, numpy_generator, torch_generator
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.latent_drift.pictures import OTHERS, draw_pictures, encode
from ld_simulations.benchmarks.privacy.reconstruction_attacks import (
    Gradients,
    LatentPrior,
    LearnedInverse,
    gallery_scores,
    match_gradient,
    share_of_gradient,
)
from ld_simulations.benchmarks.privacy.reconstruction_plan import (
    CRAFTED,
    ReconstructionConfig,
    Request,
    passes_default_policy,
)
from ld_simulations.benchmarks.privacy.reconstruction_server import MaliciousServer
from ld_simulations.hospitals_config import HospitalsConfig

ATTACKS = ("learned inverse", "gradient matching")
TRIVIAL = ("mean of public scans", "another patient", "sample of the base")
SAMPLER, SAMPLER_STEPS = "dpm-solver++", 15


@dataclass(frozen=True, eq=False)
class Cohort:
    """Scans of one visit of each patient."""

    images: Tensor
    """`(N,1,S,S)` in [-1,1]."""
    data: TrainingData

    def rows(self, rows: Sequence[int]) -> Cohort:
        """The scans at these indices, in this order, without their pseudonyms."""
        chosen = list(rows)
        prompts = [self.data.prompts[row] for row in chosen]
        return Cohort(self.images[chosen], TrainingData(self.data.latents[chosen], prompts))


class ReconstructionRuns:
    """Attacks requests; what the server computes before a round is made once and kept."""

    def __init__(
        self,
        config: ReconstructionConfig,
        hospitals: HospitalsConfig,
        modality: Modality,
        base_model: str,
        folder: Path,
    ) -> None:
        self.config, self.hospitals, self.modality = config, hospitals, modality
        self.base_model, self.folder = base_model, folder
        self.base: BaseModel = load_base(base_model)
        first, others = hospitals.hospitals[0], hospitals.hospitals[1:]
        tuning, patients = config.tuning_patients, config.patients
        self.private = self._cohort([first], tuning + patients).rows(range(tuning, tuning + patients))
        self.public = self._cohort(others, config.public_patients)
        self.prior = LatentPrior(self.public.data.latents)
        self._prepared: dict[str, tuple[Gradients, LearnedInverse, Tensor]] = {}

    def attack(self, request: Request) -> dict[str, Any]:
        """All rounds of a request."""
        most = self.config.rounds if request.adapter == "lora" else self.config.full_rounds
        count = min(most, max(1, most // 4, self.config.visits // request.visits))
        return self._attack(request, range(count), self.config.matched_rounds)

    def confirm(self, request: Request) -> dict[str, Any]:
        """Fresh rounds of a request, all of them attacked in both ways."""
        first = self.config.rounds
        return self._attack(
            request, range(first, first + self.config.confirmed_rounds), first + self.config.confirmed_rounds
        )

    def _attack(self, request: Request, numbers: range, matched_rounds: int) -> dict[str, Any]:
        server = MaliciousServer(request, self.base_model)
        gradients, inverse, gallery = self._prepare(server)
        gated = request.weights == CRAFTED and request.visits > 1
        blocked = gradients.blocked_gradient(self.public.data) if gated else None
        rounds = [
            self._round(server, gradients, inverse, gallery, blocked, number, number < matched_rounds)
            for number in numbers
        ]
        best = max(rounds, key=gap)
        answer = best["answers"][best_attack(best)]
        shown = [self.private.images[answer["right"]], best["picture"], self.private.images[answer["other"]]]
        write_tensors(picture_file(self.folder, request), {"pictures": torch.cat(shown)}, {})
        return {
            "request": asdict(request),
            "moved": server.moved,
            "rounds": [{key: value for key, value in row.items() if key != "picture"} for row in rounds],
        }

    def _round(
        self,
        server: MaliciousServer,
        gradients: Gradients,
        inverse: LearnedInverse,
        gallery: Tensor,
        blocked: Tensor | None,
        number: int,
        match: bool,
    ) -> dict[str, Any]:
        request, seed = server.request, derive_seed(number, "reconstruction", server.request.name)
        order = numpy_generator(seed, "split").permutation(len(self.private.images)).tolist()
        half = len(order) // 2
        store, outside = order[:half], order[half:]
        sent = server.round(self.private.rows(store).data, f"the site's own key {seed}".encode())
        drawn = [store[row] for row in sent.rows]
        others = outside[: len(drawn)]
        observed = F.normalize(server.gradient(sent.update), dim=0)
        seen = observed[gradients.chosen]
        if request.visits > 1:
            seen = share_of_gradient(seen, inverse.centre, blocked)
        start = inverse(seen)
        answers = {ATTACKS[0]: start}
        crafted = request.weights == CRAFTED and passes_default_policy(request)
        matched = request.visits == 1 or (crafted and request.visits <= self.config.matched_visits)
        if matched and match:
            answers[ATTACKS[1]] = match_gradient(gradients, self.prior, seen, start, self.config.evaluations)
        latents = {name: answer.view(1, *self.base.latent_shape) for name, answer in answers.items()}
        pictures = {name: self.base.decode(latent) for name, latent in latents.items()}
        pictures |= self._trivial(seed)
        scores = gallery_scores(seen, gallery)
        members, strangers = scores[drawn].tolist(), scores[others].tolist()
        judged = {name: self._judge(picture, drawn, others) for name, picture in pictures.items()}
        return {
            "drawn": len(drawn),
            "answers": judged,
            "picture": pictures[best_attack({"answers": judged})][0],
            "gallery_auc": area_under_curve(members, strangers).value if len(drawn) > 1 else None,
            "gallery_names_a_member": max(members) > max(strangers),
        }

    def _judge(self, picture: Tensor, drawn: Sequence[int], others: Sequence[int]) -> dict[str, Any]:
        errors = (self.private.images - picture).square().mean((1, 2, 3))
        psnr = 10 * torch.log10(4 / errors)
        return {
            "right_db": float(psnr[list(drawn)].max()),
            "other_db": float(psnr[list(others)].max()),
            "right": drawn[int(psnr[list(drawn)].argmax())],
            "other": others[int(psnr[list(others)].argmax())],
        }

    def _trivial(self, seed: int) -> dict[str, Tensor]:
        row = int(numpy_generator(seed, "another").integers(len(self.public.images)))
        noise = torch.randn((1, *self.base.latent_shape), generator=torch_generator(seed, "sample"))
        sampler = make_sampler(self.base.scheduler, SAMPLER, SAMPLER_STEPS)
        with torch.no_grad():
            drawn = sample(self.base, self.base.embed([self.public.data.prompts[row]]), noise, sampler, None, 1)
        pictures = self.base.decode(self.prior.mean.view(1, *self.base.latent_shape)), self.public.images[[row]]
        return dict(zip(TRIVIAL, (*pictures, self.base.decode(drawn)), strict=True))

    def _prepare(self, server: MaliciousServer) -> tuple[Gradients, LearnedInverse, Tensor]:
        """Gradients, inverse and the candidates' gradients, which all requests at the same weights share."""
        request = server.request
        alone = request.visits == 1
        key = "-".join(map(str, (request.weights, request.adapter, request.rank, request.gate, request.blocks, alone)))
        prompts = [*self.private.data.prompts, *self.public.data.prompts]
        gradients = Gradients(server, prompts, derive_seed(0, "reconstruction", key))
        if key not in self._prepared:
            file = self.folder / f"gradients-{key}.safetensors"
            if not file.exists():
                public = gradients.features(self.public.data, self.config.draws)
                gallery = gradients.features(self.private.data, self.config.draws)
                write_tensors(file, {"public": public.half(), "gallery": gallery.half()}, {})
            kept = {name: value.float() for name, value in read_tensors(file)[0].items()}
            inverse = LearnedInverse.fit(kept["public"], self.public.data.latents)
            self._prepared = {key: (gradients, inverse, kept["gallery"])}
        _, inverse, gallery = self._prepared[key]
        return gradients, inverse, gallery

    def _cohort(self, hospitals: Sequence[Any], count: int) -> Cohort:
        config = replace(self.hospitals, hospitals=list(hospitals))
        folder, side = self.folder / "pictures", self.base.resolution
        pictures = draw_pictures(config, self.modality, side, count, OTHERS, 1, folder)
        prompts = [self.modality.prompt(attributes) for attributes in pictures.attributes]
        return Cohort(pictures.images, TrainingData(encode(self.base, pictures.images), prompts))


def best_attack(row: Mapping[str, Any]) -> str:
    """The attack of a round whose answer has the largest gap."""
    return max((name for name in ATTACKS if name in row["answers"]), key=lambda name: gap(row, name))


def gap(row: Mapping[str, Any], attack: str = "") -> float:
    """Gap of a round's answer in dB; by default of its best attack."""
    answer = row["answers"][attack or best_attack(row)]
    return float(answer["right_db"] - answer["other_db"])


def picture_file(folder: Path, request: Request) -> Path:
    """File of the pictures `(3,S,S)` of a request's best round: right scan, reconstruction, best-matching outside."""
    return folder / "best" / f"{request.name}.safetensors"


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean, by bootstrap over rounds."""
    random = np.random.default_rng(seed)
    means = random.choice(np.asarray(values), (draws, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
