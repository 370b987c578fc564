"""Rows of views that Feast owns, into Feast's own layout: newest event time wins, without a race.

Feast's store reads the stored times, compares, and writes in a second round trip; two writers can
then leave the older value. Here one script per entity compares and writes.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from feast import utils
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import _versioned_fv_name
from google.protobuf.timestamp_pb2 import Timestamp

from features.redis_client import ScriptMissingError, load_script, pipelined

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from feast import FeatureView, RepoConfig
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from features.redis_client import RedisClient

WriteRow = tuple["EntityKey", "dict[str, Value]", "datetime", "datetime | None"]


@cache
def _script() -> bytes:
    return files("features").joinpath("lua/write_feast_row.lua").read_bytes()


@cache
def _digest() -> str:
    return hashlib.sha1(_script(), usedforsecurity=False).hexdigest()


def write_rows(
    client: RedisClient, config: RepoConfig, table: FeatureView, data: Sequence[WriteRow]
) -> int:
    """Write the rows in one round trip; return how many were newer than what was stored.

    Of rows that share an entity, the newest stays, in whatever order they come.

    Raises:
        StoreError: Redis did not answer; some rows may be written, and may be written again.
    """
    commands = [_command(config, table, row) for row in data]
    doing = f"writing rows of {table.name}"
    try:
        return sum(pipelined(client, commands, doing))
    except ScriptMissingError:
        load_script(client, _script())
        return sum(pipelined(client, commands, doing))


def _command(config: RepoConfig, table: FeatureView, row: WriteRow) -> tuple[Any, ...]:
    entity_key, values, event_time, _ = row
    settings, view = config.online_store, _versioned_fv_name(table, config)
    at = Timestamp()
    at.FromDatetime(utils.make_tzaware(event_time))
    time_field = f"_ts:{view}"
    pairs: list[Any] = [time_field, at.SerializeToString()]
    for name, value in values.items():
        pairs += (_mmh3(f"{view}:{name}"), value.SerializeToString())
    version = config.entity_key_serialization_version
    key = _redis_key(config.project, entity_key, entity_key_serialization_version=version)
    compare = 0 if settings.skip_dedup else 1
    seconds_kept = settings.key_ttl_seconds or 0
    times = (time_field, at.seconds, at.nanos, seconds_kept, compare)
    return ("EVALSHA", _digest(), 1, key, *times, *pairs)
