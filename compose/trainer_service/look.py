"""What the trainer looks at before it decides: the lake, how far it is behind, what is served.

Nothing here imports torch: a trainer that waits is a small process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from compose.cli.options import kafka_of
from compose.trainer_service.schedule import Seen
from features.clock import now_ms
from features.lake import log_topics, next_offset
from features.lake_window import lake_extent
from scoring.signature import RETRIEVAL_MODEL
from streams.chain import known_chain
from streams.control import read_pointers
from streams.kafka import watermarks

if TYPE_CHECKING:
    from pathlib import Path

    from compose.settings import Settings

MANIFEST: Final = "manifest.json"


class PackageFacts(msgspec.Struct, frozen=True):
    """The part of a manifest by which a package and a published version are known as the same."""

    created_ms: int
    files: dict[str, str] = {}


@dataclass(frozen=True)
class Served:
    """The version that answers.

    Attributes:
        folder: of the version in Triton's repository.
        facts: None where its manifest cannot be read.
        package: the package it was made from; None where no folder of the models has it.
    """

    version: int
    folder: Path
    facts: PackageFacts | None
    package: Path | None

    def is_of(self, created_ms: int | None) -> bool:
        """Return whether it was made from the package that was made then."""
        return self.facts is not None and self.facts.created_ms == created_ms


def look(settings: Settings) -> Seen:
    """Return what there is at this moment.

    Raises:
        LakeError: the lake has a hole.
        StreamError: Kafka did not answer.
    """
    _, topics = kafka_of(settings)
    served = find_served(settings)
    return Seen(
        now_ms=now_ms(),
        lake=lake_extent(settings.lake.path, topics.events),
        lag=lake_lag(settings),
        served_version=served.version if served else None,
        served_ms=served.facts.created_ms if served and served.facts else 0,
        missing="its package is not in the models folder" if served and not served.package else "",
    )


def lake_lag(settings: Settings) -> int:
    """Return how many records of the newest topic the lake lacks."""
    kafka, topics = kafka_of(settings)
    newest = topics.at(known_chain(kafka, topics).current).events
    root = settings.lake.path
    is_there = newest in log_topics(root, topics.events)
    lag = 0
    for partition, (low, high) in watermarks(kafka, newest).items():
        end = next_offset(root, newest, partition) if is_there else None
        lag += max(0, high - (low if end is None else max(low, end)))
    return lag


def find_served(settings: Settings) -> Served | None:
    """Return what the pointers name, None before the first publication."""
    pointers = read_pointers(*kafka_of(settings))
    if pointers is None or pointers.model_version is None:
        return None
    folder = settings.model_repository / RETRIEVAL_MODEL / str(pointers.model_version)
    facts = package_facts(folder)
    package = find_package(settings.models, facts) if facts else None
    return Served(pointers.model_version, folder, facts, package)


def find_package(models: Path, facts: PackageFacts) -> Path | None:
    """Return the folder under the models that a published version was made from."""
    folders = (path.parent for path in models.glob(f"*/{MANIFEST}"))
    return next((folder for folder in folders if package_facts(folder) == facts), None)


def package_facts(folder: Path) -> PackageFacts | None:
    """Return what a package's manifest says of it, None where it cannot be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=PackageFacts)
    except (OSError, msgspec.MsgspecError):
        return None
