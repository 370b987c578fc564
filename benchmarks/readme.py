"""`make figures`: write the figures of benchmarks/results into README.md, and nothing by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
BLOCK: Final = re.compile(r"<!-- figures:(\S+) -->\n.*?<!-- /figures -->", re.DOTALL)
# What each figure of a result is called for people: (figure, words).
ROWS: Final = {
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
        ("events_per_s_history_10", "events/s, users with 10 events"),
        ("events_per_s_history_1000", "events/s, users with 1,000 events"),
        ("events_per_s_history_5000", "events/s, users with 5,000 events"),
        ("bytes_per_user", "bytes of Redis per user that has events"),
        ("worker_mb", "resident memory of the worker (MB)"),
    ),
    "parity": (
        ("pairs", "reads taken while real events flowed, each at its own ordinal and clock"),
        ("pairs_through_feast", "of those, through Feast's `get_online_features`"),
        ("pairs_after_late_events", "reads of users with late events"),
        ("values", "values compared with the lake"),
        ("mismatches", "values that differed"),
    ),
    "faults": (
        ("cases", "cases, each on at least 200,000 events"),
        ("equal", "cases that ended byte for byte equal to the oracle"),
        ("lost", "events lost"),
        ("doubled", "events doubled"),
    ),
}


def block(name: str) -> str:
    """Return the table of one result, as it stands in the README."""
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
    lines += [f"| {words} | {figures[figure]:,} |" for figure, words in ROWS[name]]
    lines += ["", f"Raw: [benchmarks/results/{name}.json](benchmarks/results/{name}.json)."]
    return "\n".join([*lines, "<!-- /figures -->"])


def rendered(readme: str) -> str:
    """Return the README with every block as the results say."""
    return BLOCK.sub(lambda found: block(found[1]), readme)


def main() -> int:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
