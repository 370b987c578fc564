"""The events a training learns from: the lake as it was when the run began.

The lake grows meanwhile. A run that goes on, and the other processes of a run, must see what its
first process saw, so that is kept beside the checkpoint: how many events each user had. Arrival
numbers them, so a user's events below that number are the same whenever they are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from compose.cli.options import kafka_of, stores_of
from features import lake
from features.generations import start_field
from features.redis import Trending
from scoring.signature import K_MAX
from trainer.checkpoint import FILE as CHECKPOINT_FILE
from trainer.dataset import EventLog
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from compose.settings import Settings
    from features.config import StateConfig
    from trainer.ranks import Ranks

FILE: Final = "events.safetensors"
# What counts as trending until the near-line windows take over: the newest week of the log.
_TRENDING_MS: Final = 7 * 86_400_000


@dataclass(frozen=True)
class TrainingLog:
    """Events, and the first and last offset of the lake by partition when they were read."""

    log: EventLog
    window_from: dict[str, int]
    window_to: dict[str, int]


def training_log(
    settings: Settings, config: StateConfig, ranks: Ranks, *, resume: bool
) -> TrainingLog:
    """Return the same events to every process of a run, and to one that goes on with it.

    Raises:
        LakeError: no event log, or an unreadable one.
        CheckpointError: what was kept of the run's events is damaged.
    """
    path = settings.training.checkpoints / FILE
    if not ranks.is_first:
        # What the first process has read is then there for this one, too.
        ranks.wait()
        return _as_kept(settings, config, path)
    if resume and path.is_file():
        found = _as_kept(settings, config, path)
    else:
        # Its checkpoint would be refused by a later --resume.
        remove_traces(settings)
        window_from, window_to = _window(settings)
        found = TrainingLog(read_log(settings, config), window_from, window_to)
        _keep(found, path)
    ranks.wait()
    return found


def remove_traces(settings: Settings) -> None:
    """No run is left to go on with: the next one begins, on the events of then."""
    for name in (CHECKPOINT_FILE, FILE):
        (settings.training.checkpoints / name).unlink(missing_ok=True)


def read_log(settings: Settings, config: StateConfig) -> EventLog:
    """Return the lake's events as the generation's rules take them."""
    return EventLog.from_columns(_columns(settings, config))


def _columns(settings: Settings, config: StateConfig) -> dict[str, lake.Column]:
    _, topics = kafka_of(settings)
    return lake.read_accepted(settings.lake.path, topics.events, config)


def _keep(found: TrainingLog, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    window = {"from": found.window_from, "to": found.window_to}
    tensors = {"user_ids": found.log.user_ids_U, "next_ordinals": found.log.next_ordinals}
    written = path.with_suffix(".new")
    save_file(tensors, written, metadata={"window": json.dumps(window)})
    written.replace(path)


def _as_kept(settings: Settings, config: StateConfig, path: Path) -> TrainingLog:
    try:
        with safe_open(path, framework="numpy") as file:
            window = json.loads(file.metadata()["window"])
            user_ids, ends = file.get_tensor("user_ids"), file.get_tensor("next_ordinals")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); train from the start, without --resume"
        ) from error
    columns = _columns(settings, config)
    place = np.searchsorted(user_ids, columns["user_id"]).clip(max=len(user_ids) - 1)
    was_there = (user_ids[place] == columns["user_id"]) & (columns["ordinal"] < ends[place])
    kept = {name: column[was_there] for name, column in columns.items()}
    return TrainingLog(EventLog.from_columns(kept), window["from"], window["to"])


def _window(settings: Settings) -> tuple[dict[str, int], dict[str, int]]:
    """Return the first and the last offset of each partition in the lake."""
    _, topics = kafka_of(settings)
    root = settings.lake.path
    files = [
        (start_field(source, file.partition), file)
        for source, name in enumerate(lake.log_topics(root, topics.events))
        for file in lake.list_files(root, name)
    ]
    return (
        {field: file.start for field, file in reversed(files)},
        {field: file.end for field, file in files},
    )


def read_trending(settings: Settings) -> Trending:
    """Return the items most used in the log's newest week, with their share of its events."""
    log = read_log(settings, stores_of(settings)[0].config)
    newest = log.event_time_ms_N >= log.event_time_ms_N.max() - _TRENDING_MS
    items, counts = np.unique(log.item_id_N[newest], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:K_MAX]
    return Trending(
        tuple(items[order].tolist()),
        tuple((counts[order] / counts.sum()).round(6).tolist()),
        total=1.0,
    )
