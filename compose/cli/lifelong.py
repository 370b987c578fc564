"""`moveline lifelong status|build|verify|retire`: memories of what has left the streams."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options
from compose.cli.data import stop_on_signals
from streams.lifelong_build import COVERAGE_DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from compose.settings import Settings
    from features.lifelong import LiveMemory
    from features.lifelong_store import LifelongStore

    Columns = dict[str, np.ndarray[tuple[int], np.dtype]]

# Users that differ and are named; all are counted.
_SHOWN = 20

MemoryVersion = Annotated[
    str | None,
    typer.Option(
        "--memory-version",
        help="16 hex digits of a model's manifest; the newest published model's if left out.",
    ),
]
lifelong_app = typer.Typer(
    help="Memories of what has left the streams, one per memory version.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(lifelong_app, name="lifelong")


@dataclass(frozen=True)
class _Place:
    """The memories of a generation, its users and its lake."""

    settings: Settings
    memories: LifelongStore

    def users(self) -> list[int]:
        from features.generations import Generations

        generations = Generations(self.memories.client)
        return generations.users(self.memories.generation, lambda _: True)

    def parts(self, users: Sequence[int] | None = None) -> Iterator[Columns]:
        """Yield the lake's accepted events by user."""
        import numpy as np

        from features.lake_users import stream_users

        _, topics = options.kafka_of(self.settings)
        chosen = None if users is None else np.array(sorted(users), np.int64)
        return stream_users(
            self.settings.lake.path, topics.events, self.memories.config, users=chosen
        )


def _place(settings: Settings, generation: str | None) -> _Place:
    """Return the place of a generation; the live one if none was named."""
    from features.lifelong_store import LifelongStore
    from features.redis import connect
    from features.store import open_state

    number = None if generation is None else settings.generation_number
    return _Place(
        settings,
        LifelongStore.of(open_state(connect(settings.redis.url), generation=number)),
    )


