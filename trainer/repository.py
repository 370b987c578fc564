"""Versions in Triton's model repository: each appears whole or not at all.

    gems/4, gems/5        what Triton loads: the live version and the one before it
    .kept/gems/3          what `moveline rollback` can bring back; Triton does not see it
    .staging/TOKEN-...    a publication's copy until it is whole

So a Triton that starts loads what has to answer and nothing else, without being told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from typing import TYPE_CHECKING, Final

from trainer.errors import PublishError, StagingError
from trainer.manifest import facts_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STAGING: Final = ".staging"
KEPT: Final = ".kept"
# Python writes its byte code beside a model's source when Triton first loads it. To Triton that is
# a change of the version, and the next load would load it anew, live or not. A file of that name
# keeps Python from it; permissions would not keep root.
NO_BYTE_CODE: Final = "__pycache__"
# A version from before there were tokens: nobody knows whether it was ever live.
UNKNOWN_TOKEN: Final = 0


def versions_on_disk(model_folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, ascending: what Triton loads."""
    if not model_folder.is_dir():
        return []
    return sorted(int(path.name) for path in model_folder.iterdir() if path.name.isdecimal())


def kept_folder(model_folder: Path) -> Path:
    """Return where versions lie that Triton does not load."""
    return model_folder.parent / KEPT / model_folder.name


def every_version(model_folder: Path) -> dict[int, Path]:
    """Return each version's folder, also of those that Triton does not load, ascending."""
    places = (kept_folder(model_folder), model_folder)
    found = {
        version: place / str(version) for place in places for version in versions_on_disk(place)
    }
    return dict(sorted(found.items()))


def publish_token(version: Path) -> int:
    """Return the token of the publication that made a version, UNKNOWN_TOKEN if none is noted."""
    return int(facts_of(version).get("publish_token", UNKNOWN_TOKEN))


def require_model_folder(model_folder: Path) -> None:
    """Return if Triton can serve versions from this folder.

    Raises:
        PublishError: it has no configuration.
    """
    if not (model_folder / "config.pbtxt").is_file():
        raise PublishError(
            f"{model_folder} has no config.pbtxt: give the folder that Triton serves as "
            "--model-repository."
        )


def stage(model_folder: Path, files: Mapping[str, Path | bytes], *, token: int) -> Path:
    """Return a folder outside every model's with these files, synced to disk.

    Args:
        model_folder: of the model that it will be a version of.
        files: name in the version -> content, or the file to copy.
        token: of this publication: a later one knows by it what was left behind.

    Raises:
        StagingError: it could not be written; nothing of it is left.
    """
    # Inside the repository, so that a rename reaches the model's folder even on a mounted volume.
    draft = model_folder.parent / STAGING / f"{token}-{uuid.uuid4().hex}"
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            _write_synced(draft / name, content)
        (draft / NO_BYTE_CODE).touch()
        _sync_folder(draft)
    except OSError as error:
        discard(draft)
        needed = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in files.values())
        free = shutil.disk_usage(model_folder.parent).free
        raise StagingError(
            f"the package could not be copied to {draft.parent} ({error}): it has {needed:,} "
            f"bytes, {free:,} are free. Nothing was changed; make room with `moveline gc` and "
            "publish again."
        ) from error
    except BaseException:
        discard(draft)
        raise
    return draft


def discard(draft: Path) -> None:
    """Remove a staged folder, and the folder of all drafts with the last one."""
    shutil.rmtree(draft, ignore_errors=True)
    with contextlib.suppress(OSError):  # another publisher's draft is in there
        draft.parent.rmdir()


def discard_drafts(repository: Path, *, before: int) -> list[Path]:
    """Remove what publications with a smaller token have left staged; return what that was."""
    folder = repository / STAGING
    drafts = sorted(folder.iterdir()) if folder.is_dir() else []
    removed = [draft for draft in drafts if _token_of(draft) < before]
    for draft in removed:
        discard(draft)
    return removed


def _token_of(draft: Path) -> int:
    token = draft.name.partition("-")[0]
    return int(token) if token.isdecimal() else UNKNOWN_TOKEN


def claim_version(draft: Path, model_folder: Path, *, at_least: int) -> Path:
    """Rename a draft to the model's next free number; two publishers never share one.

    Raises:
        PublishError: the repository spans file systems, or the draft is gone.
    """
    while True:
        version = max(at_least, max(every_version(model_folder), default=0) + 1)
        target = model_folder / str(version)
        try:
            # Fails on an existing folder unless it is empty, which no version ever is.
            draft.rename(target)
        except OSError as error:
            if not draft.exists():
                raise PublishError(
                    f"{draft} is gone: a later publication went live meanwhile and cleared up. "
                    "Publish again if this package is still wanted."
                ) from error
            if not target.exists():
                raise PublishError(
                    f"{draft} could not be renamed to {target} ({error}): both must lie on one "
                    "file system."
                ) from error
        else:
            discard(draft)
            _sync_folder(model_folder)
            return target


def keep(model_folder: Path, version: int) -> Path:
    """Take a version out of Triton's sight; `restore` brings it back."""
    folder = kept_folder(model_folder)
    folder.mkdir(parents=True, exist_ok=True)
    return (model_folder / str(version)).rename(folder / str(version))


def restore(model_folder: Path, version: int) -> Path:
    """Put a kept version back where Triton loads it; one that is there stays."""
    target, kept = model_folder / str(version), kept_folder(model_folder) / str(version)
    if kept.is_dir() and not target.exists():
        kept.rename(target)
    return target


def size_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_synced(target: Path, content: Path | bytes) -> None:
    with target.open("wb") as written:
        if isinstance(content, bytes):
            written.write(content)
        else:
            with content.open("rb") as read:
                shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
