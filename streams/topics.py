"""The one table of topics: names, partition counts, and the settings each must have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from streams.errors import TopicMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PREFIX: Final = "moveline"
# Enough for four workers; a key's partition depends on the count, so it is chosen once.
DEFAULT_PARTITIONS: Final = 4
# Kafka refuses names of 250 characters and more; the longest suffix of ours has 13, or as many as
# a topic that `moveline repartition` has made a thousand times.
PREFIX_CHARS_MAX: Final = 200
_EVENTS: Final = re.compile(r"\.events-([1-9][0-9]*)$")
_PREFIX: Final = re.compile(r"^[A-Za-z0-9._-]+$")

TIMESTAMP_TYPE: Final = "message.timestamp.type"
CLEANUP_POLICY: Final = "cleanup.policy"
RETENTION_MS: Final = "retention.ms"

# The log is the ground truth: it is kept until an operator says otherwise. LogAppendTime, because
# with the producer's time brokers refuse records dated ahead and retention eats backfills.
_LOG: Final = {TIMESTAMP_TYPE: "LogAppendTime", CLEANUP_POLICY: "delete", RETENTION_MS: "-1"}
_TABLE: Final = {CLEANUP_POLICY: "compact"}
# What was served is compared within days; it names users, so it is not kept for longer.
_SERVED: Final = {CLEANUP_POLICY: "delete", RETENTION_MS: "604800000"}
# A hint that was not followed within the hour has been overtaken by many others.
_HINTS: Final = {CLEANUP_POLICY: "delete", RETENTION_MS: "3600000"}


@dataclass(frozen=True, kw_only=True)
class TopicSpec:
    """A topic as it must be.

    Attributes:
        settings: what the topic is created with; `required` names those checked afterwards.
        is_any_width: one that exists may have another number of partitions.
    """

    name: str
    num_partitions: int
    replication: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = (TIMESTAMP_TYPE, CLEANUP_POLICY)
    is_any_width: bool = False


@dataclass(frozen=True)
class Topics:
    """The topics of one installation; two prefixes can share a cluster.

    Attributes:
        source: which of the event log's topics `events` is: they follow each other, and
            streams/chain.py tells which one is the newest.
    """

    prefix: str = DEFAULT_PREFIX
    source: int = 0

    def __post_init__(self) -> None:
        """Refuse a prefix Kafka would refuse later, topic by topic."""
        if not _PREFIX.match(self.prefix) or len(self.prefix) > PREFIX_CHARS_MAX:
            raise ValueError(
                f"topic prefix {self.prefix!r}: 1 to {PREFIX_CHARS_MAX} of A-Z a-z 0-9 . _ -"
            )

    @property
    def events(self) -> str:
        """What users did, keyed by decimal user_id."""
        return f"{self.prefix}.events" + (f"-{self.source}" if self.source else "")

    def at(self, source: int) -> Topics:
        """Return the same installation's topics when the event log is in its n-th topic."""
        return replace(self, source=source)

    @property
    def items(self) -> str:
        """The catalogue, keyed by decimal item_id, newest entry wins."""
        return f"{self.prefix}.items"

    @property
    def dead_letters(self) -> str:
        """Events no worker could take: original bytes and key, the reason in headers."""
        return f"{self.prefix}.dead-letters"

    @property
    def control(self) -> str:
        """Pointers (generation, model), newest entry wins."""
        return f"{self.prefix}.control"

    @property
    def sessions(self) -> str:
        """Closed sessions, keyed by decimal user_id."""
        return f"{self.prefix}.sessions"

    @property
    def nearline(self) -> str:
        """Hints of work for the near-line app; none of them is the record of it."""
        return f"{self.prefix}.nearline"

    @property
    def feature_log(self) -> str:
        """What `recommend` read of sampled users and answered, keyed by decimal user_id."""
        return f"{self.prefix}.feature-log"

    def specs(
        self, partitions: int = DEFAULT_PARTITIONS, replication: int = 1
    ) -> tuple[TopicSpec, ...]:
        """Return every topic; `partitions` is that of events, and of what is as wide when new."""
        return (
            TopicSpec(
                name=self.events,
                num_partitions=partitions,
                replication=replication,
                settings=_LOG,
            ),
            TopicSpec(
                name=self.items,
                num_partitions=1,
                replication=replication,
                settings=_TABLE,
                required=(CLEANUP_POLICY,),
            ),
            TopicSpec(
                name=self.dead_letters, num_partitions=1, replication=replication, settings=_LOG
            ),
            TopicSpec(
                name=self.control,
                num_partitions=1,
                replication=replication,
                settings=_TABLE,
                required=(CLEANUP_POLICY,),
            ),
            TopicSpec(
                name=self.sessions,
                num_partitions=partitions,
                replication=replication,
                settings=_LOG,
                is_any_width=True,
            ),
            TopicSpec(
                name=self.nearline,
                num_partitions=partitions,
                replication=replication,
                settings=_HINTS,
                required=(CLEANUP_POLICY,),
                is_any_width=True,
            ),
            TopicSpec(
                name=self.feature_log,
                num_partitions=1,
                replication=replication,
                settings=_SERVED,
                required=(CLEANUP_POLICY,),
            ),
        )


def source_of(events_topic: str) -> int:
    """Return which topic of the event log a name is of; 0 for one that is not ours.

    >>> source_of("moveline.events"), source_of("moveline.events-2"), source_of("other")
    (0, 2, 0)
    """
    match = _EVENTS.search(events_topic)
    return int(match[1]) if match else 0


def check_topic(
    spec: TopicSpec, *, num_partitions: int, settings: Mapping[str, str], bootstrap: str
) -> None:
    """Raise unless an existing topic is what the spec asks for.

    Args:
        spec: what it must be.
        num_partitions: what it has.
        settings: what the broker lists; one that it does not list cannot be checked.
        bootstrap: for the command in the message.

    Raises:
        TopicMismatchError: naming the setting, what was found, and the way out.
    """
    if num_partitions != spec.num_partitions and not spec.is_any_width:
        raise TopicMismatchError(
            spec.name,
            setting="partitions",
            found=str(num_partitions),
            expected=str(spec.num_partitions),
            next_step=(
                "A user's partition depends on the count, so it cannot be changed in place: set "
                f"the number of partitions to {num_partitions}, or use another topic prefix. An "
                "events topic gets another count by: moveline repartition --partitions "
                f"{spec.num_partitions}"
            ),
        )
    for name in spec.required:
        found = settings.get(name, spec.settings[name])
        if found != spec.settings[name]:
            raise TopicMismatchError(
                spec.name,
                setting=name,
                found=found,
                expected=spec.settings[name],
                next_step=_alter_step(spec, name, bootstrap),
            )


def _alter_step(spec: TopicSpec, name: str, bootstrap: str) -> str:
    command = (
        f"kafka-configs.sh --bootstrap-server {bootstrap} --alter --entity-type topics "
        f"--entity-name {spec.name} --add-config {name}={spec.settings[name]}"
    )
    if name == TIMESTAMP_TYPE:
        return f"Use another topic prefix, or, before its first record: {command}"
    return f"Change it with: {command}"
