"""A small network that tells an attribute from a picture: do generated pictures show what they were asked for?

Trained on real pictures, scored on held-out real and on generated ones; the AUC of the former is the latter's
ceiling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_common.core.errors import RequestError
from ld_common.core.seeding import derive_seed, torch_generator

WIDTHS = (16, 32, 64, 128)
GROUPS = 8
BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
MAX_SHIFT_PX = 3
MAX_BRIGHTNESS, MAX_CONTRAST = 0.15, 0.2
"""Grey levels are shifted and scaled by up to this much, so that brightness alone does not decide."""


class AttributeClassifier(nn.Module):
    """Four strided convolutions of 97,000 parameters: pictures `(N,1,S,S)` in [-1,1] -> log odds `(N,)`, or numbers."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in zip((1, *WIDTHS), WIDTHS, strict=False):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, padding_mode="replicate")
            blocks += [convolution, nn.GroupNorm(GROUPS, outputs), nn.SiLU()]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTHS[-1], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Log odds `(N,)` that the attribute is there; of a regressor, the attribute."""
        odds: Tensor = self.head(self.blocks(pictures).mean((2, 3)))[:, 0]
        return odds


def train_classifier(
    pictures: Tensor, labels: Tensor, seed: int, steps: int = 300, device: str = "cpu"
) -> AttributeClassifier:
    """Train on pictures `(N,1,S,S)` in [-1,1] and labels `(N,)` of 0 and 1; half of every batch has the attribute.

    AdamW with a cosine rate; the same seed on the same CPU gives the same weights.

    Raises:
        RequestError: the labels are all the same.
    """
    groups = _by_label(labels)
    targets = torch.arange(2).repeat_interleave(BATCH // 2).float()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = [rows[torch.randint(len(rows), (BATCH // 2,), generator=generator)] for rows in groups]
        return torch.cat(rows), targets

    return _train(pictures, draw, F.binary_cross_entropy_with_logits, seed, steps, device)


def train_regressor(
    pictures: Tensor, values: Tensor, seed: int, steps: int = 300, device: str = "cpu"
) -> AttributeClassifier:
    """Train on pictures `(N,1,S,S)` in [-1,1] and numbers `(N,)` of mean 0 and deviation 1, by squared error."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(values), (BATCH,), generator=generator)
        return rows, values[rows]

    return _train(pictures, draw, F.mse_loss, seed, steps, device)


def _train(
    pictures: Tensor,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    steps: int,
    device: str,
) -> AttributeClassifier:
    """`draw` gives a batch's rows `(B,)` and targets `(B,)`."""
    generator = torch_generator(seed, "attribute classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "attribute classifier weights"))
        model = AttributeClassifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows, targets = draw(generator)
        batch = augment(pictures[rows.to(pictures.device)].to(device), generator)
        loss = loss_of(model(batch), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture `(B,1,S,S)` shifted by up to 3 px, with brightness and contrast a little off; never flipped.

    A flip would exchange left and right, which in a patient differ.
    """
    count, _, height, width = pictures.shape
    draws = torch.rand(2, count, 1, 1, 1, generator=generator).to(pictures.device) * 2 - 1
    shifts = torch.randint(2 * MAX_SHIFT_PX + 1, (2, count, 1), generator=generator).to(pictures.device)
    padded = F.pad(pictures, (MAX_SHIFT_PX,) * 4, mode="replicate")[:, 0]
    rows = shifts[0] + torch.arange(height, device=pictures.device)  # (B,H)
    columns = shifts[1] + torch.arange(width, device=pictures.device)  # (B,W)
    which = torch.arange(count, device=pictures.device)[:, None, None]
    shifted = padded[which, rows[:, :, None], columns[:, None, :]][:, None]
    return shifted * (1 + MAX_CONTRAST * draws[0]) + MAX_BRIGHTNESS * draws[1]


def score(model: AttributeClassifier, pictures: Tensor, batch_size: int = 256) -> Tensor:
    """Log odds `(N,)` on the CPU that each of `pictures` `(N,1,S,S)` shows the attribute."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(batch.to(device)).cpu() for batch in pictures.split(batch_size)])


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a picture `(N,)` with the attribute outscores one without; ties are half.

    Of m and n pictures that scores say nothing about it is 0.5 with the standard error sqrt((m+n+1) / (12 m n)).

    Raises:
        RequestError: the labels are all the same.
    """
    without, having = (scores.cpu()[rows] for rows in _by_label(labels))
    ordered = without.sort().values.contiguous()
    below = torch.searchsorted(ordered, having.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, having.contiguous(), right=True)
    return float((below + not_above).double().mean() / (2 * len(without)))


def _by_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of the labels that are 0 and of those that are 1, on the CPU."""
    present = labels.cpu().bool()
    groups = (~present).nonzero()[:, 0], present.nonzero()[:, 0]
    if not all(map(len, groups)):
        raise RequestError(
            f"all {len(labels)} labels are the same, so nothing tells them apart: give pictures with and without"
        )
    return groups
