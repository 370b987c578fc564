"""Goal: users stay where they are in Redis.

Changing a literal here orphans every stored key: it is a decision, with a line in CHANGELOG.md.
"""

import pytest

from features import keys


@pytest.mark.parametrize(
    ("entity_id", "bucket"),
    [(0, 0), (1, 632), (2, 241), (42, 980), (1007, 368), (2**62, 256), (2**63 - 1, 903)],
)
def test_buckets(entity_id: int, bucket: int) -> None:
    assert keys.bucket_of(entity_id) == bucket


def test_every_id_falls_into_one_of_1024() -> None:
    assert keys.NUM_BUCKETS == 1024
    assert {keys.bucket_of(user) for user in range(100_000)} == set(range(1024))


def test_keys() -> None:
    assert keys.row_key(1, 42) == "moveline:{b980}:g1:row:42"
    assert keys.chunks_key(12, 42) == "moveline:{b980}:g12:chunks:42"
    assert keys.checkpoints_key(1, 980) == "moveline:{b980}:g1:checkpoints"
    assert keys.items_key(1007) == "moveline:{i368}:items"
    assert keys.generation_key(1) == "moveline:generation:g1"
    assert keys.built_key(12) == "moveline:generation:g12:built"
    assert keys.ITEMS_READ_KEY == "moveline:items-read"
    assert keys.POINTERS_KEY == "moveline:pointers"
    assert keys.DOMAINS_KEY == "moveline:domains"
    assert keys.TRENDING_KEY == "moveline:trending"
    assert keys.WITHDRAWN_KEY == "moveline:withdrawn"
