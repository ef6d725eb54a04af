"""The table of visits in each form that it is handed over in."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_client.data.exclusions import Reason
from ld_client.data.table_reading import read_table
from ld_client.data_config import ColumnsConfig, DataConfig
from ld_common.core.errors import RequestError, TableError
from ld_common.imaging.modality import Modality

ROWS = (("patient", "date", "age", "note"), ("Müller", "2020-01-31", "74.5", "a"), ("Petit", "2020-02-01", "81", "b"))
ENCODING = "data.encoding: windows-1252"
CELLS = ("Müller", "74.5")
"""Of the first row; a table is read if they come out right."""


@dataclass(frozen=True)
class TableSample:
    """One row of the page's list of tables."""

    name: str
    ending: str
    write: Callable[[], bytes]
    setting: str = ""
    """What the site's YAML file must say for it."""


def table_samples() -> list[TableSample]:
    """One sample for each form."""
    comma, cp1252 = _text(","), "windows-1252"
    return [
        TableSample("Commas, UTF-8", ".csv", lambda: comma.encode()),
        TableSample("Commas, UTF-8 with a byte order mark", ".csv", lambda: comma.encode("utf-8-sig")),
        TableSample("Semicolons and decimal commas", ".csv", lambda: _text(";", decimal=",").encode()),
        TableSample("Semicolons, with Excel's line sep=;", ".csv", lambda: b"sep=;\n" + _text(";").encode()),
        TableSample("Tabs", ".tsv", lambda: _text("\t").encode()),
        TableSample("Bars", ".txt", lambda: _text("|").encode()),
        TableSample("Commas, quoted decimal commas", ".csv", lambda: comma.replace("74.5", '"74,5"').encode()),
        TableSample("Unicode text of Excel (UTF-16, tabs)", ".txt", lambda: _text("\t").encode("utf-16")),
        TableSample("Windows-1252, named in the site's file", ".csv", lambda: comma.encode(cp1252), ENCODING),
        TableSample("Windows-1252, not named", ".csv", lambda: comma.encode(cp1252)),
        TableSample("Commas, decimal commas without quotes", ".csv", lambda: comma.replace("74.5", "74,5").encode()),
        TableSample("Excel workbook", ".xlsx", _workbook),
        TableSample("Excel workbook before 2007", ".xls", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)),
        TableSample("OpenDocument spreadsheet", ".ods", lambda: _archive({"mimetype": "application/vnd.oasis"})),
        TableSample("HTML named as a workbook", ".xls", lambda: b"<html><table><tr><td>patient</td></tr></table>"),
        TableSample("CSV, compressed", ".csv.gz", lambda: gzip.compress(comma.encode())),
        TableSample("CSV in a zip archive", ".zip", lambda: _archive({"visits.csv": comma})),
        TableSample("SPSS", ".sav", lambda: b"$FL2@(#) SPSS DATA FILE" + bytes(200)),
        TableSample("Parquet", ".parquet", lambda: b"PAR1" + bytes(64) + b"PAR1"),
    ]


def try_table(sample: TableSample, folder: Path, modality: Modality) -> dict[str, Any]:
    """Write the table into a folder and read it and the ages in it; returns the row of the page."""
    path = folder / f"visits{sample.ending}"
    path.write_bytes(sample.write())
    encoding = sample.setting.partition(": ")[2]
    columns = ColumnsConfig(attributes={"age": "age"})
    said, read = "", False
    try:
        table = read_table(DataConfig(root=str(folder), table=str(path), encoding=encoding, columns=columns))
        first = table.rows()[0] if table.rows() else None
        read = len(table.rows()) == len(ROWS) - 1 and first is not None and (first.patient, first.cells["age"]) == CELLS
        said = "; ".join(f"{one.name}: {one.reason.value}: {one.detail}" for one in table.exclusions)
        for row in table.rows():
            modality.parse("age", row.cells["age"])
        if not read and not said:
            said = f"WRONG: the rows are {[(row.patient, row.cells) for row in table.rows()]}"
    except RequestError as error:
        said = f"{Reason.UNKNOWN_VALUE.value}: {error}"
    except TableError as error:
        said = str(error).replace(str(path), path.name)
    shown = sample.setting if read and not said else said
    return {"group": "tables", "name": sample.name, "detail": sample.ending, "read": read, "said": shown}


def _text(separator: str, decimal: str = ".") -> str:
    return "".join(separator.join(cell.replace(".", decimal) for cell in row) + "\n" for row in ROWS)


def _archive(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _workbook() -> bytes:
    """The smallest workbook that spreadsheet programs open."""
    office = "http://schemas.openxmlformats.org"
    main, package = f"{office}/spreadsheetml/2006/main", f"{office}/package/2006"
    related = f"{office}/officeDocument/2006/relationships"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    cells = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' for cell in row) + "</row>" for row in ROWS
    )
    return _archive(
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
            f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r1" Type="{related}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
            "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{related}">'
            '<sheets><sheet name="visits" sheetId="1" r:id="r1"/></sheets></workbook>',
            "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r1" Type="{related}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
            "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
        }
    )
