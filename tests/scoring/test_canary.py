"""A canary and a shadow on real servers: two published versions, events, and who decides.

Both versions are the same package, so that what differs between the arms is what their users do,
which the test says.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from compose.canary import CanaryError, CanaryRequest, CanaryWatch, promote, start, stop
from compose.canary_rules import Decision
from compose.memories import memory_of
from compose.settings import Settings, load_settings
from features.clock import now_ms
from features.errors import SchemaMismatchError
from features.events import Event
from features.feature_log import decode_served
from features.redis import CatalogueStore, Pointers
from scoring.arms import CANARY, CONTROL, SHADOW, arm_of
from scoring.signature import RETRIEVAL_MODEL, Degraded
from scoring.triton import TritonServer
from streams.control import claim_token, read_pointers, write_pointers
from streams.feature_log import read_feature_log
from streams.kafka import KafkaConfig, ensure_topics
from streams.producer import EventProducer
from streams.topics import Topics
from tests.asking import answered, whole
from tests.scoring.states import write_clicks
from tests.scoring.test_ladder import counted
from tests.scoring.tiny import ITEM_IDS
from tests.small import REPOSITORY
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.feature_log import Served
    from features.redis import Canary, StateStore
    from scoring.client import Recommender

pytestmark = pytest.mark.servers
# What the served model logs to, and so what decides; the event log is shared with other tests.
TOPICS = Topics()
USERS = range(5_000, 5_120)
_IDS = itertools.count()


@dataclass
class Place:
    """An installation with two versions: `old` is live."""

    settings: Settings
    kafka: KafkaConfig
    store: StateStore
    recommender: Recommender
    old: int
    new: int
    environment: dict[str, str]

    def pointers(self) -> Pointers:
        """Return what is live, as both places say."""
        recorded = read_pointers(self.kafka, TOPICS)
        assert recorded == CatalogueStore(self.store.client).get_pointers()
        assert recorded is not None
        return recorded

    def ask_everybody(self, canary: Canary, *, marker: str) -> None:
        """Ask for all users, until a whole answer of every arm is logged."""
        wanted = {(user, arm_of(user, canary)) for user in USERS}
        if canary.mode == "shadow":
            wanted |= {(user, SHADOW) for user, arm in wanted if arm == CONTROL}
        num_expected = 0

        def is_logged() -> bool:
            nonlocal num_expected
            if self.num_logged(marker) < num_expected:
                return False
            if {(one.user_id, one.arm) for one in self.logged(marker)} >= wanted:
                return True
            for users in (USERS[:60], USERS[60:]):
                self.recommender.recommend_many(users, k=5, request_id=marker, deadline_s=20)
            num_expected += len(wanted)
            return False

        until(is_logged, what="everybody is logged")

    def logged(self, marker: str) -> list[Served]:
        """Return the feature log's records of one marker, less those that Redis was late for."""
        return [one for one in self._records(marker) if Degraded.STORE_AWAY not in _flags(one)]

    def num_logged(self, marker: str) -> int:
        """Return how many records of one marker there are, these included."""
        return len(self._records(marker))

    def _records(self, marker: str) -> list[Served]:
        values = read_feature_log(self.kafka, TOPICS.feature_log, since_ms=0, records_max=100_000)
        found = (decode_served(value) for value in values)
        return [one for one in found if one.request_id == marker]

    def users_do(self, records: list[Served], likes: Callable[[Served], bool]) -> None:
        """Every user's next event: the first item of the answer, or another one."""
        with EventProducer(self.kafka, TOPICS.events) as producer:
            for one in records:
                item = one.item_ids[0] if likes(one) else 2**61 + 1
                producer.send(
                    Event(
                        event_id=f"{uuid.uuid4().hex}-{next(_IDS)}",
                        user_id=one.user_id,
                        item_id=item,
                        action="click",
                        event_time_ms=now_ms(),
                    )
                )
            assert producer.flush(20) == []

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the group."""
        return subprocess.run(
            [sys.executable, "-m", "compose.cli", "canary", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def _flags(one: Served) -> Degraded:
    return Degraded(one.degraded)


@pytest.fixture(scope="module")
def next_version(
    version: int, package: Path, model_repository: Path, triton_stack: LocalStack
) -> Iterator[int]:
    """The same model once more, as the version after the first one; both are loaded."""
    from trainer.publish import publish  # noqa: PLC0415 - imports torch

    del version
    with TritonServer(triton_stack.addresses.triton_grpc) as server:
        published = publish(package, model_repository, [server], token=1)
        yield published.version
        # Two versions stay loaded: the first one is to stay when others publish more of them.
        shutil.rmtree(published.folder)
        server.load(RETRIEVAL_MODEL)


@pytest.fixture
def place(
    triton_stack: LocalStack,
    served_store: StateStore,
    recommender: Recommender,
    version: int,
    next_version: int,
    model_repository: Path,
    tmp_path: Path,
) -> Iterator[Place]:
    """Known users, the first of two versions live."""
    addresses = triton_stack.addresses
    kafka = KafkaConfig(addresses.kafka)
    ensure_topics(kafka, TOPICS.specs(1))
    for user in USERS:
        write_clicks(served_store, user, [ITEM_IDS[(user + n) % 30] for n in range(5)])
    memory = memory_of(model_repository, version)
    assert memory is not None
    token = claim_token(kafka, TOPICS, "test")
    pointers = Pointers(version, served_store.generation, memory.memory_version, token)
    write_pointers(kafka, TOPICS, pointers)
    CatalogueStore(served_store.client).put_pointers(pointers)
    until(
        answered(
            lambda: recommender.recommend(USERS[0]).provenance.generation == served_store.generation
        ),
        30,
    )
    rules = {
        "users_min": 25,
        "answers_min": 25,
        "margin": 0.1,
        "latency_factor": 100.0,
        "check_s": 0.2,
        "share": 0.5,
    }
    settings = load_settings(
        kafka={"bootstrap": addresses.kafka},
        redis={"url": addresses.redis},
        triton={"grpc": addresses.triton_grpc},
        model_repository=model_repository,
        generation=f"g{served_store.generation}",
        run_dir=tmp_path,
        canary=rules,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "200",
        "MOVELINE_KAFKA__BOOTSTRAP": addresses.kafka,
        "MOVELINE_REDIS__URL": addresses.redis,
        "MOVELINE_TRITON__GRPC": addresses.triton_grpc,
        "MOVELINE_MODEL_REPOSITORY": str(model_repository),
        "MOVELINE_GENERATION": f"g{served_store.generation}",
        "MOVELINE_RUN_DIR": str(tmp_path),
        **{f"MOVELINE_CANARY__{name.upper()}": str(value) for name, value in rules.items()},
    }
    yield Place(settings, kafka, served_store, recommender, version, next_version, environment)
    token = claim_token(kafka, TOPICS, "test")
    write_pointers(kafka, TOPICS, Pointers(version, served_store.generation, None, token))


def test_better_is_promoted_by_nobody(place: Place) -> None:
    """`watch` decides: the canary's users click what they are shown, the others do not."""
    canary = start(place.settings, place.new, CanaryRequest())
    assert place.pointers().canary == canary
    place.ask_everybody(canary, marker="better")
    records = place.logged("better")
    for one in records:
        assert one.arm == arm_of(one.user_id, canary)
        # Which version spoke, and the memories it read: never those of the other arm.
        assert one.model_version == (place.new if one.arm == CANARY else place.old)
    assert {one.arm for one in records} == {CANARY, CONTROL}
    place.users_do(records, likes=lambda one: one.arm == CANARY)
    watched = place.run("watch")
    assert watched.returncode == 0, watched.stderr
    assert "promote: good enough" in watched.stderr
    pointers = place.pointers()
    assert (pointers.model_version, pointers.canary) == (place.new, None)
    answer = whole(lambda: place.recommender.recommend(USERS[0]))
    assert answer.provenance.model_version == place.new


