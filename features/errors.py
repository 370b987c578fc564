"""Errors of the feature layer: what a reader or writer of state can run into."""

from enum import StrEnum


class FeatureError(Exception):
    """Root of this package's errors."""

    retriable: bool = False


class Reason(StrEnum):
    """Why an event went to the dead-letter topic (header `reason`)."""

    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    WRONG_TYPE = "wrong_type"
    UNSUPPORTED_VERSION = "unsupported_version"
    ID_OUT_OF_RANGE = "id_out_of_range"
    KEY_MISMATCH = "key_mismatch"
    UNKNOWN_ACTION = "unknown_action"
    TIME_OUT_OF_RANGE = "time_out_of_range"
    TIME_IN_FUTURE = "time_in_future"


class InvalidEventError(FeatureError, ValueError):
    """An event breaks the contract of docs/formats.md; `reason` is what the dead letter carries."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class CorruptRowError(FeatureError):
    """Stored bytes are not a state row this version can read."""


class UnknownRowFormatError(CorruptRowError):
    """A row, or a generation's record, has a format that only other builds of Moveline know."""


class CorruptMemoryError(FeatureError):
    """Stored bytes are not a memory this build reads; `moveline lifelong build` makes it anew."""


class SchemaMismatchError(FeatureError):
    """A model or a reader was built for another feature schema than the state has."""


class StoreError(FeatureError):
    """Redis refused or could not be reached."""


class AddressError(FeatureError, ValueError):
    """A setting that is to say where Redis is does not."""


class StoreUnavailableError(StoreError):
    """Redis did not answer; the same call may work later."""

    retriable = True


class StoreFullError(StoreError):
    """Redis is at maxmemory; nothing was written, consumption has to pause."""

    retriable = True


class UnsafeStoreError(StoreError):
    """Redis may evict state by itself, which would lose users silently."""


class GenerationError(FeatureError):
    """A generation is not what a command needs it to be: partial, behind, live, or another's."""


class LakeError(FeatureError):
    """The event log on disk is missing, truncated or has a hole."""


class LakeBusyError(LakeError):
    """Another process writes the same partition's files."""

    retriable = True


class LeaseLostError(FeatureError):
    """What this process held alone may be somebody else's by now."""

    retriable = True


class EntityFrameError(FeatureError, ValueError):
    """A frame of users and times cannot be joined with the views asked for."""


class FeatureLogError(FeatureError):
    """A record of the feature log is not one this build reads."""


class NoSuchOrdinalError(FeatureError):
    """A user's log holds fewer events than the ordinal asks for."""


class ReadOnlyViewError(FeatureError):
    """A view owned by the stream worker was written through Feast."""


class StaleTokenError(FeatureError):
    """Somebody claimed a later token and has moved the pointers: they stay as that one left them.

    Attributes:
        token: of whoever came too late.
        held: of what holds.
    """

    def __init__(self, token: int, held: int) -> None:
        super().__init__(
            f"the live pointers were written with token {held}, this command holds the older "
            f"token {token}: what it did is not live. Look at what is with `moveline models`, and "
            "run the command again if it is still wanted."
        )
        self.token = token
        self.held = held
