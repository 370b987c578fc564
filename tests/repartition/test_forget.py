"""A user is forgotten over every topic of the log: in states, lake and whatever is built later."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from features.lake_revisions import find_user
from features.row import decode_row
from streams.forget import Forgetting
from streams.lake_chain import LogSink
from streams.replay import ReplayRequest
from tests.replay.rows import everything
from tests.worker.running import running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.repartition.conftest import Log


def test_the_past_in_a_retired_topic_is_gone_too(log: Log, tmp_path: Path) -> None:
    log.produce(3_000, source=0)
    users = Counter(one.event.user_id for one in log.sent if one.event is not None)
    busiest = users.most_common(1)[0][0]
    stop = threading.Event()
    sink = LogSink(log.kafka, log.topics, tmp_path, flush_s=0.2)
    following = threading.Thread(target=sink.run, args=(stop,))
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        log.repartition(5)
        log.produce(1_000, source=1)
        log.wait(worker)
        following.start()
        before = decode_row(everything(log.live).rows[busiest])
        done = Forgetting(here=log.here, lake=tmp_path).forget(busiest)
        log.produce(500, source=1)
        log.wait(worker)
    stop.set()
    following.join(30)
    assert done.is_clean
    assert done.source == 1
    assert done.num_rewritten == 2, "one revision in each topic"
    assert done.kept[0].next_ordinal == before.next_ordinal
    topic = log.topics.at(0).events
    found = [one for one in find_user(tmp_path, topic, busiest) if one.is_current]
    assert all(log.topics.at(1).events in one.file.path.parts for one in found)
    LogSink(log.kafka, log.topics, tmp_path).run(threading.Event(), until_end=True)
    for origin in ("earliest", "lake"):
        request = ReplayRequest(origin=origin, lake=tmp_path, waiting_chunks_max=10_000)
        again, _ = log.replay(request)
        assert everything(again) == everything(log.live), origin
