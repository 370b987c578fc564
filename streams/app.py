"""The near-line app: `faust -A streams.app worker`. The one file that imports Faust.

Faust carries hints between the apps of a group and hosts the status page. It acknowledges
a message even when its work failed, and may commit past one that is unfinished; neither matters
here, for no message is the record of any work (streams/nearline.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import faust
from prometheus_client import start_http_server

from streams.errors import WorkerStuckError
from streams.nearline import (
    TICK_S,
    Hint,
    Nearline,
    Work,
    decode_hint,
    encode_hint,
    hints_of_tick,
    prepare_topics,
)
from streams.nearline_config import NearlineConfig, from_environment

if TYPE_CHECKING:
    from faust.types import StreamT
    from faust.web import Request, Response, View

log = logging.getLogger("moveline.nearline")

# aiokafka has no static membership: until a dead member is noticed its partitions stand still.
# One piece of work takes a second or two, so a poll that is half a minute late is a dead one.
MAX_POLL_INTERVAL_S: Final = 30.0
SESSION_TIMEOUT_S: Final = 10.0
REBALANCE_TIMEOUT_S: Final = 10.0
HEARTBEAT_S: Final = 3.0
# A group can stand still while a killed member is still believed in, and an app may own nothing.
# After this long without a hint an app does the work by itself: doing it twice costs a little and
# changes nothing.
ALONE_S: Final = 10.0
# Faust's consumer can be alive and silent for ever after a broker's outage or a rebalance. An app
# that owns partitions and gets none of its own hints for this long ends, to be started again.
SILENT_S: Final = 60.0


class NearlineApp(faust.App):
    """Faust's app and the work it does; nothing is opened before the worker starts.

    Attributes:
        settings: where everything is.
        nearline: what follows hints, from the moment the worker is set up.
        turn: held while a hint is followed: the work shares connections.
        heard_at: when the newest hint came through Kafka (monotonic seconds).
    """

    def __init__(self, config: NearlineConfig) -> None:
        self.settings = config
        self.nearline: Nearline | None = None
        self.turn = asyncio.Lock()
        self.tick = 0
        self.heard_at = time.monotonic()
        super().__init__(
            config.app_id,
            broker=[f"kafka://{address}" for address in config.kafka.bootstrap.split(",")],
            store="memory://",
            # Nothing is stored, but Faust wants a folder, and would make it where it is started.
            datadir=Path(tempfile.gettempdir()) / config.app_id,
            web_port=config.port,
            web_host="127.0.0.1",
            broker_max_poll_interval=MAX_POLL_INTERVAL_S,
            broker_session_timeout=SESSION_TIMEOUT_S,
            broker_rebalance_timeout=REBALANCE_TIMEOUT_S,
            broker_heartbeat_interval=HEARTBEAT_S,
            broker_commit_interval=1.0,
            # Only what is hinted from now on; older hints have been overtaken.
            consumer_auto_offset_reset="latest",
            stream_wait_empty=False,
            # Topics are made by streams.topics, with settings; Faust would make others.
            topic_allow_declare=False,
            topic_disable_leader=True,
            worker_redirect_stdouts=False,
        )
        self.hints = self.topic(config.topics.nearline, value_type=bytes, value_serializer="raw")

    async def on_first_start(self) -> None:
        """Look at the topics and open the metrics' port; Faust starts everything else after."""
        metrics = (await asyncio.to_thread(self.opened)).metrics
        server, _ = start_http_server(self.settings.metrics_port, registry=metrics.registry)
        log.info("metrics at http://127.0.0.1:%d/metrics", server.server_port)
        self.add_future(self._keep_time())
        await super().on_first_start()

    async def _keep_time(self) -> None:
        """Give hints until the app stops.

        Faust's own timers wait until the group has given the app its partitions; this does not.
        """
        while not self.should_stop:
            widths = self.opened().widths
            due = hints_of_tick(self.tick, widths.tiles)
            self.tick += 1
            if self.producer.started:
                for hint in due:
                    partition = hint.partition % widths.hints
                    await self.hints.send(partition=partition, value=encode_hint(hint))
            if time.monotonic() - self.heard_at > ALONE_S:
                for hint in due:
                    self.opened().metrics.alone.labels(hint.work).inc()
                    await self.follow(hint)
            await self._end_if_silent()
            await self.sleep(TICK_S)

    async def _end_if_silent(self) -> None:
        silent_s = time.monotonic() - self.heard_at
        if silent_s > SILENT_S and self.assignor.assigned_actives():
            await self.crash(
                WorkerStuckError(
                    f"no hint arrived for {silent_s:.0f} s although partitions are assigned: "
                    "ending so that a supervisor can start a fresh app. See the broker with "
                    "`moveline status`."
                )
            )

    def opened(self) -> Nearline:
        """Return what follows hints, after the topics have been looked at."""
        if self.nearline is None:
            self.nearline = Nearline(self.settings, prepare_topics(self.settings))
        return self.nearline

    async def follow(self, hint: Hint) -> None:
        """Do what a hint is about, beside the loop that keeps the membership."""
        async with self.turn:
            await asyncio.to_thread(self.opened().follow, hint)


def make_app(config: NearlineConfig) -> NearlineApp:
    """Return the app with its agents and its page."""
    app = NearlineApp(config)
    control = app.topic(config.topics.control, value_type=bytes, value_serializer="raw")

    async def follow_hints(stream: StreamT[bytes]) -> None:
        async for raw in stream:
            hint = decode_hint(raw)
            if hint is None:
                log.warning("not a hint: %r", raw[:100])
            else:
                app.heard_at = time.monotonic()
                await app.follow(hint)

    async def follow_control(stream: StreamT[bytes]) -> None:
        async for _ in stream:
            app.opened().started_at.pop(Hint(Work.POINTERS), None)
            await app.follow(Hint(Work.POINTERS))

    async def show_status(view: View, request: Request) -> Response:
        del request
        status: dict[str, Any] = {
            **app.opened().status(),
            "tick": app.tick,
            "seconds_since_hint": round(time.monotonic() - app.heard_at, 3),
        }
        answer: Response = view.json(status)
        return answer

    app.agent(app.hints, name="moveline.hints")(follow_hints)
    app.agent(control, name="moveline.control")(follow_control)
    app.page("/moveline/status", name="moveline.status")(show_status)
    return app


app = make_app(from_environment(os.environ))
