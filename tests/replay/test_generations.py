"""Pointers move to whole, caught-up generations only, and back; what is dropped leaves nothing.

Method: generations built by real workers and replays; the control topic is read back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest

from features import keys
from features.errors import GenerationError, StoreFullError
from features.generations import Built, Generations
from features.redis import CatalogueStore, Pointers, execute
from streams.control import claim_token, read_pointers, read_promotion, write_pointers
from streams.replay import ReplayRequest
from tests.conftest import SMALL
from tests.replay.rows import everything
from tests.worker.running import running

if TYPE_CHECKING:
    from tests.replay.conftest import Place


def live_everywhere(place: Place) -> Pointers | None:
    """Return what is live, once control topic and Redis agree; without the token."""
    recorded = read_pointers(place.kafka, place.topics)
    assert recorded == CatalogueStore(place.live.client).get_pointers()
    return recorded and msgspec.structs.replace(recorded, token=0)


def publish(place: Place, version: int, generation: int) -> None:
    """Record a model as a publication does."""
    token = claim_token(place.kafka, place.topics, "publish")
    write_pointers(place.kafka, place.topics, Pointers(version, generation, token=token))


def test_promote_and_demote_move_the_pointer_and_keep_the_model(place: Place) -> None:
    place.produce(1_000)
    place.catch_up()
    first, second = place.live.generation, place.fresh()
    place.build(second)
    write_pointers(place.kafka, place.topics, Pointers(3, first))
    CatalogueStore(second.client).put_pointers(Pointers(3, first))
    done = place.here.promote(second.generation, clock=lambda: 77)
    assert (done.generation, done.previous, done.at_ms) == (second.generation, first, 77)
    assert read_promotion(place.kafka, place.topics) == done
    assert live_everywhere(place) == Pointers(3, second.generation)
    # A publication in between does not make it forget what was live before.
    publish(place, 4, second.generation)
    assert place.here.demote().generation == first
    assert live_everywhere(place) == Pointers(4, first)
    # And the demotion is taken back likewise.
    assert place.here.demote().generation == second.generation
    assert live_everywhere(place) == Pointers(4, second.generation)


def test_demote_asks_for_a_name_it_does_not_know(place: Place) -> None:
    place.produce(100)
    place.catch_up()
    with pytest.raises(GenerationError, match="before anything: name it"):
        place.here.demote()
    place.here.promote(place.live.generation)
    with pytest.raises(GenerationError, match=f"before g{place.live.generation}: name it"):
        place.here.demote()
    again = place.fresh()
    place.build(again)
    assert place.here.demote(to=again.generation).previous == place.live.generation


def test_a_crash_between_topic_and_redis_is_healed_by_promoting_again(place: Place) -> None:
    place.produce(300)
    place.catch_up()
    again = place.fresh()
    place.build(again)
    place.here.promote(place.live.generation)
    done = place.here.promote(again.generation)
    execute(again.client, "DEL", keys.POINTERS_KEY)
    CatalogueStore(again.client).put_pointers(Pointers(None, place.live.generation))
    place.here.promote(again.generation)
    assert live_everywhere(place) == Pointers(None, again.generation)
    assert read_promotion(place.kafka, place.topics) == done


def test_what_is_behind_is_not_promoted(place: Place) -> None:
    place.produce(500)
    again = place.fresh()
    place.build(again)
    place.produce(300)
    assert place.here.lag(again) == 300
    with pytest.raises(GenerationError, match="300 records behind, at most 299"):
        place.here.promote(again.generation, lag_max=299)
    assert read_pointers(place.kafka, place.topics) is None
    place.here.promote(again.generation, lag_max=300)


def test_other_rules_need_a_model_made_for_them(place: Place) -> None:
    place.produce(300)
    place.catch_up()
    first = place.live.generation
    write_pointers(place.kafka, place.topics, Pointers(3, first))
    other = place.fresh(replace(SMALL, recent=4))
    place.build(other)
    with pytest.raises(GenerationError, match=r"version 3, reads features .*--model-version"):
        place.here.promote(other.generation)
    place.here.promote(other.generation, model_version=4)
    assert live_everywhere(place) == Pointers(4, other.generation)


def test_what_is_not_there_is_named(place: Place) -> None:
    with pytest.raises(GenerationError, match=r"no generation g99 \(there are: none\).*replay"):
        place.here.promote(99)
    with pytest.raises(GenerationError, match="no generation g99"):
        place.here.drop(99)


def test_the_list_says_how_each_was_built(place: Place) -> None:
    place.produce(800)
    place.catch_up()
    some, behind = place.fresh(), place.fresh(replace(SMALL, recent=4))
    place.build(some, ReplayRequest(users=frozenset({1, 2, 3})))
    place.build(behind)
    place.here.promote(place.live.generation)
    place.produce(50)
    with running(place.kafka, place.topics, place.live) as worker:
        worker.wait("events_total", 1)
        found = {info.number: info for info in place.here.list()}
        assert found[place.live.generation].is_followed
    assert sorted(found) == [place.live.generation, some.generation, behind.generation]
    live = found[place.live.generation]
    assert live.is_live
    assert live.built is None
    assert live.num_users > found[some.generation].num_users == 3
    partly = found[some.generation].built
    assert partly is not None
    assert partly.is_partial
    assert str(partly) == "--from earliest --users (3 users)"
    rest = found[behind.generation]
    assert (rest.lag, rest.is_live, rest.is_followed) == (50, False, False)
    assert rest.config == behind.config


def test_drop_leaves_nothing_and_touches_nothing_else(place: Place) -> None:
    place.produce(2_000)
    place.catch_up()
    again = place.fresh()
    place.build(again)
    place.here.promote(place.live.generation)
    live = everything(place.live)
    assert place.here.drop(again.generation) > 300
    assert not place.live.client.keys(f"*g{again.generation}*")
    assert everything(place.live) == live
    assert place.live.read_checkpoints(0, [0])[0][0] >= 0


def test_an_interrupted_drop_is_seen_and_can_be_repeated(place: Place) -> None:
    place.produce(2_000)
    again = place.fresh()
    place.build(again)
    steps = Generations(again.client).drop(again.generation)
    assert next(steps) == keys.NUM_BUCKETS
    steps.close()
    for refused in (
        lambda: place.here.promote(again.generation),
        lambda: place.build(again),
    ):
        with pytest.raises(GenerationError, match="being dropped"):
            refused()
    place.here.drop(again.generation)
    assert not place.live.client.keys(f"*g{again.generation}*")
    place.build(again)
    place.catch_up()
    assert everything(again) == everything(place.live)


def test_live_and_followed_generations_are_not_dropped(place: Place) -> None:
    place.produce(300)
    place.catch_up()
    again = place.fresh()
    place.build(again)
    place.here.promote(place.live.generation)
    with pytest.raises(GenerationError, match="is live"):
        place.here.drop(place.live.generation)
    place.produce(10)
    with running(place.kafka, place.topics, again) as worker:
        worker.wait("events_total", 1)
        with pytest.raises(GenerationError, match=r"a worker of g\d+ runs"):
            place.here.drop(again.generation)


def test_a_full_redis_stops_a_build_before_live_traffic_notices(place: Place) -> None:
    client = place.live.client
    used = int(client.info("memory")["used_memory"])
    generations = Generations(client)
    generations.refuse_full(5)
    # Redis gives memory back in the background: half of it is too little all the same.
    client.config_set("maxmemory", used // 2)
    try:
        with pytest.raises(StoreFullError, match="take room from live traffic"):
            generations.refuse_full(5)
    finally:
        client.config_set("maxmemory", 0)


def test_the_record_says_what_was_asked_for() -> None:
    built = Built(topic="t", origin="time", from_ms=5, to_ms=9, users="ab", num_users=2_000)
    assert str(built) == "--from 5 --to 9 --users (2,000 users)"
    assert built.is_partial
    assert not Built(topic="t", origin="lake").is_partial
