"""Put an exported package into Triton's repository as the next version, and prove that it answers.

The steps up to PROVEN are here; what comes after them is in compose/publishing.py. What a crash
after any of them leaves, and how it heals: ARCHITECTURE.md, section 8. A package whose memories no
loaded compressor makes brings its own: steps STAGED to PROVEN first happen to `lifelong`, then to
`gems`. What fails is taken out again.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from enum import IntEnum
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from scoring.errors import ScoringError
from scoring.signature import LIFELONG_MODEL, RETRIEVAL_MODEL
from trainer.errors import NotFiniteError, ParityError, PublishError, StagingError
from trainer.golden import as_sent, compare_answers, compare_folded, read_golden
from trainer.manifest import (
    COMPRESSOR_FILE,
    GOLDEN_FILE,
    ITEM_IDS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    facts_of,
    manifest_bytes,
    sha256_of,
    verify,
)
from trainer.repository import (
    claim_version,
    discard,
    every_version,
    require_model_folder,
    stage,
    versions_on_disk,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from scoring.triton import TritonServer

    OnStep = Callable[["Step"], None]
    Check = Callable[[Path, TritonServer, int], float]

log = logging.getLogger("moveline.publish")

# What Triton runs: the name in the version's folder, and ours.
_PROGRAMS: Final = {
    RETRIEVAL_MODEL: {"model.py": "gems_model.py", "graph.py": "graph.py"},
    LIFELONG_MODEL: {"model.py": "lifelong_model.py"},
}


class Step(IntEnum):
    """How far a publication is; each is announced once it is done."""

    CLAIMED = 1
    VERIFIED = 2
    STAGED = 3
    RENAMED = 4
    LOADED = 5
    PROVEN = 6
    REMEMBERED = 7
    RECORDED = 8
    FLIPPED = 9
    FOLLOWED = 10
    TIDIED = 11


def log_step(step: Step) -> None:
    """Say in the log how far a publication is."""
    log.info("step %d of %d: %s", step, len(Step), step.name.lower())


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


@dataclass(frozen=True)
class _Publication:
    """What every step needs."""

    package: Path
    manifest: dict[str, Any]
    servers: Sequence[TritonServer]
    token: int
    on_step: OnStep


def publish(
    package: Path,
    repository: Path,
    servers: Sequence[TritonServer],
    *,
    token: int = 0,
    on_step: OnStep = log_step,
) -> Published:
    """Return once the package is a version that every Triton answers with, as the package does.

    Args:
        package: as exported.
        repository: the folder that every server serves.
        servers: all of them.
        token: of this publication.
        on_step: told what is done.

    Raises:
        ExportError: the package does not match its manifest.
        PublishError: no such model folder, or a Triton could not load it (taken out again).
        ParityError: a Triton's answers differ from the package's (taken out again).
    """
    manifest = verify(package)
    compare_answers(read_golden(package).outputs, read_golden(package))
    gems, lifelong = repository / RETRIEVAL_MODEL, repository / LIFELONG_MODEL
    require_model_folder(gems)
    work = _Publication(package, manifest, servers, token, on_step)
    on_step(Step.VERIFIED)
    lifelong_version, added = None, None
    if manifest["memory_version"] is not None:
        require_model_folder(lifelong)
        lifelong_version = newest_folding(lifelong, manifest["memory_version"])
        if lifelong_version is None:
            added = _publish_lifelong(work, gems, lifelong)
            lifelong_version = int(added.name)
    try:
        folder, parity = _publish_gems(work, lifelong_version, gems)
    except BaseException:
        if added:
            take_out(added, servers)
        raise
    return Published(int(folder.name), folder, parity, lifelong_version)


def newest_folding(model_folder: Path, memory_version: str) -> int | None:
    """Return the newest loaded version of `lifelong` that makes such memories, else None."""
    for version in reversed(versions_on_disk(model_folder)):
        if facts_of(model_folder / str(version)).get("memory_version") == memory_version:
            return version
    return None


def _publish_lifelong(work: _Publication, gems: Path, lifelong: Path) -> Path:
    """Return the folder of the new, proven version; its number is that which `gems` will get."""
    names = [COMPRESSOR_FILE, ITEM_IDS_FILE, GOLDEN_FILE]
    next_gems = max(every_version(gems), default=0) + 1
    # Its steps are not announced: they are those of the same names of `gems`, a little earlier.
    folder = _add(work, lifelong, names, {}, at_least=next_gems, on_step=_say_nothing)
    _prove(folder, work.servers, check_lifelong_parity, _say_nothing)
    return folder


def _publish_gems(
    work: _Publication, lifelong_version: int | None, gems: Path
) -> tuple[Path, float]:
    names = [MODEL_FILE, ITEM_IDS_FILE, GOLDEN_FILE]
    if work.manifest.get("machine_code"):
        names.append(work.manifest["machine_code"]["file"])
    if lifelong_version is not None:
        names.append(COMPRESSOR_FILE)
    # What a published version reads is known now: the manifest says so from here on.
    facts = {"lifelong_model_version": lifelong_version}
    folder = _add(work, gems, names, facts, at_least=lifelong_version or 1, on_step=work.on_step)
    return folder, _prove(folder, work.servers, check_parity, work.on_step)


def _add(
    work: _Publication,
    model_folder: Path,
    names: Iterable[str],
    facts: dict[str, Any],
    *,
    at_least: int,
    on_step: OnStep,
) -> Path:
    """Return the new version's folder, complete and on disk from its first moment."""
    programs = {
        name: files("trainer.triton_model").joinpath(ours).read_bytes()
        for name, ours in _PROGRAMS[model_folder.name].items()
    }
    draft = stage(
        model_folder,
        {**{name: work.package / name for name in names}, **programs},
        token=work.token,
    )
    try:
        # Of the copies, so that Triton refuses what changes from here on.
        hashes = {name: sha256_of(draft / name) for name in [*names, *programs]}
        _refuse_bad_copy(work.manifest["files"], hashes)
        facts = {**facts, "publish_token": work.token, "published_files": hashes}
        (draft / MANIFEST_FILE).write_bytes(manifest_bytes({**work.manifest, **facts}))
        on_step(Step.STAGED)
        folder = claim_version(draft, model_folder, at_least=at_least)
    except OSError as error:
        raise StagingError(f"{draft} could not be completed ({error}): publish again.") from error
    finally:
        discard(draft)
    on_step(Step.RENAMED)
    return folder


