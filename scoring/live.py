"""What is live: pointers, withdrawn items, trending items; refreshed off the request path."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import msgspec

from features.config import StateConfig
from features.errors import StoreError
from features.nearline import read_domain_trending
from features.redis import CatalogueStore, StateStore, Trending
from scoring.sources import FollowerCache
from scoring.within import Calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from features.redis import Canary, RedisClient

log = logging.getLogger("moveline.recommend")

# A published version answers within this; a withdrawn item is gone within twice this.
REFRESH_S: Final = 1.0
# Domains whose trending items are kept fresh, as many as have a list of their own; of more, the
# one that was asked for first is read again when it is next asked for.
DOMAINS_MAX: Final = 1_000


@dataclass(frozen=True)
class Snapshot:
    """One consistent look at what is live."""

    model_version: int | None = None
    memory_version: str | None = None
    generation: int = 1
    config: StateConfig = field(default_factory=StateConfig)
    withdrawn: frozenset[int] = frozenset()
    trending: Trending = field(default_factory=lambda: Trending((), ()))
    trending_by_domain: Mapping[int, Trending] = field(default_factory=dict)
    canary: Canary | None = None

    def of_canary(self) -> Snapshot:
        """Return this with the canary's version and its memories in the live ones' place."""
        if self.canary is None:
            return self
        return replace(
            self,
            model_version=self.canary.version,
            memory_version=self.canary.memory_version,
        )


class Live:
    """Keeps a snapshot fresh from a thread; readers take `snapshot` without waiting."""

    def __init__(self, client: RedisClient) -> None:
        self.client = client
        self.snapshot = Snapshot()
        self.followers = FollowerCache(client)
        self.reads, self.models = Calls("read"), Calls("model")
        self._domains: OrderedDict[int, Trending] = OrderedDict()
        self._changing_domains = threading.Lock()
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
        self.reads.close()
        self.models.close()

    def learn_domains(self, domains: Iterable[int]) -> None:
        """Know the trending items of domains from now on.

        Raises:
            StoreError: Redis did not answer, or holds something else in their place.
        """
        try:
            found = read_domain_trending(self.client, list(domains))
        except msgspec.MsgspecError as error:
            raise StoreError(f"the trending items of a domain are not readable: {error}") from error
        with self._changing_domains:
            for domain, trending in found.items():
                self._domains[domain] = trending or Trending((), ())
            while len(self._domains) > DOMAINS_MAX:
                self._domains.popitem(last=False)
            self.snapshot = replace(self.snapshot, trending_by_domain=dict(self._domains))

    def store(self, snapshot: Snapshot) -> StateStore:
        """Return the state store of the snapshot's generation."""
        return StateStore(self.client, snapshot.generation, snapshot.config)

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self._refresh()

    def _refresh(self) -> None:
        """Replace the snapshot; what cannot be read leaves the last one, and the log says so."""
        try:
            snapshot = read_snapshot(CatalogueStore(self.client), self.snapshot)
            with self._changing_domains:
                domains = list(self._domains)
            self.learn_domains(domains)
            with self._changing_domains:
                self.snapshot = replace(snapshot, trending_by_domain=dict(self._domains))
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
        canary=pointers.canary,
    )
