"""The quality run makes one file a model and seed, goes on where it stopped, and gets its pages.

Method: the program itself on a made-up file of a known set, two of its models trained for a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.planted import (
    BASKET,
    EVENTS_BETWEEN,
    ITEMS_PER_INTEREST,
    NUM_INTERESTS,
    planted_columns,
)
from benchmarks.quality_figures import MixedResultsError, outcomes, summary
from benchmarks.quality_pages import draw, page, present
from trainer.streaming_evaluation import STREAMS

if TYPE_CHECKING:
    from pathlib import Path

MODELS = ("popularity", "own_recency", "gru4rec")
DAY_MS = 86_400_000


def write_shop(folder: Path) -> None:
    """Thirty customers who come back for what they bought, as the online_retail set stores it."""
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(1, 31), 40)
    favourite = 10 * user + rng.integers(0, 6, len(user))
    item = np.where(rng.random(len(user)) < 0.7, favourite, rng.integers(1, 400, len(user)))
    time_ms = np.sort(rng.integers(0, 300, (30, 40)), axis=1).ravel() * DAY_MS
    columns = {
        "user_id": user.astype(np.int32),
        "item_id": item.astype(np.int32),
        "ts_ms": time_ms,
        "event_type": (rng.random(len(user)) < 0.05).astype(np.int8),
    }
    pq.write_table(pa.table(columns), folder / "online_retail.parquet")


def measure(data: Path, results: Path, *, models: str = ",".join(MODELS), set_name: str) -> Any:  # noqa: ANN401 - a finished process
    command = [sys.executable, "-m", "benchmarks.bench_quality", "--set", set_name]
    command += ["--models", models, "--budget-s", "1", "--test-users", "20"]
    command += ["--results", str(results)]
    environment = {**os.environ, "DATA": str(data)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of results, and the last line of the run that left them."""
    folder = tmp_path_factory.mktemp("quality")
    write_shop(folder)
    done = measure(folder, folder / "results", set_name="online_retail")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])["figures"]


def test_the_last_line_says_what_was_measured(shop: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = shop
    assert (figures["set"], figures["protocol"]) == ("online_retail", "global")
    assert set(figures["models"]) == set(MODELS)
    for model in figures["models"].values():
        assert set(model) == {"hr10", "ndcg10", "recall100", "spread"}
    assert figures["models"]["own_recency"]["hr10"] > figures["models"]["popularity"]["hr10"]
    assert figures["models"]["gru4rec"]["spread"] is None
    assert figures["live_vs_frozen_ndcg10"] is None, "the served model was not asked for"
    assert summary(folder / "results", "online_retail", "global") == figures


def test_what_is_there_is_not_made_again(shop: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = shop
    files = sorted((folder / "results").glob("*/*.json"))
    assert [path.name for path in files] == sorted(f"global-{name}-s1.json" for name in MODELS)
    before = [path.stat().st_mtime_ns for path in files]
    files[-1].unlink()
    again = measure(folder, folder / "results", set_name="online_retail")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("there already") == len(MODELS) - 1
    after = [path.stat().st_mtime_ns for path in files]
    assert after[-1] != before[-1]
    assert after[:-1] == before[:-1]


def test_every_result_gets_its_page_and_plot(
    shop: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = shop
    assert present(folder / "results") == [("online_retail", "global")]
    text = page(folder / "results", "online_retail", "global")
    for name in MODELS:
        assert f"{name} |" in text
    draw(folder / "results", "online_retail", "global", tmp_path / "one.png")
    draw(folder / "results", "online_retail", "global", tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_results_that_do_not_compare_are_refused(
    shop: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = shop
    for path in (folder / "results").glob("*/*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["model"] == "popularity":
            result["settings"]["sample"]["test_users"] = 5
        (tmp_path / "online_retail").mkdir(exist_ok=True)
        (tmp_path / "online_retail" / path.name).write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(MixedResultsError, match="measure both alike"):
        outcomes(tmp_path, "online_retail", "global")


def test_absent_data_are_said_loudly(tmp_path: Path) -> None:
    done = measure(tmp_path, tmp_path / "results", models="popularity", set_name="globo_clicks")
    assert done.returncode == 2
    assert "is not measured" in " ".join(done.stderr.split())


def test_a_planted_interest_returns_after_both_streams_and_in_the_control_does_not() -> None:
    planted, control = (planted_columns(seed=3, is_planted=on) for on in (True, False))
    assert EVENTS_BETWEEN > STREAMS
    same: dict[bool, list[bool]] = {}
    for is_planted, columns in ((True, planted), (False, control)):
        returned = columns["value"] == 1.0
        for user in (1, 2, 3, 4):
            own = columns["user_id"] == user
            rows = np.flatnonzero(own & returned)
            first = np.flatnonzero(own)[0]
            interest = (columns["item_id"][first] - 1) // ITEMS_PER_INTEREST
            came = (columns["item_id"][rows] - 1) // ITEMS_PER_INTEREST
            assert (came < NUM_INTERESTS).all()
            assert len(rows) % BASKET == 0
            same.setdefault(is_planted, []).append(bool((came == interest).all()))
            window = columns["item_id"][rows[0] - STREAMS : rows[0]]
            assert ((window - 1) // ITEMS_PER_INTEREST >= NUM_INTERESTS).all()
    assert all(same[True])
    assert not any(same[False])
    for name in ("user_id", "event_time_ms", "ordinal"):
        assert planted[name].tolist() == control[name].tolist(), name
