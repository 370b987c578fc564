"""The decoder that looks at ranges itself takes exactly the events that judging would take."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from features.errors import InvalidEventError
from features.events import (
    DWELL_MS_MAX,
    ID_MAX,
    POSITION_MAX,
    TIME_MS_MAX,
    VALUE_MAX,
    decode_checked,
    decode_event,
    judge_ranges,
)

AROUND = {
    "user_id": (0, ID_MAX),
    "item_id": (0, ID_MAX),
    "event_time_ms": (0, TIME_MS_MAX),
    "v": (1, 1),
    "dwell_ms": (0, DWELL_MS_MAX),
    "position": (0, POSITION_MAX),
    "value": (-VALUE_MAX, VALUE_MAX),
}
PLAIN = {"event_id": "e", "user_id": 7, "item_id": 1, "action": "click", "event_time_ms": 5}


def near(lowest: float, largest: float) -> st.SearchStrategy[object]:
    """Return what stands at the edges of a range, inside and outside, and wrong types."""
    edges = [lowest - 1, lowest, lowest + 1, largest - 1, largest, largest + 1, lowest * 2]
    return st.sampled_from([*edges, largest * 2, None, "7", 1.5, True])


FIELDS = st.fixed_dictionaries({}, optional={k: near(*v) for k, v in AROUND.items()})


@given(FIELDS, st.sampled_from([b"7", b"07", b"8", None]), st.integers(0, 4))
@example({}, b"7", 0)
@example({"value": 1e39}, b"7", 0)
def test_takes_what_judging_takes(fields: dict[str, object], key: bytes | None, cut: int) -> None:
    value = msgspec.json.encode({**PLAIN, **fields})
    value = value[: len(value) - cut]
    try:
        expected = decode_event(value)
        judge_ranges(expected, key)
    except InvalidEventError:
        assert decode_checked(value, key) is None
        return
    found = decode_checked(value, key)
    assert found is not None
    assert msgspec.structs.asdict(found) == msgspec.structs.asdict(expected)


def test_leaves_a_forget_to_the_judges() -> None:
    forget = {**PLAIN, "action": "forget", "item_id": 0}
    assert decode_checked(msgspec.json.encode(forget), b"7") is None
    judge_ranges(decode_event(msgspec.json.encode(forget)), b"7")
    with pytest.raises(InvalidEventError, match="about no item"):
        judge_ranges(decode_event(msgspec.json.encode({**forget, "item_id": 3})), b"7")


def test_takes_an_event_and_nothing_else() -> None:
    assert decode_checked(msgspec.json.encode(PLAIN), b"7") is not None
    for value in (None, b"", b"\xff\xfe", b"[]", b"null", b'{"user_id":7}'):
        assert decode_checked(value, b"7") is None
