"""Recognises files and table rows of patients who withdrew consent while a site is indexed; they are only counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ld_client.data.pseudonyms import pseudonym
from ld_client.data.withdrawals import withdrawn


@dataclass
class WithdrawnScans:
    """Counts what an index passes over; it keeps no name."""

    key: bytes
    pseudonyms: frozenset[str]
    files: int = 0
    rows: int = 0

    @classmethod
    def of(cls, store: Path, key: bytes) -> WithdrawnScans:
        """For the withdrawals of a store; raises `StoreError`."""
        return cls(key, withdrawn(store))

    def is_withdrawn(self, patient: str) -> bool:
        """Whether a patient of the table or of a header withdrew consent."""
        return bool(self.pseudonyms) and bool(patient) and pseudonym(self.key, patient) in self.pseudonyms

    def take_file(self, patient: str, name: str) -> bool:
        """Count a file if it is a withdrawn patient's, and return whether it is.

        Args:
            patient: its patient by the table or its header; empty where neither says.
            name: its path relative to the data's root. Where `patient` is empty, a folder or file that is called like a
                withdrawn patient makes it the patient's.
        """
        if not self.pseudonyms:
            return False
        parts = PurePosixPath(name).parts
        candidates = [patient] if patient else [*parts, *(part.split(".")[0] for part in parts[-1:])]
        taken = any(map(self.is_withdrawn, candidates))
        self.files += taken
        return taken

    def take_row(self, patient: str) -> bool:
        """Count a table row if it is a withdrawn patient's, and return whether it is."""
        taken = self.is_withdrawn(patient)
        self.rows += taken
        return taken
