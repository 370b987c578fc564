"""Errors of the answering side, for recommenders and publishers."""

from __future__ import annotations


class ScoringError(Exception):
    """Root of this package's errors."""

    retriable: bool = False


class DeadlineExceededError(ScoringError):
    """No answer within the deadline the caller set; asking again is safe."""

    retriable = True


class UnavailableError(ScoringError):
    """Triton, or the model asked for, is not there."""

    retriable = True


class OverloadedError(ScoringError):
    """This client already has its limit of requests in flight."""

    retriable = True


class RejectedError(ScoringError, ValueError):
    """The request itself is wrong: asking again will not help."""


class ModelLoadError(ScoringError):
    """Triton refused to load a model version; the versions before it still answer."""


class SignatureError(ScoringError):
    """An answer does not have the tensors docs/formats.md promises."""
