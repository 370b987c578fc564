"""`moveline demo`: the main job on real data and real servers, from clicks to recommendations."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from compose.cli.answers import answer_table
from compose.cli.models import quality_table
from compose.cli.options import kafka_of, stores_of
from compose.cli.stack import prepare, print_addresses, remember, stack_options
from compose.demo_loop import turn_the_loop
from compose.errors import ComposeError
from compose.figures import report
from compose.groceries import Groceries, load_groceries, write_products
from compose.local.foreground import running_stack
from compose.local.server import inherited_environment
from compose.probe import measure_freshness, measure_requests
from compose.settings import ADDRESSES_FILE
from compose.training import TrainRequest, publish_package, train_package
from features import lake
from features.clock import now_ms
from features.events import Event
from scoring.client import Recommender
from streams.kafka import committed, end_offsets
from streams.producer import EventProducer
from streams.publish import publish_events
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compose.local.stack import LocalStack
    from compose.settings import Settings
    from features.redis import CatalogueStore
    from scoring.client import Answer

SEED: Final = 7
NUM_LINES_MIN: Final = 330_000
# Held back from the bulk and sent at a steady rate, so that freshness is not that of a backlog.
NUM_PROBES: Final = 1_000
PROBE_RATE: Final = 200.0
NUM_REQUESTS: Final = 300
NUM_CLICKS: Final = 5
# Held back too, and sent while the trainer's loop turns.
NUM_LOOP_EVENTS: Final = 2_000
# Of the first training's seconds, what the turn of the loop gets.
LOOP_BUDGET_SHARE: Final = 0.4
# A week, which is as far back as the live counts look.
HALF_LIFE_H: Final = 7 * 24
# Of the households that are shown: with fewer events there is little to recommend from.
NUM_EVENTS_MIN: Final = 200
K: Final = 10
CATCH_UP_TIMEOUT_S: Final = 180.0
_POLL_S: Final = 0.2


class DemoFailedError(ComposeError):
    """Something the demo promises did not happen."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What may differ between two demos."""

    keep: bool = False
    record: bool = False
    kafka_home: Path | None = None
    num_lines_min: int = NUM_LINES_MIN
    train_budget_s: float = 150.0
    train_epochs: float = 1.0


