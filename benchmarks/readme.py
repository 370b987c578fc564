"""`make figures`: write the figures of benchmarks/results into the pages, and nothing by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = (ROOT / "README.md", ROOT / "docs" / "measured.md")
RESULTS: Final = ROOT / "benchmarks" / "results"
BLOCK: Final = re.compile(r"<!-- figures:(\S+) -->\n.*?<!-- /figures -->", re.DOTALL)
# What each figure of a result is called for people: (figure, words).
ROWS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "demo": (
        ("events", "real events published, acknowledged and kept"),
        ("events_per_s", "events/s, first send to last one in Redis, lake written beside it"),
        (
            "freshness_p50_ms",
            "freshness p50, acknowledgement to Redis, at 200 events/s (ms)",
        ),
        ("freshness_p99_ms", "freshness p99 (ms)"),
        ("click_to_answer_ms", "acknowledged click to an answer that has seen it (ms)"),
        ("request_p50_ms", "request p50 over gRPC, one client (ms)"),
        ("request_p99_ms", "request p99 (ms)"),
        ("loop_requests", "requests while the trainer's loop turned once"),
        ("loop_failed_requests", "of them failed"),
        ("hr10_model", "HR@10 of the model"),
        ("hr10_own_frequency", "HR@10 of own frequency, last 256"),
        ("hr10_own_decayed", "HR@10 of own frequency, recency-weighted"),
        ("hr10_popularity", "HR@10 of popularity, renewed daily"),
        ("ndcg10_model", "NDCG@10 of the model"),
        ("ndcg10_own_frequency", "NDCG@10 of own frequency, last 256"),
        ("ndcg10_own_decayed", "NDCG@10 of own frequency, recency-weighted"),
        ("ndcg10_popularity", "NDCG@10 of popularity"),
        ("seconds_total", "the whole demo, installs apart (s)"),
    ),
    "bench-ingest": (
        ("events_per_s", "events/s of one worker, Redis and broker on the same cores"),
        ("floor_events_per_s", "records/s of a consumer that only looks at each value's length"),
        (
            "faust_events_per_s",
            "events/s of the same job as a plain Faust agent, on 50,000 of the events",
        ),
        ("ratio_to_faust", "times the plain Faust agent"),
        ("ratio_to_faust_batched", "times a Faust agent tuned to take 1,000 events at once"),
        ("events_per_s_history_10", "events/s, users with 10 events"),
        ("events_per_s_history_1000", "events/s, users with 1,000 events"),
        ("events_per_s_history_5000", "events/s, users with 5,000 events"),
        ("bytes_per_user", "bytes of Redis per user that has events"),
        ("worker_mb", "resident memory of the worker (MB)"),
    ),
    "bench-compact": (
        ("events_per_s_nearline", "events/s folded near-line, from chunks in Redis"),
        ("events_per_s_batch", "events/s folded by the batch builder, from the lake"),
        ("events_per_s_compressor", "events/s that Triton's compressor answers by itself"),
        ("difference_max", "largest difference between the two ways, relative"),
        ("memory_bytes_per_user", "bytes of Redis per user and memory version"),
    ),
    "bench-train": (
        (
            "tokens_per_s",
            "events/s read by a training step of GEMs, update of the weights included",
        ),
        ("stock_tokens_per_s", "events/s of the same model with torch.nn.MultiheadAttention"),
        ("padded_tokens_per_s", "events/s without batches of similar length"),
        ("device", "measured on"),
        ("mfu", "share of the peak that the model's arithmetic uses"),
        ("peak_tflops", "that peak, a large matrix product on the same device (TFLOP/s)"),
    ),
    "bench-staleness": (
        ("once_frozen", "NDCG@10, trained once, state of that training"),
        ("once_live", "NDCG@10, trained once, live state"),
        ("daily_frozen", "NDCG@10, trained daily, state of the last training"),
        ("daily_live", "NDCG@10, trained daily, live state"),
        ("sixhourly_frozen", "NDCG@10, trained every six hours, state of the last training"),
        ("sixhourly_live", "NDCG@10, trained every six hours, live state"),
        ("recent_popularity_live", "NDCG@10 of what was clicked lately, no model"),
        ("co_occurrence_live", "NDCG@10 of what others clicked next, no model"),
        ("judged_events", "clicks judged"),
        ("judged_users", "users that made them"),
        ("users", "users learned from"),
    ),
    "bench-publish": (
        ("requests", "requests while ten versions were published and two taken back"),
        ("rate_per_s", "of them per second, due at a steady rate whatever happens"),
        ("failed", "requests that failed"),
        ("mixed", "answers that mixed versions, or came from one that was not live"),
        ("quiet_p99_ms", "p99 before the first publication (ms)"),
        ("swap_p99_ms", "p99 during publications and rollbacks (ms)"),
        ("publish_to_ready_s", "from `moveline publish` to a proven version, the slowest (s)"),
        ("rollback_s", "`moveline rollback`, the slower one (s)"),
        ("rss_growth_mb", "growth of Triton and its models over the ten (MB)"),
    ),
    "faults-publish": (
        ("cases", "publications that were killed or broken"),
        ("healed", "after which the next one went live and nothing was left behind"),
        ("answers", "answers meanwhile"),
        ("wrong_answers", "of them wrong"),
    ),
    "bench-score": (
        ("p50_ms_1k", "p50 of an answer, a user with 1,000 events, one caller (ms)"),
        ("p50_ms_10k", "10,000 events (ms)"),
        ("p50_ms_100k", "100,000 events (ms)"),
        ("p50_ms_1m", "1,000,000 events (ms)"),
        ("ratio_1m_10k", "1,000,000 events, times 10,000"),
        ("requests_per_s", "answers/s, eight callers"),
        ("bytes_per_user_1m", "bytes of Redis, the user with 1,000,000 events"),
        ("graph_compiled_ms", "the exported graph compiled, one user and thread, no Triton (ms)"),
        ("graph_interpreted_ms", "the same graph interpreted (ms)"),
        ("indexer_latency_ratio_5k", "mid-term indexer over 5,000 events, times full attention"),
        ("indexer_recall_ratio_5k", "its recall, times that of full attention"),
    ),
    "bench-pit": (
        ("rows_per_s", "rows/s of a training set, the newest event as of each row"),
        ("peak_mb", "peak memory of that process (MB)"),
        ("feast_rows_per_s", "rows/s of Feast's file store, from a table that has the answers"),
        ("feast_peak_mb", "peak memory of that process (MB), imports included"),
        ("mismatches", "values in which the two differ"),
        ("through_feast_rows_per_s", "rows/s of ours through Feast's API"),
        ("whole_rows_per_s", "rows/s of the whole set, session and 512 events a row"),
        ("whole_peak_mb", "peak memory of that process (MB)"),
    ),
    "bench-read": (
        ("ours_100_ms", "100 users, session and 256 events, into arrays (ms)"),
        ("floor_100_ms", "redis-py's pipeline for the same bytes, not looked at (ms)"),
        ("floor_ratio_100", "times that floor"),
        ("ours_feast_api_100_ms", "the same through Feast's API (ms)"),
        ("stock_feast_100_ms", "Feast's own Redis store, the same features as arrays (ms)"),
        ("speedup_vs_feast_100", "times faster than Feast's own store"),
    ),
    "parity": (
        ("pairs", "reads taken while real events flowed, each at its own ordinal and clock"),
        ("pairs_through_feast", "of those, through Feast's `get_online_features`"),
        ("pairs_after_late_events", "reads of users with late events"),
        ("values", "values compared with the lake"),
        ("mismatches", "values that differed"),
    ),
    "faults": (
        ("cases", "cases"),
        ("events_per_case", "records of each case"),
        ("equal", "cases that ended byte for byte equal to the oracle"),
        ("lost", "events lost"),
        ("doubled", "events doubled"),
    ),
    "bench-freshness": (
        ("rate", "events/s, steady, one worker"),
        ("p50_ms", "p50, acknowledged by the broker to readable in Redis (ms)"),
        ("p99_ms", "p99 (ms)"),
        ("p999_ms", "p99.9 (ms)"),
        ("append_p99_ms", "p99 from the broker's append time, an upper bound (ms)"),
        ("events_per_cpu_s", "events per CPU second of the worker at that rate"),
    ),
    "bench-memory": (
        ("events", "events, one worker process"),
        ("rss_start_mb", "resident memory (MB) when the slope begins to count"),
        ("rss_end_mb", "at the end (MB)"),
        ("rss_max_mb", "at most (MB)"),
        ("slope_mb_per_million", "growth per million events in between (MB)"),
    ),
    "bench-replay": (
        ("live_events_per_s", "events/s, live ingest by one worker"),
        ("kafka_events_per_s", "events/s, `moveline replay` from Kafka"),
        ("lake_events_per_s", "events/s, `moveline replay` from the lake"),
        ("kafka_ratio", "from Kafka, times live ingest"),
        ("lake_ratio", "from the lake, times live ingest"),
        ("equal", "every user byte for byte as live, a sample as the oracle says"),
    ),
}
ROWS["bench-staleness-alone"] = ROWS["bench-staleness"]


def block(name: str) -> str:
    """Return the table of one result, as it stands in a page."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    machine = result["machine"]
    where = f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB"
    lines = [
        f"<!-- figures:{name} -->",
        f"`{result['command']}` on {where}, every server on the same cores:",
        "",
        "| what | figure |",
        "|---|---|",
    ]
    figures = result["figures"]
    # A result of before a figure was measured does not show it.
    rows = [(words, figures[figure]) for figure, words in ROWS[name] if figure in figures]
    lines += [f"| {words} | {_shown(value)} |" for words, value in rows]
    lines += ["", f"Raw: `benchmarks/results/{name}.json`."]
    return "\n".join([*lines, "<!-- /figures -->"])


def _shown(value: float | bool | str) -> str:  # noqa: FBT001 - a figure can be a verdict
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,}"


def rendered(page: str) -> str:
    """Return the page with every block as the results say."""
    return BLOCK.sub(lambda found: block(found[1]), page)


def main() -> int:
    """Rewrite the pages."""
    for path in PAGES:
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