@lifelong_app.command("status")
def status(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Show each memory version that is kept up to date, and how far it is. Looks at every user."""
    from streams.control import read_memories
    from streams.lifelong_build import coverage

    settings = options.settings_of(config, kafka=kafka, redis=redis, generation=generation)
    place = _place(settings, generation)
    live = read_memories(*options.kafka_of(settings))
    users = place.users() if live else []
    table = Table(
        title=f"memories of g{place.memories.generation}, of users with chunks",
        title_justify="left",
    )
    for name in ("memory version", "lifelong", "users", "whole", "current", "chunks folded"):
        table.add_column(name, justify="left" if name == "memory version" else "right")
    for one in live:
        found = coverage(place.memories, users, one.memory_version)
        table.add_row(
            one.memory_version,
            str(one.lifelong_model_version),
            f"{found.num_users:,}",
            f"{found.share:.2%}",
            f"{found.num_current:,}",
            f"{found.num_folded:,} of {found.num_chunks:,}",
        )
    Console().print(table)
    if not live:
        Console(stderr=True).print(
            "no memory version is kept up to date: publish a model that reads one, then "
            "`moveline lifelong build`"
        )


@lifelong_app.command("build")
def build(
    *,
    memory_version: MemoryVersion = None,
    rate: Annotated[
        float | None, typer.Option(min=1, help="Chunks a second at most; all it can if left out.")
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(min=0, max=1, help="Exit with 1 if less users than this share are whole."),
    ] = COVERAGE_DEFAULT,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Make memories of the lake: for a new memory version, or where chunks left Redis too early.

    From then on the near-line app keeps the version up to date. Ctrl-C ends it; the same command
    goes on where it was, and finds nothing to do where nothing is missing.

    Example: moveline lake --until-end && moveline lifelong build
    """
    from compose.memories import build_memories, find_memory, keep_live

    settings = options.settings_of(
        config,
        kafka=kafka,
        redis=redis,
        triton=triton,
        lake=lake,
        repository=repository,
        generation=generation,
    )
    live = find_memory(settings.model_repository, memory_version)
    number = _place(settings, generation).memories.generation
    keep_live(settings, *options.kafka_of(settings), live)
    stop = stop_on_signals()
    report, found = build_memories(settings, number, live, rate=rate, should_stop=stop.is_set)
    Console(stderr=True).print(
        f"memory version {live.memory_version}: {report.num_chunks:,} chunks folded for "
        f"{report.num_users:,} users; {found.share:.2%} of {found.num_users:,} users with chunks "
        f"are whole, {found.num_current:,} current"
    )
    if report.num_behind:
        Console(stderr=True).print(
            f"{report.num_behind:,} users lack chunks that the lake does not have yet: "
            "moveline lake --until-end, then again"
        )
    if found.share < coverage or stop.is_set():
        raise typer.Exit(code=1)


@lifelong_app.command("verify")
def verify(
    *,
    memory_version: MemoryVersion = None,
    users: Annotated[int, typer.Option(min=1, help="Users compared, drawn at random.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the users.")] = 1,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Compare memories with those that the lake gives; exit with 1 if one differs.

    Example: moveline lake --until-end && moveline lifelong verify --users 1000
    """
    from compose.memories import MemoryVersionError, find_memory
    from scoring.triton import TritonServer
    from streams import lifelong_build
    from streams.fold import TritonFold
    from streams.progress import progress_bar

    settings = options.settings_of(
        config,
        redis=redis,
        triton=triton,
        lake=lake,
        repository=repository,
        generation=generation,
    )
    live = find_memory(settings.model_repository, memory_version)
    place = _place(settings, generation)
    chosen = _sample(place, live, users, seed)
    verdicts = []
    with (
        TritonServer(settings.triton.address) as server,
        progress_bar("verify", total=len(chosen), unit="users") as advance,
    ):
        for verdict in lifelong_build.verify(
            place.memories, live, TritonFold(server), place.parts(chosen)
        ):
            verdicts.append(verdict)
            advance(1)
    behind = [one for one in verdicts if one.difference is None]
    wrong = [one for one in verdicts if one.difference is not None and not one.is_equal]
    console = Console(stderr=True)
    console.print(
        f"{len(verdicts) - len(behind):,} memories compared, {len(wrong):,} differ by more than "
        f"{lifelong_build.TOLERANCE:g}; {len(behind):,} not compared: the lake ends before them"
    )
    for one in wrong[:_SHOWN]:
        console.print(f"user {one.user_id}: {one.difference:.2e} over {one.num_chunks:,} chunks")
    if wrong:
        raise typer.Exit(code=1)
    if len(verdicts) == len(behind):
        raise MemoryVersionError(
            f"no memory of version {live.memory_version} was compared: build it, or let the lake "
            "catch up (moveline lake --until-end)."
        )


def _sample(place: _Place, live: LiveMemory, count: int, seed: int) -> list[int]:
    """Return users who have a memory, drawn at random."""
    everybody = place.users()
    random.Random(seed).shuffle(everybody)  # noqa: S311 - a sample, no secret
    chosen: list[int] = []
    for at in range(0, len(everybody), count):
        part = everybody[at : at + count]
        held = place.memories.read(part, live.memory_version)
        chosen += [user for user, raw in zip(part, held, strict=True) if raw is not None]
        if len(chosen) >= count:
            break
    return chosen[:count]


@lifelong_app.command("retire")
def retire(
    memory_version: Annotated[str, typer.Argument(help="As `status` prints it.")],
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Keep a memory version up to date no more, and remove its memories.

    For one that no model reads which you may still go back to. Looks at every key.
    """
    from compose.memories import MemoryVersionError
    from compose.memories import retire as take_off
    from features.redis import CatalogueStore

    settings = options.settings_of(config, kafka=kafka, redis=redis, generation=generation)
    place = _place(settings, generation)
    pointers = CatalogueStore(place.memories.client).get_pointers()
    if pointers is not None and pointers.memory_version == memory_version:
        raise MemoryVersionError(
            f"model version {pointers.model_version}, which is live, reads memory version "
            f"{memory_version}: make another one live first."
        )
    canary = None if pointers is None else pointers.canary
    if canary is not None and canary.memory_version == memory_version:
        raise MemoryVersionError(
            f"the canary of version {canary.version} reads memory version {memory_version}: "
            "end it first: moveline canary stop"
        )
    take_off(settings, *options.kafka_of(settings), memory_version)
    removed = place.memories.discard_version(memory_version)
    Console(stderr=True).print(f"{removed:,} memories of version {memory_version} removed")
