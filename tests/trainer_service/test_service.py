"""Goal: the service outlives what its runs do, says how it is, and ends when told to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from compose.trainer_service.heal import CHECKPOINT_FOLDER, KILLED
from compose.trainer_service.metrics import TrainerMetrics
from compose.trainer_service.records import RunRecord, run_name, runs_of
from compose.trainer_service.schedule import Run, Wait
from compose.trainer_service.service import Service
from features.clock import now_ms
from features.keys import TRAINER_LEASE_KEY
from features.lease import Lease, holder
from features.redis import connect
from tests.small import REPOSITORY, UNCOMPILED
from tests.trainer_service.installation import add_events
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compose.settings import Settings

START_S = 90.0


def environment(settings: Settings) -> dict[str, str]:
    """What makes a command find the installation."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOVELINE_")}
    training = settings.training.model_dump(include=set(settings.training.model_fields_set))
    return {
        **clean,
        **UNCOMPILED,
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "220",
        "MOVELINE_KAFKA__BOOTSTRAP": settings.kafka.bootstrap,
        "MOVELINE_KAFKA__PREFIX": settings.kafka.prefix,
        "MOVELINE_REDIS__URL": settings.redis.url,
        "MOVELINE_GENERATION": settings.generation,
        "MOVELINE_RUN_DIR": str(settings.run_dir),
        "MOVELINE_MODEL_REPOSITORY": str(settings.model_repository),
        **{f"MOVELINE_TRAINING__{name.upper()}": str(value) for name, value in training.items()},
    }


def moveline(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compose.cli", *arguments],
        env=environment(settings),
        cwd=settings.run_dir.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )


def answer_of(settings: Settings, *arguments: str) -> Any:  # noqa: ANN401 - whatever JSON says
    """Return what a command that succeeds prints as JSON."""
    done = moveline(settings, *arguments)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


