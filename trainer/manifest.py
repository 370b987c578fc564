"""The manifest of a package: what is in it, by hash, read without torch."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from trainer.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST_FILE: Final = "manifest.json"
MODEL_FILE: Final = "model.pt2"
# The same graph compiled, for processors like the one that exported it; there need not be one.
# Not "model.so": Triton's Python would import that in place of model.py.
MACHINE_CODE_FILE: Final = "machine_code.so"
# Folds old events into the memory that the model reads.
COMPRESSOR_FILE: Final = "compressor.pt2"
# The vocabulary: little-endian int64, ascending; `available` is indexed by place in it.
ITEM_IDS_FILE: Final = "item_ids.i64"
# Fixed requests and what the exported model answered: every Triton has to answer the same.
GOLDEN_FILE: Final = "golden.npz"
# 2: lifelong memory is a state with a count, and a compressor is in the package.
# 3: live sources, candidates and a domain are inputs, and answers say what sources contributed.
MANIFEST_VERSION: Final = 3
HASH_CHUNK_BYTES: Final = 1 << 20


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written, here and where it is published."""
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify(directory: Path) -> dict[str, Any]:
    """Read the manifest of an exported directory after checking every file against it.

    Raises:
        ExportError: A file is missing or differs from its hash, or the manifest names none.
    """
    manifest = read_manifest(directory / MANIFEST_FILE)
    refuse_changed(directory, manifest["files"], next_step="export again: moveline train")
    return manifest


def verify_published(version: Path) -> dict[str, Any]:
    """Read the manifest of a version in Triton's repository after checking every file against it.

    Raises:
        ExportError: A file is missing or differs from its hash.
    """
    manifest = read_manifest(version / MANIFEST_FILE)
    hashes = manifest.get("published_files", {})
    refuse_changed(version, hashes, next_step="publish again: moveline publish")
    return manifest


def refuse_changed(directory: Path, hashes: Mapping[str, str], *, next_step: str) -> None:
    """Return if every file has its hash.

    Raises:
        ExportError: One is missing or differs.
    """
    for name, expected in hashes.items():
        path = directory / name
        actual = sha256_of(path) if path.is_file() else "no such file"
        if actual != expected:
            msg = f"{path} has hash {actual}, the manifest says {expected}; {next_step}"
            raise ExportError(msg)


def facts_of(version: Path) -> dict[str, Any]:
    """Return what a published version's manifest says, of any format; nothing if it is unreadable.

    For questions about versions that are only looked at: who made it, which memories it reads.
    """
    try:
        facts = json.loads((version / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest without looking at the files beside it.

    Raises:
        ExportError: It is none, or of another version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}); export again"
        raise ExportError(msg) from error
    hashes = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not {MODEL_FILE, ITEM_IDS_FILE} <= hashes.keys():
        msg = f"{path} does not name the files of a package; export again"
        raise ExportError(msg)
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        msg = (
            f"{path} has version {manifest.get('manifest_version')}, this Moveline reads "
            f"{MANIFEST_VERSION}; train and export again: moveline train"
        )
        raise ExportError(msg)
    read: dict[str, Any] = manifest
    return read
