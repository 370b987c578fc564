"""Dry run and audit find exactly what differs, and nothing where nothing does.

Method: real generations, then one user's row, chunk or existence is changed behind their back.
"""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

import pytest

from features import keys
from features.generations import Generations
from streams.audit import audit
from streams.compare import compare_generations, dry_run
from streams.event_log import some_buckets
from streams.replay import ReplayRequest
from tests.conftest import SMALL
from tests.replay.rows import everything
from tests.streams.support import read_all
from tests.worker.running import running

if TYPE_CHECKING:
    from pathlib import Path

    from features.config import StateConfig
    from features.redis import StateStore
    from streams.audit import AuditReport
    from streams.compare import Comparison
    from tests.replay.conftest import Place

ALL = some_buckets(1.0)
PARTITIONS = [0, 1, 2]


@pytest.fixture
def filled(place: Place) -> Place:
    """A live generation with 4,000 records in it."""
    place.produce(4_000)
    place.catch_up()
    return place


def dry(
    place: Place, config: StateConfig = SMALL, request: ReplayRequest | None = None
) -> Comparison:
    """Return the comparison of a dry run over all users."""
    request = request or ReplayRequest()
    logs = place.here.logs(lake=request.lake, prefer_lake=request.origin == "lake")
    return dry_run(logs, request, config, place.live, ALL, Event())


def checked(place: Place, store: StateStore, lake: Path | None = None) -> AuditReport:
    """Return the audit of every user of a generation."""
    built = Generations(store.client).built(store.generation)
    return audit(place.here.logs(lake=lake), store, built, num_users=100_000)


def test_a_dry_run_with_the_same_rules_equals_the_live_generation(filled: Place) -> None:
    keys_before = filled.live.client.dbsize()
    result = dry(filled)
    users = len(everything(filled.live).rows)
    assert (result.num_equal, result.num_users) == (users, users)
    assert result.is_equal
    assert result.same_rules
    assert sum(result.dead_letters.values()) == sum(one.event is None for one in filled.sent)
    assert filled.live.client.dbsize() == keys_before


def test_a_dry_run_finds_who_differs_is_missing_and_extra(filled: Place) -> None:
    rows = sorted(everything(filled.live).rows)
    client, generation = filled.live.client, filled.live.generation
    client.setrange(keys.row_key(generation, rows[0]), 0, b"\xee\xee")
    client.delete(keys.row_key(generation, rows[1]))
    stranger = keys.row_key(generation, 987_654)
    client.copy(keys.row_key(generation, rows[2]), stranger)
    with_chunks = next(u for u in everything(filled.live).chunks if u not in rows[:3])
    client.hset(keys.chunks_key(generation, with_chunks), b"0", b"other")
    result = dry(filled)
    assert (result.different, result.extra, result.missing) == (2, 1, 1)
    assert result.moving == 0
    assert set(result.examples) == {rows[0], rows[1], with_chunks, 987_654}
    assert result.examples[with_chunks] == "chunks [0]"
    assert not result.is_equal


def test_other_sizes_differ_in_bytes_and_not_in_contents(filled: Place) -> None:
    result = dry(filled, replace(SMALL, recent=5, mid=9, chunk=2))
    assert not result.same_rules
    assert result.is_equal, result.examples
    gap = dry(filled, replace(SMALL, session_gap_ms=1))
    assert gap.different > 10
    assert any("user_session" in what for what in gap.examples.values())


def test_a_dry_run_beside_live_traffic_waits_for_who_moves(filled: Place) -> None:
    with running(filled.kafka, filled.topics, filled.live) as worker:
        worker.wait("redelivered_total", 0)
        filled.produce(1_500)
        result = dry(filled)
        worker.wait("events_total", 1)
    assert result.is_equal, result.examples
    assert result.moving == 0


def test_users_with_events_after_the_end_are_not_judged(filled: Place) -> None:
    last = max(checked_times(filled))
    filled.produce(500)
    filled.catch_up()
    result = dry(filled, request=ReplayRequest(to_ms=last + 1))
    moved = {one.event.user_id for one in filled.sent[4_000:] if one.event}
    assert result.is_equal
    assert 0 < result.moving <= len(moved)


def checked_times(place: Place) -> list[int]:
    """Return every record's append time."""
    return [message.timestamp()[1] for message in read_all(place.kafka, place.topics.events)]


def test_two_generations_compare(filled: Place) -> None:
    again = filled.fresh()
    filled.build(again)
    result = compare_generations(again, filled.live, ALL, {0: PARTITIONS})
    assert result.is_equal
    assert result.num_equal == len(everything(filled.live).rows)
    victim = sorted(everything(again).rows)[3]
    again.client.delete(keys.row_key(again.generation, victim))
    result = compare_generations(again, filled.live, ALL, {0: PARTITIONS})
    assert (result.missing, result.examples) == (1, {victim: "only in the live one"})


def test_the_audit_agrees_with_every_user(filled: Place, tmp_path: Path) -> None:
    filled.sink(tmp_path)
    again = filled.fresh(replace(SMALL, recent=5, mid=9, chunk=2))
    filled.build(again, ReplayRequest(origin="lake", lake=tmp_path))
    for store in (filled.live, again):
        for lake in (None, tmp_path):
            report = checked(filled, store, lake)
            assert report.num_wrong == 0, report.wrong
            assert report.num_users == len(everything(store).rows)
            assert report.num_events > 2_500


def test_the_audit_finds_every_kind_of_damage(filled: Place) -> None:
    rows = everything(filled.live)
    client, generation = filled.live.client, filled.live.generation
    lone, flipped, swapped = sorted(rows.rows)[:3]
    client.delete(keys.row_key(generation, lone))
    client.setrange(keys.row_key(generation, flipped), 0, b"\x09\x09")
    client.set(keys.row_key(generation, swapped), rows.rows[sorted(rows.rows)[5]])
    with_chunks = next(u for u in rows.chunks if u not in {lone, flipped, swapped})
    client.hdel(keys.chunks_key(generation, with_chunks), b"0")
    report = checked(filled, filled.live)
    assert set(report.wrong) == {lone, flipped, swapped, with_chunks}
    assert "no row" in report.wrong[lone]
    assert report.wrong[flipped] == "tail: item_id of an event"
    assert report.wrong[with_chunks] == "chunk 0: other events than the oracle's"


def test_the_audit_of_a_generation_that_is_behind_judges_what_it_has(filled: Place) -> None:
    again = filled.fresh()
    filled.build(again)
    filled.produce(500)
    assert checked(filled, again).num_wrong == 0
    some = filled.fresh()
    filled.build(some, ReplayRequest(users=frozenset({1, 2, 3})))
    report = checked(filled, some)
    assert (report.num_users, report.num_wrong) == (3, 0)


def test_a_sample_is_whole_buckets() -> None:
    keep = some_buckets(0.25)
    share = sum(map(keep, range(40_000))) / 40_000
    assert 0.24 < share < 0.26
    assert all(map(some_buckets(5.0), range(1_000)))
