"""Runs one exported retrieval package. Needs torch and the files beside it, nothing of Moveline."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

_OUTPUTS = ("item_id", "score", "contribution")


def _beside(name: str) -> Any:  # noqa: ANN401 - a module
    """Return a module of this version's folder, where Python looks for none by itself."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuse_changed(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise if a file is not the one that was published: Triton then keeps what it has loaded."""
    for name, expected in manifest.get("published_files", {}).items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise pb_utils.TritonModelException(
                f"{folder / name} was changed after it was published: publish the model again."
            )


def _read(request: Any, name: str) -> torch.Tensor:  # noqa: ANN401 - Triton's objects are untyped
    return from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack())


def _output(name: str, tensor: torch.Tensor) -> Any:  # noqa: ANN401 - Triton's objects are untyped
    return pb_utils.Tensor.from_dlpack(name, tensor.contiguous().__dlpack__())


class TritonPythonModel:
    """One instance of one version."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the package and answer once, so that the first request is not the slow one."""
        torch.set_num_threads(1)
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        _refuse_changed(folder, manifest)
        self.padding = manifest["padding"]
        self.names = [spec["name"] for spec in manifest["inputs"]]
        raw = bytearray((folder / "item_ids.i64").read_bytes())
        self.item_ids = torch.frombuffer(raw, dtype=torch.int64)
        self.model = _beside("graph").load_graph(folder, manifest)
        warm_up = [
            torch.full(
                (2, *spec["shape"]) if spec["batched"] else tuple(spec["shape"]),
                self.padding if spec["name"].endswith("_item") else 0,
                dtype=getattr(torch, spec["dtype"]),
            )
            for spec in manifest["inputs"]
        ]
        warm_up[self.names.index("available")][:] = True
        with torch.inference_mode():
            self.model(*warm_up)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request's batch as it came."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:  # noqa: ANN401 - Triton's objects are untyped
        withdrawn = _read(request, "withdrawn")
        inputs = {name: _read(request, name) for name in self.names if name != "available"}
        inputs["available"] = ~torch.isin(self.item_ids, withdrawn)
        # A live source may name what is in no vocabulary: `available` cannot speak of it.
        counted = inputs["counted_item"]
        inputs["counted_item"] = counted.masked_fill(torch.isin(counted, withdrawn), self.padding)
        with torch.inference_mode():
            outputs = self.model(*(inputs[name] for name in self.names))
        return pb_utils.InferenceResponse(
            output_tensors=[
                _output(name, tensor) for name, tensor in zip(_OUTPUTS, outputs, strict=True)
            ]
        )
