"""The server of mlflow/compose.yaml without containers: PostgreSQL, an S3 store and `mlflow server`, each a real process."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import fs

from itm.config import Recipe
from itm.tracking.registry import find_version, promote
from itm.tracking.runs import Tracker, client
from pipelines.cli import stage_main
from pipelines.evaluate import evaluate
from pipelines.register import register
from pipelines.train import train
from tests.support import ROOT
from tests.support.noise_split import small_split
from tests.support.ports import free_ports
from tests.support.postgres import postgres, postgres_binaries
from tests.support.registry_world import wait_for
from tests.support.s3_server import BUCKET, s3_server
from tests.support.small_training import recipe, splits

MLFLOW = ROOT / "mlflow"
pytestmark = pytest.mark.e2e


def service(name: str) -> dict[str, Any]:
    """A service of compose.yaml with the values of example.env filled in, and the tests' bucket."""
    values = dict(line.split("=", 1) for line in (MLFLOW / "example.env").read_text().splitlines() if "=" in line and line[0] != "#")
    values["BUCKET"] = BUCKET
    text = re.sub(r"\$\{(\w+)[^}]*\}", lambda match: values.get(match[1], ""), (MLFLOW / "compose.yaml").read_text())
    found: dict[str, Any] = yaml.safe_load(text)["services"][name]
    return found


@dataclass(frozen=True)
class Team:
    """Addresses of the running services; `database` as psycopg2 takes it."""

    uri: str
    database: str
    store: str

    def count(self, table: str) -> int:
        """Rows of a table, past MLflow."""
        import psycopg2

        with contextlib.closing(psycopg2.connect(self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")
            row = cursor.fetchone()
        assert row is not None
        return int(row[0])

    def objects(self) -> list[str]:
        """Keys in the bucket, past MLflow."""
        store = fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=self.store, scheme="http")
        return [info.path for info in store.get_file_info(fs.FileSelector(BUCKET, recursive=True)) if info.is_file]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """The three services, joined as compose.yaml joins them. The client has the address of one, and no key of the store."""
    if postgres_binaries() is None:
        pytest.skip("NOT TESTED: the PostgreSQL backend; no PostgreSQL server is installed: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("server")
    [port], log = free_ports(1), folder / "server.log"
    account = service("database")["environment"]
    with postgres(account["POSTGRES_USER"], account["POSTGRES_PASSWORD"], account["POSTGRES_DB"]) as database, s3_server() as store:
        server = service("mlflow")
        given = {
            name: value.replace("@database/", f"@127.0.0.1:{database}/").replace("http://objects:9000", store)
            for name, value in server["environment"].items()
        }
        command = [{"0.0.0.0": "127.0.0.1", "5000": str(port), "2": "1"}.get(word, word) for word in server["command"]]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
        with log.open("wb") as out:
            words = [sys.executable, "-m", *command]
            process = subprocess.Popen(words, env=clean | given, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            with pytest.MonkeyPatch.context() as patch:
                for name in os.environ.keys() - clean.keys():
                    patch.delenv(name)
                patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
                patch.setenv("ITM_CACHE", str(folder / "cache"))
                address = given["MLFLOW_BACKEND_STORE_URI"].replace("+psycopg2", "")
                yield Team(f"http://127.0.0.1:{port}", address, store.removeprefix("http://"))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def finished(root: Path, name: str, seed: int) -> Recipe:
    """Two steps of training and an evaluation."""
    choices = recipe(root, name=name, steps=2, validate_every=2).model_copy(update={"seed": seed})
    train(choices)
    evaluate(choices)
    return choices


def versions_of(*aliases: str) -> list[str]:
    return [str(find_version(f"models:/itm-matcher@{alias}").version) for alias in aliases]


def test_a_run_is_trained_registered_promoted_and_searched_with_the_server_of_the_compose_file(
    team: Team, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits(tmp_path)
    small_split(tmp_path / "shards", "test", shards=1)
    assert [register(finished(tmp_path, name, seed)).version for seed, name in enumerate(("one", "two"))] == ["1", "2"]
    run = client().get_run(json.loads((tmp_path / "runs" / "one" / "run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "2"
    assert {"train/loss", "val/rsum", "test/auto/rsum", "train/samples_per_s"} <= run.data.metrics.keys()
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["one-train"]

    first, second = (float(find_version(f"models:/itm-matcher/{version}").tags["rsum"]) for version in (1, 2))
    champion = find_version("models:/itm-matcher@champion")
    assert versions_of("champion", "candidate") == ["2" if second > first else "1", "2"]
    found = client().search_model_versions(f"name='itm-matcher' and tag.weights_sha256='{champion.tags['weights_sha256']}'")
    assert [str(version.version) for version in found] == [str(champion.version)]

    where = ["--model", "models:/itm-matcher@champion", "--shards", f"{tmp_path}/shards/test", "-k", "3"]
    assert stage_main("search", ["a red thing", *where]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4
    assert stage_main("search", ["a red thing", "--model", "models:/itm-matcher@best", *where[2:]]) == 2
    assert "it has candidate (version 2), champion (version" in capsys.readouterr().err

    other = "2" if str(champion.version) == "1" else "1"
    assert promote("itm-matcher", other, "rsum", 600.0)
    assert versions_of("champion", "previous") == [other, str(champion.version)]
    back = re.search(r"itm (models) (rollback) (itm-matcher)\b", (ROOT / "docs" / "registry-and-serving.md").read_text())
    assert back is not None
    assert stage_main(back[1], [back[2], back[3]]) == 0
    assert versions_of("champion") == [str(champion.version)]

    assert (team.count("runs"), team.count("model_versions")) == (2, 2)
    names = {key.partition("/artifacts/")[2] for key in team.objects()}
    assert {"evaluation.json", "MLmodel", "artifacts/matcher/model.safetensors"} <= names
    assert not (tmp_path / "mlruns").exists()


def test_clients_that_write_at_the_same_moment_lose_nothing(team: Team) -> None:
    def log(number: int) -> str:
        with Tracker.start("crowd", f"run {number}", {"number": number}) as tracker:
            for step in range(10):
                tracker.metrics({"loss": math.nan if step == 9 else number / (step + 1)}, step)
        return tracker.run_id

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(log, range(4)))
    door = client()
    assert len({door.get_run(run).info.experiment_id for run in runs}) == 1, "none of them found the experiment, all made it"
    for number, run in enumerate(runs):
        history = sorted(door.get_metric_history(run, "loss"), key=lambda metric: metric.step)
        assert [metric.value for metric in history] == pytest.approx([*(number / (step + 1) for step in range(9)), math.nan], nan_ok=True)


def test_the_image_of_the_server_holds_the_versions_that_are_tested_here() -> None:
    pins = dict(re.findall(r"(\S+)==(\S+)", (MLFLOW / "Dockerfile").read_text()))
    assert pins == {name: importlib.metadata.version(name) for name in ("mlflow", "psycopg2-binary", "boto3")}


def test_the_server_answers_to_the_names_of_the_example_and_to_no_other(team: Team) -> None:
    for host, status in (("mlflow:5000", 200), ("elsewhere.example:5000", 403)):
        connection = http.client.HTTPConnection(team.uri.removeprefix("http://"), timeout=10)
        connection.request("GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()
