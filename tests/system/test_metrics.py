"""The dashboard for Grafana against a real Ray head: packing, teaching and a training of two workers, and every query has rows.

With `prometheus` on the machine the queries themselves are run; without it their metrics are looked for in the text of the exporter.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from itm.config import load_recipe
from pipelines.cli import RECIPES
from pipelines.on_ray.meters import COUNTERS, GAUGES
from tests.support import ROOT
from tests.support.ports import free_ports
from tests.support.ray_head import Head, ray_head
from tests.support.registry_world import wait_for

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e

OVERRIDES = [
    "data.source.options.world=tiny",
    "teachers.image.options.world=tiny",
    "teachers.text.options.world=tiny",
    "train.workers=2",
    "train.batch_size=4",
    "train.steps=100000",
    "train.max_hours=0.008",
    "train.log_every=5",
    "train.validate_every=20",
    "train.warmup_steps=0",
    "registry.metric=rsum",
]
SCRAPES = 4
"""Seconds between two looks of Prometheus, and the most that one may take: a busy machine needs more than one."""


def queries() -> dict[str, str]:
    """Title of a panel -> its queries, with the variables of the dashboard as a person would leave them."""
    dashboard = json.loads((ROOT / "cluster/grafana/itm.json").read_text())
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    return {title: expr.replace("$__rate_interval", "1m").replace("$run", ".*") for title, expr in found.items()}


def exported(port: int) -> set[str]:
    """Names of the samples in the text of an exporter."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if line and not line.startswith("#")}


@contextmanager
def watching(port: int) -> Iterator[set[str]]:
    """What the exporter has said while the block ran."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            with suppress(OSError):  # it starts a little later than the head
                seen.update(exported(port))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(20)


@contextmanager
def prometheus(head: Head, folder: Path) -> Iterator[str | None]:
    """The address of a Prometheus that reads the exporter every few seconds; None where it is not installed."""
    if not (program := shutil.which("prometheus")):
        yield None
        return
    (port,) = free_ports(1)
    config = folder / "prometheus.yml"
    jobs = [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{head.metrics}"]}]}]
    config.write_text(json.dumps({"global": {"scrape_interval": f"{SCRAPES}s"}, "scrape_configs": jobs}))
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/-/ready", process, folder / "prometheus.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def rows_of(address: str, expr: str, since: float) -> list[object]:
    asked = urllib.parse.urlencode({"query": expr, "start": since, "end": time.time(), "step": 1})
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{asked}", timeout=20) as answer:
        return list(json.load(answer)["data"]["result"])


def test_every_query_of_the_dashboard_has_rows_while_stages_run(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pipelines.pack import pack
    from pipelines.teach import teach
    from pipelines.training.driver import train

    recipe = load_recipe(RECIPES / "demo-cusa.yaml", [f"data.root={tmp_path}/shards", f"output={tmp_path}/runs", *OVERRIDES])
    with ray_head(tmp_path / "head.log", RAY_metrics_report_interval_ms="1000") as head, prometheus(head, tmp_path) as address:
        # Ray's processes look for the agent when they start, and where it does not answer in time they export nothing for good
        wait_for(f"http://127.0.0.1:{head.metrics}/metrics", head.process, tmp_path / "head.log")
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
        began = time.time()
        try:
            with watching(head.metrics) as seen:
                pack(recipe)
                teach(recipe)
                done = train(recipe)
                time.sleep(2 * SCRAPES)
        finally:
            ray.shutdown()
        plain = {f"ray_{name}" for name in COUNTERS}  # a counter may also be exported by its plain name, as it was before Ray 2.10
        own = {name for name in seen if name.startswith("ray_itm_")} - plain
        assert own == {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
        asked = {title: set(re.findall(r"ray_itm_\w+", expr)) for title, expr in queries().items()}
        assert {title: names - own for title, names in asked.items() if names - own} == {}
        assert set().union(*asked.values()) == own, "what is measured is shown"
        if address is not None:
            empty = [title for title, expr in queries().items() if not rows_of(address, expr, began)]
            assert empty == []
            (steps,) = rows_of(address, "max by (run) (ray_itm_train_step)", began)
            assert 0 < float(steps["values"][-1][1]) <= done["steps"]  # type: ignore[index]  # what was exported last, a second before
    assert done["ended"] == "train.max_hours=0.008 are over", "of two workers, which end together because rank 0 tells both"
    if address is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus): the metrics are exported, the queries were not run")
