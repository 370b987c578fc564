"""Goal: Prometheus scrapes what exists, and the dashboard asks for metrics that are exported.

A panel on a metric that nobody exports shows an empty graph, which reads as "all quiet".
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compose.settings import TrainingSettings
from streams import nearline_metrics
from streams.metrics import METRICS_PORT_DEFAULT, WorkerMetrics

# What the dashboard shows: a worker's health at a glance.
SHOWN_METRICS = frozenset(
    {
        "moveline_events_total",
        "moveline_micro_batch_events",
        "moveline_lag_events",
        "moveline_step_seconds",
        "moveline_write_seconds",
        "moveline_refused_writes_total",
        "moveline_duplicates_total",
        "moveline_late_total",
        "moveline_dead_letters_total",
        "moveline_freshness_seconds",
    },
)
# A name before a range, a closing parenthesis or a selector; functions are followed by "(".
METRIC = re.compile(r"\b[a-z]\w*_\w+(?=[\[){])")
# A histogram is exported as three series, each with a suffix.
HISTOGRAM_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")
GRID_COLUMNS = 24


@pytest.fixture
def dashboard(repository: Path) -> dict[str, Any]:
    """The one dashboard."""
    path = repository / "compose" / "grafana" / "dashboards" / "moveline.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def metrics_in(expression: str) -> set[str]:
    """Metric names that a PromQL expression reads, suffixes of histograms taken off."""
    return {HISTOGRAM_SUFFIX.sub("", name) for name in METRIC.findall(expression)}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_dashboard_reads_each_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    read = set().union(*(metrics_in(expression) for expression in expressions(dashboard)))
    assert read == SHOWN_METRICS


def exported_series() -> set[str]:
    """Names of the series that a worker exports, by the types of its metrics."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    families = WorkerMetrics().registry.collect()
    return {family.name + ending for family in families for ending in endings[family.type]}


def test_dashboard_reads_series_that_the_worker_exports(dashboard: dict[str, Any]) -> None:
    read = {name for expression in expressions(dashboard) for name in METRIC.findall(expression)}
    assert read
    assert read <= exported_series()


def test_a_metric_that_is_not_exported_would_be_found() -> None:
    expression = "sum by (le) (rate(moveline_freshnes_seconds_bucket[5m])) / sum(up_time)"
    assert metrics_in(expression) == {"moveline_freshnes_seconds", "up_time"}


def test_counters_are_read_as_rates(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        counters = re.findall(r"\w+_(?:total|bucket|sum|count)\b", expression)
        assert all(f"rate({name}[$__rate_interval])" in expression for name in counters)


def test_dead_letters_are_shown_by_reason(dashboard: dict[str, Any]) -> None:
    (expression,) = [it for it in expressions(dashboard) if "dead_letters" in it]
    assert "by (reason)" in expression


def test_panels_have_their_own_place_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < GRID_COLUMNS
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])


def test_dashboard_and_datasource_agree(
    dashboard: dict[str, Any],
    repository: Path,
    yaml_reader: Callable[[Path], Any],
    compose_file: dict[str, Any],
) -> None:
    provisioning = repository / "compose" / "grafana" / "provisioning"
    (source,) = yaml_reader(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in compose_file["services"]["prometheus"]["ports"]
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    used |= {it["datasource"]["uid"] for panel in dashboard["panels"] for it in panel["targets"]}
    assert used == {source["uid"]}


def test_dashboard_folder_is_mounted_where_grafana_looks(
    repository: Path,
    yaml_reader: Callable[[Path], Any],
    compose_file: dict[str, Any],
) -> None:
    provisioning = repository / "compose" / "grafana" / "provisioning"
    (provider,) = yaml_reader(provisioning / "dashboards" / "moveline.yml")["providers"]
    grafana = compose_file["services"]["grafana"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/moveline.json"


def test_prometheus_scrapes_services_that_exist(
    repository: Path,
    yaml_reader: Callable[[Path], Any],
    compose_file: dict[str, Any],
) -> None:
    config = yaml_reader(repository / "compose" / "prometheus" / "prometheus.yml")
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    ports = {
        "worker": METRICS_PORT_DEFAULT,
        "nearline": nearline_metrics.METRICS_PORT_DEFAULT,
        "trainer": TrainingSettings().metrics_port,
    }
    assert set(jobs) == {*ports, "triton", "prometheus"}
    for name, port in ports.items():
        (lookup,) = jobs[name]["dns_sd_configs"]
        assert lookup["names"] == [name]
        assert compose_file["services"][name]["expose"] == [str(lookup["port"])]
        assert lookup["port"] == port
    assert jobs["triton"]["static_configs"] == [{"targets": ["triton:8002"]}]
    assert "127.0.0.1:8002:8002" in compose_file["services"]["triton"]["ports"]


def test_datasource_knows_the_scrape_interval(
    repository: Path,
    yaml_reader: Callable[[Path], Any],
) -> None:
    compose = repository / "compose"
    config = yaml_reader(compose / "prometheus" / "prometheus.yml")
    datasources = compose / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml_reader(datasources)["datasources"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
