"""`moveline trainer run`, `once`, `runs`, `show`: models that are kept fresh by themselves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from compose.trainer_service.records import RunRecord

RUNS_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    trainer = typer.Typer(no_args_is_help=True, help="Keep the served model fresh, by itself.")
    trainer.command("run")(run)
    trainer.command("once")(once)
    trainer.command("runs")(runs)
    trainer.command("show")(show)
    app.add_typer(trainer, name="trainer")


def run(
    *,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="0 takes a free one [MOVELINE_TRAINING__METRICS_PORT]."),
    ] = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Train, judge and publish whenever it is time or enough events have come, until Ctrl-C.

    It goes on from the served weights and trains from scratch now and then. Several may run: one
    trains at a time. When and how is said by the settings under `training`: docs/trainer.md.
    """
    from prometheus_client import start_http_server

    from compose.cli.data import stop_on_signals
    from compose.trainer_service.metrics import TrainerMetrics
    from compose.trainer_service.records import runs_of
    from compose.trainer_service.service import Service

    settings = options.settings_of(
        config,
        kafka=kafka,
        redis=redis,
        triton=triton,
        lake=lake,
        repository=repository,
        generation=generation,
        training={"metrics_port": metrics_port},
    )
    metrics = TrainerMetrics()
    port = settings.training.metrics_port
    try:
        server, thread = start_http_server(
            port, addr=settings.training.metrics_host, registry=metrics.registry
        )
    except OSError as error:
        raise typer.BadParameter(
            f"metrics port {port} cannot be opened ({error}): give another --metrics-port"
        ) from error
    Console(stderr=True).print(
        f"metrics at http://127.0.0.1:{server.server_port}/metrics, runs in "
        f"{runs_of(settings.models).path}"
    )
    try:
        Service(settings, runs_of(settings.models), metrics).serve(stop_on_signals())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def once(
    *,
    full: Annotated[
        bool, typer.Option("--full", help="Train from scratch, not from the served weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Do one run of the trainer now: train, judge, publish.

    Exits with 0 when a version was published or there was a reason not to train, with 1 when the
    run failed or a gate refused its version. What is live stays live then.
    """
    from compose.local.interrupts import interrupts
    from compose.trainer_service.one_run import run_once

    settings = options.settings_of(
        config,
        kafka=kafka,
        redis=redis,
        triton=triton,
        lake=lake,
        repository=repository,
        generation=generation,
    )
    with interrupts():
        record = run_once(settings, full=full)
    _print_run(record, as_json=as_json)
    if record.state in {"failed", "refused"}:
        raise typer.Exit(code=1)


def runs(
    *,
    last: Annotated[int, typer.Option(min=1, help="So many of the newest.")] = RUNS_SHOWN,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
    config: options.Config = None,
) -> None:
    """List what the trainer did: events, speed, figures, verdict and version of each run."""
    from compose.trainer_service.records import runs_of

    settings = options.settings_of(config)
    found = runs_of(settings.models).all()[-last:]
    if as_json:
        _print_json(found)
        return
    table = Table(
        "run", "is", "kind", "woken by", title=f"the newest {len(found)} runs", title_justify="left"
    )
    for name in ("events", "tokens/s", "loss", "NDCG@10", "served", "version", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("says")
    for one in found:
        table.add_row(*_row(one))
    Console().print(table)


def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="As `moveline trainer runs` has it.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    config: options.Config = None,
) -> None:
    """Print everything that is recorded of one run, gate by gate."""
    from compose.trainer_service.records import runs_of

    settings = options.settings_of(config)
    _print_run(runs_of(settings.models).find(name), as_json=as_json)


def _row(one: RunRecord) -> tuple[str, ...]:
    is_of_a_model = one.kind is not None
    seconds = ((one.ended_ms or one.started_ms) - one.started_ms) / 1000
    times = f" ({one.times} times)" if one.times > 1 else ""
    return (
        one.run,
        _colour(one.state) + times,
        one.kind or "",
        one.why,
        f"{one.num_events:,}" if is_of_a_model else "",
        f"{one.tokens_per_s:,.0f}" if is_of_a_model else "",
        "" if one.loss is None else f"{one.loss:.3f}",
        _figure(one, "ndcg10_model"),
        _figure(one, "ndcg10_served"),
        "" if one.version is None else str(one.version),
        f"{seconds:.0f}" if one.ended_ms else "",
        one.says,
    )


def _figure(one: RunRecord, name: str) -> str:
    return f"{one.figures[name]:.4f}" if name in one.figures else ""


def _colour(state: str) -> str:
    colours = {"published": "green", "failed": "red", "refused": "yellow"}
    return f"[{colours[state]}]{state}[/]" if state in colours else state


def _print_run(one: RunRecord, *, as_json: bool) -> None:
    if as_json:
        _print_json(one)
        return
    import msgspec

    console = Console()
    table = Table("what", "is", title=f"run {one.run}", title_justify="left", show_header=False)
    for name, value in msgspec.to_builtins(one).items():
        if name not in {"run", "gates"} and value not in (None, "", {}):
            table.add_row(name, _words(value))
    console.print(table)
    if one.gates:
        gates = Table("gate", "found", "limit", "verdict", title="gates", title_justify="left")
        for gate in one.gates:
            verdict = f"[red]{gate.says}[/]" if gate.says else "passed"
            gates.add_row(gate.name, str(gate.value), str(gate.limit), verdict)
        console.print(gates)


def _words(value: Any) -> str:  # noqa: ANN401 - any field of a record
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
