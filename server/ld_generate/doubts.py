"""Refusals of `--strict`: attributes that the sites did not have, and scans unlike theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes
from ld_common.release.release import Release
from ld_generate.samples import extrapolated


def refuse_doubts(release: Release, path: Path, attributes: Sequence[Attributes], further: Sequence[str]) -> None:
    """Raise `RequestError` with all that speaks against an answer.

    Args:
        release: the release.
        path: of the scan, for the message.
        attributes: those of the scan, and the changed ones of each target.
        further: reasons beside attributes out of range.
    """
    doubts = list(dict.fromkeys([*extrapolated(release, attributes), *further]))
    if doubts:
        raise RequestError(f"--strict refuses '{path}': {'; '.join(doubts)}")
