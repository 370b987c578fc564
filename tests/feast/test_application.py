"""Feast's users need no Moveline: a program that knows Feast alone reads, pushes and looks back."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from features import definitions
from features.clock import now_ms
from features.config import StateConfig
from tests.feast.states import expected_user, make_events, write_user
from tests.feast.test_repository import feast_command

if TYPE_CHECKING:
    import redis

pytestmark = pytest.mark.servers
APPLICATION = Path(__file__).with_name("app_recommender.py")
REPOSITORY = Path(definitions.__file__).parent
RULES = StateConfig()


def test_the_application_imports_nothing_of_ours() -> None:
    tree = ast.parse(APPLICATION.read_text(encoding="utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules <= {"feast", "pandas", *sys.stdlib_module_names}


def test_it_reads_pushes_and_looks_back(
    client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """Its clock is the real one: a session that is open now."""
    newest_ms = now_ms() - 1_000
    state = write_user(client, 5, make_events(5, count=100, end_ms=newest_ms), config=RULES)
    history = tmp_path / "lake" / "item_statistics"
    history.mkdir(parents=True)
    days = [datetime.now(tz=UTC) - timedelta(days=ago) for ago in (3, 1)]
    columns: dict[str, list[Any]] = {
        "item_id": [7, 7],
        "item_events_1d": [1, 2],
        "item_events_7d": [10, 20],
        "event_timestamp": days,
    }
    pd.DataFrame(columns).to_parquet(history / "days.parquet")
    environment = {
        "MOVELINE_REDIS__URL": redis_url,
        "MOVELINE_FEAST__REGISTRY": str(tmp_path / "registry.db"),
        "MOVELINE_LAKE__PATH": str(tmp_path / "lake"),
    }
    applied = feast_command("apply", "--skip-source-validation", **environment)
    assert applied.returncode == 0, applied.stdout + applied.stderr
    ran = subprocess.run(
        [sys.executable, str(APPLICATION), str(REPOSITORY), "5"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3_000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    expected = expected_user(state, now_ms(), RULES)
    for name in ("session_num_events", "session_is_open", "recent_item_id", "mid_event_time_ms"):
        assert found["online"][name] == [expected[name], None], name
    assert found["awaited"]["recent_item_id"] == found["online"]["recent_item_id"]
    assert found["statistics"]["item_events_1d"] == [3, None]
    assert found["statistics"]["item_events_7d"] == [20, None]
    assert found["history"] == [10, 20]
