"""`moveline train`, `evaluate`, `publish`: from the event log to a version that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping

Package = Annotated[
    Path | None,
    typer.Option(
        "--package", help="Exported model; the newest under the models folder if left out."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train")(train)
    app.command("evaluate")(evaluate)
    app.command("publish")(publish)
    app.command("demo")(demo)


def train(
    *,
    budget: Annotated[float, typer.Option(help="Seconds of training at most.")] = 120.0,
    epochs: Annotated[float, typer.Option(help="Passes over the label groups.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of torch, of each process.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or auto [MOVELINE_TRAINING__DEVICE].")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16 [MOVELINE_TRAINING__PRECISION].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")
    ] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint [MOVELINE_TRAINING__CHECKPOINTS]."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Folder of TensorBoard's event files [MOVELINE_TRAINING__TENSORBOARD]."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the package to write.")] = None,
    warm: Annotated[
        str | None,
        typer.Option(
            "--warm",
            metavar="PACKAGE|published",
            help="Go on from this package, or from that of the version which is live.",
        ),
    ] = None,
    lake: options.Lake = None,
    generation: options.Generation = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Train a GEMs retrieval model on the lake, judge it on the held-out window, export it.

    The last 15% of the time span is held out. The package holds weights, ids and a manifest, and
    no pickle. `moveline publish` puts it into Triton.

    With --warm the weights of an earlier training learn on: items keep their ids, new ones join,
    and users' lifelong memories stay valid. Without, everything is learned from the start.

    A run that was killed goes on with the same command and --resume, and ends in the same weights.
    Several processes or GPUs: `torchrun --nproc-per-node 2 -m compose.cli train ...`.
    """
    from compose.training import TrainRequest, train_package
    from compose.warm_base import warm_base

    settings = options.settings_of(
        config,
        lake=lake,
        generation=generation,
        kafka=kafka,
        redis=redis,
        repository=repository,
        training={
            "device": device,
            "precision": precision,
            "checkpoints": checkpoints,
            "tensorboard": tensorboard,
        },
    )
    result = train_package(
        settings,
        TrainRequest(
            budget_s=budget,
            epochs=epochs,
            seed=seed,
            num_threads=threads,
            resume=resume,
            warm=None if warm is None else warm_base(settings, warm),
            out=out,
        ),
    )
    if result is None:
        return
    Console().print(quality_table(result.metrics))
    Console(stderr=True).print(f"package: {result.package}. Next: `moveline publish`.")


def evaluate(
    *,
    package: Package = None,
    seed: Annotated[int, typer.Option(help="Draws the users that are judged.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    lake: options.Lake = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Judge a package on the lake's events after its split, beside rankings that need no model.

    Weights are those of the package, frozen at its split; every event is predicted before it is
    shown, from all that came before it; all items are ranked, repeats allowed.
    """
    from compose.training import evaluate_package, newest_package

    settings = options.settings_of(config, lake=lake, redis=redis)
    metrics = evaluate_package(settings, package or newest_package(settings.models), seed=seed)
    if as_json:
        Console().out(json.dumps(metrics))
    else:
        Console().print(quality_table(metrics))


def publish(
    *,
    package: Package = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Make a package the next version in Triton, prove that it answers alike, and go live.

    A package that fails a check is taken out again and what was live stays live.
    """
    from compose.publishing import newest_package, publish_package

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, repository=repository
    )
    live = publish_package(settings, package or newest_package(settings.models))
    Console(stderr=True).print(
        f"version {live.version} answers: ready {live.ready_s:.1f} s after the start, live after "
        f"{live.live_s:.1f} s, scores within {live.parity:.1e} of the package's"
    )


def demo(
    *,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the stack up and print what to try next.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the figures under benchmarks/results.")
    ] = False,
    kafka_home: Annotated[
        Path | None,
        typer.Option(
            envvar="KAFKA_HOME",
            help="Start this Apache Kafka (needs java) instead of the embedded broker.",
        ),
    ] = None,
    lines: Annotated[int, typer.Option(help="Transaction lines at least; whole households.")] = (
        330_000
    ),
    budget: Annotated[float, typer.Option(help="Seconds of training at most.")] = 150.0,
    run_dir: options.RunDir = None,
    config: options.Config = None,
) -> None:
    """Do the main job on real data: events in, state live, model trained, published, answering.

    Starts servers of its own on free ports and stops them at the end. Exits with 1 if an answer
    does not change by new events, differs without any, or the model does not beat popularity.
    """
    from compose.demo import DemoOptions, run_demo

    settings = options.settings_of(config, run_dir=run_dir)
    run_demo(
        settings,
        DemoOptions(
            keep=keep,
            record=record,
            kafka_home=kafka_home,
            num_lines_min=lines,
            train_budget_s=budget,
        ),
    )


def quality_table(metrics: Mapping[str, float]) -> Table:
    """Return HR@10 and NDCG@10 of every ranking in a manifest's metrics."""
    table = Table("ranking", title="held-out window, full ranking", title_justify="left")
    table.add_column("HR@10", justify="right")
    table.add_column("NDCG@10", justify="right")
    for key, value in metrics.items():
        if key.startswith("hr10_"):
            name = key.removeprefix("hr10_")
            table.add_row(name, f"{value:.4f}", f"{metrics[f'ndcg10_{name}']:.4f}")
    return table
