"""Goal: records of the feature log stay readable; changing a byte of them is a decision."""

from __future__ import annotations

import msgspec
import pytest

from features.errors import FeatureLogError
from features.feature_log import Served, decode_served, encode_served
from features.state import Position
from features.view import SessionView

RECORD_BYTES = bytes.fromhex(
    "070000000000000020a4e0a29a0100000000000000000000"
    "0300000000000000010000000f000000ffffffff01000000"
)
SERVED = Served(
    served_at_ms=1_763_700_000_000,
    user_id=42,
    generation=1,
    schema_hash="acf8567a24559848",
    ordinal=2,
    clock_ms=1_763_700_000_001,
    position=Position(0, 3, 41),
    recent=RECORD_BYTES,
    mid=b"",
    user_session=SessionView(
        is_open=True,
        session_id=1,
        start_ms=1_763_700_000_000,
        last_ms=1_763_700_000_000,
        num_events=1,
        dwell_ms=15,
        distinct_items=1,
        action_counts=(0, 1),
        last_items=(7,),
    ),
    item_ids=[7, 2**63 - 1],
    scores=[-0.5, -1.0],
    contribution=(0.5, 0.25, 0.25),
    live_version=3,
    model_version=3,
    degraded=0,
    request_id="r-1",
    memory_version="00ff00ff00ff00ff",
    num_folded=5,
    has_mid=False,
    candidates=[7, 8],
    in_domain=2**64 - 1,
    arm="canary",
    took_ms=12.5,
)
GOLDEN = (
    "de0019ac7365727665645f61745f6d73cf0000019aa4b64500a7757365725f69642aaa67656e6572617469"
    "6f6e01ab736368656d615f68617368b061636638353637613234353539383438a76f7264696e616c02a863"
    "6c6f636b5f6d73cf0000019aa4b64501a8706f736974696f6e83a6736f7572636500a9706172746974696f"
    "6e03a66f666673657429a6726563656e74c430070000000000000020a4e0a29a0100000000000000000000"
    "0300000000000000010000000f000000ffffffff01000000a36d6964c400ac757365725f73657373696f6e"
    "99c301cf0000019aa4b64500cf0000019aa4b64500010f019200019107a86974656d5f6964739207cf7fff"
    "ffffffffffffa673636f72657392cbbfe0000000000000cbbff0000000000000ac636f6e74726962757469"
    "6f6e93cb3fe0000000000000cb3fd0000000000000cb3fd0000000000000ac6c6976655f76657273696f6e"
    "03ad6d6f64656c5f76657273696f6e03a8646567726164656400aa726571756573745f6964a3722d31ae6d"
    "656d6f72795f76657273696f6eb030306666303066663030666630306666aa6e756d5f666f6c64656405a7"
    "6861735f6d6964c2aa63616e64696461746573920708a9696e5f646f6d61696ecfffffffffffffffffa361"
    "726da663616e617279a7746f6f6b5f6d73cb4029000000000000a17603"
)
# What builds before candidates, domains and canaries wrote: still read.
VERSION_2 = (
    "de0014ac7365727665645f61745f6d73cf0000019aa4b64500a7757365725f69642aaa67656e6572617469"
    "6f6e01ab736368656d615f68617368b061636638353637613234353539383438a76f7264696e616c02a863"
    "6c6f636b5f6d73cf0000019aa4b64501a8706f736974696f6e83a6736f7572636500a9706172746974696f"
    "6e03a66f666673657429a6726563656e74c430070000000000000020a4e0a29a0100000000000000000000"
    "0300000000000000010000000f000000ffffffff01000000a36d6964c400ac757365725f73657373696f6e"
    "99c301cf0000019aa4b64500cf0000019aa4b64500010f019200019107a86974656d5f6964739207cf7fff"
    "ffffffffffffa673636f72657392cbbfe0000000000000cbbff0000000000000ac636f6e74726962757469"
    "6f6e93cb3fe0000000000000cb3fd0000000000000cb3fd0000000000000ac6c6976655f76657273696f6e"
    "03ad6d6f64656c5f76657273696f6e03a8646567726164656400aa726571756573745f6964a3722d31ae6d"
    "656d6f72795f76657273696f6eb030306666303066663030666630306666aa6e756d5f666f6c64656405a1"
    "7602"
)
# What builds before memories wrote: still read, as a read without a memory.
VERSION_1 = (
    "de0012ac7365727665645f61745f6d73cf0000019aa4b64500a7757365725f69642aaa67656e65726174696f"
    "6e01ab736368656d615f68617368b061636638353637613234353539383438a76f7264696e616c02a8636c6f"
    "636b5f6d73cf0000019aa4b64501a8706f736974696f6e83a6736f7572636500a9706172746974696f6e03a6"
    "6f666673657429a6726563656e74c430070000000000000020a4e0a29a010000000000000000000003000000"
    "00000000010000000f000000ffffffff01000000a36d6964c400ac757365725f73657373696f6e99c301cf00"
    "00019aa4b64500cf0000019aa4b64500010f019200019107a86974656d5f6964739207cf7fffffffffffffff"
    "a673636f72657392cbbfe0000000000000cbbff0000000000000ac636f6e747269627574696f6e93cb3fe000"
    "0000000000cb3fd0000000000000cb3fd0000000000000ac6c6976655f76657273696f6e03ad6d6f64656c5f"
    "76657273696f6e03a8646567726164656400aa726571756573745f6964a3722d31a17601"
)


# What the fields hold that came with version 3, where a record does not have them.
BEFORE_3 = {"has_mid": True, "candidates": [], "in_domain": 0, "arm": "live", "took_ms": 0.0}


def test_version_2_is_read() -> None:
    older = msgspec.structs.replace(SERVED, **BEFORE_3, v=2)
    assert decode_served(bytes.fromhex(VERSION_2)) == older


def test_version_1_is_read() -> None:
    older = msgspec.structs.replace(SERVED, **BEFORE_3, memory_version=None, num_folded=0, v=1)
    assert decode_served(bytes.fromhex(VERSION_1)) == older
    assert older.chunks_folded is None
    assert SERVED.chunks_folded == 5


def test_the_bytes() -> None:
    assert encode_served(SERVED).hex() == GOLDEN
    assert decode_served(bytes.fromhex(GOLDEN)) == SERVED


def test_a_read_of_nothing() -> None:
    unknown = msgspec.structs.replace(
        SERVED, position=None, user_session=None, recent=b"", ordinal=0, request_id=""
    )
    assert decode_served(encode_served(unknown)) == unknown
    assert unknown.view() is None


def test_a_reader_ignores_fields_it_does_not_know() -> None:
    plain = msgspec.msgpack.decode(encode_served(SERVED))
    assert decode_served(msgspec.msgpack.encode({**plain, "novelty": 1})) == SERVED


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "without a value"),
        (b"", "not a feature log record"),
        (b"\xc1", "not a feature log record"),
        (msgspec.msgpack.encode({"v": 1}), "not a feature log record"),
        (
            encode_served(msgspec.structs.replace(SERVED, v=4)),
            "version 4; this build reads 1, 2, 3",
        ),
        (encode_served(msgspec.structs.replace(SERVED, mid=b"x")), "a record has 48"),
    ],
)
def test_what_is_no_record_is_refused(value: bytes | None, said: str) -> None:
    with pytest.raises(FeatureLogError, match=said):
        decode_served(value)
