"""Every reader of tables follows the rules of `ld_common.core.tables`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ld_client.data.exclusions import Reason
from ld_client.data.table_reading import read_table
from ld_client.data_config import ColumnsConfig, DataConfig
from ld_common.core.errors import ConfigError, LdError, RequestError, TableError
from ld_common.core.tables import decimal_point, is_encoding, open_table
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_generate.batch_table import read_rows
from ld_generate.web.scans import EXAMPLES_TABLE, find_examples
from tests.conftest import write_mr_slice


def cells(path: Path, content: str | bytes, encoding: str = "") -> list[list[str]]:
    """Header and rows of a table with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with open_table(path, encoding=encoding) as opened:
        return [opened.header, *(list(row.cells.values()) for row in opened.rows)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_that_of_the_header(separator: str, table: Path) -> None:
    lines = ["patient,age,note", "A,70,x", "B,71,y"]
    content = "\r\n".join(line.replace(",", separator) for line in lines)
    assert cells(table, content) == [line.split(",") for line in lines]


def test_a_separator_inside_of_names_and_cells_separates_nothing(table: Path) -> None:
    assert cells(table, '"age, years";sex\n70,5;F\n') == [["age, years", "sex"], ["70,5", "F"]]
    assert cells(table, "id;age, in years;sex\n1;70;F\n2;71;M\n")[1] == ["1", "70", "F"]
    assert cells(table, 'input,target\na.dcm,"age=80;sex=M"\nb.dcm,age=80;sex=M\n')[2] == ["b.dcm", "age=80;sex=M"]
    assert cells(table, "participant_id\nsub-01\n") == [["participant_id"], ["sub-01"]]


def test_the_line_that_tells_excel_the_separator_is_no_header(table: Path) -> None:
    assert cells(table, "sep=;\r\na;b\r\n1;2\r\n") == [["a", "b"], ["1", "2"]]


def test_empty_rows_and_trailing_separators_say_nothing(table: Path) -> None:
    assert cells(table, "a,b,\n1,2,\n\n , ,\n3\n") == [["a", "b"], ["1", "2"], ["3", ""]]
    with open_table(table) as opened:
        assert [(row.number, row.problem(["a", "b"])) for row in opened.rows] == [(2, ""), (5, "")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_unicode_with_or_without_a_mark(encoding: str, table: Path) -> None:
    assert cells(table, "naïve,größe\nÄ,170\n".encode(encoding)) == [["naïve", "größe"], ["Ä", "170"]]


def test_another_encoding_is_named_and_never_guessed(table: Path) -> None:
    content = "patient;Größe;note\nMüller;170;x\nMeier;180;schön\n".encode("windows-1252")
    assert cells(table, content, "windows-1252")[1] == ["Müller", "170", "x"]
    with pytest.raises(TableError, match="UTF-8"):
        cells(table, content, "utf-8")
    table.write_bytes(content)
    with open_table(table) as opened:
        assert not opened.is_utf_8
        rows = list(opened.rows)
    assert "not UTF-8" in rows[0].problem(["patient"])
    assert rows[1].problem(["patient"]) == ""  # what nobody reads harms nobody
    assert "'note'" in rows[1].problem(["patient", "note"])


def test_encodings_that_python_knows_and_that_extend_ascii_are_known() -> None:
    assert all(map(is_encoding, ["windows-1252", "latin-1", "cp1251", "gb18030", "shift_jis", "utf-8"]))
    assert not any(map(is_encoding, ["utf-16", "utf-7", "rot13", "base64", "punycode", "idna", "unicode_escape", "x"]))


@pytest.mark.parametrize(
    ("cell", "separator", "number"),
    [
        ("74,5", ";", "74.5"),
        ("-0,25", "\t", "-0.25"),
        ("1,234", ";", "1.234"),
        ("1,234", "\t", "1,234"),  # a thousand, or little more than one
        ("0,234", "|", "0.234"),
        ("74,5", ",", "74.5"),  # in quotes, else these were two cells
        ("1,234", ",", "1,234"),
        ("1.234,5", ";", "1.234,5"),
        ("a,5", ";", "a,5"),
        ("74.5", ";", "74.5"),
    ],
)
def test_a_decimal_comma_is_one_where_the_comma_separates_no_cells(cell: str, separator: str, number: str) -> None:
    assert decimal_point(cell, separator) == number


def _archive(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x" * 100)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.xlsx", b"", "an Excel workbook: save it as CSV"),
        ("t.XLS", b"\0\1", "an Excel workbook"),
        ("t.xls", b"<html><table><tr><td>a</td></tr></table>", "an HTML or XML page: save it as CSV"),
        ("t.csv", b"PAR1" + bytes(60) + b"PAR1", "a Parquet file: export it as CSV"),
        ("t.csv", b"SQLite format 3\0", "an SQLite database"),
        ("t.ods", b"", "an OpenDocument spreadsheet: save it as CSV"),
        ("t.csv", b"PK\x03\x04" + bytes(40), "an Excel workbook: save it as CSV, or unpack it if it is a zip archive"),
        ("t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook"),
        ("t.csv", b"\x1f\x8b\x08\x00rest", "compressed by gzip: unpack it"),
        ("t.csv", b"\n<HTML><table>", "an HTML or XML page"),
        ("t.csv", b"$FL2@(#) SPSS", "an SPSS file"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), "NUL characters: save it as UTF-8"),
        ("t.csv", b'a,b\n1,2\n"3,4\n5,6\n', "the row that begins in line 3"),
    ],
)
def test_a_file_that_is_no_table_is_called_what_it_is(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=words), open_table(tmp_path / name) as opened:
        list(opened.rows)