@pytest.fixture
def service(
    installation: Callable[..., Settings],
) -> Iterator[Callable[..., tuple[Settings, subprocess.Popen[bytes], str]]]:
    """Starts `moveline trainer run`; returns settings, process and where its metrics are."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*, events: int, **training: object) -> tuple[Settings, subprocess.Popen[bytes], str]:
        settings = installation(**training)
        for seed in range(events):
            add_events(settings, seed=seed)
        settings.run_dir.mkdir(exist_ok=True)
        log = settings.run_dir / "trainer.log"
        with log.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "compose.cli", "trainer", "run"],
                    env=environment(settings),
                    cwd=settings.run_dir.parent,
                    stderr=file,
                )
            )
        address = re.compile(rb"http://[\d.]+:\d+/metrics")
        until(lambda: address.search(log.read_bytes()), START_S, what="its metrics")
        found = address.search(log.read_bytes())
        assert found is not None
        return settings, started[-1], found[0].decode()

    yield start
    for process in started:
        process.kill()
        process.wait()


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own http address
        text = answer.read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_with_nothing_to_learn_it_waits_and_says_so(
    service: Callable[..., tuple[Settings, subprocess.Popen[bytes], str]],
) -> None:
    settings, process, url = service(events=0)
    runs = runs_of(settings.models)
    until(runs.newest, START_S, what="a record")
    until(lambda: metric(url, "moveline_trainer_looked_timestamp_seconds"), what="a look")
    assert metric(url, "moveline_trainer_model_age_seconds") == -1
    assert metric(url, 'moveline_trainer_runs_total{state="skipped"}') == 1
    listed = moveline(settings, "trainer", "runs")
    assert "skipped" in listed.stdout, listed
    (one,) = answer_of(settings, "trainer", "runs", "--json")
    assert (one["state"], one["why"]) == ("skipped", "time")
    shown = moveline(settings, "trainer", "show", one["run"])
    assert "holds no event" in shown.stdout
    # A person may ask at the same time; a reason not to train is no error.
    assert answer_of(settings, "trainer", "once", "--json")["state"] == "skipped"
    process.terminate()
    assert process.wait(START_S) == 0


def test_a_run_that_is_killed_is_recorded_and_the_service_goes_on(
    service: Callable[..., tuple[Settings, subprocess.Popen[bytes], str]],
) -> None:
    """Then it is told to stop in the middle of the next run."""
    settings, process, url = service(events=1, epochs=10_000, budget_s=600, lease_s=10)
    runs = runs_of(settings.models)
    client = connect(settings.redis.url)
    folders = settings.models / "runs"

    def checkpoint() -> bool:
        newest = runs.newest()
        return bool(newest) and any(folders.glob(f"{newest.run}/{CHECKPOINT_FOLDER}/*.safetensors"))

    until(checkpoint, START_S, what="a checkpoint")
    assert metric(url, "moveline_trainer_running") == 1
    name = holder(client, TRAINER_LEASE_KEY)
    assert name is not None
    os.kill(int(name.split(":")[1]), signal.SIGKILL)
    until(lambda: runs.all()[0].state == "failed", START_S, what="the record of it")
    (dead,) = runs.all()
    assert dead.says == KILLED
    until(lambda: metric(url, "moveline_trainer_failures_in_a_row") == 1, what="the failure")
    assert process.poll() is None
    # It waits before it tries again.
    assert isinstance(Service(settings, runs, TrainerMetrics()).turn(), Wait)
    process.terminate()
    assert process.wait(START_S) == 0
    assert holder(client, TRAINER_LEASE_KEY) is None


def test_told_to_stop_it_stops_its_run(
    service: Callable[..., tuple[Settings, subprocess.Popen[bytes], str]],
) -> None:
    settings, process, _ = service(events=1, epochs=10_000, budget_s=600)
    runs = runs_of(settings.models)
    until(
        lambda: list((settings.models / "runs").glob(f"*/{CHECKPOINT_FOLDER}/*.safetensors")),
        START_S,
        what="a checkpoint",
    )
    process.terminate()
    assert process.wait(START_S) == 0
    (record,) = runs.all()
    assert record.state == "stopped"
    assert holder(connect(settings.redis.url), TRAINER_LEASE_KEY) is None


def test_a_turn_decides_and_leaves_the_lease(installation: Callable[..., Settings]) -> None:
    settings = installation(every_s=3_600)
    runs = runs_of(settings.models)
    add_events(settings, seed=0)
    service = Service(settings, runs, TrainerMetrics())
    assert service.turn() == Run("time", "full", "no version is served yet")
    client = connect(settings.redis.url)
    assert holder(client, TRAINER_LEASE_KEY) is None
    lease = Lease.take(client, TRAINER_LEASE_KEY, owner="somebody")
    assert lease is not None
    with lease:
        assert isinstance(service.turn(), Wait)
    begun_ms = now_ms()
    runs.write(
        RunRecord(
            run=run_name(begun_ms),
            state="refused",
            why="time",
            kind="full",
            started_ms=begun_ms,
            ended_ms=begun_ms,
            window_to={"0": 399},
        )
    )
    assert service.turn() == Wait(begun_ms + 3_600_000)


def test_without_redis_it_records_a_failure_and_waits(
    installation: Callable[..., Settings],
) -> None:
    settings = installation()
    away = settings.model_copy(
        update={"redis": settings.redis.model_copy(update={"url": "redis://127.0.0.1:9/0"})}
    )
    runs = runs_of(away.models)
    service = Service(away, runs, TrainerMetrics())
    service.turn()
    (record,) = runs.all()
    assert record.state == "failed"
    assert "moveline status" in record.says
    assert isinstance(service.turn(), Wait)
    assert runs.all() == [record]


def broken_child(settings: Settings, why: str, parent: int) -> None:
    """Stand for a run whose program cannot even begin, as with a broken installation."""
    del settings, why, parent
    sys.exit(3)


def test_a_run_that_cannot_begin_is_a_failure_too(
    installation: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = installation()
    add_events(settings, seed=0)
    runs = runs_of(settings.models)
    service = Service(settings, runs, TrainerMetrics())
    monkeypatch.setattr("compose.trainer_service.service.run_child", broken_child)
    action = service.turn()
    assert isinstance(action, Run)
    service._have_run(action, threading.Event())
    (record,) = runs.all()
    assert (record.state, record.says) == ("failed", "a run ended with code 3 before it began")
    assert isinstance(service.turn(), Wait)


def test_serving_ends_when_it_is_told_to(installation: Callable[..., Settings]) -> None:
    settings = installation()
    stop = threading.Event()
    serving = threading.Thread(
        target=Service(settings, runs_of(settings.models), TrainerMetrics()).serve, args=(stop,)
    )
    serving.start()
    until(runs_of(settings.models).newest, what="a record")
    stop.set()
    serving.join(10)
    assert not serving.is_alive()
