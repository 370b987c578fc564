"""Which generation is live, how far each is behind, and moving the pointer between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from features.clock import now_ms
from features.errors import GenerationError
from features.generations import Generations
from features.lifelong_store import LifelongStore
from features.redis import CatalogueStore, Pointers, StateStore
from features.schema import schema_hash
from streams.chain import known_chain
from streams.control import (
    Promotion,
    claim_token,
    read_pointers,
    read_promotion,
    write_pointers,
    write_promotion,
)
from streams.event_log import logs_of
from streams.kafka import group_is_active
from streams.lifelong_build import COVERAGE_DEFAULT, coverage
from streams.progress import progress_bar
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from features.config import StateConfig
    from features.generations import Built
    from features.redis_client import RedisClient
    from streams.event_log import EventLog
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# What readers take while nothing was published (scoring/live.py).
UNPUBLISHED: Final = 1
# Records a generation may be behind and still be promoted: about a second of heavy traffic, which
# its worker makes up for. Idle buckets' checkpoints alone can be five seconds old.
LAG_MAX: Final = 50_000


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """One generation as `moveline generations` shows it."""

    number: int
    config: StateConfig
    num_users: int
    lag: int
    built: Built | None
    is_live: bool
    is_followed: bool


@dataclass(frozen=True)
class Installation:
    """Where the generations and what is said of them are kept."""

    kafka: KafkaConfig
    topics: Topics
    client: RedisClient

    def store(self, generation: int) -> StateStore:
        """Return a generation's state under its recorded rules.

        Raises:
            GenerationError: there is no such generation, or it is being dropped.
        """
        recorded = Generations(self.client).recorded()
        built = Generations(self.client).built(generation)
        if generation not in recorded:
            known = ", ".join(f"g{number}" for number in recorded) or "none"
            raise GenerationError(
                f"there is no generation g{generation} (there are: {known}). Build it: moveline "
                f"replay --into g{generation} --from earliest"
            )
        if built is not None and built.is_dropping:
            raise GenerationError(
                f"g{generation} is being dropped: end that with moveline drop g{generation}"
            )
        return StateStore(self.client, generation, recorded[generation])

    def live(self) -> int | None:
        """Return the number of the live generation; the control topic's word, not Redis'."""
        pointers = read_pointers(self.kafka, self.topics)
        return None if pointers is None else pointers.generation

    def list(self) -> list[GenerationInfo]:
        """Return every generation by number."""
        generations = Generations(self.client)
        users, live = generations.count_users(), self.live()
        return [
            GenerationInfo(
                number=number,
                config=config,
                num_users=users[number],
                lag=self.lag(StateStore(self.client, number, config)),
                built=generations.built(number),
                is_live=number == live,
                is_followed=self.is_followed(number),
            )
            for number, config in generations.recorded().items()
        ]

    def lag(self, store: StateStore) -> int:
        """Return how many records of the log are not applied to every bucket."""
        lag = 0
        for events in self.logs():
            ends = events.end_offsets()
            applied = store.read_checkpoints(events.source, list(ends))
            lag += sum(max(0, end - max(0, min(applied[p]))) for p, end in ends.items())
        return lag

    def logs(self, *, lake: Path | None = None, prefer_lake: bool = False) -> Sequence[EventLog]:
        """Return the topics of the event log, in order."""
        chain = known_chain(self.kafka, self.topics)
        return logs_of(self.kafka, self.topics, chain, lake=lake, prefer_lake=prefer_lake)

    def is_followed(self, generation: int) -> bool:
        """Return whether a worker keeps a generation, whichever topic of the log it is at."""
        chain = known_chain(self.kafka, self.topics)
        groups = [group_of(self.topics.at(n), generation) for n in range(len(chain.sources))]
        return any(group_is_active(self.kafka, group) for group in groups)

    def promote(
        self,
        generation: int,
        *,
        model_version: int | None = None,
        memory_version: str | None = None,
        lag_max: int = LAG_MAX,
        clock: Callable[[], int] = now_ms,
    ) -> Promotion:
        """Make a generation the live one, for every reader at once.

        First the control topic, the record of truth, then Redis. A crash between the two is
        healed by whoever reads the control topic next: a starting worker, or this command.

        Args:
            generation: which.
            model_version: the model that goes live with it; None keeps the live one and its memory.
            memory_version: what that model reads, None for nothing.
            lag_max: records it may be behind.
            clock: for the record.

        Raises:
            GenerationError: it is partial, behind, lacks memories, or the live model cannot read
                it.
            StaleTokenError: somebody moved the pointers meanwhile.
        """
        store = self.store(generation)
        token = claim_token(self.kafka, self.topics, "promote")
        before = read_pointers(self.kafka, self.topics)
        self._refuse_partial(generation)
        if model_version is None:
            self._refuse_unread(store, before)
        lag = self.lag(store)
        if lag > lag_max:
            raise GenerationError(
                f"g{generation} is {lag:,} records behind, at most {lag_max:,} are allowed "
                f"(--max-lag): let it catch up first: moveline worker --generation g{generation}"
            )
        if model_version is None and before is not None:
            # What a canary showed, it showed in the generation it began in.
            after = msgspec.structs.replace(before, generation=generation, token=token, canary=None)
        else:
            after = Pointers(model_version, generation, memory_version, token)
        if after.memory_version is not None:
            self._refuse_uncovered(store, after.memory_version)
        previous = None if before is None else before.generation
        promotion = Promotion(generation, previous, clock())
        if previous != generation:
            write_promotion(self.kafka, self.topics, after, promotion)
        else:
            write_pointers(self.kafka, self.topics, after)
        CatalogueStore(self.client).put_pointers(after)
        return promotion

    def demote(
        self,
        *,
        to: int | None = None,
        lag_max: int = LAG_MAX,
        clock: Callable[[], int] = now_ms,
    ) -> Promotion:
        """Make the generation before the live one live again; `to` names another.

        Raises:
            GenerationError: it is not known which that is; otherwise as `promote`.
        """
        if to is None:
            last, live = read_promotion(self.kafka, self.topics), self.live()
            if last is None or last.previous is None or last.generation != live:
                name = "anything" if live is None else f"g{live}"
                raise GenerationError(
                    f"the control topic does not say what was live before {name}: name it: "
                    "moveline demote --to g1"
                )
            to = last.previous
        return self.promote(to, lag_max=lag_max, clock=clock)

    def drop(self, generation: int, *, shown: bool = False) -> int:
        """Delete a generation; return how many keys that were. Interrupted, it can be repeated.

        Raises:
            GenerationError: it is live, or a worker keeps it.
        """
        name = f"g{generation}"
        pointers = CatalogueStore(self.client).get_pointers()
        read_by_redis = None if pointers is None else pointers.generation
        if generation in {self.live() or UNPUBLISHED, read_by_redis}:
            raise GenerationError(
                f"{name} is live: promote another first: moveline promote g2, or moveline demote"
            )
        if self.is_followed(generation):
            raise GenerationError(
                f"a worker of {name} runs (group {group_of(self.topics, generation)}) and would "
                "build it again: stop it, then drop."
            )
        generations, num_keys = Generations(self.client), 0
        if generation not in generations.recorded() and generations.built(generation) is None:
            raise GenerationError(f"there is no generation {name}: see moveline generations")
        with progress_bar(f"drop {name}", total=None, unit="keys", shown=shown) as advance:
            for count in generations.drop(generation):
                num_keys += count
                advance(count)
        return num_keys

    def _refuse_partial(self, generation: int) -> None:
        built = Generations(self.client).built(generation)
        if built is not None and built.is_partial:
            raise GenerationError(
                f"g{generation} is partial, built with `{built}`: it can be compared, not "
                "promoted. Build a whole one: moveline replay --into gN --from earliest"
            )

    def _refuse_uncovered(self, store: StateStore, memory_version: str) -> None:
        """Return unless too many users' memories lack something; looks at every user."""
        users = Generations(self.client).users(store.generation, lambda _: True)
        found = coverage(LifelongStore.of(store), users, memory_version)
        if found.share < COVERAGE_DEFAULT:
            raise GenerationError(
                f"g{store.generation} has whole memories of version {memory_version} for "
                f"{found.share:.1%} of {found.num_users:,} users, {COVERAGE_DEFAULT:.0%} "
                f"are needed: moveline lifelong build --generation g{store.generation}"
            )

    def _refuse_unread(self, store: StateStore, live: Pointers | None) -> None:
        """Raise if the live model was made for other features than the generation has."""
        if live is None or live.model_version is None or live.generation == store.generation:
            return
        config = CatalogueStore(self.client).recorded_config(live.generation)
        if config is not None and schema_hash(config) != schema_hash(store.config):
            raise GenerationError(
                f"the live model, version {live.model_version}, reads features as g"
                f"{live.generation} has them; g{store.generation} was built under other rules. "
                "Train and publish a model on it, then give its version: --model-version N"
            )
