"""Which patients of a store are held out for the privacy audit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """How many patients of a store are trained on, and how many are held out for the privacy audit."""

    trained: int
    held_out: int

    def __str__(self) -> str:
        return f"{self.trained} patients to train on, {self.held_out} held out"


def held_out_patients(
    pseudonyms: list[str], held_out: float, independent: bool = False, former: frozenset[str] = frozenset()
) -> set[str]:
    """Pseudonyms of the patients who are held out, by keyed hashes.

    By default these are the round(`held_out` * patients) lowest hashes: the share is met to a patient, but one patient
    more or less can move another across. `former` patients are counted among them, so that a withdrawal moves nobody.
    With `independent`, a patient's side follows from the patient's hash alone: the share is met only on average, but
    the training sets of data sets that differ by one patient differ by that patient at most, as a differentially
    private study promises.
    """
    present = set(pseudonyms)
    hashes = {name: hashlib.sha256(f"held out/{name}".encode()).digest() for name in present | former}
    if independent:
        return {name for name in present if int.from_bytes(hashes[name][:8]) < held_out * 2**64}
    names = sorted(hashes, key=lambda name: hashes[name])
    return present.intersection(names[: round(held_out * len(names))])
