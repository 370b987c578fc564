"""Events and items out of CSV, Parquet and JSON lines: a row, or a batch of rows, in memory.

Every row becomes what it says or an error that names file, row and column. Rows count from 1,
headers apart.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from features.catalogue import NAME_CHARS_MAX, Item
from features.events import Event
from streams.columns import (
    EVENT_FIELDS,
    EVENT_FIELDS_REQUIRED,
    ITEM_FIELDS,
    ITEM_FIELDS_REQUIRED,
    JOINED_FIELDS,
    ColumnMapping,
    field_converters,
    is_empty,
    resolve,
    to_bool,
    to_categories,
    to_id,
    to_text,
)
from streams.errors import MappingError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import BinaryIO

    from streams.columns import Converter

STDIN: Final = "-"
FORMATS: Final = ("csv", "parquet", "jsonl")
_FORMAT_OF: Final = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
# Rows of a Parquet file in memory at once.
BATCH_ROWS: Final = 16_384
# A longer line is no row but a file without line ends: reading stops there. CSV cells have the
# csv module's own limit, 128 KiB.
LINE_BYTES_MAX: Final = 1_048_576
# 64 bits of the file's hash: a billion files have one chance in forty of any two alike.
FILE_HASH_CHARS: Final = 16
_HASH_BLOCK_BYTES: Final = 1 << 20

Row = dict[str, Any]


class _Rows(NamedTuple):
    """A file's columns, None where each row brings its own, and its rows."""

    columns: tuple[str, ...] | None
    rows: Iterator[Row]


class _Cell(NamedTuple):
    """One field of a row: where it stands and how it is read."""

    name: str
    column: str
    convert: Converter
    required: bool


def read_events(
    path: Path | str, *, mapping: ColumnMapping | None = None, file_format: str | None = None
) -> Iterator[Event]:
    """Yield the events of a file, or of standard input for "-", in its order.

    Without a column for it, event_id is "HASH:ROW", the first 16 hex digits of the file's SHA-256
    and the row: loading a file twice changes nothing. Standard input has a random HASH instead.

    Args:
        path: a file or "-".
        mapping: columns and constants; by default every field has the column of its name.
        file_format: csv, parquet or jsonl; by the file's ending if left out.

    Raises:
        MappingError: naming file, row and column.
    """
    mapping = mapping or ColumnMapping()
    converters = field_converters(mapping.time_unit)
    with _opened(path, file_format) as source:
        cells = _cells(source, mapping, converters, str(path), EVENT_FIELDS, EVENT_FIELDS_REQUIRED)
        fixed = _constants(mapping, converters)
        prefix = file_prefix(path)
        for number, row in enumerate(source.rows, start=1):
            values = _values(row, cells, f"{path}, row {number}")
            yield Event(**{"event_id": f"{prefix}:{number}", **fixed, **values})


def read_items(
    path: Path | str, *, mapping: ColumnMapping | None = None, file_format: str | None = None
) -> Iterator[Item]:
    """Yield the items of a file; arguments as for `read_events`.

    Fields: item_id; name (several columns as A+B, joined by a space); categories (likewise, or one
    column with "a|b"); available (true/false). An id that is no number is hashed, and kept as the
    item's original_id.

    Raises:
        MappingError: naming file, row and column.
    """
    mapping = mapping or ColumnMapping()
    converters: dict[str, Converter] = {
        "item_id": lambda cell: (to_id(cell), to_text(cell)),
        "name": _to_name,
        "categories": lambda cell: to_categories([cell]),
        "available": to_bool,
    }
    with _opened(path, file_format) as source:
        cells = _cells(source, mapping, converters, str(path), ITEM_FIELDS, ITEM_FIELDS_REQUIRED)
        single = [cell for cell in cells if cell.name not in JOINED_FIELDS]
        joined = [cell for cell in cells if cell.name in JOINED_FIELDS]
        fixed = _constants(mapping, converters)
        for number, row in enumerate(source.rows, start=1):
            place = f"{path}, row {number}"
            values = fixed | _values(row, single, place) | _joined(row, joined, place)
            item_id, text = values.pop("item_id")
            yield Item(
                item_id=item_id, original_id=None if text == str(item_id) else text, **values
            )


def file_prefix(path: Path | str) -> str:
    """Return what event_ids of this file begin with; for standard input, one of this call's own."""
    if str(path) == STDIN:
        return uuid.uuid4().hex[:FILE_HASH_CHARS]
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()[:FILE_HASH_CHARS]


def count_rows(path: Path | str, *, file_format: str | None = None) -> int | None:
    """Return how many rows a file has where that is cheap to know (Parquet), for a bar's total."""
    if str(path) != STDIN and _format_of(path, file_format) == "parquet":
        with _opened(path, file_format), pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    return None


