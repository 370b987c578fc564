"""Put an exported package into Triton's repository as the next version, and prove that it answers.

Steps, each leaving the versions before it untouched:
  1. verify the package against its manifest;
  2. copy it into the repository's .staging, outside any model's folder, and sync it to disk;
  3. rename it to the next version number: Triton sees the whole folder or none of it;
  4. load over the repository API and wait until the version is ready;
  5. send known tensors through Triton and through the package here: the answers must agree.
A package whose memories the newest compressor does not make brings its own: steps 2 to 5 first
happen to `lifelong`, then to `gems`. What fails step 4 or 5 is taken out again. The pointer flip is
the caller's, afterwards.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from scoring.errors import ScoringError
from scoring.signature import LIFELONG_MODEL, RETRIEVAL_MODEL
from trainer.errors import ParityError, PublishError
from trainer.export import (
    COMPRESSOR_FILE,
    ITEM_IDS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    manifest_bytes,
    read_manifest,
    verify,
)
from trainer.repository import add_version, require_model_folder, versions_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from scoring.triton import TritonServer

__all__ = ["PARITY_TOLERANCE", "Published", "check_parity", "publish", "versions_on_disk"]

log = logging.getLogger("moveline.publish")

# Relative difference of scores between this process and Triton; they run the same graph.
PARITY_TOLERANCE: Final = 1e-3
# Below this a score is compared as if it were this large.
_SMALLEST_COMPARED: Final = 1e-6
_GOLDEN_USERS: Final = 4
_GOLDEN_EVENTS: Final = 64
_GOLDEN_SEED: Final = 20
_GOLDEN_DAYS_MS: Final = 90 * 86_400_000


@dataclass(frozen=True)
class Published:
    """A version that answers in Triton.

    Attributes:
        lifelong_version: Version of `lifelong` that makes the memories it reads; None if it reads
            none.
    """

    version: int
    folder: Path
    parity: float
    lifelong_version: int | None


def publish(package: Path, repository: Path, server: TritonServer) -> Published:
    """Return once the package is the newest ready version of the retrieval model.

    Raises:
        ExportError: the package does not match its manifest.
        PublishError: no such model folder, or Triton could not load it (taken out again).
        ParityError: Triton's answers differ from the package's (taken out again).
    """
    manifest = verify(package)
    gems, lifelong = repository / RETRIEVAL_MODEL, repository / LIFELONG_MODEL
    require_model_folder(gems)
    lifelong_version, added = None, False
    if manifest["memory_version"] is not None:
        require_model_folder(lifelong)
        lifelong_version = newest_folding(lifelong, manifest["memory_version"])
        if lifelong_version is None:
            lifelong_version, added = _publish_lifelong(package, gems, lifelong, server), True
    try:
        folder, parity = _publish_gems(package, manifest, lifelong_version, gems, server)
    except BaseException:
        if added:
            _take_out(lifelong / str(lifelong_version), server)
        raise
    return Published(int(folder.name), folder, parity, lifelong_version)


def newest_folding(model_folder: Path, memory_version: str) -> int | None:
    """Return the newest version of `lifelong` if it makes such memories, else None.

    An older one that makes them does not count. Triton keeps the two newest versions loaded, and
    so the two newest versions of `gems` always find theirs.
    """
    versions = versions_on_disk(model_folder)
    if not versions:
        return None
    manifest = read_manifest(model_folder / str(versions[-1]) / MANIFEST_FILE)
    return versions[-1] if manifest["memory_version"] == memory_version else None


def _publish_lifelong(package: Path, gems: Path, lifelong: Path, server: TritonServer) -> int:
    """Return the number of the new, proven version: that which `gems` will get."""
    content: dict[str, Path | bytes] = {
        COMPRESSOR_FILE: package / COMPRESSOR_FILE,
        ITEM_IDS_FILE: package / ITEM_IDS_FILE,
        MANIFEST_FILE: package / MANIFEST_FILE,
        "model.py": files("trainer.triton_model").joinpath("lifelong_model.py").read_bytes(),
    }
    next_gems = max(versions_on_disk(gems), default=0) + 1
    folder = add_version(lifelong, content, at_least=next_gems)
    _prove(folder, server, check_lifelong_parity)
    return int(folder.name)


def _publish_gems(
    package: Path,
    manifest: dict[str, Any],
    lifelong_version: int | None,
    gems: Path,
    server: TritonServer,
) -> tuple[Path, float]:
    content: dict[str, Path | bytes] = {
        MODEL_FILE: package / MODEL_FILE,
        ITEM_IDS_FILE: package / ITEM_IDS_FILE,
        # What a published version reads is known now: the manifest says so from here on.
        MANIFEST_FILE: manifest_bytes({**manifest, "lifelong_model_version": lifelong_version}),
        "model.py": files("trainer.triton_model").joinpath("gems_model.py").read_bytes(),
    }
    if lifelong_version is not None:
        content[COMPRESSOR_FILE] = package / COMPRESSOR_FILE
    folder = add_version(gems, content, at_least=lifelong_version or 1)
    return folder, _prove(folder, server, check_parity)


def _prove(
    folder: Path, server: TritonServer, check: Callable[[Path, TritonServer, int], float]
) -> float:
    """Return what `check(folder, server, version)` found once the version is loaded."""
    model, version = folder.parent.name, int(folder.name)
    try:
        server.load(model)
        server.wait_ready(model, version)
        return check(folder, server, version)
    except BaseException as error:
        # Whatever it was, Ctrl-C included: a version that is not proven must not stay.
        _take_out(folder, server)
        if isinstance(error, ScoringError | ParityError):
            raise PublishError(
                f"version {version} of {model} was taken out again, what was live still is: {error}"
            ) from error
        raise


def _take_out(folder: Path, server: TritonServer) -> None:
    """Remove a version and make Triton forget it; without another one the model is unloaded.

    A Triton that cannot be told does not hide why the version was removed: it reads the folder
    anew when it comes back.
    """
    shutil.rmtree(folder)
    model_folder = folder.parent
    try:
        if versions_on_disk(model_folder):
            server.load(model_folder.name)
        else:
            server.unload(model_folder.name)
    except ScoringError as error:
        log.warning("Triton was not told of the removal: %s", error)


def check_parity(folder: Path, server: TritonServer, version: int) -> float:
    """Return the largest relative difference between Triton's answers and the package's own.

    Raises:
        ParityError: the items differ, or the scores by more than PARITY_TOLERANCE.
    """
    manifest = verify(folder)
    inputs = golden_inputs(folder, manifest)
    names = [spec["name"] for spec in manifest["outputs"]]
    answered = server.infer(RETRIEVAL_MODEL, version, _as_sent(inputs), names)
    model = torch.export.load(folder / MODEL_FILE).module()
    with torch.inference_mode():
        expected = dict(zip(names, model(*inputs.values()), strict=True))
    if not np.array_equal(answered["item_id"], expected["item_id"].numpy()):
        raise ParityError("Triton returned other items than the package for the golden requests")
    held = expected["item_id"].numpy() >= 0
    scores = expected["score"].numpy()[held]
    worst = np.abs(answered["score"][held] - scores) / np.abs(scores).clip(_SMALLEST_COMPARED)
    return _refuse_difference(float(worst.max(initial=0.0)), "scores")


def check_lifelong_parity(folder: Path, server: TritonServer, version: int) -> float:
    """Return the largest difference between Triton's states and the compressor's own.

    It is relative to the largest entry: single entries are sums that may come out as almost zero.

    Raises:
        ParityError: the counts differ, or the states by more than PARITY_TOLERANCE.
    """
    manifest = read_manifest(folder / MANIFEST_FILE)
    inputs = golden_events(folder, manifest)
    names = [spec["name"] for spec in manifest["compressor_outputs"]]
    sent = {name: tensor.numpy() for name, tensor in inputs.items()}
    answered = server.infer(LIFELONG_MODEL, version, sent, names)
    compressor = torch.export.load(folder / COMPRESSOR_FILE).module()
    with torch.inference_mode():
        state, count = compressor(*inputs.values())
    if not np.array_equal(answered["count"], count.numpy()):
        raise ParityError("Triton counted other events than the compressor for the golden ones")
    worst = np.abs(answered["state"] - state.numpy()).max() / float(state.abs().max())
    return _refuse_difference(float(worst), "states")


def _refuse_difference(worst: float, what: str) -> float:
    if not worst <= PARITY_TOLERANCE:
        raise ParityError(f"{what} differ by {worst:.2e} relative, at most {PARITY_TOLERANCE:.0e}")
    return worst


def golden_inputs(folder: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return fixed requests with full streams of known items, in the order of the manifest.

    Every other user has a lifelong memory; live sources name known and new items.
    """
    rng = np.random.default_rng(_GOLDEN_SEED)
    item_ids = np.fromfile(folder / ITEM_IDS_FILE, "<i8")
    inputs: dict[str, torch.Tensor] = {}
    for spec in manifest["inputs"]:
        name, dtype = spec["name"], getattr(torch, spec["dtype"])
        shape = (_GOLDEN_USERS, *spec["shape"]) if spec["batched"] else tuple(spec["shape"])
        inputs[name] = torch.zeros(shape, dtype=dtype)
        if name in {"recent_item", "mid_item"}:
            inputs[name] = torch.from_numpy(rng.choice(item_ids, shape))
        elif name.endswith("age_ms"):
            ages = np.sort(rng.integers(0, _GOLDEN_DAYS_MS, shape), axis=1)[:, ::-1]
            inputs[name] = torch.from_numpy(ages.copy())
        elif name == "lifelong":
            inputs[name][::2] = torch.from_numpy(rng.normal(size=shape)[::2])
        elif name == "lifelong_count":
            inputs[name][::2] = _GOLDEN_EVENTS
        elif name in {"exclude_item", "candidate_item"}:
            inputs[name][:] = -1
        elif name == "counted_item":
            # Half of them are new items, which only a live source can name.
            ids = np.concatenate((item_ids, np.arange(1, len(item_ids) + 1) + item_ids.max() // 2))
            inputs[name] = torch.from_numpy(rng.choice(ids, shape))
        elif name == "counted_share":
            shares = -np.sort(-rng.random(shape), axis=2) / shape[2]
            inputs[name] = torch.from_numpy(shares.astype(np.float32))
        elif name == "available":
            inputs[name][:] = True
    # One asks for an order among items, one for a domain.
    inputs["candidate_item"][1, : len(item_ids)] = torch.from_numpy(
        item_ids[: inputs["candidate_item"].shape[1]]
    )
    inputs["in_domain"][3] = 1
    return inputs


def golden_events(folder: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return fixed old events of known items, in the order of the manifest."""
    rng = np.random.default_rng(_GOLDEN_SEED)
    item_ids = np.fromfile(folder / ITEM_IDS_FILE, "<i8")
    shape = (_GOLDEN_USERS, _GOLDEN_EVENTS)
    events = {
        spec["name"]: rng.integers(0, _GOLDEN_DAYS_MS, shape)
        for spec in manifest["compressor_inputs"]
    }
    events["item"] = rng.choice(item_ids, shape)
    return {name: torch.from_numpy(column) for name, column in events.items()}


def _as_sent(inputs: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Return the tensors as Triton's signature wants them: withdrawn items by id."""
    sent = {name: tensor.numpy() for name, tensor in inputs.items() if name != "available"}
    sent["withdrawn"] = np.array([-1], np.int64)
    return sent
