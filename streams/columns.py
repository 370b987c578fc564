"""Which column is which field, and how one cell becomes one value. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Final, Literal

from features.events import DWELL_MS_MAX, ID_MAX, TIME_MS_MAX, VALUE_MAX, parse_id
from streams.errors import MappingError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

TimeUnit = Literal["s", "ms", "iso"]
TIME_UNITS: Final[tuple[TimeUnit, ...]] = ("s", "ms", "iso")

EVENT_FIELDS: Final = (
    "event_id",
    "user_id",
    "item_id",
    "action",
    "event_time_ms",
    "domain",
    "dwell_ms",
    "value",
    "request_id",
    "position",
)
EVENT_FIELDS_REQUIRED: Final = ("user_id", "item_id", "action", "event_time_ms")
ITEM_FIELDS: Final = ("item_id", "name", "categories", "available")
ITEM_FIELDS_REQUIRED: Final = ("item_id", "name")
# Several columns for one field of an item: `--map categories=department+type`.
COLUMN_JOIN: Final = "+"
JOINED_FIELDS: Final = ("name", "categories")
# Several categories in one cell.
CATEGORY_SPLIT: Final = "|"
# A place on a screen; the lake keeps 32 bits of it.
POSITION_MAX: Final = 2**31 - 1
_TRUE: Final = frozenset({"true", "t", "yes", "y", "1"})
_FALSE: Final = frozenset({"false", "f", "no", "n", "0"})


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """Where each field comes from; a field not named is the column of its own name.

    Attributes:
        columns: field to column; an item's name and categories take several, joined by "+".
        constants: field to a value that every row has.
        time_unit: what event times are written in: seconds, milliseconds or ISO 8601. A time
            without a zone is UTC. Parquet's own timestamps need no unit.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    time_unit: TimeUnit = "ms"


def parse_mapping(
    maps: Iterable[str] = (), constants: Iterable[str] = (), *, time_unit: str = "ms"
) -> ColumnMapping:
    """Return the mapping that `--map field=column --const field=value --time-unit u` asks for.

    Raises:
        MappingError: not field=..., a field twice, or an unknown unit.
    """
    unit = next((known for known in TIME_UNITS if known == time_unit), None)
    if unit is None:
        raise MappingError(f"--time-unit {time_unit!r}: write one of {', '.join(TIME_UNITS)}.")
    columns, values = _pairs("--map", maps), _pairs("--const", constants)
    twice = columns.keys() & values.keys()
    if twice:
        raise MappingError(f"{min(twice)!r} has both a --map and a --const: keep one.")
    return ColumnMapping(columns=columns, constants=values, time_unit=unit)


def resolve(
    mapping: ColumnMapping,
    *,
    fields: Collection[str],
    required: Collection[str],
    columns: Collection[str] | None,
    source: str,
) -> dict[str, tuple[str, ...]]:
    """Return the columns of every field that has some; constants have none.

    Args:
        mapping: what the user said.
        fields: the fields there are.
        required: those that need a column or a constant.
        columns: the file's columns; None where each row brings its own (JSON lines).
        source: the file, for messages.

    Raises:
        MappingError: an unknown field, a column that is not there, a required field without one.
    """
    named = {**mapping.columns, **mapping.constants}
    unknown = [name for name in named if name not in fields]
    if unknown:
        raise MappingError(f"{unknown[0]!r} is not a field; map one of {', '.join(fields)}.")
    resolved: dict[str, tuple[str, ...]] = {}
    for name in fields:
        if name in mapping.constants:
            continue
        column = mapping.columns.get(name, name)
        joined = name in JOINED_FIELDS and column not in (columns or ())
        wanted = tuple(column.split(COLUMN_JOIN)) if joined else (column,)
        missing = [] if columns is None else [part for part in wanted if part not in columns]
        if not missing:
            resolved[name] = wanted
        elif name in mapping.columns or name in required:
            raise MappingError(
                f"{source} has no column {missing[0]!r} for {name}; its columns are "
                f"{', '.join(columns or ())}. Name another with --map {name}=COLUMN, or a fixed "
                f"value with --const {name}=VALUE."
            )
    return resolved


Converter = Callable[[object], object]


def field_converters(time_unit: TimeUnit) -> dict[str, Converter]:
    """Return, by field, what turns a cell that is not empty into the field's value.

    Each raises ValueError with a sentence about the cell.
    """
    return {
        "event_id": to_text,
        "user_id": to_id,
        "item_id": to_id,
        "action": to_text,
        "event_time_ms": {"s": _from_seconds, "ms": _from_ms, "iso": _from_iso}[time_unit],
        "domain": to_text,
        "dwell_ms": lambda cell: to_int(cell, largest=DWELL_MS_MAX),
        "value": to_float,
        "request_id": to_text,
        "position": lambda cell: to_int(cell, largest=POSITION_MAX),
    }


