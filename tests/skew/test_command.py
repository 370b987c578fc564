"""`moveline skew` on real servers: no skew where there is none, and every planted one is found.

Method: a worker applies made-up traffic, reads are logged through Kafka by the code that Triton
runs, the sink writes the lake. Then something is spoilt, and the command has to say what.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from features import keys
from features.clock import now_ms
from features.feature_log import decode_served, encode_served
from features.redis import CatalogueStore, Pointers
from features.row import TRAILER_BYTES
from features.state import RECORD_BYTES
from scoring.feature_log import FeatureLog
from scoring.live import Live, read_snapshot
from scoring.recommend import Ask, RetrievalError, answer
from streams.feature_log import FeatureLogProducer
from streams.lake import LakeSink
from tests.worker.running import running, wait_caught_up
from tests.worker.test_state import worker_environment
from tests.worker.traffic import Traffic, publish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.redis import StateStore
    from scoring.recommend import Retrieved
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

pytestmark = pytest.mark.servers
# Reads are made as if so much later: what is still on its way to Redis is no skew.
LATER_MS = 120_000
BUSY_USER = 1


def away(*_: object, **__: object) -> Retrieved:
    raise RetrievalError("no model here")


@dataclass
class Served:
    """An installation that serves and logs."""

    kafka: KafkaConfig
    topics: Topics
    store: StateStore
    lake: Path
    environment: dict[str, str]
    counts: dict[str, int] = field(default_factory=lambda: {"delivered": 0, "dropped": 0})
    change: Callable[[bytes], bytes] = staticmethod(lambda value: value)  # noqa: RUF009 - a function

    def _count(self, name: str, number: int) -> None:
        self.counts[name] += number

    def serve(self, users: list[int]) -> None:
        """Answer for every user once, and log it."""
        producer = FeatureLogProducer(
            self.kafka,
            self.topics.feature_log,
            on_delivered=partial(self._count, "delivered"),
            on_dropped=partial(self._count, "dropped"),
        )
        producer.start()
        catalogue = CatalogueStore(self.store.client)
        catalogue.put_pointers(Pointers(None, self.store.generation))
        live = Live(self.store.client)
        live.snapshot = read_snapshot(catalogue, live.snapshot)
        asks = [Ask(user, 3) for user in users]
        at_ms = now_ms() + LATER_MS
        log = FeatureLog(share=1.0, send=lambda key, value: producer.send(key, self.change(value)))
        log.log(asks, answer(asks, live, away, at_ms), at_ms)
        producer.close()
        assert self.counts == {"delivered": self.counts["delivered"], "dropped": 0}

    def sink(self) -> None:
        """Write the log as it is to the lake."""
        LakeSink(self.kafka, self.topics.events, self.lake).run(until_end=True)

    def skew(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        return subprocess.run(
            [sys.executable, "-m", "compose.cli", "skew", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def report(self, code: int) -> dict[str, Any]:
        """Return the command's report, after its exit status."""
        done = self.skew("--json")
        assert done.returncode == code, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@pytest.fixture
def served(
    kafka: KafkaConfig, topics: Topics, store: StateStore, stack: LocalStack, tmp_path: Path
) -> Served:
    """An installation with 1,500 records applied."""
    environment = {
        **os.environ,
        **worker_environment(stack, topics, store),
        "MOVELINE_RUN_DIR": str(tmp_path),
        "COLUMNS": "200",
    }
    publish(kafka, topics.events, Traffic(seed=5, num_users=60).make(1_500))
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)
    return Served(kafka, topics, store, tmp_path / "lake", environment)


def test_without_skew_it_says_zero(served: Served) -> None:
    served.sink()
    served.serve(list(range(70)))
    report = served.report(0)
    assert (report["compared"], report["differing"], report["skipped"]) == (70, 0, {})
    assert report["values"] > 3_000
    assert report["edit_distances"]["mid"] == {"0": 70}
    assert report["events_unseen"] == 0


