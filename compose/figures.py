"""The last line of every measuring command: one JSON object, also kept under benchmarks/results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS: Final = Path("benchmarks/results")
_VERSIONS: Final = ("confluent-kafka", "torch", "redis", "feast", "tritonclient", "numpy")
_GIB: Final = 1024**3


def machine() -> dict[str, Any]:
    """Return what decides a figure besides the code."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / _GIB),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def commit() -> str:
    """Return the checkout's commit, with + if files differ from it; "unknown" outside one."""
    found = _git("rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def report(
    name: str,
    figures: Mapping[str, object],
    *,
    command: str,
    caveats: Mapping[str, str],
    keep: bool = True,
) -> None:
    """Print the figures as the last line; with `keep` also write benchmarks/results/NAME.json."""
    line = {"name": name, "figures": dict(figures), "commit": commit(), "machine": machine()}
    if keep and RESULTS.is_dir():
        kept = {**line, "command": command, "caveats": dict(caveats)}
        text = json.dumps(kept, indent=2) + "\n"
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