def to_text(cell: object) -> str:
    """Return text as it is, a number as text, a whole one without its ".0".

    >>> to_text("a"), to_text(7), to_text(7.0)
    ('a', '7', '7')
    """
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, list | dict):
        raise ValueError(f"{cell!r} is not text")  # noqa: TRY004 - callers map ValueError
    return str(cell)


def to_id(cell: object) -> int:
    """Return the id: whole numbers and decimal strings as they are, other strings hashed."""
    if isinstance(cell, str):
        return parse_id(cell)
    return to_int(cell, largest=ID_MAX)


def to_int(cell: object, *, largest: int) -> int:
    """Return the whole number in `cell`, which lies in 0..`largest`.

    >>> to_int("12", largest=20), to_int(12.0, largest=20)
    (12, 12)
    """
    if isinstance(cell, bool):
        raise ValueError(f"{cell!r} is not a number")  # noqa: TRY004 - callers map ValueError
    number = _decimal(cell)
    if number != number.to_integral_value():
        raise ValueError(f"{cell!r} is not a whole number")
    if not 0 <= number <= largest:
        raise ValueError(f"{cell!r} is outside 0..{largest}")
    return int(number)


def to_float(cell: object) -> float:
    """Return the number in `cell`, which 32 bits can hold."""
    number = float(_decimal(cell))
    if abs(number) > VALUE_MAX:
        raise ValueError(f"{cell!r} is outside +-{VALUE_MAX:g}")
    return number


def to_bool(cell: object) -> bool:
    """Return what true/false, yes/no, 1/0 say."""
    text = str(cell).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{cell!r} is neither true nor false")


def to_categories(cells: Iterable[object]) -> tuple[str, ...]:
    """Return the categories in one or more cells, in order, each once.

    >>> to_categories(["a|b", None, "b"])
    ('a', 'b')
    """
    found: dict[str, None] = {}
    for cell in cells:
        parts = cell if isinstance(cell, list) else str(cell or "").split(CATEGORY_SPLIT)
        found.update(dict.fromkeys(text for part in parts if (text := str(part).strip())))
    return tuple(found)


def is_empty(cell: object) -> bool:
    """Return whether a cell holds no value: null, "" or NaN."""
    return cell is None or cell == "" or cell != cell  # noqa: PLR0124 - NaN is what differs


def _decimal(cell: object) -> Decimal:
    try:
        number = Decimal(cell.strip() if isinstance(cell, str) else str(cell))
    except InvalidOperation as error:
        raise ValueError(f"{cell!r} is not a number") from error
    if not number.is_finite():
        raise ValueError(f"{cell!r} is not a finite number")
    return number


def _from_seconds(cell: object) -> int:
    return _from_moment(cell) if _is_moment(cell) else _in_range(_decimal(cell) * 1000, cell)


def _from_ms(cell: object) -> int:
    return _from_moment(cell) if _is_moment(cell) else _in_range(_decimal(cell), cell)


def _from_iso(cell: object) -> int:
    if _is_moment(cell):
        return _from_moment(cell)
    try:
        return _from_moment(dt.datetime.fromisoformat(str(cell).strip()))
    except ValueError as error:
        raise ValueError(f"{cell!r} is not an ISO 8601 time") from error


def _is_moment(cell: object) -> bool:
    return isinstance(cell, dt.date)


def _from_moment(cell: object) -> int:
    """Return UTC epoch ms of a date or datetime, by whole numbers: floats would lose the last."""
    assert isinstance(cell, dt.date), "checked by the caller"
    moment = cell if isinstance(cell, dt.datetime) else dt.datetime(*cell.timetuple()[:3])  # noqa: DTZ001 - its zone follows
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    since = moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return _in_range(Decimal(since // dt.timedelta(milliseconds=1)), cell)


def _in_range(time_ms: Decimal, cell: object) -> int:
    if not 0 <= time_ms <= TIME_MS_MAX:
        raise ValueError(f"{cell!r} is outside the years 1970 to 9999: check --time-unit")
    return int(time_ms)


def _pairs(option: str, words: Iterable[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name and value):
            raise MappingError(f"{option} {word!r}: write {option} FIELD=VALUE.")
        if name in pairs:
            raise MappingError(f"{option} names {name!r} twice: keep one.")
        pairs[name] = value
    return pairs
