"""Revisions: published files of a partition replaced by others, all at once.

Readers take the newest revision when they begin and keep to it; its files stay until
`remove_old_revisions` finds that another has been the newest for long enough. The sink goes on
writing new files meanwhile.

Crash after step n of `rewrite` -> what is seen -> how it heals:
1 lock taken         -> nothing; the kernel frees the lock      -> the next rewrite goes on
2 new files          -> a pending folder no reader looks at     -> the next rewrite removes it
3 manifest in it     -> likewise                                -> likewise
4 folder renamed     -> the new revision, whole                 -> nothing to heal
and of `remove_old_revisions`, which goes on when it is called again:
1 replaced files     -> fewer files that no kept revision lists
2 old manifests      -> revisions that nobody can list any more
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import LakeError
from features.lake import (
    LakeFile,
    as_file,
    file_name,
    list_partition,
    list_partitions,
    log_topics,
    partition_folder,
    write_file,
)
from features.lake_lock import REVISION_LOCK_NAME, locked
from features.lake_manifest import (
    MANIFEST_NAME,
    ListedFile,
    Manifest,
    read_manifest,
    revision_name,
    revision_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

# A name that features.lake takes for neither a file nor a revision.
PENDING_REVISION_NAME: Final = ".pending-revision"
# How long replaced files stay for whoever began to read before: longer than a day's training.
KEPT_MS: Final = 2 * 86_400_000


@dataclass(frozen=True)
class Place:
    """One partition's part of a lake; `source` counts the topics of the log."""

    root: Path
    topic: str
    partition: int
    source: int = 0

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return partition_folder(self.root, self.topic, self.partition)

    def files(self) -> list[LakeFile]:
        """Return the files that count; LakeError as `list_partition` says."""
        return list_partition(self.root, self.topic, self.partition)


@dataclass(frozen=True)
class Replacement:
    """Neighbouring files, and the events that stand in their offsets from now on."""

    old: Sequence[LakeFile]
    events: pa.Table


@dataclass(frozen=True)
class Found:
    """A file on disk that holds events of a user; `is_current` if readers who begin now see it."""

    file: LakeFile
    num_events: int
    is_current: bool


def places(root: Path, topic: str) -> list[Place]:
    """Return every partition of the log's topics, of which `topic` is the first."""
    return [
        Place(root, name, partition, source)
        for source, name in enumerate(log_topics(root, topic))
        for partition in list_partitions(root, name)
    ]


def rewrite(
    place: Place,
    plan: Callable[[Sequence[LakeFile]], Iterable[Replacement]],
    *,
    reason: str,
    now_ms: int,
) -> Manifest | None:
    """The replacements count from now on; return the new revision, None if there were none.

    Args:
        place: the partition.
        plan: given the files that count, yields what replaces some of them, in their order; one
            replacement is in memory at a time.
        reason: kept in the manifest; it names no user.
        now_ms: kept in the manifest.

    Raises:
        LakeError: files leave a hole, or one of them cannot be read.
        LakeBusyError: another rewrite is under way.
    """
    with locked(place.folder, name=REVISION_LOCK_NAME):
        files = place.files()
        pending = place.folder / PENDING_REVISION_NAME
        shutil.rmtree(pending, ignore_errors=True)
        replaced: dict[LakeFile, ListedFile | None] = {}
        revision = (
            max(revision_numbers(path.name for path in place.folder.iterdir()), default=0) + 1
        )
        for replacement in plan(files):
            pending.mkdir(exist_ok=True)
            listed = _write(pending, revision, replacement)
            replaced |= dict.fromkeys(replacement.old) | {replacement.old[0]: listed}
        if not replaced:
            return None
        manifest = Manifest(
            revision=revision,
            made_ms=now_ms,
            reason=reason,
            files=tuple(_listed(place, files, replaced)),
        )
        _publish(place.folder, pending, manifest)
    return manifest


def _write(pending: Path, revision: int, replacement: Replacement) -> ListedFile:
    start, end = replacement.old[0].start, replacement.old[-1].end
    name = file_name(start, end)
    write_file(pending / name, replacement.events)
    return ListedFile(start, end, f"{revision_name(revision)}/{name}")


