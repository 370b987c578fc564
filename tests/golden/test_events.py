"""Goal: bytes of events and the hashes made from them never change by accident.

Changing a literal here is a decision: producers in other languages and every stored topic, lake and
row rely on it. Write it into docs/formats.md and CHANGELOG.md, with what becomes unreadable.
"""

import json

import pytest

from features.events import (
    EVENT_VERSION,
    Event,
    decode_event,
    domain_hash,
    encode_event,
    event_hash,
    parse_id,
    stable_id,
)

FULL = Event(
    event_id="e-1",
    user_id=42,
    item_id=1007,
    action="click",
    event_time_ms=1_763_700_000_000,
    domain="home",
    dwell_ms=1200,
    value=4.5,
    request_id="r-9",
    position=3,
)
SHORT = Event(
    event_id="e-1", user_id=42, item_id=1007, action="click", event_time_ms=1_763_700_000_000
)
SHORT_JSON = (
    b'{"event_id":"e-1","user_id":42,"item_id":1007,"action":"click","event_time_ms":1763700000000}'
)
FULL_JSON = SHORT_JSON[:-1] + (
    b',"domain":"home","dwell_ms":1200,"value":4.5,"request_id":"r-9","position":3}'
)
# A map of 5 entries; FULL has 10 and begins with the same five.
SHORT_MSGPACK = bytes.fromhex(
    "85"
    "a86576656e745f6964a3652d31"  # event_id "e-1"
    "a7757365725f69642a"  # user_id 42
    "a76974656d5f6964cd03ef"  # item_id 1007
    "a6616374696f6ea5636c69636b"  # action "click"
    "ad6576656e745f74696d655f6d73cf0000019aa4b64500"  # event_time_ms
)
FULL_MSGPACK = (
    b"\x8a"
    + SHORT_MSGPACK[1:]
    + bytes.fromhex(
        "a6646f6d61696ea4686f6d65"  # domain "home"
        "a86477656c6c5f6d73cd04b0"  # dwell_ms 1200
        "a576616c7565cb4012000000000000"  # value 4.5, 64-bit
        "aa726571756573745f6964a3722d39"  # request_id "r-9"
        "a8706f736974696f6e03"  # position 3
    )
)


def test_the_version_of_these_bytes_is_one() -> None:
    assert EVENT_VERSION == 1


@pytest.mark.parametrize(
    ("event", "golden"), [(SHORT, SHORT_JSON), (FULL, FULL_JSON)], ids=["short", "full"]
)
def test_json_has_these_bytes_in_both_directions(event: Event, golden: bytes) -> None:
    assert encode_event(event) == golden
    assert decode_event(golden) == event


@pytest.mark.parametrize(
    ("event", "golden"), [(SHORT, SHORT_MSGPACK), (FULL, FULL_MSGPACK)], ids=["short", "full"]
)
def test_msgpack_has_these_bytes_in_both_directions(event: Event, golden: bytes) -> None:
    assert encode_event(event, msgpack=True) == golden
    assert decode_event(golden, msgpack=True) == event


def test_what_other_producers_may_write_differently_is_the_same_event() -> None:
    """Any key order, any white space, an explicit v and nulls, a field of a later version."""
    fields = json.loads(SHORT_JSON)
    spelled = {"later_field": [1], "v": 1, "domain": None, "dwell_ms": None, **fields}
    reversed_order = dict(reversed(spelled.items()))
    assert decode_event(json.dumps(reversed_order, indent=2).encode()) == SHORT


@pytest.mark.parametrize(
    ("text", "golden"),
    [
        ("user-42", 0x6FA0_CA4D_7BE6_EFA6),
        ("sku/0001", 1_346_453_859_446_403_894),
        # The digest is 174ec559233e3ebf: text is hashed as UTF-8.
        ("\u00c4rger", 0x174E_C559_233E_3EBF),
        ("", 7_252_660_547_403_494_068),
    ],
)
def test_string_ids_hash_to(text: str, golden: int) -> None:
    assert stable_id(text) == golden


@pytest.mark.parametrize(
    ("raw", "golden"),
    [
        ("42", 42),
        (42, 42),
        ("007", 7),
        ("9223372036854775807", 2**63 - 1),
        # Neither a decimal in range: hashed like any other text.
        ("9223372036854775808", 738_759_672_502_709_442),
        ("-1", 2_258_336_317_711_253_734),
    ],
)
def test_ids_at_the_edge_are_read_as(raw: str | int, golden: int) -> None:
    assert parse_id(raw) == golden


def test_event_ids_hash_to() -> None:
    assert event_hash("e-1") == 0x3D21_BC87_29AC_D985


def test_domains_hash_to() -> None:
    assert domain_hash("home") == 0x5418_D0AB_DCED_061A
    assert domain_hash("") == 0x2D06_8005_38D3_94C2
    assert domain_hash(None) == 0
