"""The data sets that quality is measured on, as event logs.

Files NAME.parquet with user_id, item_id, ts_ms and event_type, sorted by user and time, in the
folder that DATA names. `complete_journey` also comes with the wheel that the demo uses; `planted`
and `planted_control` are made up (planted.py). Whatever else is absent is said, and not measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.planted import planted_columns
from compose.errors import ComposeError, WheelMissingError
from compose.groceries import data_folder
from features.config import DEFAULT_ACTIONS
from trainer.baselines import HALF_LIFE_MS, NEWS_HALF_LIFE_MS
from trainer.dataset import Bools, EventLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.protocols import ProtocolName

DATA: Final = Path(os.environ.get("DATA", "../shared/data"))
# What a planted return is marked with; the mark is no input of any model.
JUDGED_VALUE: Final = 1.0

Columns = dict[str, NDArray[Any]]


class DataMissingError(ComposeError):
    """The files of a data set are not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set and the policies that go with it.

    Attributes:
        repeats: Whether an item that the user already met may be answered and counts.
        half_life_ms: Of recent popularity.
        label_share: Share of the labels that models learn from, the newest.
        protocols: The first one is the default.
        only_marked: Judge marked labels only.
        fitted_events: Item tables and vocabulary know the newest so many events; None is all.
    """

    title: str
    load: Callable[[], Columns]
    repeats: bool = True
    half_life_ms: int = HALF_LIFE_MS
    label_share: float = 0.4
    protocols: tuple[ProtocolName, ...] = ("global",)
    only_marked: bool = False
    fitted_events: int | None = None


def load_log(data: DataSet) -> tuple[EventLog, Bools | None]:
    """The events of a set, and which of them are judged; None for all.

    Raises:
        DataMissingError: Its files are not there.
    """
    log = EventLog.from_columns(data.load())
    return log, (log.value_N == JUDGED_VALUE) if data.only_marked else None


def _file(name: str) -> Path:
    path = DATA / f"{name}.parquet"
    if not path.is_file():
        raise DataMissingError(
            f"{path} is not there, so {name.removesuffix('_items')} is not measured: name the "
            "folder of its files, as in `make bench-quality SET=... DATA=folder`"
        )
    return path


def _columns(name: str, *, action: str, kinds: tuple[int, ...] = (0,)) -> Columns:
    """Ids, times and action of the rows of some kinds, and ordinals in the order of the file."""
    table = pq.read_table(_file(name), columns=["user_id", "item_id", "ts_ms", "event_type"])
    table = table.filter(table["user_id"].is_valid())
    kept = np.isin(table["event_type"].to_numpy(), kinds)
    user_id = table["user_id"].to_numpy()[kept].astype(np.int64)
    return _with_ordinals(
        user_id,
        item_id=table["item_id"].to_numpy()[kept].astype(np.int64),
        event_time_ms=table["ts_ms"].to_numpy()[kept],
        action=np.full(len(user_id), DEFAULT_ACTIONS.index(action)),
    )


def _with_ordinals(user_id: NDArray[np.int64], **columns: NDArray[Any]) -> Columns:
    order = np.argsort(user_id, kind="stable")
    in_order = user_id[order]
    ordinal = np.empty(len(user_id), np.int64)
    ordinal[order] = np.arange(len(user_id)) - np.searchsorted(in_order, in_order)
    return {"user_id": user_id, "ordinal": ordinal, **columns}


def _domain_of_items(columns: Columns, name: str, column: str) -> NDArray[np.uint64]:
    """A number for the category of each event's item."""
    items = pq.read_table(_file(f"{name}_items"), columns=["item_id", column])
    text = np.array([one or "" for one in items[column].to_pylist()])
    _, number = np.unique(text, return_inverse=True)
    ids = items["item_id"].to_numpy()
    order = np.argsort(ids)
    place = np.searchsorted(ids[order], columns["item_id"]).clip(max=len(ids) - 1)
    found = ids[order][place] == columns["item_id"]
    return np.where(found, number[order][place] + 1, 0).astype(np.uint64)


def complete_journey() -> Columns:
    """A year of groceries; domain is the department."""
    name = "complete_journey"
    if not (DATA / f"{name}.parquet").is_file():
        return _complete_journey_of_the_wheel()
    columns = _columns(name, action="purchase", kinds=(0, 1, 2))
    return {**columns, "domain": _domain_of_items(columns, name, "department")}


def _complete_journey_of_the_wheel() -> Columns:
    try:
        folder = data_folder()
    except WheelMissingError as error:
        raise DataMissingError(f"no complete_journey.parquet in {DATA}, and {error}") from error
    rows = pq.read_table(folder / "transactions.parquet")
    products = pq.read_table(folder / "products.parquet", columns=["product_id", "department"])
    rows = rows.append_column("row", [np.arange(rows.num_rows)]).join(products, "product_id")
    rows = rows.sort_by("row")
    departments = np.array([one or "" for one in rows["department"].to_pylist()])
    _, domain = np.unique(departments, return_inverse=True)
    user_id = rows["household_id"].to_numpy().astype(np.int64)
    times = rows["transaction_timestamp"].cast("timestamp[ms]").cast("int64")
    return _with_ordinals(
        user_id,
        item_id=rows["product_id"].to_numpy().astype(np.int64),
        event_time_ms=times.to_numpy(),
        action=np.full(len(user_id), DEFAULT_ACTIONS.index("purchase")),
        domain=domain.astype(np.uint64),
    )


def globo_clicks() -> Columns:
    """Six weeks of a news portal; domain is the environment."""
    columns = _columns("globo_clicks", action="click")
    environment = pq.read_table(_file("globo_clicks"), columns=["environment"])["environment"]
    return {**columns, "domain": environment.to_numpy().astype(np.uint64)}


def online_retail() -> Columns:
    """A year of a gift shop's purchases, cancellations left out; domain is unused."""
    return _columns("online_retail", action="purchase")


def ml_latest_small() -> Columns:
    """MovieLens ratings; domain is the list of genres."""
    name = "ml_latest_small"
    columns = _columns(name, action="rating")
    return {**columns, "domain": _domain_of_items(columns, name, "genres")}


DATA_SETS: Final[dict[str, DataSet]] = {
    "complete_journey": DataSet(title="Complete Journey (groceries)", load=complete_journey),
    "globo_clicks": DataSet(
        title="Globo.com (news)",
        load=globo_clicks,
        half_life_ms=NEWS_HALF_LIFE_MS,
        # Ten days of news. With millions of one-click visits the item vectors take minutes.
        fitted_events=600_000,
    ),
    "online_retail": DataSet(title="Online Retail (gifts)", load=online_retail),
    "ml_latest_small": DataSet(
        title="MovieLens, latest small",
        load=ml_latest_small,
        repeats=False,
        label_share=1.0,
        protocols=("global", "leave_one_out"),
    ),
    "planted": DataSet(
        title="Planted: an old interest returns",
        load=lambda: planted_columns(seed=1, is_planted=True),
        label_share=1.0,
        only_marked=True,
    ),
    "planted_control": DataSet(
        title="Planted, control: somebody else's interest comes",
        load=lambda: planted_columns(seed=1, is_planted=False),
        label_share=1.0,
        only_marked=True,
    ),
}
