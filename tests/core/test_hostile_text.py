"""Configs, JSON and tables that would stop or fill a process are refused in one line."""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_client.data.table_reading import read_table
from ld_client.data_config import ColumnsConfig, DataConfig
from ld_client.deployment.audit_log import MAX_LOG_BYTES, read_log
from ld_client.deployment.audit_verify import MOST_PROBLEMS, LogOwner, verify_log
from ld_common.core.config import MAX_YAML_BYTES, load_config
from ld_common.core.errors import (
    ConfigError,
    DeploymentError,
    LdError,
    ReleaseError,
    RequestError,
    SignatureError,
    TableError,
)
from ld_common.core.strict_json import MAX_BYTES, read_json
from ld_common.core.tables import MAX_LINE, MAX_LINES, table_lines
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_common.protocol.study_config import MAX_STUDY, StudyConfig, study_from_json
from ld_common.release.release import read_manifest
from ld_common.release.trusted_keys import read_trust
from ld_generate.batch_table import read_rows

LAUGHS = b"\n".join(
    [b"a0: &a0 [lol, lol]", *[b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 10)]]
)
YAML = {
    "aliases of aliases": (LAUGHS, "with its aliases"),
    "an alias of itself": (b"name: &a [*a]", "in its own value"),
    "deep": (b"[" * 100_000, "not valid YAML"),
    "a number of many digits": (b"name: " + b"9" * 10_000, "not valid YAML"),
    "a date that is none": (b"name: 2024-13-45", "not valid YAML"),
    "large": (b"#" * (MAX_YAML_BYTES + 1), "are read"),
}


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("name", YAML)
def test_a_config_that_would_stop_its_reader_is_refused(name: str, tmp_path: Path) -> None:
    content, words = YAML[name]
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(StudyConfig, tmp_path / "study.yaml")


def test_an_honest_alias_stands_for_its_value(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("name: &words brain\noutput: *words\ntraining: {<<: {steps: 7}}\n")
    study = load_config(StudyConfig, tmp_path / "study.yaml")
    assert (study.name, study.output, study.training.steps) == ("brain", "brain", 7)


@pytest.mark.attack
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 10_000 + "]"])
def test_json_that_would_end_its_reader_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        read_json(text)
    with pytest.raises(ConfigError):
        study_from_json(text)


@pytest.mark.attack
def test_a_study_of_any_size_is_not_read() -> None:
    with pytest.raises(ConfigError, match="are read"):
        study_from_json(json.dumps({"name": "x" * MAX_STUDY}))


@pytest.mark.attack
def test_a_log_of_lines_that_are_none_is_not_read_to_its_end() -> None:
    owner = LogOwner(Ed25519PrivateKey.generate().public_key(), "aster", "brain")
    verdict = verify_log(b"{}\n" * 3 * MOST_PROBLEMS, None, owner)
    assert sum("it is not an entry" in problem for problem in verdict.problems) == MOST_PROBLEMS
    assert any("from here on were not read" in problem for problem in verdict.problems)


@pytest.mark.attack
def test_a_log_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "audit.log").touch()
    os.truncate(tmp_path / "audit.log", MAX_LOG_BYTES + 1)
    with pytest.raises(DeploymentError, match="are read"):
        read_log(tmp_path / "audit.log")


@pytest.mark.attack
@pytest.mark.parametrize(
    ("read", "kind"), [(read_manifest, ReleaseError), (lambda at: read_trust(f"{at}/manifest.json"), SignatureError)]
)
def test_a_manifest_of_any_size_is_not_read_into_memory(
    read: Callable[[Path], object], kind: type[LdError], tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_bytes(b'"' + b" " * MAX_BYTES + b'"')
    with pytest.raises(kind):
        read(tmp_path)


def _site(path: Path) -> object:
    return read_table(DataConfig(root=str(path.parent), table=str(path), columns=ColumnsConfig("patient", "date")))


def _scans(path: Path) -> object:
    return read_scan_table(path, Modality(prompt_template="a scan"), 32)


HEADS = {_site: b"patient,date\n", _scans: b"patient,input\n", read_rows: b"input,target\n"}


@pytest.mark.attack
@pytest.mark.parametrize("read", HEADS)
@pytest.mark.parametrize(
    "rows",
    [
        b"x" * (MAX_LINE + 1),
        b'"' + b"x" * 200_000,
        b",".join(b"%d" % number for number in range(200_000)),
    ],
    ids=["one line", "one cell", "many columns"],
)
def test_a_table_of_any_size_is_not_read_into_memory(
    read: Callable[[Path], object], rows: bytes, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(HEADS[read] + rows)
    with pytest.raises((TableError, RequestError), match=r"are read|field larger"):
        read(table)
    table.write_bytes(b"")
    os.truncate(table, 2**40)  # takes no space
    with pytest.raises((TableError, RequestError), match="line 1 is longer"):
        read(table)


@pytest.mark.attack
def test_a_table_of_any_number_of_rows_is_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"a,b\n" * (MAX_LINES + 1))
    with table_lines(tmp_path / "table.csv") as lines, pytest.raises(csv.Error, match="split it"):
        deque(lines, maxlen=0)