def _cells(
    source: _Rows,
    mapping: ColumnMapping,
    converters: dict[str, Converter],
    name_of_source: str,
    fields: Collection[str],
    required: Collection[str],
) -> list[_Cell]:
    resolved = resolve(
        mapping,
        fields=fields,
        required=required,
        columns=source.columns,
        source=name_of_source,
    )
    return [
        _Cell(name, column, converters[name], name in required)
        for name, columns in resolved.items()
        for column in columns
    ]


def _constants(mapping: ColumnMapping, converters: dict[str, Converter]) -> dict[str, Any]:
    fixed: dict[str, Any] = {}
    for name, text in mapping.constants.items():
        try:
            fixed[name] = converters[name](text)
        except ValueError as error:
            raise MappingError(f"--const {name}={text}: {error}") from error
    return fixed


def _values(row: Row, cells: list[_Cell], place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, column, convert, required in cells:
        cell = row.get(column)
        if is_empty(cell):
            if required:
                raise MappingError(f"{place}, column {column!r}: {name} is empty.")
            continue
        try:
            values[name] = convert(cell)
        except ValueError as error:
            raise MappingError(f"{place}, column {column!r} ({name}): {error}.") from error
    return values


def _joined(row: Row, cells: list[_Cell], place: str) -> dict[str, Any]:
    """Return an item's name and categories, each out of one column or more."""
    found: dict[str, list[object]] = {}
    for cell in cells:
        found.setdefault(cell.name, [])
        if not is_empty(row.get(cell.column)):
            found[cell.name].append(row.get(cell.column))
    values: dict[str, Any] = {}
    if "categories" in found:
        values["categories"] = to_categories(found["categories"])
    if "name" in found:
        columns = [cell.column for cell in cells if cell.name == "name"]
        try:
            values["name"] = _to_name(" ".join(map(to_text, found["name"])))
        except ValueError as error:
            raise MappingError(f"{place}, column {'+'.join(columns)!r} (name): {error}.") from error
    return values


def _to_name(cell: object) -> str:
    name = to_text(cell).strip()
    if not name:
        raise ValueError("it is empty")
    if len(name) > NAME_CHARS_MAX:
        raise ValueError(f"{len(name)} characters, at most {NAME_CHARS_MAX} are a name")
    return name


def _format_of(path: Path | str, file_format: str | None) -> str:
    found = file_format or _FORMAT_OF.get(Path(path).suffix.lower())
    if found not in FORMATS:
        raise MappingError(
            f"{path}: give the format with --format, one of {', '.join(FORMATS)} "
            f"(found {file_format or Path(path).suffix or 'no ending'!r})."
        )
    return found


@contextmanager
def _opened(path: Path | str, file_format: str | None) -> Iterator[_Rows]:
    """Yield the open file's rows; whatever reading runs into names the file."""
    found = _format_of(path, file_format)
    is_stdin = str(path) == STDIN
    if found == "parquet" and is_stdin:
        raise MappingError("Parquet cannot be read from standard input: give a file.")
    try:
        with ExitStack() as stack:
            file = sys.stdin.buffer if is_stdin else stack.enter_context(Path(path).open("rb"))
            yield _read(file, found, stack)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise MappingError(f"{path} cannot be read as {found}: {error}.") from error


def _read(file: BinaryIO, file_format: str, stack: ExitStack) -> _Rows:
    if file_format == "parquet":
        parquet = pq.ParquetFile(file)
        return _Rows(tuple(parquet.schema_arrow.names), _parquet_rows(parquet))
    if file_format == "jsonl":
        return _Rows(None, _json_rows(file))
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    # Or its collection would close standard input for everybody.
    stack.callback(text.detach)
    lines = csv.reader(text, strict=True)
    header = tuple(next(lines, ()))
    if not header:
        raise MappingError(f"{_name(file)} is empty: a CSV begins with the names of its columns.")
    return _Rows(header, _csv_rows(lines, header, _name(file)))


def _parquet_rows(parquet: pq.ParquetFile) -> Iterator[Row]:
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
        yield from batch.to_pylist()


def _csv_rows(lines: Iterator[list[str]], header: tuple[str, ...], name: str) -> Iterator[Row]:
    number = 0
    for cells in lines:
        if not cells:
            continue  # an empty line, usually the last
        number += 1
        if len(cells) != len(header):
            raise MappingError(
                f"{name}, row {number}: {len(cells)} cells, the header has {len(header)}."
            )
        yield dict(zip(header, cells, strict=True))


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    number = 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        if len(line) > LINE_BYTES_MAX:
            raise MappingError(
                f"{_name(file)}, row {number + 1}: longer than {LINE_BYTES_MAX} bytes; JSON lines "
                "have one object on each line."
            )
        if not line.strip():
            continue
        number += 1
        try:
            yield decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MappingError(f"{_name(file)}, row {number}: {error}.") from error


def _name(file: BinaryIO) -> str:
    return STDIN if file is sys.stdin.buffer else str(file.name)
