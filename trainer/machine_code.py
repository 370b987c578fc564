"""Machine code of an exported graph: AOTInductor's shared library, kept beside the portable graph.

It is what serves where it fits (trainer/triton_model/graph.py): an answer takes a third of the time
of the interpreted graph, and a version is loaded in milliseconds instead of seconds.
"""

import logging
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
_OPTIONS: Final[dict[str, Any]] = {
    # As every graph is served; the compiler writes the number into the code.
    "cpp.threads": 1,
    # Compiling torch's headers first pays from the second graph on, and there is none.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}


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
    with TemporaryDirectory(prefix="moveline-compile-") as folder, _compiling(Path(folder)):
        archive = Path(folder) / "graph.pt2"
        # Asked of the program itself, and taken from it again before it is saved.
        program.example_inputs = (inputs, {})
        try:
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - documented, whatever its name
                program, package_path=str(archive), inductor_configs=_OPTIONS
            )
        except (RuntimeError, OSError) as error:
            raise ExportError(
                f"the graph could not be compiled: {error}\nMake {COMPILER} work, or do without "
                "with training.machine_code = never"
            ) from error
        _take_library(archive, package / MACHINE_CODE_FILE)
    return {
        "file": MACHINE_CODE_FILE,
        "torch_version": torch.__version__,
        "cpu_flags": cpu_flags(),
    }


@contextmanager
def _compiling(folder: Path) -> Iterator[None]:
    """Keep what the compiler leaves in a folder, and torch's warnings about itself from the log."""
    # A second of start-up, which only who compiles has to pay.
    from torch._inductor.utils import fresh_cache  # noqa: PLC0415

    with fresh_cache(dir=str(folder)), warnings.catch_warnings():
        # Only torch and what it compiles with run here, and warn of one another.
        warnings.simplefilter("ignore")
        yield


def _take_library(archive: Path, target: Path) -> None:
    """Unpack the library alone: whoever loads the archive unpacks it into a folder of its own."""
    with zipfile.ZipFile(archive) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".so"))
        with files.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
