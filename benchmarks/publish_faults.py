"""The faults of `make faults-publish`: each breaks a publication into a running installation.

A case returns, in a sentence, what it did. Somebody asks all the time meanwhile; what he was told,
whether the next publication goes live, and what is left on disk is judged in
benchmarks/faults_publish.py, the same way for all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.publish_bench import copy_package, fill_lake, train_once, until
from features.clock import now_ms
from features.events import Event
from trainer.manifest import GOLDEN_FILE, ITEM_IDS_FILE, MANIFEST_FILE, MODEL_FILE, sha256_of
from trainer.publish import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.publish_bench import Installation


class NotRefusedError(Exception):
    """A publication that had to fail went live."""


@dataclass(frozen=True)
class Case:
    """A fault, and what may be answered during it.

    Attributes:
        may_go_live: the version that is being published may answer, too.
        may_fall_back: answers without the model are right: Redis or the model is away.
        may_fail: requests may fail: tritonserver itself is dead for a while.
    """

    run: Callable[[Installation], str]
    may_go_live: bool = False
    may_fall_back: bool = False
    may_fail: bool = False


def killed_after(bench: Installation, step: Step) -> str:
    """SIGKILL the publisher once it has said that a step is done."""
    child = bench.child(bench.packages[1], wait_at=step)
    child.reach(step)
    child.kill()
    return f"SIGKILL after step {int(step)}, {step.name.lower()}"


def refused(bench: Installation, package: Path, word: str, *, more: tuple[str, ...] = ()) -> str:
    """Publish what has to be refused; return the refusal's last line.

    Raises:
        NotRefusedError: it went live, or another thing was wrong with it.
    """
    code, err = bench.child(package, more=more).end()
    if code == 0 or word not in err:
        raise NotRefusedError(f"ended with {code} and without {word!r}: {err[-300:]}")
    last = [line for line in err.splitlines() if word in line][-1]
    return last[:160]


@contextmanager
def broken(bench: Installation) -> Iterator[Path]:
    """Yield a copy of a package that may be broken."""
    package = copy_package(bench.packages[1], bench.folder / "broken")
    try:
        yield package
    finally:
        shutil.rmtree(package)


def truncated(bench: Installation) -> str:
    """Publish a package of which the second half is missing."""
    with broken(bench) as package:
        content = (package / MODEL_FILE).read_bytes()
        (package / MODEL_FILE).write_bytes(content[: len(content) // 2])
        return refused(bench, package, "ExportError")


def byte_flipped(bench: Installation) -> str:
    """Publish a package with one other bit in the weights."""
    with broken(bench) as package:
        content = bytearray((package / MODEL_FILE).read_bytes())
        content[len(content) // 2] ^= 1
        (package / MODEL_FILE).write_bytes(content)
        return refused(bench, package, "ExportError")


def byte_flipped_on_disk(bench: Installation) -> str:
    """Flip a bit of the copy in the repository, between the rename and Triton's load."""
    child = bench.child(bench.packages[1], wait_at=Step.RENAMED)
    child.reach(Step.RENAMED)
    (version,) = bench.versions().never_live()
    model = bench.versions().folders[version] / MODEL_FILE
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    child.go_on()
    code, err = child.end()
    if code == 0 or "was changed after it was published" not in err:
        raise NotRefusedError(f"ended with {code}: {err[-300:]}")
    return "Triton refused the version whose file differs from its hash"


def not_finite(bench: Installation) -> str:
    """Publish a package whose model answers NaN."""
    with broken(bench) as package:
        golden = dict(np.load(package / GOLDEN_FILE))
        golden["out.score"][:] = np.nan
        with (package / GOLDEN_FILE).open("wb") as file:
            np.savez(file, allow_pickle=False, **golden)
        _rehash(package)
        return refused(bench, package, "NotFiniteError")


