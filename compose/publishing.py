"""From a package to the version that answers, in numbered steps.

What a crash after any of them leaves, and how it heals: ARCHITECTURE.md, section 8.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compose.cli.options import kafka_of, stores_of
from compose.errors import ComposeError
from compose.serving import open_servers, point, pointers_to
from compose.versions import Versions, tidy
from features.errors import SchemaMismatchError
from features.redis import CatalogueStore, connect
from features.schema import schema_hash
from streams.control import claim_token
from trainer.manifest import MANIFEST_FILE, verify
from trainer.publish import Published, Step, log_step, publish, take_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from compose.settings import Settings
    from features.redis import Pointers

    OnStep = Callable[[Step], None]


class NoPackageError(ComposeError):
    """Nothing was trained yet, or not in this folder."""


@dataclass(frozen=True)
class Live:
    """A version that went live."""

    version: int
    parity: float
    ready_s: float
    live_s: float


@dataclass(frozen=True)
class Prepared:
    """A version that every Triton answers with, its memories whole: pointers can name it."""

    published: Published
    pointers: Pointers


def newest_package(models: Path) -> Path:
    """Return the youngest package in the models folder.

    Raises:
        NoPackageError: there is none.
    """
    packages = sorted(path.parent for path in models.glob(f"*/{MANIFEST_FILE}"))
    if not packages:
        raise NoPackageError(f"no package under {models}: run `moveline train` first.")
    return packages[-1]


def publish_package(
    settings: Settings,
    package: Path,
    *,
    token: int | None = None,
    on_step: OnStep = log_step,
) -> Live:
    """Return once the package is a version that every answer follows.

    Args:
        settings: of the installation.
        package: as exported.
        token: claimed when the work began that ends here; None claims one now.
        on_step: told what is done.

    Raises:
        SchemaMismatchError: the package was built for other features than the generation has.
        TrainerError: see trainer.publish.
        MemoryVersionError: too many users lack memories of the version that it reads.
        StaleTokenError: somebody with a later token moved the pointers meanwhile.
        FlipNotSeenError: answers did not follow the pointers.
    """
    started = time.monotonic()
    kafka, topics = kafka_of(settings)
    if token is None:
        token = claim_token(kafka, topics, "publish")
    on_step(Step.CLAIMED)
    ready = prepare(settings, package, token, on_step=on_step)
    ready_s = time.monotonic() - started
    fill_trending(settings)
    try:
        point(settings, kafka, topics, ready.pointers, on_step=on_step)
    except BaseException:
        give_up(settings, ready)
        raise
    versions = Versions.read(settings.model_repository, kafka, topics)
    with open_servers(settings) as servers:
        tidy(versions, servers)
    on_step(Step.TIDIED)
    published = ready.published
    return Live(published.version, published.parity, ready_s, time.monotonic() - started)


def prepare(
    settings: Settings, package: Path, token: int, *, on_step: OnStep = log_step
) -> Prepared:
    """Return once every Triton answers with the package and its memories are whole.

    Nothing names the version yet. Whoever does not go on from here has to `take_out` its folder, or
    leave it to the next publication.

    Raises:
        SchemaMismatchError, TrainerError, MemoryVersionError, StaleTokenError: as
            `publish_package`.
    """
    kafka, topics = kafka_of(settings)
    refuse_other_schema(settings, verify(package))
    with open_servers(settings) as servers:
        published = publish(
            package, settings.model_repository, servers, token=token, on_step=on_step
        )
        try:
            pointers = pointers_to(settings, kafka, topics, published.version, token)
        except BaseException:
            take_out(published.folder, servers)
            raise
    on_step(Step.REMEMBERED)
    return Prepared(published, pointers)


def give_up(settings: Settings, ready: Prepared) -> None:
    """Take a version out again unless the record of truth names it already."""
    kafka, topics = kafka_of(settings)
    versions = Versions.read(settings.model_repository, kafka, topics)
    if ready.published.version not in {versions.live, versions.canary}:
        with open_servers(settings) as servers:
            take_out(ready.published.folder, servers)


def refuse_other_schema(settings: Settings, manifest: Mapping[str, object]) -> None:
    """Return if the package reads the features that the generation's state holds.

    Raises:
        SchemaMismatchError: it does not.
    """
    store, _ = stores_of(settings)
    held, wanted = schema_hash(store.config), manifest["feature_schema_hash"]
    if held != wanted:
        raise SchemaMismatchError(
            f"the package was trained on features {wanted}, generation g{store.generation} has "
            f"{held}: train on this generation with `moveline train`, or publish for another one "
            "with MOVELINE_GENERATION."
        )


def fill_trending(settings: Settings) -> None:
    """Give answers something for users nobody knows, until the near-line app has counted."""
    catalogue = CatalogueStore(connect(settings.redis.url))
    if catalogue.get_trending() is None:
        # Reads the whole log with what the trainer has for it, which takes seconds: once.
        from compose.training_log import read_trending  # noqa: PLC0415 - imports torch

        catalogue.put_trending(read_trending(settings))
