"""Where a key lies: Kafka's murmur2 partitioner, for many keys at once.

An event counts only in the partition where its key belongs under the number of partitions that
the log is recorded with. That is how a user's order survives a topic that somebody widened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streams.micro_batch import MicroBatch

    Words = np.ndarray[tuple[int], np.dtype[np.uint32]]

# Of org.apache.kafka.common.utils.Utils.murmur2.
_SEED: Final = 0x9747B28C
_M: Final = np.uint32(0x5BD1E995)
_WORD_BYTES: Final = 4
_POSITIVE: Final = np.uint32(0x7FFFFFFF)


def partitions_of(keys: Sequence[bytes], num_partitions: int) -> list[int]:
    """Return the partition of each key, as Java's producer and librdkafka's murmur2 choose it.

    >>> partitions_of([b"42", b"100001", b"42"], 4)
    [0, 1, 0]
    """
    by_length: dict[int, list[int]] = {}
    for at, key in enumerate(keys):
        by_length.setdefault(len(key), []).append(at)
    found = np.zeros(len(keys), np.int64)
    for length, places in by_length.items():
        joined = b"".join(keys[at] for at in places)
        bytes_KL = np.frombuffer(joined, np.uint8).reshape(len(places), length)
        found[places] = (_murmur2(bytes_KL) & _POSITIVE) % np.uint32(num_partitions)
    partitions: list[int] = found.tolist()
    return partitions


def _murmur2(bytes_KL: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> Words:
    """Return the hash of K keys of L bytes each."""
    num_keys, length = bytes_KL.shape
    hashes = np.full(num_keys, _SEED ^ length, np.uint32)
    whole = length - length % _WORD_BYTES
    for at in range(0, whole, _WORD_BYTES):
        word = _little_endian(bytes_KL[:, at : at + _WORD_BYTES]) * _M
        hashes = (hashes * _M) ^ ((word ^ (word >> np.uint32(24))) * _M)
    if whole < length:
        hashes = (hashes ^ _little_endian(bytes_KL[:, whole:])) * _M
    hashes = (hashes ^ (hashes >> np.uint32(13))) * _M
    return hashes ^ (hashes >> np.uint32(15))


def _little_endian(bytes_KW: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> Words:
    words: Words = np.zeros(len(bytes_KW), np.uint32)
    for at in range(bytes_KW.shape[1]):
        words |= bytes_KW[:, at].astype(np.uint32) << np.uint32(8 * at)
    return words


def drop_misplaced(batch: MicroBatch, num_partitions: int) -> int:
    """Leave out the events that lie where their user's key does not belong; return how many.

    `moveline repartition` moves them: they count where it puts them.
    """
    users = list(batch.by_user)
    belongs = partitions_of([b"%d" % user for user in users], num_partitions)
    num_dropped = 0
    for user, partition in zip(users, belongs, strict=True):
        events = batch.by_user[user]
        kept = [event for event in events if event.position.partition == partition]
        if len(kept) < len(events):
            num_dropped += len(events) - len(kept)
            batch.by_user[user] = kept
            if not kept:
                del batch.by_user[user]
    return num_dropped
