"""What readers of state need: which state is live, and any number of users in one round trip.

    store = open_state(connect(url))
    users = read_users(store, [42, 43], now_ms=now_ms(), newest=store.config.recent)
    users.streams().recent_BR["item_id"], users.sessions().num_events_B

Each user is read atomically: streams, session and position are of one instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from features.errors import GenerationError, SchemaMismatchError
from features.redis import CatalogueStore, StateStore
from features.schema import schema_hash
from features.user_batch import UserBatch, decode_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.redis import RedisClient

# Before anything was promoted there is no pointer, and the first generation is the live one.
GENERATION_DEFAULT: Final = 1


def live_generation(client: RedisClient) -> int:
    """Return the generation that readers follow.

    Raises:
        StoreError: Redis did not answer.
    """
    pointers = CatalogueStore(client).get_pointers()
    return GENERATION_DEFAULT if pointers is None else pointers.generation


def open_state(
    client: RedisClient, *, generation: int | None = None, expected_hash: str | None = None
) -> StateStore:
    """Return the state of a generation under the rules it was built with.

    Args:
        client: from `features.redis.connect`.
        generation: which; None is the live one.
        expected_hash: the feature schema hash that the reader was made for, from its manifest.

    Raises:
        GenerationError: nobody has built the generation.
        SchemaMismatchError: its features are not those of `expected_hash`.
        StoreError: Redis did not answer.
    """
    number = live_generation(client) if generation is None else generation
    config = CatalogueStore(client).recorded_config(number)
    if config is None:
        raise GenerationError(
            f"g{number} does not exist: start `moveline worker`, or choose one of "
            "`moveline generations`."
        )
    found = schema_hash(config)
    if expected_hash not in {None, found}:
        raise SchemaMismatchError(
            f"g{number} has the feature schema {found}, this reader was made for "
            f"{expected_hash}: read the generation it was made for, or train again on this one."
        )
    return StateStore(client, number, config)


def read_users(
    store: StateStore, user_ids: Sequence[int], *, now_ms: int, newest: int | None = None
) -> UserBatch:
    """Return users' state as columns, in the order asked; an unknown user is all padding.

    Args:
        store: from `open_state`.
        user_ids: any number; one may come twice.
        now_ms: the clock at which sessions are judged.
        newest: records of each; None is recent and mid-term stream together.

    Raises:
        StoreError: Redis did not answer.
        CorruptRowError: stored bytes are not a row.
    """
    wanted = store.config.recent + store.config.mid if newest is None else newest
    rows = store.read_rows(user_ids, newest=wanted)
    return decode_batch(user_ids, rows, newest=wanted, now_ms=now_ms, config=store.config)
