"""`rounds.csv`: one line a round and site, for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_common.protocol.study_config import StudyConfig
from ld_server.round_log import RoundRecord
from ld_server.tracking.base import Tracker

ROUNDS_CSV = "rounds.csv"
COLUMNS = (
    "round",
    "site",
    "ended",
    "round_seconds",
    "round_counted",
    "round_failure",
    "left_out",
    "visits",
    "patients",
    "loss_first",
    "loss_last",
    "update_norm",
    "clipped",
    "uplink_bytes",
    "seconds",
    "validation_loss",
    "validation_visits",
    "validation_pairs",
    "validation_followup_gain_db",
    "validation_same_for_all_gain_db",
    "not_validated",
)
"""The same in every run; a cell is empty where the study withholds the number."""
_SCORES = ("loss", "visits", "pairs", "followup_gain_db", "same_for_all_gain_db")
_OF_THE_ENTRY = ("visits", "patients", "loss_first", "loss_last", "update_norm", "clipped", "uplink_bytes", "seconds")


class RoundsCsv(Tracker):
    """Replaces the file after each round, so it is whole whenever it is read."""

    name = "csv"

    def __init__(self, study: StudyConfig, output: Path) -> None:
        super().__init__(study, output)
        self._records: list[RoundRecord] = []

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Write the rounds so far."""
        self._records = list(records)
        self._write()

    def add(self, record: RoundRecord) -> None:
        """Write all rounds with the new one."""
        self._records.append(record)
        self._write()

    def end(self, failed: bool) -> None:
        """Nothing: the file is complete."""

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in self._records:
            writer.writerows(_rows(record, self.study.federation.sites))
        write_bytes(self.output / ROUNDS_CSV, text.getvalue().encode())


def _rows(record: RoundRecord, sites: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A round's lines, in the order of the sites' names."""
    for site in sorted({*sites, *record.sites, *record.left_out}):
        entry, scores = record.sites.get(site, {}), record.validation.get(site, {})
        yield {
            "round": record.round,
            "site": site,
            "ended": record.ended,
            "round_seconds": round(record.seconds, 3),
            "round_counted": int(record.counted),
            "round_failure": record.failure,
            "left_out": record.left_out.get(site, ""),
            **{key: _cell(entry.get(key)) for key in _OF_THE_ENTRY},
            **{f"validation_{name}": _cell(scores.get(name)) for name in _SCORES},
            "not_validated": record.not_validated.get(site, ""),
        }


def _cell(value: Any) -> Any:
    """A value as a cell: yes and no as 1 and 0, nothing for None."""
    if value is None:
        return ""
    return int(value) if isinstance(value, bool) else value