def _refuse_bad_copy(wanted: dict[str, str], found: dict[str, str]) -> None:
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            raise StagingError(
                f"the copy of {name} has hash {found[name]}, the package {wanted[name]}: the "
                "package was written to meanwhile, or the disk fails. Publish again."
            )


def _say_nothing(step: Step) -> None:
    del step


def _prove(folder: Path, servers: Sequence[TritonServer], check: Check, on_step: OnStep) -> float:
    """Return the worst of what `check(folder, server, version)` found, once all have loaded it."""
    try:
        load_version(folder, servers)
        on_step(Step.LOADED)
        worst = max(check(folder, server, int(folder.name)) for server in servers)
    except BaseException as error:
        # Whatever it was, Ctrl-C included: a version that is not proven must not stay.
        take_out(folder, servers)
        if isinstance(error, ScoringError | ParityError | NotFiniteError):
            raise PublishError(
                f"version {folder.name} of {folder.parent.name} was taken out again, what was live "
                f"still is: {error}"
            ) from error
        raise
    on_step(Step.PROVEN)
    return worst


def load_version(folder: Path, servers: Sequence[TritonServer]) -> None:
    """Return once every server takes requests for a version."""
    for server in servers:
        server.load(folder.parent.name)
        server.wait_ready(folder.parent.name, int(folder.name))


def take_out(folder: Path, servers: Sequence[TritonServer]) -> None:
    """Remove a version and make every Triton forget it."""
    shutil.rmtree(folder, ignore_errors=True)
    reload(folder.parent, servers)


def reload(model_folder: Path, servers: Sequence[TritonServer]) -> None:
    """Have every Triton load what the folder holds; without a version the model is unloaded.

    A Triton that cannot be told is no failure: it reads the folder anew when it comes back.
    """
    for server in servers:
        try:
            if versions_on_disk(model_folder):
                server.load(model_folder.name)
            else:
                server.unload(model_folder.name)
        except ScoringError as error:
            log.warning("Triton was not told what it serves: %s", error)


def check_parity(folder: Path, server: TritonServer, version: int) -> float:
    """Return the largest relative difference between Triton's answers and the package's own.

    Raises:
        ExportError: there are no golden requests in the folder.
        NotFiniteError, ParityError: as `compare_answers`.
    """
    golden = read_golden(folder)
    answered = server.infer(RETRIEVAL_MODEL, version, as_sent(golden.inputs), list(golden.outputs))
    return compare_answers(answered, golden)


def check_lifelong_parity(folder: Path, server: TritonServer, version: int) -> float:
    """Return the largest relative difference between Triton's states and the compressor's own.

    Raises:
        ExportError: there are no golden requests in the folder.
        ParityError: as `compare_folded`.
    """
    golden = read_golden(folder)
    answered = server.infer(LIFELONG_MODEL, version, golden.events, list(golden.folded))
    return compare_folded(answered, golden)
