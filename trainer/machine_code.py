"""Machine code of an exported graph: AOTInductor's shared library, kept beside the portable graph.

It is what serves where it fits (trainer/triton_model/graph.py): an answer takes a third of the time
of the interpreted graph, and a version is loaded in milliseconds instead of seconds.
"""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trainer.errors import ExportError
from trainer.manifest import MACHINE_CODE_FILE
from trainer.triton_model.graph import cpu_flags

log = logging.getLogger("moveline.export")

# "auto" makes it where there is a compiler.
MachineCode = Literal["auto", "never"]
COMPILER: Final = "g++"
# A minute is usual; a machine that is ten times slower than that does better without.
LIMIT_S: Final = 900
# Of what the compiler said before it failed; the reason stands at its end.
KEPT_CHARS: Final = 4_000


def write_machine_code(
    program: ExportedProgram, inputs: tuple[Tensor, ...], package: Path
) -> dict[str, Any] | None:
    """Compile a graph into the package; return what the manifest says of it, None if not possible.

    Takes about a minute of one processor, whatever the size of the weights.

    Args:
        program: As exported.
        inputs: What it was traced with.
        package: The folder; a file is added.

    Raises:
        ExportError: There is a compiler, and it failed.
    """
    if shutil.which(COMPILER) is None:
        log.warning(
            "no %s on PATH: the package has no machine code, so that answers take about three "
            "times as long and a version seconds to load. Install it and train again.",
            COMPILER,
        )
        return None
    with TemporaryDirectory(prefix="moveline-compile-") as name:
        folder = Path(name)
        # With the sample inputs, which the compiler asks for and a package must not have.
        program.example_inputs = (inputs, {})
        torch.export.save(program, folder / "graph.pt2")
        _compile(folder / "graph.pt2", folder / "compiled.pt2")
        _take_library(folder / "compiled.pt2", package / MACHINE_CODE_FILE)
    return {
        "file": MACHINE_CODE_FILE,
        "torch_version": torch.__version__,
        "cpu_flags": cpu_flags(),
    }


def _compile(graph: Path, archive: Path) -> None:
    """Have another process compile a saved graph (trainer/compile_graph.py says why another)."""
    # What torch warns of are torch's own parts; what it caches goes with the folder.
    module = "trainer.compile_graph"
    command = [sys.executable, "-W", "ignore", "-m", module, str(graph), str(archive)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(graph.parent / "cache")}
    try:
        subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=LIMIT_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr or ""
        reason = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise ExportError(
            f"the graph could not be compiled: {reason[-KEPT_CHARS:].strip() or error}\n"
            f"Make {COMPILER} work, or do without with training.machine_code = never"
        ) from error


def _take_library(archive: Path, target: Path) -> None:
    """Unpack the library alone: whoever loads the archive unpacks it into a folder of its own."""
    with zipfile.ZipFile(archive) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".so"))
        with files.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