def _rehash(package: Path) -> None:
    import json  # noqa: PLC0415 - one use

    path = package / MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {name: sha256_of(package / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def no_better_model(bench: Installation) -> str:
    """Have the trainer learn from a log in which counting is always right: no model is better."""
    fill_lake(bench, _faithful())
    record = train_once(bench)
    if record["state"] != "refused" or "own_frequency has" not in record["says"]:
        raise NotRefusedError(f"the run was {record['state']}: {record['says']}")
    return str(record["says"])[:160]


def _faithful() -> list[Event]:
    """Return events of users who meet the same item every day."""
    newest_ms = now_ms()
    return [
        Event(
            event_id=f"faithful:{user}:{day}",
            user_id=user,
            item_id=user,
            action="click",
            event_time_ms=newest_ms - (_NUM_DAYS - day) * _DAY_MS,
        )
        for user in range(_NUM_FAITHFUL)
        for day in range(_NUM_DAYS)
    ]


def other_schema(bench: Installation) -> str:
    """Publish a model of other features than the live generation has."""
    package = copy_package(bench.packages[1], bench.folder / "schema", feature_schema_hash="0" * 16)
    try:
        return refused(bench, package, "SchemaMismatchError")
    finally:
        shutil.rmtree(package)


def disk_full(bench: Installation) -> str:
    """Let no file become larger than the vocabulary: writing the weights fails."""
    package = bench.packages[1]
    size = (package / ITEM_IDS_FILE).stat().st_size
    return refused(bench, package, "StagingError", more=("--file-bytes-max", str(size)))


def triton_killed(bench: Installation) -> str:
    """SIGKILL tritonserver while it loads; start it again as its supervisor would."""
    child = bench.child(bench.packages[1], wait_at=Step.RENAMED)
    child.reach(Step.RENAMED)
    child.go_on()
    log = next(one.log for one in bench.stack.running() if one.name.startswith("triton"))
    version = bench.versions().never_live()[0]
    until(lambda: f"loading: gems:{version}" in log.read_text("utf-8", "replace"))
    bench.restart_triton()
    code, err = child.end()
    if code == 0 and f"live {version}" not in " ".join(child.said):
        raise NotRefusedError(err[-300:])
    return f"tritonserver SIGKILLed while it loaded version {version}, publisher ended with {code}"


def two_at_once(bench: Installation) -> str:
    """Have two publishers run at the same time, the first to claim its token waiting longest."""
    first = bench.child(bench.packages[1], wait_at=Step.PROVEN)
    first.reach(Step.PROVEN)
    second = bench.child(bench.packages[0])
    code, err = second.end()
    if code:
        raise NotRefusedError(f"the second publisher failed: {err[-300:]}")
    bench.note(int(second.said[-1]))
    first.go_on()
    code, err = first.end()
    if code == 0 or "StaleTokenError" not in err:
        raise NotRefusedError(f"the first publisher ended with {code}: {err[-300:]}")
    return "two publishers; the one that had claimed first came last and was refused"


def redis_away(bench: Installation, step: Step) -> str:
    """Stop Redis at a step of the publication, and let it go on after the publisher has ended."""
    child = bench.child(bench.packages[1], wait_at=step)
    child.reach(step)
    pid = bench.pid("redis")
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(_AWAY_S, partial(os.kill, pid, signal.SIGCONT))
    try:
        child.go_on()
        timer.start()
        code, _ = child.end()
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)
    return (
        f"Redis silent from step {int(step)}, {step.name.lower()}, on; publisher ended with {code}"
    )


_DAY_MS: Final = 86_400_000
_NUM_FAITHFUL: Final = 40
_NUM_DAYS: Final = 30
# Longer than a command waits for Redis.
_AWAY_S: Final = 12.0

CASES: Final[dict[str, Case]] = {
    **{
        f"killed-{step.name.lower()}": Case(
            partial(killed_after, step=step), may_go_live=step >= Step.RECORDED
        )
        for step in Step
    },
    "truncated": Case(truncated),
    "byte-flipped": Case(byte_flipped),
    "byte-flipped-on-disk": Case(byte_flipped_on_disk),
    "not-finite": Case(not_finite),
    "no-better-model": Case(no_better_model),
    "other-schema": Case(other_schema),
    "disk-full": Case(disk_full),
    "triton-killed": Case(triton_killed, may_go_live=True, may_fall_back=True, may_fail=True),
    "two-at-once": Case(two_at_once, may_go_live=True),
    "redis-away-before": Case(partial(redis_away, step=Step.REMEMBERED), may_fall_back=True),
    "redis-away-recorded": Case(
        partial(redis_away, step=Step.RECORDED), may_go_live=True, may_fall_back=True
    ),
}
