"""Export without pickle: two torch.export graphs, raw files, and a manifest that hashes them.

Legend: B users, N events, V items.
"""

import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from features.sources import SOURCES
from trainer.batches import PADDING
from trainer.calibration import described
from trainer.errors import ExportError
from trainer.golden import record_golden
from trainer.item_vectors import usual_domains
from trainer.machine_code import MachineCode, write_machine_code
from trainer.manifest import (
    COMPRESSOR_FILE,
    ITEM_IDS_FILE,
    MANIFEST_FILE,
    MANIFEST_VERSION,
    MODEL_FILE,
    manifest_bytes,
    read_manifest,
    sha256_of,
    verify,
)
from trainer.models.lifelong import Compressor, memory_version
from trainer.models.serving import (
    NUM_CANDIDATES,
    NUM_EXCLUDED,
    GemsServing,
    Tensors,
    compressor_input_signature,
    compressor_output_signature,
    input_signature,
    output_signature,
)
from trainer.models.sources import FACTS
from trainer.train import Trained
from trainer.training_state import save_state

# What is written here is read without torch in trainer/manifest.py; readers find it here too.
__all__ = [
    "COMPRESSOR_FILE",
    "ITEM_IDS_FILE",
    "MANIFEST_FILE",
    "MANIFEST_VERSION",
    "MODEL_FILE",
    "Provenance",
    "export",
    "read_manifest",
    "sha256_of",
    "verify",
]

