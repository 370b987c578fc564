"""The feature log beside the lake: every logged read is compared with what the lake gives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from features.as_of import read_user_logs
from features.errors import FeatureLogError
from features.feature_log import decode_served
from features.lake import list_files
from features.schema import schema_hash
from features.skew import UserHistory
from features.skew_report import SkewReport, Skipped
from scoring.signature import Degraded
from streams.feature_log import read_feature_log
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from features.config import StateConfig
    from features.feature_log import Served
    from features.lake import LakeFile
    from features.state import Accepted, Position
    from streams.kafka import KafkaConfig


# By (source, partition), the first and the last offset the lake has.
Covered = dict[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class SkewRequest:
    """Which reads to compare.

    Attributes:
        since_ms: logged at or after this, epoch ms.
        user_id: only this user's.
        records_max: the newest so many; about 25 kB of memory each with the default sizes.
    """

    records_max: int
    since_ms: int = 0
    user_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class SkewSource:
    """Where the two sides are.

    Attributes:
        feature_log: topic of what was served.
        events: topics of events, oldest first: the place of one is its `source`.
        lake: the lake's folder.
        rules: by generation, the rules recorded for it; None where it is gone.
    """

    kafka: KafkaConfig
    feature_log: str
    events: Sequence[str]
    lake: Path
    rules: Callable[[int], StateConfig | None]


def compare_log(source: SkewSource, request: SkewRequest, *, shown: bool = False) -> SkewReport:
    """Return how what was served differs from the lake.

    Raises:
        LakeError: no lake, a hole, or a file that is truncated.
        StreamError: the feature log cannot be read.
    """
    report = SkewReport()
    by_generation: dict[int, list[Served]] = defaultdict(list)
    for served in _read(source, request, report, shown=shown):
        by_generation[served.generation].append(served)
    for generation, reads in sorted(by_generation.items()):
        config = source.rules(generation)
        comparable = [one for one in reads if _is_comparable(one, config, report)]
        if config is not None and comparable:
            _compare(source, config, comparable, report, shown=shown)
    return report


def _read(
    source: SkewSource, request: SkewRequest, report: SkewReport, *, shown: bool
) -> list[Served]:
    found: list[Served] = []
    values = read_feature_log(
        source.kafka,
        source.feature_log,
        since_ms=request.since_ms,
        records_max=request.records_max,
        user_id=request.user_id,
    )
    with progress_bar("feature log", total=None, unit="records", shown=shown) as advance:
        for value in values:
            advance(1)
            try:
                found.append(decode_served(value))
            except FeatureLogError:
                report.skip(Skipped.UNREADABLE)
    return found


def _is_comparable(served: Served, config: StateConfig | None, report: SkewReport) -> bool:
    reason = None
    if config is None:
        reason = Skipped.GENERATION_GONE
    elif served.schema_hash != schema_hash(config):
        reason = Skipped.OTHER_SCHEMA
    elif _is_unread(served):
        reason = Skipped.NOT_READ
    if reason is not None:
        report.skip(reason)
    return reason is None


def _is_unread(served: Served) -> bool:
    """Return whether no state was read: Redis was away, or there was no time for it."""
    degraded = Degraded(served.degraded)
    return Degraded.STORE_AWAY in degraded or (
        Degraded.DEADLINE in degraded
        and served.position is None
        and Degraded.UNKNOWN_USER not in degraded
    )


def _compare(
    source: SkewSource,
    config: StateConfig,
    reads: Sequence[Served],
    report: SkewReport,
    *,
    shown: bool,
) -> None:
    files = {n: list_files(source.lake, topic) for n, topic in enumerate(source.events)}
    covered = _covered(files)
    num_files = sum(map(len, files.values()))
    users = {one.user_id for one in reads}
    with progress_bar("lake", total=num_files, unit="files", shown=shown) as advance:
        logs = read_user_logs(
            source.lake, source.events, users, config, advance=lambda _: advance(1)
        )
    # A user's reads in the order of their ordinals: each history is walked through once.
    ordered = sorted(reads, key=lambda one: (one.user_id, one.ordinal))
    with progress_bar("compare", total=len(ordered), unit="reads", shown=shown) as advance:
        history, user = UserHistory((), config), None
        for served in ordered:
            advance(1)
            if served.user_id != user:
                user = served.user_id
                history = UserHistory(logs.get(user, ()), config)
            reason = _uncovered(served.position, history.events, covered)
            if history.is_forgotten(served):
                reason = Skipped.FORGOTTEN
            if reason is not None:
                report.skip(reason)
            else:
                report.add(served, history.compare(served))


def _covered(files: Mapping[int, Sequence[LakeFile]]) -> Covered:
    found: Covered = {}
    for number, of_topic in files.items():
        for file in of_topic:
            start, _ = found.get((number, file.partition), (file.start, file.end))
            found[number, file.partition] = start, file.end
    return found


def _uncovered(
    position: Position | None, events: Sequence[Accepted], covered: Covered
) -> Skipped | None:
    """Return why the lake cannot say what should have been read, None where it can."""
    if position is not None:
        _, end = covered.get((position.source, position.partition), (0, -1))
        if position.offset > end:
            return Skipped.NOT_IN_LAKE
    first = events[0].position if events else position
    if first is not None and covered[first.source, first.partition][0] > 0:
        return Skipped.LAKE_STARTS_LATER
    return None