def _listed(
    place: Place, files: Sequence[LakeFile], replaced: Mapping[LakeFile, ListedFile | None]
) -> Iterator[ListedFile]:
    """Yield what the new manifest lists: of replaced neighbours, one in the place of the first."""
    for file in files:
        listed = replaced.get(file)
        if listed:
            yield listed
        elif file not in replaced:
            yield ListedFile(file.start, file.end, str(file.path.relative_to(place.folder)))


def _publish(folder: Path, pending: Path, manifest: Manifest) -> None:
    with (pending / MANIFEST_NAME).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(pending)
    pending.rename(folder / revision_name(manifest.revision))
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_user(root: Path, topic: str, user_id: int) -> list[Found]:
    """Return every file on disk that holds events of a user, replaced ones included.

    Nothing found with `is_current` is the proof that no reader who begins now sees the user.

    Raises:
        LakeError: a hole, or a file cannot be read.
    """
    found = []
    for place in places(root, topic):
        current = {file.path for file in place.files()}
        for file in files_on_disk(place):
            num_events = count_user(file.path, user_id)
            if num_events:
                found.append(Found(file, num_events, file.path in current))
    return found


def count_user(path: Path, user_id: int) -> int:
    """Return how many events of a user a file holds; row groups without the id are not read.

    Raises:
        LakeError: the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            column = parquet.schema_arrow.get_field_index("user_id")
            total = 0
            for group in range(parquet.num_row_groups):
                bounds = parquet.metadata.row_group(group).column(column).statistics
                if bounds and bounds.has_min_max and not bounds.min <= user_id <= bounds.max:
                    continue
                users = parquet.read_row_group(group, columns=["user_id"])["user_id"]
                total += pc.sum(pc.equal(users, user_id)).as_py() or 0
            return total
    except (pa.ArrowException, OSError) as error:
        raise LakeError(
            f"{path} cannot be read ({error}), so nobody knows what it holds."
        ) from error


def files_on_disk(place: Place) -> list[LakeFile]:
    """Return every file of every revision, also those that no longer count."""
    folders = [place.folder, *place.folder.glob(revision_name(0)[:-8] + "*")]
    paths = (path for folder in folders for path in folder.iterdir())
    return sorted(file for path in paths if (file := as_file(place.partition, path)))


def manifests(place: Place) -> list[Manifest]:
    """Return the revisions that are kept, oldest first.

    Raises:
        LakeError: a manifest cannot be read.
    """
    names = place.folder.glob(f"{revision_name(0)[:-8]}*/{MANIFEST_NAME}")
    numbers = revision_numbers(path.parent.name for path in names)
    return [read_manifest(place.folder, number) for number in numbers]


def remove_old_revisions(place: Place, *, before_ms: int) -> list[Path]:
    """Files that counted for the last time before `before_ms` are gone; return which they were.

    A reader that began earlier than that and still reads gets a LakeError.

    Raises:
        LakeError: a manifest cannot be read.
    """
    with locked(place.folder, name=REVISION_LOCK_NAME):
        history = manifests(place)
        if not history:
            return []
        place.files()  # a lost newest manifest must not make an older one count
        replaced_ms = [manifest.made_ms for manifest in history[1:]]
        kept = [
            manifest
            for manifest, until_ms in zip(history, [*replaced_ms, before_ms + 1], strict=True)
            if until_ms > before_ms
        ]
        keeps_first = history[0].revision == 1 and history[0].made_ms > before_ms
        listed = {place.folder / one.path for manifest in kept for one in manifest.files}
        # The sink's own files count in a revision until they stand before its end.
        sink_from = 0 if keeps_first else min(manifest.end for manifest in kept) + 1
        gone = [
            file.path
            for file in files_on_disk(place)
            if file.path not in listed
            and not (file.path.parent == place.folder and file.start >= sink_from)
        ]
        for path in gone:
            path.unlink()
        for manifest in history:
            if manifest not in kept:
                (place.folder / revision_name(manifest.revision) / MANIFEST_NAME).unlink()
        for folder in place.folder.glob(revision_name(0)[:-8] + "*"):
            if not any(folder.iterdir()):
                folder.rmdir()
    return gone
