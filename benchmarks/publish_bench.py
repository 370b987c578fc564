"""An installation to publish into: real servers, packages, and somebody who asks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.common import CONSOLE, TOPICS, kafka_home
from compose.cli.options import kafka_of
from compose.local.foreground import running_stack
from compose.local.stack import StackOptions
from compose.serving import load_served_models
from compose.settings import load_settings
from compose.versions import Versions, dead_folders
from features.config import StateConfig
from features.keys import bucket_of
from features.redis import WRITTEN, BucketWrite, CatalogueStore, StateStore, Trending, connect
from features.row import encode_write
from features.schema import schema_hash
from features.state import EMPTY_STATE, Accepted, Position, step
from scoring.client import Recommender
from scoring.errors import ScoringError
from scoring.signature import RECOMMEND_MODEL, Degraded
from scoring.triton import TritonServer
from streams.kafka import KafkaConfig, ensure_topics
from streams.producer import EventProducer
from streams.publish import publish_events
from trainer.manifest import MANIFEST_FILE, MODEL_FILE, facts_of
from trainer.repository import STAGING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compose.local.stack import LocalStack
    from compose.settings import Settings
    from features.events import Event
    from trainer.machine_code import MachineCode
    from trainer.publish import Step

RULES: Final = StateConfig(recent=8, mid=24, chunk=6, dedup_window=16)
USERS: Final = tuple(range(1, 9))
_NUM_ITEMS: Final = 40
_NUM_EVENTS: Final = 30
_START_MS: Final = 1_763_700_000_000
# A publication on a machine that does other things too.
PATIENCE_S: Final = 180.0
_TRAINING_S: Final = 600.0
_ASK_EVERY_S: Final = 0.05
_DEADLINE_S: Final = 10.0
_POLL_S: Final = 0.05


def train_packages(
    folder: Path, *, num_models: int = 2, machine_code: MachineCode = "never"
) -> list[Path]:
    """Return small packages that differ in their weights, trained for a moment each."""
    import torch  # noqa: PLC0415 - only who has no packages yet needs it

    from trainer.dataset import EventLog  # noqa: PLC0415 - likewise
    from trainer.export import Provenance, export  # noqa: PLC0415 - likewise
    from trainer.loop import LoopConfig  # noqa: PLC0415 - likewise
    from trainer.models.gems import GemsConfig  # noqa: PLC0415 - likewise
    from trainer.train import TrainConfig, train  # noqa: PLC0415 - likewise

    torch.set_num_threads(1)
    rng = np.random.default_rng(3)
    user = np.repeat(np.arange(12), 40)
    log = EventLog.from_columns(
        {
            "user_id": user,
            "item_id": rng.integers(0, _NUM_ITEMS, len(user)),
            "event_time_ms": np.sort(_START_MS - rng.integers(0, 10**9, len(user))),
            "ordinal": np.tile(np.arange(40), 12),
            "domain": np.zeros(len(user), np.uint64),
            "action": np.ones(len(user), np.uint8),
        }
    )
    model = GemsConfig(
        width=16,
        num_heads=2,
        num_blocks=1,
        num_recent_layers=1,
        num_recent=RULES.recent,
        num_mid=RULES.mid,
        dropout=0.0,
    )
    packages = []
    for number in range(num_models):
        loop = LoopConfig(examples_per_batch=16, num_threads=1, budget_s=60.0, seed=number + 1)
        config = TrainConfig(
            loop=loop, num_targets=4, code_sizes=(4, 4, 4), label_share=1.0, model=model
        )
        package = folder / f"gems-{number + 1}"
        provenance = Provenance(
            name="gems",
            created_ms=number + 1,
            window_from={"0": 0},
            window_to={"0": 1},
            feature_schema_hash=schema_hash(RULES),
            metrics={},
        )
        export(train(log, config), package, provenance, machine_code=machine_code)
        packages.append(package)
    return packages


@dataclass
class Answer:
    """What one request came to."""

    at_s: float
    taken_s: float
    user: int
    model_version: int = 0
    live_version: int = 0
    degraded: Degraded = Degraded.NONE
    items: tuple[int, ...] = ()
    error: str = ""

    @property
    def is_store_away(self) -> bool:
        """Whether no version spoke because Redis took too long, and the answer says so."""
        return Degraded.STORE_AWAY in self.degraded and not self.model_version


@dataclass
class Asker:
    """Asks `recommend` for one user after the other, all the time, in a thread of its own."""

    address: str
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, recommender: Recommender, number: int) -> Answer:
        """Return the answer to one request, or what went wrong."""
        user, started_s = USERS[number % len(USERS)], time.monotonic()
        try:
            answer = recommender.recommend(user, k=5, deadline_s=_DEADLINE_S)
        except ScoringError as error:
            return Answer(started_s, time.monotonic() - started_s, user, error=str(error))
        said = answer.provenance
        return Answer(
            started_s,
            time.monotonic() - started_s,
            user,
            said.model_version,
            said.live_version,
            said.degraded,
            tuple(item.item_id for item in answer.items),
        )

    def _run(self) -> None:
        with Recommender(self.address) as recommender:
            number = 0
            while not self._stop.wait(_ASK_EVERY_S):
                self.answers.append(self.ask(recommender, number))
                number += 1

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask beside the block."""
        thread = threading.Thread(target=self._run, name="asker")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._stop.clear()