def test_a_byte_changed_in_redis_is_found(served: Served, tmp_path: Path) -> None:
    served.sink()
    (row,) = served.store.read_rows([BUSY_USER])
    assert row is not None
    spoilt = bytearray(row)
    # The newest record's item id: records carry no checksum.
    spoilt[-TRAILER_BYTES - RECORD_BYTES] ^= 1
    key = keys.row_key(served.store.generation, BUSY_USER)
    served.store.client.set(key, bytes(spoilt))
    served.serve(list(range(20)))
    report = served.report(1)
    assert (report["compared"], report["differing"]) == (20, 1)
    assert report["by_user"] == {str(BUSY_USER): 1}
    item = report["by_feature"]["recent_item_id"]
    assert (item["num_mismatched"], item["num_missing"], item["num_extra"]) == (1, 0, 0)
    assert report["edit_distances"]["recent"] == {"0": 19, "1": 1}
    # One in twenty is allowed by a threshold of 5 %.
    assert served.skew("--threshold", "0.05").returncode == 0
    look = served.skew("--user", str(BUSY_USER), "--html", str(tmp_path / "page.html"))
    assert look.returncode == 1
    assert f"user {BUSY_USER} at" in look.stdout
    assert "recent_item_id" in look.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert f"User {BUSY_USER}," in page


def test_a_row_that_redis_lost_is_found(served: Served) -> None:
    served.sink()
    served.store.client.delete(keys.row_key(served.store.generation, BUSY_USER))
    served.serve([BUSY_USER, 2])
    report = served.report(1)
    assert report["by_user"] == {str(BUSY_USER): 1}
    assert report["by_feature"]["position"]["num_missing"] == 1


def test_a_wrong_default_is_found(served: Served) -> None:
    def with_wrong_count(value: bytes) -> bytes:
        one = decode_served(value)
        session = one.user_session
        assert session is not None
        return encode_served(
            msgspec.structs.replace(one, user_session=session._replace(distinct_items=-1))
        )

    served.sink()
    served.change = with_wrong_count
    served.serve([BUSY_USER])
    report = served.report(1)
    differing = {n for n, one in report["by_feature"].items() if one["num_reads_differing"]}
    assert differing == {"session_distinct_items"}


def test_another_schema_is_counted_apart_and_explained(served: Served) -> None:
    served.sink()
    served.serve([1, 2])
    served.change = lambda value: encode_served(
        msgspec.structs.replace(decode_served(value), schema_hash="0" * 16)
    )
    served.serve([1, 2, 3])
    report = served.report(0)
    assert (report["compared"], report["skipped"]) == (2, {"other_schema": 3})
    assert "another schema hash" in served.skew().stdout


def test_what_the_lake_does_not_have_yet_is_not_compared(served: Served) -> None:
    served.sink()
    publish(served.kafka, served.topics.events, Traffic(seed=6, num_users=60).make(300))
    with running(served.kafka, served.topics, served.store) as worker:
        wait_caught_up(served.kafka, served.topics, worker)
    served.serve(list(range(60)))
    assert served.report(0)["skipped"]["not_in_lake"] > 10
    served.sink()
    assert served.report(0)["skipped"] == {}


def test_a_lake_without_its_beginning_is_not_compared(served: Served) -> None:
    served.sink()
    publish(served.kafka, served.topics.events, Traffic(seed=6, num_users=60).make(300))
    served.sink()
    with running(served.kafka, served.topics, served.store) as worker:
        wait_caught_up(served.kafka, served.topics, worker)
    served.serve(list(range(60)))
    min(served.lake.glob("*/partition=0/*.parquet")).unlink()
    report = served.report(0)
    assert set(report["skipped"]) == {"lake_starts_later"}
    assert report["skipped"]["lake_starts_later"] + report["compared"] == 60


def test_nothing_logged_is_an_error_not_a_zero(served: Served) -> None:
    served.sink()
    done = served.skew()
    assert done.returncode == 1
    assert "no read was logged" in done.stderr


def test_a_truncated_lake_file_is_named(served: Served) -> None:
    served.sink()
    served.serve([BUSY_USER])
    file = min(served.lake.glob("*/*/*.parquet"))
    file.write_bytes(file.read_bytes()[:-30])
    done = served.skew()
    assert done.returncode == 1
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_record_that_cannot_be_read_is_counted(served: Served) -> None:
    served.sink()
    served.serve([1])
    served.change = lambda _: b"\xc1 not a record"
    served.serve([2])
    assert served.report(0)["skipped"] == {"unreadable": 1}