# Requests that one call may carry; bounds the memory of a call.
MAX_BATCH = 64
# Mid-term events that one user's request may carry: it grows by what waits to be folded, and
# 64 waiting chunks of 256 events still fit.
MAX_MID = 32_768
# Old events of one user that a call of the compressor may carry.
MAX_FOLDED = 65_536
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
# The graph is traced with two users: one would be taken for a constant.
EXAMPLE_BATCH = 2
# Likewise the events that the compressor is traced with.
EXAMPLE_EVENTS = 8
MID_ATTENTIONS: Final[tuple[Literal["full", "indexer"], ...]] = ("full", "indexer")
# Calls whose median decides between two ways to attend; the first ones warm up.
NUM_TIMED_CALLS = 15
# A pickle begins with its protocol opcode and a version; torch writes protocols 2 to 5.
PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# Files inside the package that hold raw numbers and may begin with any bytes.
RAW_PREFIXES = ("data/weights/weight_", "data/constants/tensor_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What the caller knows and the manifest must carry.

    Attributes:
        window_from, window_to: Source positions of the training window, "partition" -> offset.
        feature_schema_hash: Hash of the features the inputs are built from.
    """

    name: str
    created_ms: int
    window_from: Mapping[str, int]
    window_to: Mapping[str, int]
    feature_schema_hash: str
    metrics: Mapping[str, float]


def export(
    trained: Trained,
    staging: Path,
    provenance: Provenance,
    *,
    machine_code: MachineCode = "never",
) -> dict[str, Any]:
    """Write package, item ids and manifest into a directory and return the manifest.

    Raises:
        ExportError: The directory holds files already, the package would contain a pickle, or the
            compiler failed.
    """
    staging.mkdir(parents=True, exist_ok=True)
    if any(staging.iterdir()):
        msg = f"{staging} is not empty; give an empty staging directory"
        raise ExportError(msg)
    serving = serving_of(trained)
    if trained.config.model.mid_attention == "measured":
        serving.choose_mid_attention(faster_mid_attention(serving))
    program = exported(serving)
    code = None
    if machine_code == "auto":
        inputs = example_inputs(serving, batch=EXAMPLE_BATCH)
        code = write_machine_code(program, inputs, staging)
    save_package(program, staging / MODEL_FILE)
    ids = trained.vocabulary.item_ids_V.astype("<i8").tobytes()
    (staging / ITEM_IDS_FILE).write_bytes(ids)
    manifest = _manifest(trained, serving, provenance)
    golden = _record_golden(staging, manifest, serving, trained.model.compressor)
    files = [MODEL_FILE, ITEM_IDS_FILE, golden]
    if code is not None:
        files.append(code["file"])
        manifest["machine_code"] = code
    if trained.model.compressor is not None:
        save_package(exported_compressor(trained.model.compressor), staging / COMPRESSOR_FILE)
        files.append(COMPRESSOR_FILE)
        manifest["memory_version"] = memory_version(trained.model.compressor)
    manifest["files"] = {name: sha256_of(staging / name) for name in files}
    # Apart from `files`: what is published leaves it behind.
    state = save_state(trained, staging)
    manifest["training_files"] = {state.name: sha256_of(state)}
    (staging / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    return manifest


def serving_of(trained: Trained) -> GemsServing:
    """The trained model as it is served, live sources and domains of items with it."""
    log, vocabulary = trained.source.log, trained.vocabulary
    return GemsServing(
        trained.model,
        vocabulary,
        gate=trained.gate,
        item_domain_V=usual_domains(log, vocabulary),
    ).eval()


def _record_golden(
    staging: Path,
    manifest: Mapping[str, Any],
    serving: GemsServing,
    compressor: Compressor | None,
) -> str:
    """Have the model answer the golden requests; return the name of the file with the answers."""

    def asked(module: torch.nn.Module) -> Callable[[Sequence[Array]], Sequence[Array]]:
        def ask(arrays: Sequence[Array]) -> Sequence[Array]:
            with torch.inference_mode():
                answers = module(*(torch.from_numpy(array) for array in arrays))
            return [tensor.numpy() for tensor in answers]

        return ask

    return record_golden(
        staging,
        manifest,
        serving.item_ids_V.numpy(),
        asked(serving),
        None if compressor is None else asked(compressor.eval()),
    )


def faster_mid_attention(serving: GemsServing) -> Literal["full", "indexer"]:
    """Which attention answers one user with full streams faster on this machine, in one thread.

    Full attention reads every key; the indexer scores every key, cheaper, and gathers a few. On a
    CPU and with short streams the gathering costs more than it saves.
    """
    inputs = example_inputs(serving, batch=1)
    names = [spec.name for spec in input_signature(serving.model.config, num_items=len(inputs[-1]))]
    known = serving.item_ids_V[:1]
    filled = [
        known.expand_as(tensor) if name in {"recent_item", "mid_item"} else tensor
        for name, tensor in zip(names, inputs, strict=True)
    ]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {choice: _median_s(serving, choice, filled) for choice in MID_ATTENTIONS}
    torch.set_num_threads(num_threads)
    return min(MID_ATTENTIONS, key=lambda choice: seconds[choice])


def _median_s(
    serving: GemsServing, choice: Literal["full", "indexer"], inputs: list[Tensor]
) -> float:
    serving.choose_mid_attention(choice)
    taken = []
    with torch.inference_mode():
        for _ in range(NUM_TIMED_CALLS):
            started = time.perf_counter()
            serving(*inputs)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def exported_compressor(compressor: Compressor) -> ExportedProgram:
    """The fold of old events, with a dynamic number of users and of events."""
    batch = Dim("batch", min=1, max=MAX_BATCH)
    events = Dim("events", min=1, max=MAX_FOLDED)
    inputs = compressor_input_signature()
    example = tuple(torch.zeros(EXAMPLE_BATCH, EXAMPLE_EVENTS, dtype=spec.dtype) for spec in inputs)
    with torch.no_grad():
        return torch.export.export(
            compressor.eval(), example, dynamic_shapes=tuple({0: batch, 1: events} for _ in inputs)
        )


def exported(serving: GemsServing) -> ExportedProgram:
    """The graph for 1 to MAX_BATCH users and at least as many mid-term events as configured."""
    num_items = len(serving.item_ids_V)
    inputs = input_signature(serving.model.config, num_items=num_items)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    mid = Dim("mid", min=serving.model.config.num_mid, max=MAX_MID)
    shapes = tuple(_dynamic(spec.name, batch, mid) for spec in inputs)
    example = example_inputs(serving, batch=EXAMPLE_BATCH)
    with torch.no_grad():
        return torch.export.export(serving, example, dynamic_shapes=shapes)


def _dynamic(name: str, batch: Dim, mid: Dim) -> dict[int, Dim]:
    if name == "available":
        return {}
    return {0: batch, 1: mid} if name.startswith("mid_") else {0: batch}


def example_inputs(serving: GemsServing, *, batch: int) -> tuple[Tensor, ...]:
    """Inputs of users who met nothing, every item available: the known tensor of a smoke test."""
    num_items = len(serving.item_ids_V)
    signature = input_signature(serving.model.config, num_items=num_items)
    return tuple(_empty(spec, batch=batch) for spec in signature)


def _empty(spec: Tensors, *, batch: int) -> Tensor:
    if spec.name == "available":
        return torch.ones(spec.shape, dtype=spec.dtype)
    fill = PADDING if spec.name.endswith("_item") else 0
    return torch.full((batch, *spec.shape), fill, dtype=spec.dtype)


def save_package(program: ExportedProgram, path: Path) -> None:
    """Save without the sample inputs, which torch would pickle into the file.

    Raises:
        ExportError: A pickle is inside all the same.
    """
    # There is no public way to leave the sample inputs out; with none, an empty entry is written.
    program.example_inputs = None
    torch.export.save(program, path)
    found = pickles_in(path)
    if found:
        path.unlink()
        msg = f"torch wrote pickles into {path.name}: {', '.join(found)}"
        raise ExportError(msg)


def pickles_in(path: Path) -> list[str]:
    """Names of the entries of a zip archive that are, or contain, a pickle."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name.split("/", maxsplit=1)[-1]
            if inner.startswith(RAW_PREFIXES) and not inner.endswith((".pkl", ".pickle")):
                continue
            content = archive.read(name)
            is_nested_zip = content.startswith(b"PK\x03\x04")
            if (
                inner.endswith((".pkl", ".pickle"))
                or is_nested_zip
                or content.startswith(PICKLE_STARTS)
            ):
                found.append(name)
    return found


def _manifest(trained: Trained, serving: GemsServing, provenance: Provenance) -> dict[str, Any]:
    num_items = trained.vocabulary.num_items
    inputs = input_signature(trained.model.config, num_items=num_items)
    return {
        "manifest_version": MANIFEST_VERSION,
        **asdict(provenance),
        "window_from": dict(provenance.window_from),
        "window_to": dict(provenance.window_to),
        "metrics": dict(provenance.metrics),
        "split_ms": trained.split_ms,
        "config": asdict(trained.config),
        "training": {
            "steps": len(trained.fitted.losses),
            "seconds": round(trained.fitted.seconds, 3),
            "ended_by": trained.fitted.ended_by,
            "final_loss": trained.fitted.losses[-1],
        },
        "num_items": num_items,
        "num_domains": len(trained.vocabulary.domain_ids),
        "sources": {
            "names": list(SOURCES),
            "half_life_h": trained.config.half_life_h,
            "facts": list(FACTS),
            **described(serving.gate, ("model", *SOURCES)),
        },
        "beam_width": serving.beam_width,
        "max_batch": MAX_BATCH,
        "num_excluded": NUM_EXCLUDED,
        "num_candidates": NUM_CANDIDATES,
        "padding": PADDING,
        "inputs": [_described(spec) for spec in inputs],
        "outputs": [_described(spec) for spec in output_signature()],
        "max_mid": MAX_MID,
        "mid_attention": serving.mid_attention,
        # None until a compressor and machine code are beside the model.
        "memory_version": None,
        "machine_code": None,
        "compressor_inputs": [_described(spec) for spec in compressor_input_signature()],
        "compressor_outputs": [_described(spec) for spec in compressor_output_signature()],
        "torch_version": torch.__version__,
    }


def _described(spec: Tensors) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": list(spec.shape),
        "batched": spec.name != "available",
    }