def test_worse_is_taken_back_by_nobody(place: Place) -> None:
    canary = start(place.settings, place.new, CanaryRequest())
    watch = CanaryWatch(place.settings)
    first = watch.look()
    assert first is not None
    assert first.verdict.decision is Decision.GO_ON
    place.ask_everybody(canary, marker="worse")
    records = place.logged("worse")
    shown = place.run("status")
    assert shown.returncode == 0, shown.stderr
    assert "go on" in shown.stdout
    place.users_do(records, likes=lambda one: one.arm == CONTROL)
    seen: list[str] = []
    ended = watch.run(lambda state: seen.append(state.verdict.reason))
    assert ended is not None
    assert ended.verdict.decision is Decision.TAKE_BACK, seen
    pointers = place.pointers()
    assert (pointers.model_version, pointers.canary) == (place.old, None)
    assert watch.look() is None


def test_a_shadow_is_only_logged(place: Place, triton_stack: LocalStack) -> None:
    canary = start(place.settings, place.new, CanaryRequest(mode="shadow"))
    place.ask_everybody(canary, marker="shadow")
    records = place.logged("shadow")
    shadows = {one.user_id: one for one in records if one.arm == SHADOW}
    controls = {one.user_id: one for one in records if one.arm == CONTROL}
    assert shadows.keys() == controls.keys()
    assert {one.model_version for one in shadows.values()} == {place.new}
    assert {one.model_version for one in records if one.arm != SHADOW} == {place.old}
    # The same package: beside each other they say the same.
    assert all(shadows[user].item_ids == controls[user].item_ids for user in shadows)
    assert counted(triton_stack, "moveline_recommend_arms_total", arm=CONTROL) > 0
    place.users_do(list(controls.values()), likes=lambda one: bool(one.user_id % 2))
    state = CanaryWatch(place.settings).look()
    assert state is not None
    # Each user is compared with himself: no difference, and few are needed to be sure of it.
    assert state.verdict.decision is Decision.PROMOTE, state.verdict
    stopped = place.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert place.pointers().model_version == place.old


