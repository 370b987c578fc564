"""Put an exported package into Triton's repository as the next version, and prove that it answers.

Steps, each leaving the versions before it untouched:
  1. verify the package against its manifest;
  2. copy it into the repository's .staging, outside any model's folder, and sync it to disk;
  3. rename it to the next version number: Triton sees the whole folder or none of it;
  4. load over the repository API and wait until the version is ready;
  5. send known tensors through Triton and through the package here: the answers must agree.
A version that fails step 4 or 5 is taken out again. The pointer flip is the caller's, afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from scoring.errors import ScoringError
from scoring.signature import RETRIEVAL_MODEL
from trainer.errors import ParityError, PublishError
from trainer.export import ITEM_IDS_FILE, MANIFEST_FILE, MODEL_FILE, verify

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from scoring.triton import TritonServer

log = logging.getLogger("moveline.publish")

# Relative difference of scores between this process and Triton; they run the same graph.
PARITY_TOLERANCE: Final = 1e-3
_GOLDEN_USERS: Final = 4
_GOLDEN_SEED: Final = 20


@dataclass(frozen=True)
class Published:
    """A version that answers in Triton."""

    version: int
    folder: Path
    parity: float


def publish(package: Path, repository: Path, server: TritonServer) -> Published:
    """Return once the package is the newest ready version of the retrieval model.

    Raises:
        ExportError: the package does not match its manifest.
        PublishError: no such model folder, or Triton could not load it (taken out again).
        ParityError: Triton's answers differ from the package's (taken out again).
    """
    verify(package)
    model_folder = repository / RETRIEVAL_MODEL
    if not (model_folder / "config.pbtxt").is_file():
        raise PublishError(
            f"{model_folder} has no config.pbtxt: give the folder that Triton serves as "
            "--model-repository."
        )
    folder = _stage(package, model_folder)
    version = int(folder.name)
    try:
        server.load(RETRIEVAL_MODEL)
        server.wait_ready(RETRIEVAL_MODEL, version)
        parity = check_parity(folder, server, version)
    except BaseException as error:
        # Whatever it was, Ctrl-C included: a version that is not proven must not stay.
        shutil.rmtree(folder)
        _reload_others(model_folder, server)
        if isinstance(error, ScoringError | ParityError):
            raise PublishError(
                f"version {version} was taken out again, what was live still is: {error}"
            ) from error
        raise
    return Published(version, folder, parity)


def versions_on_disk(model_folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, ascending."""
    return sorted(int(path.name) for path in model_folder.iterdir() if path.name.isdecimal())


def _stage(package: Path, model_folder: Path) -> Path:
    """Return the new version's folder, complete from its first moment."""
    # Inside the repository, so that a rename reaches the model's folder even on a mounted volume.
    staging = model_folder.parent / ".staging"
    staging.mkdir(exist_ok=True)
    draft = staging / uuid.uuid4().hex
    draft.mkdir()
    try:
        for name in (MODEL_FILE, ITEM_IDS_FILE, MANIFEST_FILE):
            _copy_synced(package / name, draft / name)
        program = files("trainer.triton_model").joinpath("gems_model.py").read_bytes()
        (draft / "model.py").write_bytes(program)
        return _claim_version(draft, model_folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # another publisher's draft is in there
            staging.rmdir()


def _copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _claim_version(draft: Path, model_folder: Path) -> Path:
    """Rename the draft to the next free number; two publishers never share one."""
    while True:
        version = max(versions_on_disk(model_folder), default=0) + 1
        target = model_folder / str(version)
        try:
            # Fails on an existing folder unless it is empty, which no version ever is.
            draft.rename(target)
        except OSError as error:
            if not target.exists():
                raise PublishError(
                    f"{draft} could not be renamed to {target} ({error}): both must lie on one "
                    "file system."
                ) from error
        else:
            return target


def _reload_others(model_folder: Path, server: TritonServer) -> None:
    """Make Triton forget the removed version; without another one the model is unloaded.

    A Triton that cannot be told does not hide why the version was removed: it reads the folder
    anew when it comes back.
    """
    try:
        if versions_on_disk(model_folder):
            server.load(RETRIEVAL_MODEL)
        else:
            server.unload(RETRIEVAL_MODEL)
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
    difference = np.abs(answered["score"][held] - scores) / np.abs(scores).clip(1e-6)
    worst = float(difference.max(initial=0.0))
    if not worst <= PARITY_TOLERANCE:
        raise ParityError(f"scores differ by {worst:.2e} relative, at most {PARITY_TOLERANCE:.0e}")
    return worst


def golden_inputs(folder: Path, manifest: dict[str, object]) -> dict[str, torch.Tensor]:
    """Return fixed requests with full streams of known items, in the order of the manifest."""
    specs = manifest["inputs"]
    assert isinstance(specs, list)
    rng = np.random.default_rng(_GOLDEN_SEED)
    item_ids = np.fromfile(folder / ITEM_IDS_FILE, "<i8")
    inputs: dict[str, torch.Tensor] = {}
    for spec in specs:
        name, dtype = spec["name"], getattr(torch, spec["dtype"])
        shape = (_GOLDEN_USERS, *spec["shape"]) if spec["batched"] else tuple(spec["shape"])
        inputs[name] = torch.zeros(shape, dtype=dtype)
        if name in {"recent_item", "mid_item"}:
            inputs[name] = torch.from_numpy(rng.choice(item_ids, shape))
        elif name.endswith("age_ms"):
            ages = np.sort(rng.integers(0, 90 * 86_400_000, shape), axis=1)[:, ::-1]
            inputs[name] = torch.from_numpy(ages.copy())
        elif name == "exclude_item":
            inputs[name][:] = -1
        elif name == "available":
            inputs[name][:] = True
    return inputs


def _as_sent(inputs: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Return the tensors as Triton's signature wants them: no booleans, withdrawn items by id."""
    sent = {name: tensor.numpy() for name, tensor in inputs.items() if name != "available"}
    sent["lifelong_mask"] = sent["lifelong_mask"].astype(np.int64)
    sent["withdrawn"] = np.array([-1], np.int64)
    return sent
