"""Runs one exported compressor. Needs torch and the files beside it, nothing of Moveline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

_OUTPUTS = ("state", "count")
# Users and events of the warm-up call.
_WARM_UP_SHAPE = (2, 64)


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
        """Load the compressor and run it once, so that the first request is not the slow one."""
        torch.set_num_threads(1)
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        _refuse_changed(folder, manifest)
        self.names = [spec["name"] for spec in manifest["compressor_inputs"]]
        self.compressor = torch.export.load(folder / "compressor.pt2").module()
        with torch.inference_mode():
            self.compressor(*(torch.zeros(_WARM_UP_SHAPE, dtype=torch.int64) for _ in self.names))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request's batch as it came."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:  # noqa: ANN401 - Triton's objects are untyped
        with torch.inference_mode():
            outputs = self.compressor(*(_read(request, name) for name in self.names))
        return pb_utils.InferenceResponse(
            output_tensors=[
                _output(name, tensor) for name, tensor in zip(_OUTPUTS, outputs, strict=True)
            ]
        )