def test_no_answer_mixes_versions_while_pointers_flip(place: Place) -> None:
    """Live, canary and back under load: every logged pair of version and memories belongs."""
    generation = place.store.generation
    mine, other = "a" * 16, "b" * 16
    canary = start(place.settings, place.new, CanaryRequest())
    token = place.pointers().token
    tried = Pointers(
        place.old,
        generation,
        mine,
        token,
        canary=type(canary)(place.new, other, "canary", 0.5, canary.since_ms),
    )
    flipped = Pointers(place.new, generation, other, token)
    catalogue = CatalogueStore(place.store.client)
    marker, seen, pause = uuid.uuid4().hex, 0, threading.Event()
    end_s = time.monotonic() + 6
    for pointers in itertools.cycle((tried, flipped)):
        catalogue.put_pointers(pointers)
        flip_s = time.monotonic() + 1.2
        while time.monotonic() < flip_s:
            place.recommender.recommend_many(USERS[:20], k=2, request_id=marker, deadline_s=20)
            seen += 20
            # A feature log that is faster than its broker drops records, as it should.
            pause.wait(0.02)
        if time.monotonic() > end_s:
            break
    until(lambda: place.num_logged(marker) >= seen, what="all of it is logged")
    pairs = {(one.model_version, one.memory_version) for one in place.logged(marker)}
    first = memory_pair(place)
    assert pairs - {first, (place.new, first[1])} == {(place.old, mine), (place.new, other)}


def memory_pair(place: Place) -> tuple[int, str | None]:
    """Return what was live before the flips began."""
    memory = memory_of(place.settings.model_repository, place.old)
    return place.old, memory.memory_version if memory else None


def test_a_person_can_do_either(place: Place) -> None:
    started = place.run("start", str(place.new), "--share", "0.25")
    assert started.returncode == 0, started.stderr
    assert "tried as a canary on 25.0% of users" in started.stderr
    again = place.run("start", str(place.new))
    assert again.returncode == 1
    assert "is being tried already" in again.stderr
    assert promote(place.settings).version == place.new
    assert place.pointers().model_version == place.new
    none = place.run("stop")
    assert none.returncode == 1
    assert "no version is being tried" in none.stderr
    assert place.run("status").returncode == 1


def test_what_cannot_be_tried_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CanaryError, match=f"version {place.old} is live"):
        start(place.settings, place.old, CanaryRequest())
    with pytest.raises(CanaryError, match="has not loaded version 77"):
        start(place.settings, 77, CanaryRequest())
    with pytest.raises(CanaryError, match="no version is being tried"):
        stop(place.settings)
    with monkeypatch.context() as patched:
        patched.setattr("compose.canary.schema_hash", lambda _: "another")
        with pytest.raises(SchemaMismatchError, match="moveline train"):
            start(place.settings, place.new, CanaryRequest())
    assert place.pointers().canary is None
