"""The lifelong memory of a user: what folding means, and the memory as bytes. Pure; numpy only.

A memory is a sum over events, so it does not depend on the order of what is folded, nor on how the
events are cut, up to the rounding of a sum. What it has folded is always chunks 0 to
`num_chunks` - 1, each once. Layout: docs/formats.md.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np

from features.errors import CorruptMemoryError

if TYPE_CHECKING:
    Float32s = np.ndarray[Any, np.dtype[np.float32]]
    Int64s = np.ndarray[Any, np.dtype[np.int64]]

# RECORDs [N, C]: N chunks.
Chunks = np.ndarray[tuple[int, int], np.dtype[np.void]]

# The state that every compressor folds events into, float32.
LIFELONG_ROWS: Final = 64
LIFELONG_WIDTH: Final = 64
MEMORY_FORMAT: Final = 1
_MAGIC: Final = b"LM"
# Magic, format, chunks, begins, events, version, checksum of all but itself.
_HEADER: Final = struct.Struct("<2sHIIQ8sI")
_CRC_AT: Final = _HEADER.size - 4
_STATE_BYTES: Final = LIFELONG_ROWS * LIFELONG_WIDTH * 4
MEMORY_BYTES: Final = _HEADER.size + _STATE_BYTES
_VERSION: Final = re.compile(r"[0-9a-f]{16}")


class Memory(NamedTuple):
    """What has been folded of one user under one memory version.

    Attributes:
        num_chunks: k: chunks 0 to k - 1 are in it.
        num_events: how many events those are.
        begins: the ordinal of the first event of the user's state: 0, or what a forget left.
        state: float32 [LIFELONG_ROWS, LIFELONG_WIDTH].
    """

    num_chunks: int
    num_events: int
    begins: int
    state: Float32s


class Folded(NamedTuple):
    """What a compressor made of N chunks, each by itself.

    Attributes:
        states: float32 [N, LIFELONG_ROWS, LIFELONG_WIDTH].
        counts: events of each, int64 [N].
    """

    states: Float32s
    counts: Int64s


class Fold(Protocol):
    """Folds chunks with one version of the compressor."""

    def __call__(self, model_version: int, records_NC: Chunks) -> Folded:
        """Return the state of each chunk by itself; RECORDs [N, C]."""
        ...


class LiveMemory(msgspec.Struct, frozen=True):
    """A memory version that is kept up to date, and the version of `lifelong` that folds it."""

    memory_version: str
    lifelong_model_version: int


def empty_memory(begins: int) -> Memory:
    """Return the memory of a user of whom nothing is folded."""
    return Memory(0, 0, begins, np.zeros((LIFELONG_ROWS, LIFELONG_WIDTH), np.float32))


def fold_into(memory: Memory, folded: Folded) -> Memory:
    """Return the memory with the next chunks in it; `memory` is not changed."""
    return memory._replace(
        num_chunks=memory.num_chunks + len(folded.counts),
        num_events=memory.num_events + int(folded.counts.sum()),
        state=memory.state + folded.states.sum(axis=0, dtype=np.float32),
    )


def check_version(text: str) -> str:
    """Return a memory version.

    Raises:
        ValueError: not 16 hex digits.

    >>> check_version("00ff00ff00ff00ff")
    '00ff00ff00ff00ff'
    """
    if not _VERSION.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a memory version: 16 hex digits, as a model's manifest and "
            "`moveline lifelong status` have them."
        )
    return text


def pack_memory(memory: Memory, memory_version: str) -> bytes:
    """Return the memory's bytes."""
    header = _HEADER.pack(
        _MAGIC,
        MEMORY_FORMAT,
        memory.num_chunks,
        memory.begins,
        memory.num_events,
        bytes.fromhex(check_version(memory_version)),
        0,
    )[:_CRC_AT]
    state = memory.state.astype("<f4").tobytes()
    return header + struct.pack("<I", zlib.crc32(state, zlib.crc32(header))) + state


def unpack_memory(raw: bytes | memoryview, memory_version: str) -> Memory:
    """Return the memory in `raw`; its state shares memory with it.

    Raises:
        CorruptMemoryError: wrong size, magic, format, checksum, or another version's.
    """
    if len(raw) != MEMORY_BYTES:
        raise CorruptMemoryError(f"{len(raw)} bytes; a memory has {MEMORY_BYTES}")
    magic, number, num_chunks, begins, num_events, version, crc = _HEADER.unpack_from(raw)
    if (magic, number) != (_MAGIC, MEMORY_FORMAT):
        raise CorruptMemoryError(
            f"magic {magic!r}, format {number}; this build reads {_MAGIC!r}, {MEMORY_FORMAT}"
        )
    if zlib.crc32(raw[_HEADER.size :], zlib.crc32(raw[:_CRC_AT])) != crc:
        raise CorruptMemoryError("the memory does not match its checksum")
    if version.hex() != memory_version:
        raise CorruptMemoryError(f"memory version {version.hex()}, {memory_version} asked for")
    state = np.frombuffer(raw, "<f4", offset=_HEADER.size)
    return Memory(num_chunks, num_events, begins, state.reshape(LIFELONG_ROWS, LIFELONG_WIDTH))


def memory_difference(left: Memory, right: Memory) -> float:
    """Return the largest difference of two states, relative to the largest value of either.

    Both are sums over the same events: what rounding may do grows with the size of the sum.
    """
    size = max(float(np.abs(left.state).max()), float(np.abs(right.state).max()), 1e-30)
    return float(np.abs(left.state.astype(np.float64) - right.state).max()) / size
