"""Every failure the trainer raises on purpose, under one root."""


class TrainerError(Exception):
    """Training, evaluation or export was given something it cannot use."""


class EmptyWindowError(TrainerError, ValueError):
    """A time window holds no events, or no labels, to learn from or to judge on."""


class BadColumnsError(TrainerError, ValueError):
    """The columns of an event log do not fit together."""


class VocabularyError(TrainerError, ValueError):
    """A vocabulary is empty, or too large for the semantic ids it should receive."""


class DivergedError(TrainerError):
    """The loss became infinite or not a number."""


class BudgetError(TrainerError, ValueError):
    """The time budget was over before the first step of training."""


class WarmStartError(TrainerError, ValueError):
    """A training cannot go on from the model that was named."""


class ExportError(TrainerError):
    """The exported package is not what the manifest promises."""


class PublishError(TrainerError):
    """A package did not become a served version; what was served before still is."""


class ParityError(TrainerError):
    """Triton and the package answer differently."""


class NotFiniteError(TrainerError):
    """Weights are damaged: scores are not numbers."""


class StagingError(PublishError):
    """A package could not be copied into the repository; nothing of the copy is left."""


class DeviceError(TrainerError, ValueError):
    """There is no device of the kind that was asked for."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, or belongs to another run."""


class GateError(TrainerError):
    """A package is not good enough to be published; what is live stays live."""


class BadNumbersError(GateError):
    """A weight, a score or the loss is infinite or not a number."""


class OtherFeaturesError(GateError):
    """The package reads other features than the live generation holds."""


class IllegalItemError(GateError):
    """The package answered with an item that it must not name."""


class TooSlowError(GateError):
    """The package answers too slowly."""


class WorseThanRivalError(GateError):
    """A ranking that needs no model is as good on the held-out window."""


class WorseThanServedError(GateError):
    """The served version may be better on the held-out window."""
