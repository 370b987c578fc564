"""Goal: a run ends in a version that answers, or in a record that says why not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from compose.cli.options import kafka_of
from compose.trainer_service.heal import CHECKPOINT_FOLDER, DRAFT_FOLDER, KILLED, heal
from compose.trainer_service.look import find_served, look
from compose.trainer_service.one_run import TrainerBusyError, run_once
from compose.trainer_service.records import RunRecord, run_name, runs_of
from features.errors import StoreUnavailableError
from features.keys import TRAINER_LEASE_KEY
from features.lake import file_name, partition_folder
from features.lease import Lease, holder
from features.redis import Pointers, connect
from streams.control import claim_token, read_pointers, write_pointers
from streams.kafka import make_producer
from tests.small import REPOSITORY
from tests.trainer_service.installation import add_events
from tests.waiting import until
from trainer.export import ITEM_IDS_FILE
from trainer.warm_start import load_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compose.settings import Settings

START_S = 60.0


def program(settings: Settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trainer_service.installation", settings.model_dump_json()],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def newest(settings: Settings) -> RunRecord:
    record = runs_of(settings.models).newest()
    assert record is not None
    return record


def lease_is_free(settings: Settings) -> bool:
    return holder(connect(settings.redis.url), TRAINER_LEASE_KEY) is None


def checkpoints(settings: Settings) -> list[Path]:
    return list(settings.models.glob(f"runs/*/{CHECKPOINT_FOLDER}/checkpoint.safetensors"))


def test_reasons_not_to_train_are_recorded_and_are_no_errors(
    installation: Callable[..., Settings],
) -> None:
    settings = installation(events_min=10**6, lag_max=3)
    empty = run_once(settings)
    assert (empty.state, empty.kind) == ("skipped", None)
    assert "holds no event" in empty.says
    add_events(settings, seed=0)
    assert "training.events_min" in run_once(settings).says
    kafka, topics = kafka_of(settings)
    producer = make_producer(kafka)
    for _ in range(404):
        producer.produce(topics.events, b"{}")
    assert producer.flush(10) == 0
    assert look(settings).lag == 4
    assert "training.lag_max" in run_once(settings).says
    again = run_once(settings)
    assert again.times == 2
    assert [one.state for one in runs_of(settings.models).all()] == ["skipped"] * 3
    assert lease_is_free(settings)


def test_what_cannot_be_looked_at_is_a_recorded_failure(
    installation: Callable[..., Settings],
) -> None:
    settings = installation()
    add_events(settings, seed=0)
    topic = f"{settings.kafka.prefix}.events"
    (partition_folder(settings.lake.path, topic, 0) / file_name(500, 501)).write_bytes(b"")
    for times in (1, 2):
        record = run_once(settings)
        assert (record.state, record.kind, record.times) == ("failed", None, times)
        assert "restore the missing file" in record.says
    assert lease_is_free(settings)


def test_one_trains_at_a_time(
    installation: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compose.trainer_service.one_run.LOOK_S_MAX", 0.5)
    settings = installation()
    client = connect(settings.redis.url)
    lease = Lease.take(client, TRAINER_LEASE_KEY, owner="somebody")
    assert lease is not None
    with lease, pytest.raises(TrainerBusyError, match="somebody"):
        run_once(settings)
    assert runs_of(settings.models).all() == []


@pytest.mark.usefixtures("small_runs")
def test_a_gate_refuses_and_leaves_what_is_live(installation: Callable[..., Settings]) -> None:
    settings = installation(latency_ms=1e-6)
    add_events(settings, seed=0)
    kafka, topics = kafka_of(settings)
    record = run_once(settings)
    assert record.state == "refused"
    assert record.says == record.gates[-1].says
    assert [one.says for one in record.gates[:-1]] == ["", "", ""]
    assert record.gates[-1].name == "latency_ms_1"
    assert read_pointers(kafka, topics) is None
    assert list(settings.models.glob("*/manifest.json")) == []
    draft = runs_of(settings.models).folder(record.run) / DRAFT_FOLDER
    assert (draft / "manifest.json").is_file()
    assert checkpoints(settings) == []
    # What it learned from is not learned from again.
    assert run_once(settings.model_copy(update={})).state == "skipped"
    assert not draft.exists()


# Two trainings, two publications and four exported graphs, loaded: a minute on a quiet machine.
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("small_runs")
def test_versions_follow_one_another_and_keep_what_must_not_move(
    served: Callable[..., Settings],
) -> None:
    settings = served()
    kafka, topics = kafka_of(settings)
    add_events(settings, seed=0)
    first = run_once(settings)
    assert (first.state, first.says) == ("published", "")
    assert (first.kind, first.base_version, first.num_events) == ("full", None, 400)
    assert (first.window_from, first.window_to) == ({"0": 0}, {"0": 399})
    assert first.tokens_per_s > 0
    assert set(first.seconds) == {"train", "export", "judge", "gates", "publish"}
    assert first.figures.keys() >= {"ndcg10_model", "ndcg10_popularity", "hr10_own_frequency"}
    before = find_served(settings)
    assert before is not None
    assert before.version == first.version
    assert str(before.package) == first.package
    live = read_pointers(kafka, topics)
    assert live is not None
    assert live.token == first.token

    add_events(settings, seed=1, num_items=8)
    second = run_once(settings)
    assert (second.state, second.kind) == ("published", "warm")
    assert (second.base_version, second.window_to) == (first.version, {"0": 799})
    assert "ndcg10_served" in second.figures
    assert second.gates[-1].name == "ndcg10_low_against_served"
    after = find_served(settings)
    assert after is not None
    assert after.package is not None
    assert before.package is not None
    now = read_pointers(kafka, topics)
    assert now is not None
    assert now.memory_version == live.memory_version
    assert now.token > live.token
    old, new = load_state(before.package), load_state(after.package)
    place = np.searchsorted(new.vocabulary.item_ids_V, old.vocabulary.item_ids_V)
    codes_old, codes_new = (one.model.trie.codes_I3[1:].numpy() for one in (old, new))
    np.testing.assert_array_equal(codes_new[place], codes_old)
    assert len(np.fromfile(after.package / ITEM_IDS_FILE, "<i8")) > len(codes_old)

    # Without the package there is nothing to go on from.
    after.package.rename(settings.run_dir / "elsewhere")
    assert "not in the models folder" in look(settings).missing


@pytest.mark.usefixtures("small_runs")
def test_what_goes_wrong_after_going_live_is_said_and_not_undone(
    installation: Callable[..., Settings],
) -> None:
    """Without Triton: publishing is replaced by what it has done when Redis goes away in it."""
    settings = installation()
    add_events(settings, seed=0)
    kafka, topics = kafka_of(settings)

    def point(settings: Settings, package: Path, *, token: int) -> None:
        folder = settings.model_repository / "gems" / "9"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes((package / "manifest.json").read_bytes())
        write_pointers(kafka, topics, Pointers(model_version=9, generation=1, token=token))
        raise StoreUnavailableError("Redis went away")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("compose.trainer_service.one_run.publish_package", point)
        record = run_once(settings)
    assert (record.state, record.version) == ("published", 9)
    assert record.says == "Redis went away"
    served = find_served(settings)
    assert served is not None
    assert str(served.package) == record.package


@pytest.mark.usefixtures("small_runs")
def test_who_was_overtaken_does_not_publish(served: Callable[..., Settings]) -> None:
    """Somebody else's pointers come while this one trains: its own token is the older one."""
    settings = served()
    add_events(settings, seed=0)
    kafka, topics = kafka_of(settings)
    theirs = Pointers(model_version=None, generation=settings.generation_number)

    def overtake() -> None:
        until(lambda: (found := runs_of(settings.models).newest()) and found.token, START_S)
        token = claim_token(kafka, topics, "the other one")
        write_pointers(kafka, topics, msgspec.structs.replace(theirs, token=token))

    other = threading.Thread(target=overtake)
    other.start()
    record = run_once(settings)
    other.join()
    assert record.state == "refused"
    assert "token" in record.says
    live = read_pointers(kafka, topics)
    assert live is not None
    assert live.model_version is None
    assert record.token is not None
    assert live.token > record.token
    assert list(settings.models.glob("*/manifest.json")) == []


