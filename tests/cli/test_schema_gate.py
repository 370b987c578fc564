"""A package that was trained on other features is refused before anything is moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from compose.publishing import refuse_other_schema
from compose.settings import load_settings
from features.errors import SchemaMismatchError
from features.schema import schema_hash

if TYPE_CHECKING:
    from pathlib import Path

    from features.redis import StateStore


def test_only_the_generations_own_schema_passes(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store.claim_generation()
    host = store.client.connection_pool.connection_kwargs
    settings = load_settings(
        redis={"url": f"redis://{host['host']}:{host['port']}/{host.get('db', 0)}"},
        generation=f"g{store.generation}",
    )
    refuse_other_schema(settings, {"feature_schema_hash": schema_hash(store.config)})
    with pytest.raises(SchemaMismatchError, match="moveline train"):
        refuse_other_schema(settings, {"feature_schema_hash": "0" * 16})