class Child:
    """A publisher that waits at a step; dead at the end of the block, whatever happened."""

    def __init__(
        self,
        environment: Mapping[str, str],
        package: Path,
        *,
        wait_at: int = 0,
        more: Sequence[str],
    ) -> None:
        arguments = [str(package), "--wait-at", str(wait_at), *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.publish_child", *arguments],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def reach(self, step: Step) -> None:
        """Return once it says that a step is done.

        Raises:
            RuntimeError: it ended before.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if line.strip() == str(int(step)):
                return
        raise RuntimeError(f"ended before {step.name}: {self.process.communicate()[1][-500:]}")

    def go_on(self) -> None:
        """Let it go on from where it waits."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """Return how it ended, and its last words."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        self.said += out.split()
        return self.process.returncode, err


@dataclass
class Installation:
    """Servers, packages, and what has been published.

    Attributes:
        models: hash of the exported graph, by version that went live.
    """

    stack: LocalStack
    settings: Settings
    environment: dict[str, str]
    packages: list[Path]
    models: dict[int, str] = field(default_factory=dict)
    expected: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Everything of the installation on disk."""
        return self.settings.run_dir

    def versions(self) -> Versions:
        """Return what is live and on disk."""
        return Versions.read(self.settings.model_repository, *kafka_of(self.settings))

    def child(
        self, package: Path, *, wait_at: Step | None = None, more: Sequence[str] = ()
    ) -> Child:
        """Start a publisher."""
        return Child(self.environment, package, wait_at=int(wait_at or 0), more=more)

    def publish(self, package: Path) -> int:
        """Publish as an operator does and return the version.

        Raises:
            RuntimeError: it did not go live.
        """
        child = self.child(package)
        code, err = child.end()
        if code:
            raise RuntimeError(f"publishing failed: {err[-800:]}")
        version = int(child.said[-1])
        self.note(version)
        return version

    def note(self, version: int) -> None:
        """Remember what a version that is live answers."""
        model = facts_of(self.versions().folders[version])["files"][MODEL_FILE]
        self.models[version] = model
        asker = Asker(self.settings.triton.address)
        with Recommender(asker.address) as recommender:
            for number, user in enumerate(USERS):
                answer = asker.ask(recommender, number)
                if answer.model_version == version:
                    self.expected.setdefault((model, user), answer.items)

    def is_wrong(self, answer: Answer, allowed: set[int], *, may_fall_back: bool) -> bool:
        """Return whether an answer is none, or not the one that a live version gives.

        One that says that Redis was late is right, on a busy machine; whoever asks counts these.
        """
        if answer.error or answer.live_version not in allowed:
            return True
        if answer.model_version != answer.live_version:
            return not (may_fall_back or answer.is_store_away)
        expected = self.expected.get((self.models[answer.model_version], answer.user))
        return expected is not None and answer.items != expected

    def leftovers(self) -> list[str]:
        """Return what is on disk and should not be."""
        versions = self.versions()
        repository = self.settings.model_repository
        drafts = [str(path) for path in (repository / STAGING).glob("*")]
        named = {versions.live, versions.canary, *versions.lived}
        unknown = [str(folder) for one, folder in versions.folders.items() if one not in named]
        return [*drafts, *unknown, *map(str, dead_folders(versions))]

    def pid(self, name: str) -> int:
        """Return the process id of a server."""
        return next(one.pid for one in self.stack.running() if one.name == name and one.alive)

    def restart_triton(self, *, load: bool = True) -> None:
        """Kill tritonserver, start it again as it was, and load what it serves unless told not."""
        name = next(
            one.name for one in self.stack.running() if one.name.startswith("triton") and one.alive
        )
        pid = self.pid(name)
        argv = _split(Path(f"/proc/{pid}/cmdline"))
        environment = dict(part.split("=", 1) for part in _split(Path(f"/proc/{pid}/environ")))
        os.kill(pid, signal.SIGKILL)
        self.stack.stop(name)
        names = {one.name for one in self.stack.running() if one.alive}
        name = next(
            f"triton-{number}" for number in range(1, 100) if f"triton-{number}" not in names
        )
        self.stack.spawn(name, list(argv), env=environment)
        with TritonServer(self.settings.triton.address) as server:
            until(server.is_live)
        if load:
            load_served_models(self.settings)


def _split(path: Path) -> list[str]:
    return [part.decode() for part in path.read_bytes().split(b"\0") if part]


def until(is_so: Any, *, timeout_s: float = PATIENCE_S) -> None:  # noqa: ANN401 - any callable
    """Return once it is so.

    Raises:
        TimeoutError: it did not become so.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(_POLL_S)


def copy_package(package: Path, target: Path, **facts: object) -> Path:
    """Return a copy whose manifest says something else."""
    shutil.copytree(package, target)
    manifest = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
    (target / MANIFEST_FILE).write_text(json.dumps({**manifest, **facts}), encoding="utf-8")
    return target


def fill_lake(bench: Installation, events: Sequence[Event]) -> None:
    """Publish events, and have the lake's sink write them."""
    kafka, topics = kafka_of(bench.settings)
    with EventProducer(kafka, topics.events) as producer:
        publish_events(producer, events, progress=False)
    subprocess.run(
        [sys.executable, "-m", "compose.cli", "lake", "--until-end"],
        env=bench.environment,
        capture_output=True,
        check=True,
        timeout=PATIENCE_S,
    )


def train_once(bench: Installation) -> dict[str, Any]:
    """Have the trainer do one run, whatever there is to learn, and return its record."""
    environment = {
        **bench.environment,
        "MOVELINE_MODELS": str(bench.folder / "trained"),
        "MOVELINE_TRAINING__EVENTS_MIN": "1",
        "MOVELINE_TRAINING__BUDGET_S": "60",
        "MOVELINE_TRAINING__MACHINE_CODE": "never",
        # Interpreted, and beside everything else on the machine.
        "MOVELINE_TRAINING__LATENCY_MS": "10000",
    }
    done = subprocess.run(
        [sys.executable, "-m", "compose.cli", "trainer", "once", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TRAINING_S,
    )
    if not done.stdout.strip():
        raise RuntimeError(f"the trainer ended with {done.returncode}: {done.stderr[-800:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def write_users(store: StateStore) -> None:
    """Every user has a few events."""
    store.claim_generation()
    for user in USERS:
        events = [
            Accepted(
                position=Position(0, 0, number),
                append_time_ms=_START_MS + number,
                item_id=(user * 7 + number * number) % _NUM_ITEMS,
                event_time_ms=_START_MS + number,
                domain=0,
                event_hash=(user << 32) + number,
                dwell_ms=-1,
                value=float("nan"),
                action=1,
            )
            for number in range(_NUM_EVENTS)
        ]
        change = step(EMPTY_STATE, events, RULES)
        row = encode_write(EMPTY_STATE, change, len(RULES.actions))
        write = BucketWrite(bucket_of(user), 0, 0, -1, _NUM_EVENTS, {user: row})
        assert store.write_buckets([write]) == [WRITTEN]


@contextmanager
def installation(
    packages: Sequence[Path] = (), *, machine_code: MachineCode = "never"
) -> Iterator[Installation]:
    """Yield servers with users, trending items and packages; nothing is published yet."""
    with tempfile.TemporaryDirectory(prefix="moveline-publish-") as text:
        folder = Path(text)
        repository = folder / "model_repo"
        source = Path(__file__).parents[1] / "model_repo"
        for model in ("gems", "lifelong", RECOMMEND_MODEL):
            (repository / model).mkdir(parents=True)
            shutil.copy(source / model / "config.pbtxt", repository / model)
        shutil.copytree(source / RECOMMEND_MODEL / "1", repository / RECOMMEND_MODEL / "1")
        made = list(packages) or train_packages(folder / "models", machine_code=machine_code)
        options = StackOptions(
            run_dir=folder,
            model_repository=repository,
            kafka_home=kafka_home(),
            triton_environment={"MOVELINE_REDIS__URL": "{redis}"},
            persist=False,
        )
        with running_stack(options, report=CONSOLE.print) as stack:
            yield _filled(stack, folder, made)


def _filled(stack: LocalStack, folder: Path, packages: list[Path]) -> Installation:
    addresses = stack.addresses
    ensure_topics(KafkaConfig(addresses.kafka), TOPICS.specs(partitions=1, replication=1))
    client = connect(addresses.redis)
    write_users(StateStore(client, 1, RULES))
    CatalogueStore(client).put_trending(Trending((1, 2, 3), (0.3, 0.2, 0.1)))
    values = {
        "MOVELINE_KAFKA__BOOTSTRAP": addresses.kafka,
        "MOVELINE_REDIS__URL": addresses.redis,
        "MOVELINE_TRITON__GRPC": addresses.triton_grpc,
        "MOVELINE_MODEL_REPOSITORY": str(folder / "model_repo"),
        "MOVELINE_RUN_DIR": str(folder),
        "MOVELINE_LAKE__PATH": str(folder / "lake"),
    }
    settings = load_settings(
        kafka={"bootstrap": addresses.kafka},
        redis={"url": addresses.redis},
        triton={"grpc": addresses.triton_grpc},
        lake={"path": folder / "lake"},
        model_repository=folder / "model_repo",
        run_dir=folder,
    )
    load_served_models(settings)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, **values, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return Installation(stack, settings, environment, packages)
