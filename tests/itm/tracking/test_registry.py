from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import itm
from itm.tracking.fetch import download
from itm.tracking.lineage import LONGEST_PARAM, DatasetRef
from itm.tracking.registry import find_version, promote
from itm.tracking.runs import Tracker, client
from tests.support import ROOT
from tests.support.ports import free_ports
from tests.support.registry_world import TEXTS, matcher_folder, register_matcher, tiny_matcher, wait_for

pytest_plugins = ["tests.support.registry_fixtures"]
pytestmark = pytest.mark.e2e


def run_id(name: str = "run") -> str:
    with Tracker.start("tests", name) as tracker:
        return tracker.run_id


def test_a_run_keeps_params_metrics_lineage_and_artifacts(registry: Path, tmp_path: Path):
    params = {f"section.key{n}": n for n in range(150)} | {"long": "x" * 20000}
    refs = [DatasetRef("train", "0123456789ab", "/data/train")]
    (tmp_path / "page.html").write_text("hello")
    with Tracker.start("an experiment", "first", params, {"teacher": "t1"}, refs) as tracker:
        for step in range(30):
            tracker.metrics({"loss": 1 / (step + 1), "loss/csa": math.nan}, step)
        tracker.artifact(tmp_path / "page.html")
    run = client().get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 151
    assert run.data.params["section.key149"] == "149"
    assert len(run.data.params["long"]) == LONGEST_PARAM
    assert (run.data.tags["teacher"], run.data.tags["git_commit"]) == ("t1", "c0ffee")
    history = client().get_metric_history(tracker.run_id, "loss")
    assert {m.step: m.value for m in history} == {step: 1 / (step + 1) for step in range(30)}
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.source)) == ("train", "0123456789ab", {"uri": "/data/train"})
    assert next((registry / "mlruns").rglob("page.html")).read_text() == "hello"


def test_a_worker_in_another_directory_resumes_the_run_and_leaves_it_open(registry: Path, tmp_path: Path):
    tracker = Tracker.start("tests", "two processes")
    code = f"""
from itm.tracking.runs import Tracker
with Tracker.resume({tracker.run_id!r}, {tracker.uri!r}, node="trainer") as rank0:
    rank0.metrics({{"loss": 0.5}}, 7)
    __import__("time").sleep(1.5)
"""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.3"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    run = client().get_run(tracker.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.metrics["loss"] == 0.5
    assert "system/trainer/cpu_utilization_percentage" in run.data.metrics
    assert not (tmp_path / "mlflow.db").exists()
    tracker.finish()
    assert client().get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_whose_body_raises_is_marked_failed(registry: Path):
    with pytest.raises(RuntimeError, match="boom"), Tracker.start("tests", "bad") as tracker:
        raise RuntimeError("boom")
    assert client().get_run(tracker.run_id).info.status == "FAILED"


def test_a_registered_matcher_comes_back_with_the_same_scores(registry: Path, tmp_path: Path):
    run = run_id()
    version = register_matcher(matcher_folder(tmp_path / "m", 3), "tiny", run, {"rsum": 12.5}, {"recipe": "f1"})
    promote("tiny", version, "rsum", 12.5)
    found = find_version("models:/tiny@champion")
    assert (str(found.version), found.run_id) == (version, run)
    assert {"rsum": "12.5", "recipe": "f1", "git_commit": "c0ffee"}.items() <= found.tags.items()
    model = tiny_matcher(3)
    wanted = model.encode_captions(model.inputs.captions(TEXTS)).vector
    for uri in ("models:/tiny@champion", f"models:/tiny/{version}", f"runs:/{run}", found.source):
        matcher = itm.load_matcher(uri)
        torch.testing.assert_close(matcher.encode_captions(matcher.inputs.captions(TEXTS)).vector, wanted, rtol=0, atol=0)


def test_a_matcher_folder_among_the_artifacts_of_a_run_loads(registry: Path, tmp_path: Path):
    with Tracker.start("tests", "artifacts") as tracker:
        tracker.artifact(matcher_folder(tmp_path / "matcher"), "best")
    assert (download(f"runs:/{tracker.run_id}/best/matcher") / "model.safetensors").exists()
    with pytest.raises(ValueError, match="the run holds best"):
        download(f"runs:/{tracker.run_id}/worst")
    with pytest.raises(ValueError, match="no model yet"):
        download(f"runs:/{tracker.run_id}")


