"""A primary that dies is replaced by its replica, and the worker goes on there, exactly.

Method: a real primary, replica and sentinel. What the replica had not received yet is Redis come
back older, which the worker's checkpoints heal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.errors import StoreUnavailableError
from features.redis import StateStore, connect, execute
from tests.servers import SENTINEL_MASTER, redis_sentinel
from tests.small import SMALL
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Traffic, assert_equals_oracle, publish

if TYPE_CHECKING:
    from pathlib import Path

    from streams.kafka import KafkaConfig
    from streams.topics import Topics

pytestmark = pytest.mark.servers


def test_the_worker_follows_a_fail_over_and_loses_nothing(
    tmp_path: Path, kafka: KafkaConfig, topics: Topics, generation: int
) -> None:
    traffic = Traffic(seed=61, num_users=80)
    sent = traffic.make(1_500)
    publish(kafka, topics.events, sent)
    with redis_sentinel(tmp_path / "sentinel") as servers:
        client = connect(servers.url, timeout_s=30)
        store = StateStore(client, generation, SMALL)
        with running(kafka, topics, store, batch_max=100) as worker:
            worker.wait("events_total", 300)
            servers.kill_primary()
            more = traffic.make(500)
            publish(kafka, topics.events, more)
            worker.wait("store_pauses_total", 1)
            wait_caught_up(kafka, topics, worker)
        assert execute(servers.servers[1], "ROLE")[0] == b"master"
        assert assert_equals_oracle(store, kafka, topics, [*sent, *more]) > 40
        client.close()


def test_a_primary_that_no_sentinel_knows_is_an_error_of_ours(tmp_path: Path) -> None:
    with redis_sentinel(tmp_path / "sentinel") as servers:
        client = connect(servers.url.replace(SENTINEL_MASTER, "other"), timeout_s=30)
        with pytest.raises(StoreUnavailableError, match="other"):
            StateStore(client, 1, SMALL).ping()
