"""Which files of a partition count: the manifest of its newest revision, and newer files.

    partition=P/revision-00000003/manifest.json          what counts since revision 3
    partition=P/revision-00000003/START-END.parquet      what revision 3 wrote anew

A revision's folder appears by rename, whole. Its manifest lists every file from the partition's
start up to the newest offset there was; files of the sink behind that follow without being listed.
`features/lake_revisions.py` makes revisions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from features.errors import LakeError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_FORMAT: Final = 1
_REVISION_NAME: Final = re.compile(r"^revision-(\d{8})$")


class ListedFile(msgspec.Struct, frozen=True):
    """A file of a revision: the offsets [start, end], and its path from the partition's folder."""

    start: int
    end: int
    path: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A revision: the files that count up to the offset `end`, why and when it was made."""

    format: int = MANIFEST_FORMAT
    revision: int
    made_ms: int
    reason: str
    files: tuple[ListedFile, ...]

    @property
    def end(self) -> int:
        """The last offset it speaks of."""
        return self.files[-1].end


def revision_name(revision: int) -> str:
    """Return the name of a revision's folder.

    >>> revision_name(3)
    'revision-00000003'
    """
    return f"revision-{revision:08d}"


def revision_numbers(names: Iterable[str]) -> list[int]:
    """Return the revisions among a folder's names, ascending."""
    matches = (_REVISION_NAME.match(name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(folder: Path, revision: int) -> Manifest:
    """Return a revision of a partition's folder.

    Raises:
        LakeError: the manifest is missing, unreadable or of another format.
    """
    path = folder / revision_name(revision) / MANIFEST_NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise LakeError(
            f"{path} cannot be read ({error}), so nobody knows which files of {folder} count: "
            "restore it, or remove the folder and let `moveline lake` write it again."
        ) from error
    if manifest.format != MANIFEST_FORMAT or not manifest.files:
        raise LakeError(
            f"{path} has format {manifest.format} with {len(manifest.files)} files; this version "
            f"reads format {MANIFEST_FORMAT} with at least one: update Moveline, or restore it."
        )
    return manifest


def newest_manifest(folder: Path, names: Iterable[str]) -> Manifest | None:
    """Return what counts in a partition's folder, None before its first revision.

    Args:
        folder: the partition's.
        names: what lies in it.

    Raises:
        LakeError: see `read_manifest`.
    """
    numbers = revision_numbers(names)
    return read_manifest(folder, numbers[-1]) if numbers else None
