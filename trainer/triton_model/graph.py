"""The exported graph as a function: machine code where it fits this machine, else interpreted.

Lies beside `model.py` in a published version and needs torch alone, nothing of Moveline, so that a
version never changes with the code around it. The trainer judges packages through it too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Graph = Callable[..., Sequence[torch.Tensor]]

log = logging.getLogger("moveline.graph")

_CPU_FACTS = Path("/proc/cpuinfo")


def load_graph(folder: Path, manifest: Mapping[str, Any]) -> Graph:
    """Return a function of the graph's inputs, in their order, that gives its outputs in theirs."""
    return machine_code(folder, manifest) or portable(folder)


def portable(folder: Path) -> Any:  # noqa: ANN401 - torch is untyped here
    """Return the graph as a module that is interpreted; it is read and checked node by node."""
    return torch.export.load(folder / "model.pt2").module()


def machine_code(folder: Path, manifest: Mapping[str, Any]) -> Graph | None:
    """Return the graph's machine code, there in milliseconds; None if it cannot run here.

    Its answers differ from those of the interpreted graph by rounding alone.
    """
    code = manifest.get("machine_code") or {}
    hindrance = hindrance_of(code)
    if hindrance:
        log.warning("the graph is interpreted: %s", hindrance)
        return None
    # The public loader imports the compiler with it, a second of every load. The package needs this
    # very version of torch anyway, so what this name means cannot change under it.
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / code["file"]), 1)  # noqa: SLF001

    def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        # Compiled for the layout that the graph was traced with.
        outputs: Sequence[torch.Tensor] = runner.run([tensor.contiguous() for tensor in inputs])
        return outputs

    return run


def hindrance_of(code: Mapping[str, Any]) -> str:
    """Return why machine code cannot run in this process, or nothing."""
    if not code:
        return "the package has no machine code"
    if code["torch_version"] != torch.__version__:
        return f"it is for torch {code['torch_version']}, this is {torch.__version__}"
    lacking = set(code["cpu_flags"]) - set(cpu_flags())
    return f"this processor lacks {', '.join(sorted(lacking))}" if lacking else ""


def cpu_flags() -> list[str]:
    """Return what the kernel says this machine's processor can do, sorted.

    The compiler takes all of it for granted, and a missing instruction ends the process.
    """
    for line in _CPU_FACTS.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return sorted(value.split())
    return []
