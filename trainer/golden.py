"""Golden requests: fixed inputs with what the exported model answered, kept in the package.

They are recorded where torch has the model anyway. Publishing then asks every Triton the same and
compares, and needs neither torch nor the weights: it starts at once and takes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trainer.errors import ExportError, NotFiniteError, ParityError
from trainer.manifest import GOLDEN_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

# Relative difference of answers between the exported model and Triton; they run the same graph.
PARITY_TOLERANCE: Final = 1e-3
# Below this a score is compared as if it were this large.
_SMALLEST_COMPARED: Final = 1e-6
_GOLDEN_USERS: Final = 4
_GOLDEN_EVENTS: Final = 64
_GOLDEN_SEED: Final = 20
_GOLDEN_DAYS_MS: Final = 90 * 86_400_000
_NO_ITEM: Final = -1


@dataclass(frozen=True)
class Golden:
    """Requests to a model and its answers, by tensor name; of the compressor too if there is one.

    Attributes:
        inputs: of the exported graph: `available` is a mask there.
    """

    inputs: Arrays
    outputs: Arrays
    events: Arrays
    folded: Arrays


def record_golden(
    package: Path,
    manifest: Mapping[str, Any],
    item_ids: NDArray[np.int64],
    answer: Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]],
    fold: Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]] | None,
) -> str:
    """Ask the model and write the package's golden file; return its name."""
    parts = {"in": golden_inputs(manifest, item_ids), "out": {}, "event": {}, "folded": {}}
    names = [spec["name"] for spec in manifest["outputs"]]
    parts["out"] = dict(zip(names, answer(list(parts["in"].values())), strict=True))
    if fold is not None:
        parts["event"] = golden_events(manifest, item_ids)
        names = [spec["name"] for spec in manifest["compressor_outputs"]]
        parts["folded"] = dict(zip(names, fold(list(parts["event"].values())), strict=True))
    arrays = {f"{part}.{name}": array for part, of in parts.items() for name, array in of.items()}
    with (package / GOLDEN_FILE).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return GOLDEN_FILE


def read_golden(package: Path) -> Golden:
    """Read the golden file of a package or of a published version.

    Raises:
        ExportError: It is missing or damaged.
    """
    path = package / GOLDEN_FILE
    parts: dict[str, Arrays] = {"in": {}, "out": {}, "event": {}, "folded": {}}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                part, _, name = key.partition(".")
                parts[part][name] = arrays[key]
    except (OSError, ValueError, KeyError) as error:
        msg = f"{path} holds no golden requests ({error}); export again: moveline train"
        raise ExportError(msg) from error
    return Golden(parts["in"], parts["out"], parts["event"], parts["folded"])


def golden_inputs(manifest: Mapping[str, Any], item_ids: NDArray[np.int64]) -> Arrays:
    """Return fixed requests with full streams of known items, in the order of the manifest.

    Every other user has a lifelong memory.
    """
    rng = np.random.default_rng(_GOLDEN_SEED)
    inputs: Arrays = {}
    for spec in manifest["inputs"]:
        name, dtype = spec["name"], np.dtype(spec["dtype"])
        shape = (_GOLDEN_USERS, *spec["shape"]) if spec["batched"] else tuple(spec["shape"])
        inputs[name] = np.zeros(shape, dtype)
        if name in {"recent_item", "mid_item"}:
            inputs[name] = rng.choice(item_ids, shape)
        elif name.endswith("age_ms"):
            inputs[name] = np.sort(rng.integers(0, _GOLDEN_DAYS_MS, shape), axis=1)[:, ::-1].copy()
        elif name == "lifelong":
            inputs[name][::2] = rng.normal(size=shape)[::2]
        elif name == "lifelong_count":
            inputs[name][::2] = _GOLDEN_EVENTS
        elif name.endswith("_item"):
            inputs[name][:] = _NO_ITEM
        elif name == "available":
            inputs[name][:] = True
    return inputs


def golden_events(manifest: Mapping[str, Any], item_ids: NDArray[np.int64]) -> Arrays:
    """Return fixed old events of known items, in the order of the manifest."""
    rng = np.random.default_rng(_GOLDEN_SEED)
    shape = (_GOLDEN_USERS, _GOLDEN_EVENTS)
    events: Arrays = {
        spec["name"]: rng.integers(0, _GOLDEN_DAYS_MS, shape)
        for spec in manifest["compressor_inputs"]
    }
    events["item"] = rng.choice(item_ids, shape)
    return events


def as_sent(inputs: Arrays) -> Arrays:
    """Return the tensors as Triton's signature wants them: withdrawn items by id."""
    sent = {name: array for name, array in inputs.items() if name != "available"}
    return {**sent, "withdrawn": np.array([_NO_ITEM], np.int64)}


def compare_answers(answered: Mapping[str, NDArray[Any]], golden: Golden) -> float:
    """Return the largest relative difference of scores.

    Raises:
        NotFiniteError: the exported model, or Triton, gave a score that is none.
        ParityError: the items differ, or the scores by more than PARITY_TOLERANCE.
    """
    expected = golden.outputs
    held = expected["item_id"] >= 0
    for where, scores in (("the package", expected["score"]), ("Triton", answered["score"])):
        if not np.isfinite(scores[held]).all():
            raise NotFiniteError(
                f"{where} gives scores that are no numbers: the weights are damaged; train again"
            )
    if not np.array_equal(answered["item_id"], expected["item_id"]):
        raise ParityError("Triton returned other items than the package for the golden requests")
    scores = expected["score"][held]
    worst = np.abs(answered["score"][held] - scores) / np.abs(scores).clip(_SMALLEST_COMPARED)
    return _refuse_difference(float(worst.max(initial=0.0)), "scores")


def compare_folded(answered: Mapping[str, NDArray[Any]], golden: Golden) -> float:
    """Return the largest difference of states.

    It is relative to the largest entry: single entries are sums that may come out as almost zero.

    Raises:
        ParityError: the counts differ, or the states by more than PARITY_TOLERANCE.
    """
    state = golden.folded["state"]
    if not np.array_equal(answered["count"], golden.folded["count"]):
        raise ParityError("Triton counted other events than the compressor for the golden ones")
    worst = np.abs(answered["state"] - state).max() / float(np.abs(state).max())
    return _refuse_difference(float(worst), "states")


def _refuse_difference(worst: float, what: str) -> float:
    if not worst <= PARITY_TOLERANCE:
        raise ParityError(f"{what} differ by {worst:.2e} relative, at most {PARITY_TOLERANCE:.0e}")
    return worst
