"""Real servers for tests: plain context managers, from which a conftest makes its fixtures.

    @pytest.fixture(scope="session")
    def stack(tmp_path_factory):
        with local_stack({"redis", "kafka"}, run_dir=tmp_path_factory.mktemp("stack")) as stack:
            yield stack

They are tied to the test process: whatever ends it, no server outlives it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from compose.local.foreground import running_stack
from compose.local.stack import SERVICES, LocalStack, StackOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


@contextmanager
def local_stack(
    services: Iterable[str] = SERVICES,
    *,
    run_dir: Path,
    model_repository: Path | None = None,
    kafka_home: Path | None = None,
    triton_environment: Mapping[str, str] | None = None,
) -> Iterator[LocalStack]:
    """Some of the servers, on free ports, with empty data folders under `run_dir`.

    Args:
        services: any of "redis", "kafka" and "triton".
        run_dir: a folder of the test's own.
        model_repository: for Triton; an empty one is made where none is given.
        kafka_home: starts that Apache Kafka instead of the embedded broker.
        triton_environment: "{redis}" and "{kafka}" in its values become the addresses.
    """
    repository = model_repository or run_dir / "model_repo"
    repository.mkdir(parents=True, exist_ok=True)
    options = StackOptions(
        run_dir=run_dir,
        model_repository=repository,
        services=frozenset(services),
        kafka_home=kafka_home,
        triton_environment=dict(triton_environment or {}),
        persist=False,
    )
    with running_stack(options) as stack:
        yield stack
