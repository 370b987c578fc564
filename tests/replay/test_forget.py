"""`moveline forget`: the past of one user is gone from states, lake and replays; the rest stays."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from features.chunks import ChunkStore
from features.keys import bucket_of
from features.lake_revisions import find_user
from features.nearline import markers_key, outbox_key
from features.redis import CatalogueStore, Pointers, execute
from features.row import decode_row
from features.state import RECORD
from streams.audit import audit
from streams.errors import ForgetError
from streams.forget import Forgetting
from streams.kafka import end_offsets
from streams.lake import LakeSink
from tests.replay.rows import everything
from tests.replay.test_commands import environment, moveline, said
from tests.replay.test_replay import everything_kept
from tests.worker.running import running, wait_caught_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.replay.conftest import Place
    from tests.replay.test_commands import Moveline
    from tests.worker.running import Running


# Fixtures, used by name.
__all__ = ["environment", "moveline"]


@pytest.fixture
def busiest(place: Place) -> int:
    """The user with the most events, after some thousand records."""
    place.produce(4_000)
    counts = Counter(one.event.user_id for one in place.sent if one.event is not None)
    return counts.most_common(1)[0][0]


@contextmanager
def kept_going(place: Place, lake: Path) -> Iterator[Running]:
    """A worker and the lake's sink run inside the block."""
    stop = threading.Event()
    sink = threading.Thread(
        target=LakeSink(place.kafka, place.topics.events, lake, flush_s=0.2).run,
        args=(stop,),
    )
    sink.start()
    try:
        with running(place.kafka, place.topics, place.live) as worker:
            wait_caught_up(place.kafka, place.topics, worker)
            yield worker
    finally:
        stop.set()
        sink.join(30)


def test_the_past_is_gone_and_the_future_counts(place: Place, busiest: int, tmp_path: Path) -> None:
    bucket, client = bucket_of(busiest), place.live.client
    execute(client, "HSET", markers_key(place.live.generation, bucket), busiest, b"marker")
    execute(client, "HSET", outbox_key(place.live.generation, bucket), f"{busiest}:3", b"{}")
    with kept_going(place, tmp_path) as worker:
        before = decode_row(everything(place.live).rows[busiest])
        done = Forgetting(here=place.here, lake=tmp_path).forget(busiest)
        assert done.is_clean
        assert (done.num_traces, done.num_rewritten) == (2, 1)
        row = decode_row(everything(place.live).rows[busiest])
        assert (row.tail, row.num_chunks, row.user_session) == (b"", 0, None)
        assert row.next_ordinal == before.next_ordinal
        assert ChunkStore(client, place.live.generation).read([busiest])[0].records == {}
        place.produce(2_000)
        wait_caught_up(place.kafka, place.topics, worker)
        place.sink(tmp_path)
    held = everything(place.live)
    packed = b"".join([decode_row(held.rows[busiest]).tail, *held.chunks.get(busiest, {}).values()])
    assert np.frombuffer(packed, RECORD)["ordinal"].min() == before.next_ordinal
    assert_rebuilt_alike(place, tmp_path)


def assert_rebuilt_alike(place: Place, lake: Path) -> None:
    """Replays from Kafka and from the lake end at the same bytes, and the oracle agrees."""
    for origin in ("earliest", "lake"):
        again = place.fresh()
        place.build(again, everything_kept(lake, origin=origin))
        assert everything(again) == everything(place.live), origin
        logs = place.here.logs(lake=lake, prefer_lake=origin == "lake")
        report = audit(logs, again, None, num_users=10_000)
        assert report.num_wrong == 0, report.wrong


def test_twice_and_at_once(place: Place, busiest: int, tmp_path: Path) -> None:
    with kept_going(place, tmp_path):
        forgetting = Forgetting(here=place.here, lake=tmp_path, at_once=True)
        first = forgetting.forget(busiest)
        second = forgetting.forget(busiest)
    assert first.is_clean
    assert second.is_clean
    assert first.kept[0].next_ordinal == second.kept[0].next_ordinal
    found = find_user(tmp_path, place.topics.events, busiest)
    assert [one.num_events for one in found] == [1], "only the last forget is left on disk"
    assert_rebuilt_alike(place, tmp_path)


def test_a_user_nobody_knows(place: Place, busiest: int, tmp_path: Path) -> None:
    nobody = 2**62 + 1
    assert nobody != busiest
    with kept_going(place, tmp_path) as worker:
        done = Forgetting(here=place.here, lake=tmp_path).forget(nobody)
        wait_caught_up(place.kafka, place.topics, worker)
    assert done.is_clean
    assert done.num_rewritten == 0
    assert_rebuilt_alike(place, tmp_path)


def test_a_generation_without_a_worker_is_refused_first(place: Place, busiest: int) -> None:
    place.catch_up()
    CatalogueStore(place.live.client).put_pointers(Pointers(None, place.live.generation))
    ends, held = end_offsets(place.kafka, place.topics.events), everything(place.live)
    with pytest.raises(
        ForgetError, match=rf"g{place.live.generation} holds \d+ events .*no worker"
    ):
        Forgetting(here=place.here, lake=None).forget(busiest)
    assert end_offsets(place.kafka, place.topics.events) == ends
    assert everything(place.live) == held


def test_a_lake_that_stands_still_is_named(place: Place, busiest: int, tmp_path: Path) -> None:
    place.sink(tmp_path)
    with running(place.kafka, place.topics, place.live) as worker:
        wait_caught_up(place.kafka, place.topics, worker)
        with pytest.raises(ForgetError, match=r"the lake under .* start `moveline lake`"):
            Forgetting(here=place.here, lake=tmp_path, timeout_s=15).forget(busiest)


def test_the_command_ends_with_what_remains(
    place: Place, busiest: int, tmp_path: Path, moveline: Moveline
) -> None:
    lake = tmp_path / "lake"
    with kept_going(place, lake):
        told = said(moveline("forget", "--user", str(busiest), "--lake", str(lake), "--at-once"))
    assert f"user {busiest} is forgotten before offset" in told
    assert "nothing earlier was found" in told
    assert "what remains" in told
    assert f"Redis g{place.live.generation}" in told
    assert f"topic {place.topics.events}" in told
    found = find_user(lake, place.topics.events, busiest)
    assert [one.num_events for one in found] == [1]


def test_the_command_says_who_has_no_worker(
    place: Place, busiest: int, tmp_path: Path, moveline: Moveline
) -> None:
    place.catch_up()
    told = said(moveline("forget", "--user", str(busiest), "--lake", str(tmp_path)), code=1)
    assert f"no worker follows it: `moveline drop g{place.live.generation}`" in told
