"""What is live: pointers, withdrawn items, trending items; refreshed off the request path."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import msgspec

from features.config import StateConfig
from features.errors import StoreError
from features.redis import CatalogueStore, StateStore, Trending
from scoring.sources import FollowerCache

if TYPE_CHECKING:
    from features.redis import RedisClient

log = logging.getLogger("moveline.recommend")

# A published version answers within this; a withdrawn item is gone within twice this.
REFRESH_S: Final = 1.0


@dataclass(frozen=True)
class Snapshot:
    """One consistent look at what is live."""

    model_version: int | None = None
    memory_version: str | None = None
    generation: int = 1
    config: StateConfig = field(default_factory=StateConfig)
    withdrawn: frozenset[int] = frozenset()
    trending: Trending = field(default_factory=lambda: Trending((), ()))


class Live:
    """Keeps a snapshot fresh from a thread; readers take `snapshot` without waiting."""

    def __init__(self, client: RedisClient) -> None:
        self.client = client
        self.snapshot = Snapshot()
        self.followers = FollowerCache(client)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moveline-live", daemon=True)

    def start(self) -> None:
        """Take a first snapshot and keep refreshing."""
        self._refresh()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def store(self, snapshot: Snapshot) -> StateStore:
        """Return the state store of the snapshot's generation."""
        return StateStore(self.client, snapshot.generation, snapshot.config)

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self._refresh()

    def _refresh(self) -> None:
        """Replace the snapshot; what cannot be read leaves the last one, and the log says so."""
        try:
            self.snapshot = read_snapshot(CatalogueStore(self.client), self.snapshot)
        except (StoreError, msgspec.MsgspecError, ValueError) as error:
            log.warning("live pointers not refreshed: %s", error)


def read_snapshot(catalogue: CatalogueStore, last: Snapshot) -> Snapshot:
    """Return what Redis says is live, the parts it does not know as in `last`."""
    pointers = catalogue.get_pointers()
    trending = catalogue.get_trending()
    snapshot = replace(last, withdrawn=frozenset(catalogue.withdrawn()))
    if trending is not None:
        snapshot = replace(snapshot, trending=trending)
    if pointers is None:
        return snapshot
    config = catalogue.recorded_config(pointers.generation)
    return replace(
        snapshot,
        model_version=pointers.model_version,
        memory_version=pointers.memory_version,
        generation=pointers.generation,
        config=config or snapshot.config,
    )