def test_nothing_in_the_package_is_a_pickle_and_its_requirements_are_pinned(registry: Path, tmp_path: Path):
    register_matcher(matcher_folder(tmp_path / "m"), "tiny", run_id(), {})
    package = download("models:/tiny/1").parents[1]
    assert not [p for p in package.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin")]
    assert not [p for p in package.rglob("*") if p.is_file() and p.read_bytes()[:1] == b"\x80"]  # how every binary pickle starts
    lines = (package / "requirements.txt").read_text().split()
    assert any(line.startswith("torch==") for line in lines)
    assert all("==" in line and "+" not in line for line in lines)


def test_registering_the_same_weights_of_a_run_again_makes_no_second_version(registry: Path, tmp_path: Path):
    run = run_id()
    first = register_matcher(matcher_folder(tmp_path / "m"), "tiny", run, {"rsum": 1.0})
    assert register_matcher(tmp_path / "m", "tiny", run, {"rsum": 2.0}) == first
    assert find_version(f"models:/tiny/{first}").tags["rsum"] == "2.0"
    assert register_matcher(matcher_folder(tmp_path / "other", 1), "tiny", run, {}) != first


def test_the_champion_moves_only_for_a_real_gain(registry: Path, tmp_path: Path):
    versions = []
    for seed in range(4):
        folder = matcher_folder(tmp_path / str(seed), seed)
        versions.append(register_matcher(folder, "tiny", run_id(), {}, {"test_data": "d1" if seed < 3 else "d2"}))

    def gate(n: int, value: float, gain: float = 0.0):
        return promote("tiny", versions[n], "rsum", value, gain, comparable="test_data")

    def champion() -> str:
        return str(find_version("models:/tiny@champion").version)

    assert gate(0, 100.0)
    assert champion() == versions[0]
    equal = gate(1, 100.0)
    assert not equal
    assert "not better" in equal.reason
    assert not gate(1, 100.4, gain=0.5)
    assert champion() == versions[0]
    assert str(find_version("models:/tiny@candidate").version) == versions[1]
    assert gate(2, 101.0, gain=0.5)
    assert champion() == versions[2]
    assert str(find_version("models:/tiny@previous").version) == versions[0]
    other = gate(3, 500.0)
    assert not other
    assert "do not compare" in other.reason
    assert not gate(1, math.nan)
    assert gate(2, 101.0)
    assert champion() == versions[2]


def test_a_median_rank_improves_downwards(registry: Path, tmp_path: Path):
    versions = [register_matcher(matcher_folder(tmp_path / str(seed), seed), "tiny", run_id(), {}) for seed in range(2)]
    assert promote("tiny", versions[0], "t2i_medr", 9.0)
    assert not promote("tiny", versions[1], "t2i_medr", 12.0)
    assert promote("tiny", versions[1], "t2i_medr", 3.0)


def test_a_model_alias_or_version_that_does_not_exist_is_told_with_what_exists(registry: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no model 'tiny'.*none.*itm register"):
        download("models:/tiny@champion")
    version = register_matcher(matcher_folder(tmp_path / "m"), "tiny", run_id(), {})
    with pytest.raises(ValueError, match="no alias 'champion'; it has none"):
        itm.load_matcher("models:/tiny@champion")
    promote("tiny", version, "rsum", 1.0)
    for uri, message in {
        "models:/tinny@champion": "did you mean 'tiny'",
        "models:/tiny@best": r"no alias 'best'; it has candidate \(version 1\), champion \(version 1\)",
        "models:/tiny/9": "no version 9; it has 1",
        "models:/tiny": "not of the form models:/name@alias",
        "runs:/0123": "no run '0123'",
        "models:/m-0123": "no logged model m-0123",
    }.items():
        with pytest.raises(ValueError, match=message):
            itm.load_matcher(uri)


def test_a_folder_without_weights_is_refused_before_anything_is_logged(registry: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    run = run_id()
    with pytest.raises(ValueError, match=r"model\.safetensors missing"):
        register_matcher(tmp_path, "tiny", run, {})
    assert client().search_registered_models() == []


@pytest.fixture
def server(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tracking server that proxies artifacts, as a team would have it."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{registry}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "store"), "--port", str(port), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "server.log")
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("ITM_CACHE", str(tmp_path / "cache"))
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def test_a_server_serves_the_same_registry_and_a_model_is_fetched_once(server: str, tmp_path: Path):
    with Tracker.start("through a server", "run", {"a": 1}) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        tracker.artifact(matcher_folder(tmp_path / "matcher", 3))
    version = register_matcher(tmp_path / "matcher", "tiny", tracker.run_id, {"rsum": 3.0})
    assert version == register_matcher(tmp_path / "matcher", "tiny", tracker.run_id, {"rsum": 3.0}) == "1"
    assert promote("tiny", version, "rsum", 3.0)
    with pytest.raises(ValueError, match=r"no alias 'best'; it has candidate \(version 1\), champion \(version 1\)"):
        download("models:/tiny@best")
    folder = download("models:/tiny@champion")
    assert folder.is_relative_to(tmp_path / "cache")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert download("models:/tiny@champion") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "matcher" / "model.safetensors").read_bytes()
    assert (download(f"runs:/{tracker.run_id}/matcher") / "config.json").exists()
    assert not [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.name.startswith(".")]


def test_the_promotion_policy_on_paper_is_the_one_in_code():
    from itm.config import Registry
    from itm.tracking import registry as code

    policy = yaml.safe_load((ROOT / "mlflow" / "aliases.yaml").read_text())
    assert set(policy["aliases"]) == {code.CANDIDATE, code.CHAMPION, code.PREVIOUS}
    assert policy["gate"]["metric"] == Registry().metric
    assert policy["gate"]["min_gain"] == Registry().min_gain
    assert tuple(policy["gate"]["lower_is_better"]) == code.LOWER_IS_BETTER