def test_workbooks_are_told_by_what_is_in_them(table: Path, tmp_path: Path) -> None:
    for inside, words in (
        ("[Content_Types].xml", "an Excel workbook: save it as CSV$"),
        ("visits.csv", ": a zip archive: unpack it$"),
        ("mimetype", ": a zip archive: unpack it$"),
    ):
        table.write_bytes(_archive(tmp_path / "a.zip", inside))
        with pytest.raises(TableError, match=words), open_table(table):
            pass
    assert cells(table, "PK,name\n1,a\n")[0] == ["PK", "name"]  # a text that only begins so


def test_a_text_that_is_named_as_an_old_workbook_is_read(tmp_path: Path) -> None:
    (tmp_path / "export.xls").write_text("a\tb\n1\t2\n")
    with open_table(tmp_path / "export.xls") as opened:
        assert [row.cells for row in opened.rows] == [{"a": "1", "b": "2"}]


def test_a_column_that_is_read_may_occur_once(table: Path) -> None:
    table.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(RequestError, match="'a' more than once"), open_table(table, RequestError, columns=["a"]):
        pass
    with open_table(table, columns=["b"]) as opened:
        assert opened.twice(["a", "b"]) == ["a"]


HEAD = "input{0}patient{0}age{0}sex{0}diagnosis"


def site(path: Path, modality: Modality) -> object:
    attributes = {name: name for name in modality.attributes}
    columns = ColumnsConfig(date="", file="input", attributes=attributes)
    (row,) = read_table(DataConfig(root=str(path.parent), table=str(path), columns=columns)).rows()
    return float(row.cells["age"])


def scans(path: Path, modality: Modality) -> object:
    return read_scan_table(path, modality, 16).attributes[0]["age"]


def examples(path: Path, modality: Modality) -> object:
    (example,) = find_examples(path.rename(path.with_name(EXAMPLES_TABLE)).parent, modality).values()
    return example.attributes["age"]


@pytest.mark.parametrize("read", [site, scans, examples])
@pytest.mark.parametrize(("separator", "age"), [(";", "74,5"), ("\t", "74,5"), (",", "74.5"), ("|", '"74.5"')])
def test_every_reader_knows_separators_and_decimal_commas(
    read: Callable[[Path, Modality], object], separator: str, age: str, brain_mri: Modality, table: Path
) -> None:
    write_mr_slice(table.parent / "one/a.dcm", np.eye(24, dtype=np.uint16), PatientSex="F")
    line = separator.join(["one", "P1", age, "F", "CN"])
    table.write_bytes(f"{HEAD.format(separator)}\r\n{line}\r\n".encode("utf-16" if separator == "\t" else "utf-8-sig"))
    assert read(table, brain_mri) == 74.5


def batch(path: Path, modality: Modality) -> None:
    path.write_text(path.read_text().replace("age,sex,diagnosis", "target,source,slice"))
    for row in read_rows(path):
        row.check()


def indexed(path: Path, modality: Modality) -> None:
    columns = ColumnsConfig(date="", file="input", attributes={"age": "age"})
    (exclusion,) = read_table(DataConfig(root=str(path.parent), table=str(path), columns=columns)).exclusions
    assert (exclusion.name, exclusion.files, exclusion.reason) == ("row 2", 0, Reason.BROKEN_ROW)
    raise TableError(exclusion.detail)


@pytest.mark.parametrize(
    ("read", "kind"), [(indexed, TableError), (scans, RequestError), (examples, ConfigError), (batch, RequestError)]
)
def test_every_reader_refuses_a_row_with_more_cells_than_columns(
    read: Callable[[Path, Modality], object], kind: type[LdError], brain_mri: Modality, table: Path
) -> None:
    write_mr_slice(table.parent / "one/a.dcm", np.eye(24, dtype=np.uint16))
    table.write_text(f"{HEAD.format(',')}\na.dcm,P1,74,5,F,CN\n")
    with pytest.raises(kind, match="more cells than columns: put quotes"):
        read(table, brain_mri)


@pytest.mark.parametrize("read", [site, scans, examples, lambda path, _: read_rows(path)])
def test_every_reader_calls_a_workbook_one(
    read: Callable[[Path, Modality], object], brain_mri: Modality, table: Path
) -> None:
    write_mr_slice(table.parent / "one/a.dcm", np.eye(24, dtype=np.uint16))
    table.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(LdError, match="an Excel workbook: save it as CSV"):
        read(table, brain_mri)


def test_a_batch_names_the_row_whose_bytes_are_no_utf_8(table: Path) -> None:
    table.write_bytes(b"input,target\nM\xfcller.dcm,age=80\nb.dcm,age=80\n")
    first, second = read_rows(table)
    assert first.input.encode()  # can be written to batch.csv
    with pytest.raises(RequestError, match=r"'input' has characters that are not UTF-8"):
        first.check()
    second.check()
