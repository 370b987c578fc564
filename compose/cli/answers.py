"""`moveline recommend`, `moveline features`: look at answers and at what they are made from."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options
from features.clock import now_ms
from features.events import parse_id
from scoring.signature import CONTRIBUTION

if TYPE_CHECKING:
    from features.catalogue import Item
    from features.redis import CatalogueStore
    from features.view import Records, UserView
    from scoring.client import Answer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("recommend")(recommend)
    app.command("features")(features)


def recommend(
    users: Annotated[list[str], typer.Argument(help="User ids, numbers or strings.")],
    *,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    min_position: Annotated[
        str | None,
        typer.Option(
            help="PARTITION:OFFSET of an event the answer must have seen (moveline status names "
            "the topic; after a repartition SOURCE:PARTITION:OFFSET)."
        ),
    ] = None,
    exclude_seen: Annotated[bool, typer.Option(help="Leave out items seen lately.")] = False,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Rank this item and return no other; give it once for each."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Only items of this domain, as its events name it.")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for the whole call.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per user.")] = False,
    triton: options.Triton = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Ask Triton for items, and say where the answer came from."""
    from scoring.client import Recommender

    settings = options.settings_of(config, triton=triton, redis=redis)
    with Recommender(settings.triton.address) as recommender:
        answers = recommender.recommend_many(
            users,
            k=k,
            min_position=_position(min_position),
            exclude_seen=exclude_seen,
            candidates=candidate or None,
            domain=domain,
            deadline_s=deadline,
        )
    _, catalogue = options.stores_of(settings)
    console = Console()
    for answer in answers:
        if as_json:
            console.out(json.dumps(_plain(answer, catalogue)), highlight=False)
        else:
            console.print(answer_table(answer, catalogue))


def _position(raw: str | None) -> tuple[int, int] | None:
    if raw is None:
        return None
    from features.keys import log_partition

    parts = raw.split(":")
    if len(parts) not in {2, 3} or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(
            f"{raw!r} is neither PARTITION:OFFSET, for example 2:41, nor SOURCE:PARTITION:OFFSET"
        )
    source, partition, offset = map(int, ["0", *parts][-3:])
    return log_partition(source, partition), offset


def item_label(item: Item | None) -> tuple[str, str]:
    """Return an item's name and its widest category, as people know them."""
    if item is None:
        return "(not in the catalogue)", ""
    return item.name, item.categories[0] if item.categories else ""


def answer_table(answer: Answer, catalogue: CatalogueStore) -> Table:
    """Return one answer as a table: names, scores, provenance."""
    source = answer.provenance
    age = "none" if source.newest_event_age_ms is None else _duration(source.newest_event_age_ms)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {share:.0%}"
        for name, share in zip(CONTRIBUTION, source.contribution, strict=True)
    )
    table = Table(
        title=f"user {answer.user_id}",
        caption=(
            f"model version {source.model_version or '-'} | generation g{source.generation} | "
            f"{source.ordinal} events seen, the newest {age} old | {parts} | "
            f"{source.degraded.name if source.degraded else 'full answer'}"
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("#", justify="right")
    table.add_column("item", justify="right")
    table.add_column("name")
    table.add_column("category")
    table.add_column("score", justify="right")
    items = catalogue.get_items([one.item_id for one in answer.items])
    for place, (one, item) in enumerate(zip(answer.items, items, strict=True), start=1):
        table.add_row(str(place), str(one.item_id), *item_label(item), f"{one.score:.3f}")
    return table


def _plain(answer: Answer, catalogue: CatalogueStore) -> dict[str, Any]:
    items = catalogue.get_items([one.item_id for one in answer.items])
    source = answer.provenance
    return {
        "user_id": answer.user_id,
        "items": [
            {
                "item_id": one.item_id,
                "original_id": item.original_id if item else None,
                "name": item.name if item else None,
                "score": one.score,
            }
            for one, item in zip(answer.items, items, strict=True)
        ],
        "model_version": source.model_version,
        "generation": f"g{source.generation}",
        "ordinal": source.ordinal,
        "newest_event_time_ms": source.newest_event_time_ms,
        "newest_event_age_ms": source.newest_event_age_ms,
        "degraded": int(source.degraded),
        "contribution": source.contribution,
    }


def features(
    user: Annotated[str, typer.Argument(help="User id, a number or a string.")],
    *,
    newest: Annotated[int, typer.Option(help="Events of the recent stream to list.")] = 10,
    redis: options.Redis = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Show one user's session and streams as scoring would read them right now."""
    from features.chunks import ChunkStore
    from features.state import EMPTY_STATE
    from features.view import seen_clock_ms, view_user

    settings = options.settings_of(config, redis=redis, generation=generation)
    store, catalogue = options.stores_of(settings)
    user_id = parse_id(user)
    state = store.load([user_id])[user_id]
    console = Console()
    if state is EMPTY_STATE:
        console.print(
            f"user {user_id} has no state in g{store.generation}: no valid event was applied. "
            "`moveline status` shows lag and dead letters."
        )
        raise typer.Exit(code=1)
    view = view_user(state, seen_clock_ms(now_ms(), state), store.config)
    first = ChunkStore(store.client, store.generation).first_kept([user_id])[0]
    hole = f" (0 to {first - 1} only in the lake)" if first else ""
    console.print(
        f"[bold]user {user_id}[/bold]  generation g{store.generation}  {view.ordinal} events  "
        f"position {state.position.partition}:{state.position.offset}  "
        f"recent {view.recent.size}  mid-term {view.mid.size}  chunks {state.num_chunks}{hole}  "
        f"late {state.num_late}"
    )
    console.print(_session_table(view, store.config.actions))
    console.print(_stream_table(view.recent[-newest:], catalogue, store.config.actions))


def _session_table(view: UserView, actions: tuple[str, ...]) -> Table:
    session = view.user_session
    title = "open session" if session.is_open else "no open session"
    table = Table(title=title, title_justify="left")
    counts = ", ".join(
        f"{action} {count}"
        for action, count in zip(actions, session.action_counts, strict=True)
        if count
    )
    for name in ("id", "start", "last", "events", "items", "dwell", "actions"):
        table.add_column(name)
    if session.is_open:
        table.add_row(
            str(session.session_id),
            _time(session.start_ms),
            _time(session.last_ms),
            str(session.num_events),
            str(session.distinct_items),
            _duration(session.dwell_ms),
            counts,
        )
    return table


def _stream_table(records: Records, catalogue: CatalogueStore, actions: tuple[str, ...]) -> Table:
    table = Table(title=f"newest {records.size} events", title_justify="left")
    for name in ("ordinal", "time", "action", "item", "name", "domain"):
        table.add_column(name)
    domains = catalogue.get_domains()
    items = catalogue.get_items(records["item_id"].tolist())
    for record, item in zip(records[::-1], items[::-1], strict=True):
        table.add_row(
            str(record["ordinal"]),
            _time(int(record["event_time_ms"])),
            actions[int(record["action"])],
            str(record["item_id"]),
            item_label(item)[0],
            domains.get(int(record["domain"]), ""),
        )
    return table


def _time(epoch_ms: int) -> str:
    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}Z"


def _duration(span_ms: int) -> str:
    seconds = span_ms / 1000
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
