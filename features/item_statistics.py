"""Writes the item_statistics view through Feast, as anyone could push it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from features.config import StateConfig

VIEW: Final = "item_statistics"
# Rows of one write: what Feast turns into protobuf at once.
ROWS_MAX: Final = 2_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class ItemStatistics:
    """Pushes rows; Feast is imported by the first of them, which takes seconds.

    The registry is a file of this process alone: it says what the code says, and writing rows
    needs nothing of the one that users apply to.
    """

    redis_url: str
    config: StateConfig
    folder: TemporaryDirectory[str] | None = None
    _store: Any = field(default=None, repr=False)

    def push(self, rows: Mapping[int, tuple[int, int]], at_ms: int) -> None:
        """Return once (events of a day, events of a week) of those items are readable.

        Args:
            rows: by item id.
            at_ms: the clock they are counted at; Feast drops rows that are not newer than its own.
        """
        store = self._opened()
        items = list(rows)
        at = _EPOCH + timedelta(milliseconds=at_ms)
        for start in range(0, len(items), ROWS_MAX):
            some = items[start : start + ROWS_MAX]
            columns = {
                "item_id": some,
                "item_events_1d": [rows[item][0] for item in some],
                "item_events_7d": [rows[item][1] for item in some],
                "event_timestamp": [at] * len(some),
            }
            store.write_to_online_store(VIEW, inputs=columns)

    def close(self) -> None:
        """Remove the registry."""
        self._store = None
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None

    def _opened(self) -> Any:  # noqa: ANN401 - Feast has no type information
        if self._store is None:
            definitions = importlib.import_module("features.definitions")
            self.folder = TemporaryDirectory(prefix="moveline-feast-")
            folder = Path(self.folder.name)
            store = definitions.open_store(
                redis_url=self.redis_url, registry=folder / "registry.db"
            )
            definitions.apply(store, config=self.config, lake=folder / "lake")
            self._store = store
        return self._store
