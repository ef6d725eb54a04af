"""What a site keeps of cohort surveys: a key until it has answered, then the answer, so that there is one only.

Two answers to one survey, with other keys or other data, would show by their difference who came or went. Each survey
is one file in `surveys/` beside the ledger, readable by its owner only. The answer takes the place of the private key
in one step, before it leaves: whoever steals the file later cannot unmask what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ld_client.site_config import SiteConfig
from ld_common.core.atomic_files import held, write_bytes
from ld_common.core.errors import ConfigError, StoreError
from ld_common.core.strict_json import read_json, read_limited
from ld_common.protocol.survey import CohortSurvey, SurveyAnswer, answer_of, file_bytes

SURVEYS = "surveys"
"""Folder beside the ledger."""
LOCK = "lock"
KEY, RECORD = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class SurveyRecord:
    """A survey that this site has joined."""

    survey: str
    """Digest, hex."""
    public_key: str
    private_key: str
    """Hex; empty since the answer."""
    counts: str = ""
    """SHA-256 of the rounded numbers of the answer, hex."""
    answered: str = ""
    """Time; UTC, ISO 8601."""
    answer: dict[str, Any] | None = None
    """Content of the answer's file."""

    def key(self) -> X25519PrivateKey:
        """The private key; raises `StoreError` after the answer, or where it is damaged."""
        if not KEY.fullmatch(self.private_key):
            raise StoreError("this site's key for the survey is gone: join a new survey")
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(self.private_key))
        if key.public_key().public_bytes_raw().hex() != self.public_key:
            raise StoreError("this site's key for the survey is damaged: join a new survey")
        return key

    def with_answer(self, answer: SurveyAnswer, counts: str) -> SurveyRecord:
        """The record once the site has answered, without its private key."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(self, private_key="", counts=counts, answered=now, answer=answer.content())

    def sent(self) -> SurveyAnswer:
        """The answer; raises `StoreError` where there is none."""
        try:
            content = {name: value for name, value in (self.answer or {}).items() if name not in ("kind", "version")}
            return answer_of(content)
        except (ConfigError, ValueError) as error:
            raise StoreError(
                f"this site's record of its answer is damaged ({error}): restore it from a backup"
            ) from error


class SurveyRecords:
    """The records of one data set."""

    def __init__(self, site: SiteConfig) -> None:
        self.folder = site.ledger_path.parent / SURVEYS

    def file(self, survey: CohortSurvey) -> Path:
        """The file of one survey's record."""
        return self.folder / f"{survey.id}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from joining or answering; raises `StoreError` while one does."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        with held(self.folder / LOCK, StoreError("another ld-client survey is at work here: wait until it ends")):
            yield

    def load(self, survey: CohortSurvey) -> SurveyRecord | None:
        """The record of a survey, or None; raises `StoreError`."""
        path = self.file(survey)
        if not path.exists():
            return None
        record = _read(path)
        if record.survey != survey.digest():
            raise StoreError(
                f"'{path}' is of other questions with the same id: refuse this survey, and ask for a new one"
            )
        return record

    def save(self, survey: CohortSurvey, record: SurveyRecord) -> None:
        """Write a record, mode 0600; raises `CheckpointError`."""
        write_bytes(self.file(survey), file_bytes(asdict(record)), mode=0o600)

    def join(self, survey: CohortSurvey) -> SurveyRecord:
        """The record of a survey, made with a new key where there is none; raises `StoreError` or `CheckpointError`."""
        record = self.load(survey)
        if record is None:
            key = X25519PrivateKey.generate()
            public, private = key.public_key().public_bytes_raw().hex(), key.private_bytes_raw().hex()
            record = SurveyRecord(survey.digest(), public, private)
            self.save(survey, record)
        return record

    def answered_others(self, survey: CohortSurvey) -> list[str]:
        """Times at which this site answered other surveys, ascending; raises `StoreError`."""
        files = [path for path in self.folder.glob("*.json") if RECORD.fullmatch(path.stem)]
        others = [_read(path) for path in files if path != self.file(survey)]
        return sorted(record.answered for record in others if record.answer is not None)


def _read(path: Path) -> SurveyRecord:
    damaged = StoreError(f"the record of a survey '{path}' cannot be read: restore it from a backup")
    try:
        content, mode = read_json(read_limited(path)), path.stat().st_mode & 0o777
        record = SurveyRecord(**content)
    except (OSError, ValueError, TypeError) as error:
        raise damaged from error
    if mode & 0o077:
        raise StoreError(f"others may read '{path}' (mode {mode:o}), which holds a key: run chmod 600 on it")
    texts = (record.survey, record.public_key, record.private_key, record.counts, record.answered)
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.answer, dict | None):
        raise damaged
    return record