def test_killed_while_it_trains_the_next_run_goes_on(
    installation: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same told to stop: the record says so, the lease is free, the checkpoint stays."""
    # Who asks here gives up before a holder that a busy machine holds up loses its lease.
    monkeypatch.setattr("compose.trainer_service.one_run.LOOK_S_MAX", 0.5)
    settings = installation(epochs=10_000, budget_s=600, lease_s=10)
    add_events(settings, seed=0)
    killed = program(settings)
    try:
        until(lambda: checkpoints(settings), START_S, what="a checkpoint")
        with pytest.raises(TrainerBusyError):
            run_once(settings)
    finally:
        killed.kill()
        killed.communicate()
    first = newest(settings)
    assert first.state == "running"
    (settings.models / "runs" / first.run / DRAFT_FOLDER).mkdir()
    until(lambda: lease_is_free(settings), what="the end of the lease")
    add_events(settings, seed=1)
    told = program(settings)
    try:
        until(lambda: newest(settings).resumes, START_S, what="a run that goes on")
        taken_over = settings.models / "runs" / newest(settings).run / CHECKPOINT_FOLDER
        taken_over /= "checkpoint.safetensors"
        until(taken_over.is_file, START_S, what="its checkpoint")
        made_ns = taken_over.stat().st_mtime_ns
        until(lambda: taken_over.stat().st_mtime_ns > made_ns, START_S, what="a further one")
        told.terminate()
    finally:
        told.communicate(timeout=START_S)
    assert lease_is_free(settings)
    healed, second = runs_of(settings.models).all()
    assert (healed.state, healed.says) == ("failed", KILLED)
    assert not (settings.models / "runs" / healed.run / DRAFT_FOLDER).exists()
    assert (second.state, second.resumes) == ("stopped", first.run)
    # On the events it began with, although more have come.
    assert (second.window_to, second.kind) == (first.window_to, first.kind)
    assert len(checkpoints(settings)) == 1


def test_a_paused_run_finds_its_lease_lost_and_does_not_publish(
    installation: Callable[..., Settings],
) -> None:
    """Its budget is over when it wakes up, so that publishing would come next."""
    settings = installation(epochs=10_000, budget_s=10, lease_s=2)
    add_events(settings, seed=0)
    paused = program(settings)
    try:
        until(lambda: checkpoints(settings), START_S, what="a checkpoint")
        paused.send_signal(signal.SIGSTOP)
        until(lambda: lease_is_free(settings), what="the end of the lease")
        client = connect(settings.redis.url)
        lease = Lease.take(client, TRAINER_LEASE_KEY, owner="the next one")
        assert lease is not None
        with lease:
            paused.send_signal(signal.SIGCONT)
            said, _ = paused.communicate(timeout=START_S)
            assert lease.is_held
    finally:
        paused.kill()
        paused.wait()
    assert said.startswith("failed moveline:trainer-lease was lost")
    assert list(settings.models.glob("*/manifest.json")) == []
    assert newest(settings).state == "failed"


def test_a_run_that_died_after_going_live_has_published(
    installation: Callable[..., Settings],
) -> None:
    settings = installation()
    kafka, topics = kafka_of(settings)
    runs = runs_of(settings.models)
    folder = settings.model_repository / "gems" / "7"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"created_ms": 5, "files": {}}')
    write_pointers(
        kafka,
        topics,
        Pointers(model_version=7, generation=1, token=claim_token(kafka, topics, "t")),
    )
    for created_ms in (5, 6):
        runs.write(
            RunRecord(
                run=run_name(created_ms),
                state="running",
                why="time",
                started_ms=created_ms,
                created_ms=created_ms,
                kind="full",
            )
        )
    heal(settings, runs)
    live, dead = runs.all()
    assert (live.state, live.version) == ("published", 7)
    assert (dead.state, dead.version) == ("failed", None)
