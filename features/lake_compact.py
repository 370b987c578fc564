"""Compaction: the small files of a live sink become one file a block of offsets."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

import pyarrow as pa

from features.lake import BLOCK_OFFSETS, read_file
from features.lake_revisions import Replacement, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from features.lake import LakeFile
    from features.lake_revisions import Place

# A block that still grows is merged from so many files on: it will be written again.
GROWING_FILES_MIN: Final = 16


class Compacted(NamedTuple):
    """What a compaction of a partition did; no new revision if nothing was to be merged."""

    revision: int | None
    num_files_before: int
    num_files_after: int


def compact(
    place: Place,
    *,
    now_ms: int,
    growing_files_min: int = GROWING_FILES_MIN,
    advance: Callable[[int], None] = lambda _num_offsets: None,
) -> Compacted:
    """Each whole block of a partition is one file, in a new revision.

    Args:
        place: the partition.
        now_ms: kept in the manifest.
        growing_files_min: how many files the newest, unfinished block needs to be merged too.
        advance: told how many offsets were looked at, block by block.

    Raises:
        LakeError: a hole, or a file cannot be read.
        LakeBusyError: another rewrite is under way.
    """

    def plan(files: Sequence[LakeFile]) -> Iterator[Replacement]:
        for block in blocks(files):
            if len(block) >= (2 if _is_whole(block) else max(2, growing_files_min)):
                yield Replacement(block, pa.concat_tables([read_file(file) for file in block]))
            advance(block[-1].end + 1 - block[0].start)

    num_before = len(place.files())
    manifest = rewrite(place, plan, reason="compact", now_ms=now_ms)
    return Compacted(manifest.revision if manifest else None, num_before, len(place.files()))


def blocks(files: Sequence[LakeFile]) -> Iterator[list[LakeFile]]:
    """Yield neighbouring files of one block of offsets; no file crosses a block's end."""
    for _, block in itertools.groupby(files, lambda file: file.start // BLOCK_OFFSETS):
        yield list(block)


def _is_whole(block: Sequence[LakeFile]) -> bool:
    return (block[-1].end + 1) % BLOCK_OFFSETS == 0
