"""The dashboard for Grafana names the metrics that stages export, by the labels that these have. A system test runs its queries."""

from __future__ import annotations

import json
import re

import yaml

from pipelines.on_ray.meters import COUNTERS, GAUGES, TAGS, count, gauge
from tests.support import ROOT

GRAFANA = ROOT / "cluster" / "grafana"


def expressions() -> list[str]:
    dashboard = json.loads((GRAFANA / "itm.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_what_is_measured_is_shown_and_what_is_shown_is_measured() -> None:
    shown = {name for expr in expressions() for name in re.findall(r"ray_itm_\w+", expr)}
    assert shown == {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}


def test_queries_group_by_the_label_that_their_metric_has_and_take_rates_of_counters_alone() -> None:
    for expr in expressions():
        stages = {name.split("_")[0] for name in re.findall(r"ray_itm_(\w+)", expr)}
        assert {TAGS[stage] for stage in stages} == set(re.findall(r"by \((\w+)\)", expr)), expr
        assert set(re.findall(r"rate\((\w+)", expr)) <= {f"ray_{name}_total" for name in COUNTERS}


def test_prometheus_reads_the_file_in_which_ray_lists_its_exporters() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())["scrape_configs"]
    assert [path.rsplit("/", 1)[1] for found in job["file_sd_configs"] for path in found["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]


def test_a_process_without_a_ray_session_tells_nobody_and_needs_no_ray() -> None:
    gauge("itm_train_loss", 0.5, "run")
    count("itm_teach_rows", 3, "image")
