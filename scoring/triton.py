"""The door to Triton for those who publish: load, readiness, repository index, raw inference."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from scoring.errors import (
    DeadlineExceededError,
    ModelLoadError,
    RejectedError,
    ScoringError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

LOAD_TIMEOUT_S: Final = 300.0
CALL_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.05


def map_error(error: InferenceServerException, doing: str, address: str) -> ScoringError:
    """Return our error for one of tritonclient's."""
    status = str(error.status() or "")
    text = f"{doing} at {address}: {error.message()}"
    if "DEADLINE_EXCEEDED" in status:
        return DeadlineExceededError(text)
    if "UNAVAILABLE" in status:
        return UnavailableError(
            f"{text}. Is Triton up, and the model loaded? See `moveline status`."
        )
    if "INVALID_ARGUMENT" in status:
        return RejectedError(text)
    return ScoringError(f"{text} ({status})")


class TritonServer:
    """One Triton server, seen by an operator."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Any = grpcclient.InferenceServerClient(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except InferenceServerException as error:
            raise map_error(error, doing, self.address) from error

    def is_live(self) -> bool:
        """Return whether the server answers at all."""
        try:
            return bool(self._client.is_server_live(client_timeout=CALL_TIMEOUT_S))
        except InferenceServerException:
            return False

    def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Load or reload a model by its version policy; returns once the load has ended.

        Raises:
            ModelLoadError: Triton tried and failed; what was loaded before stays.
            UnavailableError: no server.
        """
        try:
            self._client.load_model(model, client_timeout=timeout_s)
        except InferenceServerException as error:
            mapped = map_error(error, f"loading {model}", self.address)
            if mapped.retriable:
                raise mapped from error
            raise ModelLoadError(
                f"{mapped}. Read Triton's log, mend the version and publish again."
            ) from error

    def unload(self, model: str) -> None:
        """Unload every version of a model."""
        with self._errors(f"unloading {model}"):
            self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_S)

    def is_ready(self, model: str, version: int | None = None) -> bool:
        """Return whether a version (or any) of a model takes requests."""
        with self._errors(f"asking for {model}"):
            name = "" if version is None else str(version)
            return bool(self._client.is_model_ready(model, name, client_timeout=CALL_TIMEOUT_S))

    def wait_ready(self, model: str, version: int, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Return once a version takes requests.

        Raises:
            ModelLoadError: it does not within the time-out.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready(model, version):
            if time.monotonic() > deadline:
                raise ModelLoadError(
                    f"{model} version {version} was not ready within {timeout_s} s: read "
                    "Triton's log."
                )
            time.sleep(_POLL_S)

    def versions(self) -> dict[str, list[tuple[int, str, str]]]:
        """Return (version, state, reason) of every model the server knows."""
        with self._errors("listing models"):
            index = self._client.get_model_repository_index(client_timeout=CALL_TIMEOUT_S)
        found: dict[str, list[tuple[int, str, str]]] = {}
        for model in index.models:
            if model.name.startswith("."):
                continue  # a folder of publishing, not a model
            versions = found.setdefault(model.name, [])
            if model.version:
                versions.append((int(model.version), model.state or "UNLOADED", model.reason))
        return found

    def infer(
        self,
        model: str,
        version: int,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[str, Array]:
        """Return the named outputs of one pinned version.

        Raises:
            ScoringError: see `map_error`.
        """
        with self._errors(f"asking {model}/{version}"):
            result = self._client.infer(
                model,
                make_inputs(inputs),
                model_version=str(version),
                outputs=[grpcclient.InferRequestedOutput(name) for name in outputs],
                client_timeout=timeout_s,
            )
        return {name: result.as_numpy(name) for name in outputs}


def make_inputs(arrays: Mapping[str, Array]) -> list[Any]:
    """Return Triton's request tensors."""
    inputs = []
    for name, array in arrays.items():
        tensor = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs
