"""The near-line app as users start it: a `faust` process of its own, which can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from compose.cli.nearline import faust_command
from compose.local.ports import free_ports
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streams.nearline_config import NearlineConfig

REPOSITORY = Path(__file__).parents[2]


@dataclass
class App:
    """One process, its log, and its status page."""

    config: NearlineConfig
    log_path: Path
    running: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()

    def end(self) -> int:
        """Ask it to end; return its exit status."""
        if self.running.poll() is None:
            self.running.send_signal(signal.SIGTERM)
        return self.running.wait(30)

    def page(self, path: str = "/moveline/status", *, port: int | None = None) -> str | None:
        """Return a page, None while nothing answers; fail when the process is gone."""
        assert self.running.poll() is None, self.log_path.read_text()
        try:
            with urlopen(f"http://127.0.0.1:{port or self.config.port}{path}", timeout=5) as answer:
                return answer.read().decode()
        except (URLError, ConnectionError, TimeoutError):
            return None

    def status(self) -> dict[str, Any]:
        """Return the status page, empty while it does not answer."""
        page = self.page()
        return {} if page is None else json.loads(page)

    def wait_for_work(self) -> None:
        """Return once a first piece of work is done."""
        until(lambda: self.status().get("done_at_ms"), 60, what=self.log_path.read_text()[-4000:])


def start(config: NearlineConfig, log_path: Path) -> App:
    """Start the app; its log goes to a file."""
    web, metrics = free_ports(2)
    config = replace(config, port=web, metrics_port=metrics)
    environment = os.environ | config.to_environment() | {"PYTHONPATH": str(REPOSITORY)}
    with log_path.open("ab") as log:
        running = subprocess.Popen(
            [*faust_command(), "--web-port", str(web)],
            cwd=log_path.parent,
            env=environment,
            stdout=log,
            stderr=log,
        )
    return App(config, log_path, running)


@contextmanager
def app_running(config: NearlineConfig, log_path: Path) -> Iterator[App]:
    """An app inside the block; whatever happens, it is gone after it."""
    app = start(config, log_path)
    try:
        yield app
    finally:
        if app.running.poll() is None:
            app.kill()
