"""Versions in Triton's model repository: each appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from typing import TYPE_CHECKING

from trainer.errors import PublishError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def versions_on_disk(model_folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, ascending."""
    return sorted(int(path.name) for path in model_folder.iterdir() if path.name.isdecimal())


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


def add_version(model_folder: Path, files: Mapping[str, Path | bytes], *, at_least: int) -> Path:
    """Return the new version's folder, complete and on disk from its first moment.

    Args:
        model_folder: of one model.
        files: name in the version -> content, or the file to copy.
        at_least: the smallest number it may get.

    Raises:
        PublishError: the repository spans file systems.
    """
    # Inside the repository, so that a rename reaches the model's folder even on a mounted volume.
    staging = model_folder.parent / ".staging"
    staging.mkdir(exist_ok=True)
    draft = staging / uuid.uuid4().hex
    draft.mkdir()
    try:
        for name, content in files.items():
            _write_synced(draft / name, content)
        return _claim_version(draft, model_folder, at_least)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # another publisher's draft is in there
            staging.rmdir()


def _write_synced(target: Path, content: Path | bytes) -> None:
    with target.open("wb") as written:
        if isinstance(content, bytes):
            written.write(content)
        else:
            with content.open("rb") as read:
                shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _claim_version(draft: Path, model_folder: Path, at_least: int) -> Path:
    """Rename the draft to the next free number; two publishers never share one."""
    while True:
        version = max(at_least, max(versions_on_disk(model_folder), default=0) + 1)
        target = model_folder / str(version)
        try:
            # Fails on an existing folder unless it is empty, which no version ever is.
            draft.rename(target)
        except OSError as error:
            if not target.exists():
                raise PublishError(
                    f"{draft} could not be renamed to {target} ({error}): both must lie on one "
                    "file system."
                ) from error
        else:
            return target