@dataclass
class Demo:
    """One demo on a running stack."""

    settings: Settings
    stack: LocalStack
    options: DemoOptions
    console: Console
    figures: dict[str, object] = field(default_factory=dict)

    def run(self) -> None:
        """Take real events all the way to answers; fill `figures`."""
        self._apply_feast()
        self._start_processes()
        groceries = self._load()
        started = time.monotonic()
        self._publish(groceries)
        self._catch_up("worker")
        seconds = time.monotonic() - started
        self.figures["events_per_s"] = round(_num_bulk(groceries) / seconds)
        self._probe(groceries)
        self._catch_up("worker")
        self._catch_up("lake")
        self._train_and_publish()
        self._ask(groceries)
        self._turn_the_loop(groceries)

    def say(self, text: str) -> None:
        """Head the next step."""
        self.console.print(f"\n[bold cyan]== {text}[/bold cyan]")

    def _apply_feast(self) -> None:
        self.say("Feast repository")
        feast = Path(sys.executable).with_name("feast")
        environment = self._environment()
        done = subprocess.run(
            [
                str(feast),
                "-c",
                str(Path(lake.__file__).parent),
                "apply",
                "--skip-source-validation",
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DemoFailedError(f"`feast apply` failed: {done.stderr.strip()[-500:]}")
        self.console.print("feast apply: entities, views and services registered")

    def _environment(self) -> dict[str, str]:
        settings = self.settings
        return inherited_environment() | {
            "MOVELINE_RUN_DIR": str(settings.run_dir.absolute()),
            "MOVELINE_KAFKA__PREFIX": settings.kafka.prefix,
            "MOVELINE_LAKE__PATH": str(settings.lake.path.absolute()),
            "MOVELINE_REDIS__URL": settings.redis.url,
            "MOVELINE_KAFKA__BOOTSTRAP": settings.kafka.bootstrap,
            "MOVELINE_FEAST__REGISTRY": str(settings.run_dir.absolute() / "feast" / "registry.db"),
        }

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "compose.cli", *arguments]

    def _start_processes(self) -> None:
        self.say("worker and lake sink")
        environment = self._environment()
        worker = self._command("worker", "--instance", "demo-1")
        for name, command in (("worker", worker), ("lake", self._command("lake"))):
            running = self.stack.spawn(name, command, env=environment)
            self.console.print(f"{name}: pid {running.pid}, log {running.log}")

    def _load(self) -> Groceries:
        """Load the catalogue through the command line, and choose the households."""
        self.say("catalogue and events")
        products = write_products(self.settings.run_dir / "products.parquet")
        mapping = ("item_id=product_id", "categories=department+product_category")
        maps = [part for pair in mapping for part in ("--map", pair)]
        command = self._command("items", "load", str(products), *maps)
        if subprocess.run(command, env=self._environment(), check=False).returncode:
            raise DemoFailedError("`moveline items load` failed, see above")
        return load_groceries(num_lines_min=self.options.num_lines_min, seed=SEED, now_ms=now_ms())

    def _publish(self, groceries: Groceries) -> None:
        kafka, topics = kafka_of(self.settings)
        bulk = _num_bulk(groceries)
        with EventProducer(kafka, topics.events) as producer:
            sent = publish_events(producer, groceries.events(0, bulk), total=bulk)
        if sent.num_failed:
            raise DemoFailedError(f"{sent.num_failed} events failed: {sent.first_failure}")
        self.figures["events"] = len(groceries)
        self.figures["produce_events_per_s"] = round(sent.events_per_s)
        self.console.print(
            f"{sent.num_delivered:,} lines of {len(groceries.households()):,} households "
            f"acknowledged, {sent.events_per_s:,.0f} events/s"
        )

    def _catch_up(self, name: str) -> None:
        """Wait until the worker or the lake has everything the topic holds now."""
        kafka, topics = kafka_of(self.settings)
        ends = end_offsets(kafka, topics.events)

        def held() -> Mapping[int, int]:
            if name == "worker":
                group = group_of(topics, self.settings.generation_number)
                return committed(kafka, group, topics.events)
            files = lake.list_files(self.settings.lake.path, topics.events)
            return {file.partition: file.end + 1 for file in files}

        def reached() -> bool:
            done = held()
            return all(done.get(partition, 0) >= end for partition, end in ends.items())

        seconds = self._wait(name, reached)
        total = sum(ends.values())
        self.console.print(f"{name} has all {total:,} events, {seconds:.1f} s after the last send")

    def _wait(self, name: str, reached: Callable[[], bool]) -> float:
        started = time.monotonic()
        while not reached():
            gone = [p for p in self.stack.running() if p.name == name and not p.alive]
            if gone or time.monotonic() - started > CATCH_UP_TIMEOUT_S:
                log = next(p.log for p in self.stack.running() if p.name == name)
                what = "has ended" if gone else f"is behind after {CATCH_UP_TIMEOUT_S:g} s"
                raise DemoFailedError(f"the {name} {what}: read {log}")
            time.sleep(_POLL_S)
        return time.monotonic() - started

    def _probe(self, groceries: Groceries) -> None:
        self.say(f"freshness at {PROBE_RATE:g} events/s")
        kafka, topics = kafka_of(self.settings)
        store, _ = stores_of(self.settings)
        bulk = _num_bulk(groceries)
        last = groceries.events(bulk, bulk + NUM_PROBES)
        with EventProducer(kafka, topics.events) as producer:
            seen = measure_freshness(producer, store, last, rate=PROBE_RATE).from_acknowledgement
        self.figures |= {"freshness_p50_ms": seen.p50_ms, "freshness_p99_ms": seen.p99_ms}
        self.console.print(
            f"broker acknowledgement to Redis: p50 {seen.p50_ms} ms, p99 {seen.p99_ms} ms"
        )

    def _train_and_publish(self) -> None:
        self.say("training on the lake")
        request = TrainRequest(
            budget_s=self.options.train_budget_s, epochs=self.options.train_epochs, seed=SEED
        )
        result = train_package(self.settings, request)
        assert result is not None, "a demo is one process"
        self.figures |= {name: round(value, 4) for name, value in result.metrics.items()}
        self.console.print(f"trained, judged and exported in {result.seconds:.0f} s")
        self.console.print(quality_table(result.metrics))
        self.say("publishing into Triton")
        live = publish_package(self.settings, result.package)
        self.figures["publish_to_live_s"] = round(live.live_s, 2)
        self.console.print(
            f"version {live.version}: ready after {live.ready_s:.1f} s, live after "
            f"{live.live_s:.1f} s, Triton's scores within {live.parity:.1e} of torch's"
        )

    def _ask(self, groceries: Groceries) -> None:
        self.say("recommendations over gRPC")
        _, catalogue = stores_of(self.settings)
        rng = np.random.default_rng(SEED)
        users = rng.permutation(groceries.regulars(NUM_EVENTS_MIN)).tolist()
        with Recommender(self.settings.triton.address) as recommender:
            asked = recommender.recommend_many(users[:3], k=K, deadline_s=10.0)
            for answer in asked:
                self.console.print(answer_table(answer, catalogue))
            again = recommender.recommend_many(users[:3], k=K, deadline_s=10.0)
            same = [one.items for one in asked] == [one.items for one in again]
            self.figures["identical_without_event"] = same
            self.console.print(
                f"asked again without an event: {'identical' if same else 'NOT identical'}"
            )
            self._click(recommender, asked[0], catalogue)
            seen = measure_requests(recommender, users, num_requests=NUM_REQUESTS, k=K)
        self.figures |= {"request_p50_ms": seen.p50_ms, "request_p99_ms": seen.p99_ms}

    def _turn_the_loop(self, groceries: Groceries) -> None:
        """Have the trainer go on from what is live, under traffic; answers show the new version."""
        self.say("one turn of the trainer's loop, while events and requests flow")
        first = _num_bulk(groceries) + NUM_PROBES
        turn = turn_the_loop(
            self.settings,
            users=groceries.regulars(NUM_EVENTS_MIN),
            events=groceries.events(first, len(groceries)),
            budget_s=LOOP_BUDGET_SHARE * self.options.train_budget_s,
        )
        self.figures |= turn.figures()
        record, spoke = turn.record, turn.traffic.versions
        answered = ", ".join(f"version {one}: {count:,} answers" for one, count in spoke.items())
        self.console.print(
            f"{record.kind or 'no'} training of {record.num_steps:,} steps, {record.state}"
            f"{': ' + record.says if record.says else ''}; {answered}; "
            f"{len(turn.traffic.failures)} failed"
        )
        for failure in turn.traffic.failures[:3]:
            self.console.print(f"  {failure}")

    def _click(
        self,
        recommender: Recommender,
        before: Answer,
        catalogue: CatalogueStore,
    ) -> None:
        """Send a few events of one household and ask for an answer that has seen them."""
        kafka, topics = kafka_of(self.settings)
        # Just below what was shown: near enough to the taste to move up by one purchase.
        below = recommender.recommend(before.user_id, k=K + NUM_CLICKS, deadline_s=10.0).items[K:]
        clicked = [one.item_id for one in below]
        self.say(f"household {before.user_id} buys {NUM_CLICKS} things now")
        for item in catalogue.get_items(clicked):
            self.console.print(f"  {item.name if item else 'not in the catalogue'}")
        with EventProducer(kafka, topics.events) as producer:
            for number, item_id in enumerate(clicked):
                newest = producer.send_and_wait(
                    Event(
                        event_id=f"demo-click:{now_ms()}:{number}",
                        user_id=before.user_id,
                        item_id=item_id,
                        action="purchase",
                        event_time_ms=now_ms(),
                    )
                )
        after = recommender.recommend(
            before.user_id, k=K, min_position=newest.position, deadline_s=10.0
        )
        visible_ms = (time.perf_counter() - newest.acked_s) * 1000
        changed = [one.item_id for one in after.items] != [one.item_id for one in before.items]
        self.figures |= {"changed_by_click": changed, "click_to_answer_ms": round(visible_ms, 1)}
        self.console.print(answer_table(after, catalogue))
        self.console.print(
            f"the answer {'changed' if changed else 'did NOT change'}; from the broker's "
            f"acknowledgement to an answer that has seen it: {visible_ms:.1f} ms"
        )


def _num_bulk(groceries: Groceries) -> int:
    """Return how many events are sent as fast as they go; the others follow at a steady rate."""
    return len(groceries) - NUM_PROBES - NUM_LOOP_EVENTS


def run_demo(settings: Settings, options: DemoOptions) -> None:
    """Run the demo on a stack of its own, print the closing table, keep or stop the stack.

    Raises:
        DemoFailedError: a promise was not kept; the table says which.
        ComposeError: a server did not come up.
    """
    started = time.monotonic()
    console = Console(stderr=True)
    settings = own_folder(settings)
    chosen = stack_options(settings, options.kafka_home, persist=False)
    with running_stack(
        chosen,
        tied=not options.keep,
        keep=(lambda: True) if options.keep else None,
        report=console.print,
    ) as stack:
        local = remember(settings, stack.addresses)
        try:
            prepare(local, console)
            demo = Demo(local, stack, options, console)
            demo.run()
        finally:
            if not options.keep:
                (settings.run_dir / ADDRESSES_FILE).unlink(missing_ok=True)
        figures = demo.figures | {"seconds_total": round(time.monotonic() - started, 1)}
        console.print(closing_table(figures))
        if options.keep:
            print_addresses(local, console)
            console.print(
                f"The stack stays up. In a shell: export MOVELINE_RUN_DIR={local.run_dir}, then "
                "`moveline status`, `moveline features HOUSEHOLD`, `moveline recommend "
                "HOUSEHOLD`, `moveline down`."
            )
    broker = "Apache Kafka" if chosen.kafka_home else "the embedded broker"
    caveats = {**CAVEATS, "broker": broker}
    report("demo", figures, command="make demo", caveats=caveats, keep=options.record)
    refuse_broken_promises(figures)


def own_folder(settings: Settings) -> Settings:
    """Return settings in a folder of the demo's own, nothing of an earlier demo's log in it.

    The trainer's records name positions, too: with them, it would find nothing new to learn.
    """
    run_dir = settings.run_dir / "demo"
    lake_path, models = run_dir / "lake", run_dir / "models"
    for path in (lake_path, models):
        if path.exists():
            shutil.rmtree(path)
    return settings.model_copy(
        update={
            "run_dir": run_dir,
            "lake": settings.lake.model_copy(update={"path": lake_path}),
            "models": models,
            # What households buy is in season for weeks.
            "sources": settings.sources.model_copy(update={"half_life_h": HALF_LIFE_H}),
        }
    )


CAVEATS: Final = {
    "events_per_s": "from the first event sent to the last one in Redis, while the lake is written",
    "freshness": f"{NUM_PROBES} events at {PROBE_RATE:g}/s after the bulk, seen by polling Redis",
    "request": "one sequential client on the same cores as every server",
    "quality": "last 15% of the year, up to 600 households, full ranking, repeats allowed",
}


def closing_table(figures: Mapping[str, object]) -> Table:
    """Return the figures that matter as a table."""
    table = Table("what", "figure", title="Moveline on this machine", title_justify="left")
    for name, value in figures.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        table.add_row(name, f"{value:,}" if is_number else str(value))
    return table


def refuse_broken_promises(figures: Mapping[str, object]) -> None:
    """Return if the demo showed what it promises.

    Raises:
        DemoFailedError: naming what it did not.
    """
    broken = []
    if not figures["identical_without_event"]:
        broken.append("two requests without an event between them differed")
    if not figures["changed_by_click"]:
        broken.append("new events did not change the answer")
    model, popular = figures["hr10_model"], figures["hr10_popularity"]
    assert isinstance(model, float)
    assert isinstance(popular, float)
    if model <= popular:
        broken.append(f"the model (HR@10 {model}) did not beat popularity ({popular})")
    if figures["loop_verdict"] not in {"published", "refused"}:
        broken.append(f"the turn of the loop was {figures['loop_verdict']}")
    # A gate may refuse the new version, and says why above: then what was live has to stay.
    if (figures["loop_verdict"] == "published") == (
        figures["loop_version_before"] == figures["loop_version_after"]
    ):
        broken.append(
            f"the turn of the loop was {figures['loop_verdict']}, and answers came from version "
            f"{figures['loop_version_before']} before and {figures['loop_version_after']} after"
        )
    if figures["loop_failed_requests"]:
        broken.append(f"{figures['loop_failed_requests']} requests failed while the loop turned")
    if broken:
        raise DemoFailedError("; ".join(broken))
