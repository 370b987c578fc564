"""Which package a training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from compose.cli.options import kafka_of
from compose.publishing import NoPackageError
from scoring.signature import RETRIEVAL_MODEL
from streams.control import read_pointers
from trainer.export import MANIFEST_FILE, MODEL_FILE, read_manifest

if TYPE_CHECKING:
    from compose.settings import Settings

# Stands for the package of the version that is live.
PUBLISHED: Final = "published"


def warm_base(settings: Settings, named: str) -> Path:
    """Return the folder of a package, or of the one that was published as what is live now.

    Raises:
        NoPackageError: nothing is published, or its package is no longer there.
        ExportError: the manifest of the published version cannot be read.
    """
    if named != PUBLISHED:
        return Path(named)
    kafka, topics = kafka_of(settings)
    pointers = read_pointers(kafka, topics)
    if pointers is None:
        raise NoPackageError(
            "nothing is published yet: run `moveline publish`, or train without --warm."
        )
    folder = settings.model_repository / RETRIEVAL_MODEL / str(pointers.model_version)
    wanted = read_manifest(folder / MANIFEST_FILE)["files"][MODEL_FILE]
    for path in sorted(settings.models.glob(f"*/{MANIFEST_FILE}"), reverse=True):
        # A version leaves behind what only training needs; the same graph tells whose it is.
        if read_manifest(path)["files"][MODEL_FILE] == wanted:
            return path.parent
    raise NoPackageError(
        f"version {pointers.model_version} is live, but its package is not under "
        f"{settings.models}: name one with --warm PACKAGE, or train without --warm."
    )
