"""Goal: when to train is decided by the records and what is seen, for any of both."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from compose.settings import TrainingSettings
from compose.trainer_service.records import RunRecord, run_name
from compose.trainer_service.schedule import (
    BACKOFF_MS_MAX,
    LOOK_AGAIN_MS,
    Past,
    Run,
    Schedule,
    Seen,
    Skip,
    Wait,
    backoff_ms,
    decide,
    num_new_offsets,
)

NOW_MS = 1_763_700_000_000
HOUR_MS = 3_600_000
SCHEDULE = Schedule(
    every_ms=6 * HOUR_MS,
    every_events=5_000,
    full_every_ms=7 * 24 * HOUR_MS,
    events_min=100,
    lag_max=1_000,
)
LAKE = {"0": (0, 1_000), "1": (50, 2_000)}


def record(ago_ms: int, **fields: object) -> RunRecord:
    begun_ms = NOW_MS - ago_ms
    given = {
        "run": run_name(begun_ms),
        "state": "published",
        "why": "time",
        "started_ms": begun_ms,
        "ended_ms": begun_ms + 60_000,
        "kind": "full",
        "window_to": {"0": 999, "1": 1_999},
        **fields,
    }
    return msgspec.convert(given, RunRecord)


def past(*records: RunRecord) -> Past:
    return Past.of(records)


def seen(**fields: object) -> Seen:
    given = {
        "now_ms": NOW_MS,
        "lake": LAKE,
        "lag": 0,
        "served_version": 3,
        "served_ms": NOW_MS - 24 * HOUR_MS,
    }
    return Seen(**{**given, **fields})  # type: ignore[arg-type]


def test_the_first_run_begins_at_once_and_from_scratch() -> None:
    action = decide(SCHEDULE, past(), seen(served_version=None))
    assert action == Run("time", "full", "no version is served yet")


def test_a_run_waits_for_its_time() -> None:
    before = record(6 * HOUR_MS - 1, window_to={"0": 899, "1": 1_899})
    assert decide(SCHEDULE, past(before), seen()) == Wait(NOW_MS + 1)
    before = msgspec.structs.replace(before, started_ms=NOW_MS - 6 * HOUR_MS)
    action = decide(SCHEDULE, past(before), seen())
    assert isinstance(action, Run)
    assert (action.why, action.kind) == ("time", "warm")


def test_new_events_wake_it_earlier() -> None:
    before = past(record(HOUR_MS))
    almost = {"0": (0, 1_000 + 4_999), "1": (50, 2_000)}
    assert isinstance(decide(SCHEDULE, before, seen(lake=almost)), Wait)
    action = decide(SCHEDULE, before, seen(lake={**almost, "1": (50, 2_001)}))
    assert isinstance(action, Run)
    assert action.why == "events"


def test_events_that_the_lake_dropped_at_its_beginning_are_not_new() -> None:
    assert num_new_offsets(past(), seen()) == 1_000 + 1_950
    assert num_new_offsets(past(record(0)), seen(lake={**LAKE, "1:0": (0, 7)})) == 7


def test_reasons_not_to_train() -> None:
    old = past(record(7 * HOUR_MS))
    for looked, word in (
        (seen(lake={}), "holds no event"),
        (seen(lag=1_001), "behind the topic"),
        (seen(), "are new in the lake"),
    ):
        action = decide(SCHEDULE, old, looked)
        assert isinstance(action, Skip)
        assert word in action.says


def test_a_reason_not_to_train_is_looked_at_again_after_a_while() -> None:
    skip = record(LOOK_AGAIN_MS - 1, state="skipped", kind=None, ended_ms=NOW_MS - 1)
    assert decide(SCHEDULE, past(skip), seen()) == Wait(NOW_MS - 1 + LOOK_AGAIN_MS)
    later = seen(now_ms=NOW_MS - 1 + LOOK_AGAIN_MS)
    assert isinstance(decide(SCHEDULE, past(skip), later), Run)


def test_training_from_scratch_comes_round() -> None:
    full = record(8 * 24 * HOUR_MS, kind="full", window_to={})
    warm = record(7 * HOUR_MS, kind="warm", window_to={})
    action = decide(SCHEDULE, past(full, warm), seen())
    assert isinstance(action, Run)
    assert action.kind == "full"
    fresh = record(24 * HOUR_MS, kind="full", window_to={})
    action = decide(SCHEDULE, past(full, fresh, warm), seen())
    assert isinstance(action, Run)
    assert action.kind == "warm"


def test_without_the_package_it_trains_from_scratch_and_says_why() -> None:
    action = decide(SCHEDULE, past(), seen(missing="its package is gone"))
    assert action == Run("time", "full", "version 3 cannot be gone on from: its package is gone")


def test_who_asks_need_not_wait_but_reasons_count() -> None:
    new = record(0, window_to={"0": 0})
    assert isinstance(decide(SCHEDULE, past(new), seen(), asked=True), Run)
    failed = record(1, state="failed", window_to={})
    assert isinstance(decide(SCHEDULE, past(failed), seen(), asked=True), Run)
    assert isinstance(decide(SCHEDULE, past(new), seen(lag=10**6), asked=True), Skip)


def test_the_settings_have_a_schedule() -> None:
    schedule = Schedule.of(TrainingSettings())
    assert schedule.every_ms == 6 * HOUR_MS
    assert schedule.full_every_ms == 7 * 24 * HOUR_MS


STATES = ("running", "stopped", "skipped", "failed", "refused", "published")
OFFSETS = st.dictionaries(
    st.sampled_from(["0", "1", "1:0"]),
    st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)).map(lambda two: tuple(sorted(two))),
)


@st.composite
def pasts(draw: st.DrawFn) -> Past:
    agos = sorted(draw(st.lists(st.integers(0, 30 * 24 * HOUR_MS), max_size=6)), reverse=True)
    return Past.of(
        [
            record(
                ago_ms,
                state=draw(st.sampled_from(STATES)),
                kind=draw(st.sampled_from(["full", "warm", None])),
                times=draw(st.integers(1, 50)),
                ended_ms=NOW_MS - draw(st.integers(0, ago_ms)),
                window_to={field: end for field, (_, end) in draw(OFFSETS).items()},
            )
            for ago_ms in agos
        ]
    )


@given(
    pasts(),
    OFFSETS,
    st.integers(0, 3_000),
    st.sampled_from([None, 1]),
    st.sampled_from(["", "asked"]),
)
def test_what_holds_whatever_happened(
    before: Past, lake: dict[str, tuple[int, int]], lag: int, served: int | None, by: str
) -> None:
    asked = by == "asked"
    looked = seen(lake=lake, lag=lag, served_version=served)
    action = decide(SCHEDULE, before, looked, asked=asked)
    new = num_new_offsets(before, looked)
    assert 0 <= new <= sum(end - first for first, end in lake.values())
    if isinstance(action, Wait):
        assert not asked
        assert action.until_ms > NOW_MS
        # There is an end to every waiting, of which nothing but failures makes a long one.
        bound_ms = BACKOFF_MS_MAX if before.failures else SCHEDULE.every_ms
        assert action.until_ms <= NOW_MS + bound_ms
        later = decide(SCHEDULE, before, seen(now_ms=action.until_ms, lake=lake, lag=lag))
        assert not isinstance(later, Wait)
    if isinstance(action, Run):
        assert lag <= SCHEDULE.lag_max
        assert new >= SCHEDULE.events_min
        assert action.kind == "full" or served is not None
        assert asked or not before.failures or before.failed_ms + backoff_ms(1) <= NOW_MS
    # Nobody is asked twice about the same: after a recorded skip or failure there is a pause.
    if not asked:
        for state in ("skipped", "failed"):
            noted = Past.of([record(0, state=state, kind=None, ended_ms=NOW_MS)])
            assert isinstance(decide(SCHEDULE, noted, looked), Wait)


@given(st.integers(1, 10**6))
def test_waiting_grows_to_its_cap(failures: int) -> None:
    assert 0 < backoff_ms(failures) <= backoff_ms(failures + 1) <= BACKOFF_MS_MAX
