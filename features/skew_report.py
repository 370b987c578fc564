"""Many reads compared: counts by feature, and which reads could not be compared and why. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from features.skew import FEATURES, STREAMS

if TYPE_CHECKING:
    from features.feature_log import Served
    from features.skew import Difference, ReadSkew

# Reads kept with all that differs in them; more are counted only.
EXAMPLES_MAX: Final = 1_000
_HOUR_MS: Final = 3_600_000


class Skipped(StrEnum):
    """Why a record of the log was not compared."""

    UNREADABLE = "unreadable"
    OTHER_SCHEMA = "other_schema"
    GENERATION_GONE = "generation_gone"
    NOT_READ = "not_read"
    NOT_IN_LAKE = "not_in_lake"
    LAKE_STARTS_LATER = "lake_starts_later"
    FORGOTTEN = "forgotten"


EXPLAINED: Final = {
    Skipped.UNREADABLE: "not a record of the feature log, or one of another version",
    Skipped.OTHER_SCHEMA: (
        "the features were computed under another schema hash than this build's: server and this "
        "command are of different versions, and their values mean different things"
    ),
    Skipped.GENERATION_GONE: "Redis no longer knows the generation's rules: it was dropped",
    Skipped.NOT_READ: "nothing was read: Redis was away (STORE_AWAY), or time too short (DEADLINE)",
    Skipped.NOT_IN_LAKE: (
        "the lake has not reached the position yet: run `moveline lake --until-end` before"
    ),
    Skipped.FORGOTTEN: "read before the user was forgotten: the lake no longer has those events",
    Skipped.LAKE_STARTS_LATER: (
        "the lake of the user's partition begins after offset 0, so that ordinals are not known"
    ),
}


@dataclass
class Tally:
    """One feature over all reads compared; rates are shares of its values."""

    num_reads_differing: int = 0
    num_values: int = 0
    num_mismatched: int = 0
    num_missing: int = 0
    num_extra: int = 0

    def add(self, difference: Difference) -> None:
        """Count one read's."""
        self.num_reads_differing += not difference.is_equal
        self.num_values += difference.num_values
        self.num_mismatched += difference.num_mismatched
        self.num_missing += difference.num_missing
        self.num_extra += difference.num_extra

    def rates(self) -> tuple[float, float, float]:
        """Return the mismatch, missing and extra rate."""
        values = max(1, self.num_values)
        return self.num_mismatched / values, self.num_missing / values, self.num_extra / values


@dataclass
class Share:
    """How many reads were compared and how many of them differed."""

    num_compared: int = 0
    num_differing: int = 0

    @property
    def rate(self) -> float:
        """Share of differing reads."""
        return self.num_differing / max(1, self.num_compared)


class Example(NamedTuple):
    """A read that differs."""

    served: Served
    skew: ReadSkew


@dataclass
class SkewReport:
    """What a comparison found.

    Attributes:
        num_records: records of the log looked at.
        reads: those compared, and those among them in which any value differs.
        num_values: values compared.
        num_late_reads: reads of a state that lacked events appended well before; not a difference.
        num_events_unseen: events lacking there.
        skipped: records not compared, by reason.
        by_feature: see Tally.
        edit_distances: by stream, how many reads had which distance.
        by_version: reads by the model version that answered, 0 for none.
        by_hour: reads by the hour they were served in, epoch ms.
        by_user: differing reads by user.
        examples: the first differing reads.
    """

    num_records: int = 0
    reads: Share = field(default_factory=Share)
    num_values: int = 0
    num_late_reads: int = 0
    num_events_unseen: int = 0
    skipped: Counter[Skipped] = field(default_factory=Counter)
    by_feature: dict[str, Tally] = field(
        default_factory=lambda: {name: Tally() for name in FEATURES}
    )
    edit_distances: dict[str, Counter[int]] = field(
        default_factory=lambda: {name: Counter() for name in STREAMS}
    )
    by_version: defaultdict[int, Share] = field(default_factory=lambda: defaultdict(Share))
    by_hour: defaultdict[int, Share] = field(default_factory=lambda: defaultdict(Share))
    by_user: Counter[int] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)

    def skip(self, reason: Skipped) -> None:
        """Count a record that is not compared."""
        self.num_records += 1
        self.skipped[reason] += 1

    def add(self, served: Served, skew: ReadSkew) -> None:
        """Count a read that was compared."""
        self.num_records += 1
        differs = not skew.is_equal
        hour_ms = served.served_at_ms // _HOUR_MS * _HOUR_MS
        for share in (self.reads, self.by_version[served.model_version], self.by_hour[hour_ms]):
            share.num_compared += 1
            share.num_differing += differs
        self.num_values += skew.num_values
        self.num_late_reads += skew.num_unseen > 0
        self.num_events_unseen += skew.num_unseen
        for difference in skew.differences:
            self.by_feature[difference.feature].add(difference)
        for stream, distance in skew.edit_distances.items():
            self.edit_distances[stream][distance] += 1
        if differs:
            self.by_user[served.user_id] += 1
            if len(self.examples) < EXAMPLES_MAX:
                self.examples.append(Example(served, skew))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the examples as plain data."""
        return {
            "records": self.num_records,
            "compared": self.reads.num_compared,
            "differing": self.reads.num_differing,
            "rate": self.reads.rate,
            "values": self.num_values,
            "late_reads": self.num_late_reads,
            "events_unseen": self.num_events_unseen,
            "skipped": {reason.value: number for reason, number in self.skipped.items()},
            "by_feature": {name: asdict(tally) for name, tally in self.by_feature.items()},
            "edit_distances": {
                stream: {str(distance): number for distance, number in sorted(counts.items())}
                for stream, counts in self.edit_distances.items()
            },
            "by_version": {str(v): asdict(share) for v, share in sorted(self.by_version.items())},
            "by_user": {str(user): number for user, number in self.by_user.most_common()},
        }
