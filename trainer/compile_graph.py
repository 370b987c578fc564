"""`python -m trainer.compile_graph GRAPH ARCHIVE`: AOTInductor on a saved graph, and nothing else.

A process of its own, since the compiler looks at what is imported (setuptools refuses the standard
library's distutils) and keeps hundreds of megabytes, both of which a trainer has to live with.
"""

import sys
from typing import Any, Final

import torch

OPTIONS: Final[dict[str, Any]] = {
    # As every graph is served; the compiler writes the number into the code.
    "cpp.threads": 1,
    # Compiling torch's headers first pays from the second graph on, and there is none.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}


def compile_graph(graph: str, archive: str) -> None:
    """Compile a graph, saved with sample inputs, into an archive that has its library inside."""
    torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - documented, whatever its name
        torch.export.load(graph), package_path=archive, inductor_configs=OPTIONS
    )


if __name__ == "__main__":
    try:
        compile_graph(*sys.argv[1:])
    except (RuntimeError, OSError) as error:
        # The trainer says it, where the traceback of the compiler would hide it.
        sys.exit(f"{type(error).__name__}: {error}")
