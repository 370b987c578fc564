"""Feast's side that is not online: where the registry lies, and what may be materialized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.registry.file import FileRegistryStore

from features.online_store import refuse_worker_view

if TYPE_CHECKING:
    from feast.infra.common.materialization_job import MaterializationTask
    from feast.infra.compute_engines.local.job import LocalMaterializationJob
    from feast.infra.registry.base_registry import BaseRegistry
    from feast.repo_config import RegistryConfig

# Beside features/, where the local stack keeps what it writes.
REGISTRY_DEFAULT: Final = Path(".moveline/feast/registry.db")


class MovelineRegistryStore(FileRegistryStore):
    """A registry file with a default place, its folders made when it is first written.

    A relative path starts at the folder that holds `features/`, as the lake's does, not at the
    working directory: Feast's command line changes that one before it opens the registry.
    """

    def __init__(self, registry_config: RegistryConfig, repo_path: Path | None) -> None:
        unset = registry_config.path.startswith("$")
        path = REGISTRY_DEFAULT if unset else Path(registry_config.path)
        del repo_path  # where Feast was started from, if nobody told it better
        root = Path(__file__).resolve().parents[1]
        super().__init__(registry_config.model_copy(update={"path": str(root / path)}), root)

    def _write_registry(self, registry_proto: Any) -> None:  # noqa: ANN401 - generated protobuf
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        super()._write_registry(registry_proto)


class MovelineComputeEngine(LocalComputeEngine):
    """Feast's local engine, which stops before it reads anything for a view it may not write."""

    def _materialize_one(
        self,
        registry: BaseRegistry,
        task: MaterializationTask,
        **kwargs: Any,  # noqa: ANN401 - passed on as received
    ) -> LocalMaterializationJob:
        refuse_worker_view(task.feature_view.name)
        return super()._materialize_one(registry, task, **kwargs)
