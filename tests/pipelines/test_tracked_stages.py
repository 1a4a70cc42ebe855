"""What the stages leave in MLflow: one walk in a folder with every printable character, and servers that are dead."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import yaml

import itm
from itm.config import Part, Recipe
from itm.data.formats import Json
from itm.tracking.addresses import DeadTracking, local_path
from itm.tracking.registry import find_version
from itm.tracking.runs import client
from pipelines import pack as packing
from pipelines.cli import stage_main
from pipelines.evaluate import evaluate
from pipelines.pack import pack
from pipelines.register import register
from pipelines.report import report
from pipelines.teach import teach
from pipelines.train import train
from tests.support.noise_split import small_split
from tests.support.ports import free_ports
from tests.support.small_training import recipe, splits

pytest_plugins = ["tests.support.registry_fixtures"]
PRINTABLE = "".join(c for c in string.printable if c.isprintable() and c != "/") + "äö"


def sts_of(choices: Recipe, folder: Path) -> Json:
    """The result of a protocol that asks the matcher itself, by the command."""
    pairs = [("a red dog", "a dog", 5), ("a cat", "no cat", 1), ("a blue box on a dog", "a dog under a box", 2)]
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in pairs))
    (folder / "recipe.json").write_text(json.dumps(choices.model_dump(mode="json")))
    assert stage_main("evaluate", ["-c", str(folder / "recipe.json"), "--protocol", "sts", "--pairs", str(folder / "pairs.tsv")]) == 0
    found: Json = json.loads(Path(choices.folder, "evaluation-sts-pairs.json").read_text())
    return found


@pytest.mark.e2e
def test_the_whole_way_in_a_folder_of_any_name_leaves_nothing_beside_it_and_one_group_a_protocol(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "beside" / PRINTABLE
    here.mkdir(parents=True)
    (here / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    splits(here)
    small_split(here / "shards", "test", shards=1)
    choices = recipe(Path()).model_copy(update={"about": "A small run."})
    done = train(choices)
    results = {name: evaluate(choices, protocol=name) for name in ("auto", "t2t")} | {"sts": sts_of(choices, tmp_path)}
    report(choices)
    itm.load_matcher(register(choices).uri)
    assert [path.name for path in (tmp_path / "beside").iterdir()] == [PRINTABLE]
    assert {path.name for path in here.iterdir()} == {"shards", "runs", "mlflow.db", "mlruns"}

    run = client().get_run(done["run_id"])
    metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    assert {name.split("/")[0] for name in metrics} == {"train", "val", "test"}
    assert {"train/loss", "train/lr", "train/rows_in", "val/rsum", "val/i2t_r1"} <= metrics.keys()
    for protocol, result in results.items():
        for name, value in result["metrics"].items():
            assert metrics[f"test/{protocol}/{name}"] == pytest.approx(value)
    assert sum(name.endswith("i2t_r1") for name in metrics) == 2, "once in validation, once in the test"
    folder = local_path(run.info.artifact_uri)
    assert folder is not None
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "environment.json", "evaluation.json", "report.html", "log/losses.jsonl"} <= kept
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["steps"] == 10
    [log] = [name for name in kept if name.startswith("log/2")]
    assert "step 10 of 10, loss" in (folder / log).read_text()
    assert "A small run." in run.data.tags["mlflow.note.content"]
    version = find_version("models:/itm-matcher@champion")
    assert "A small run." in version.description
    carried = {protocol: json.loads(version.tags[f"metrics/test/{protocol}"]) for protocol in ("t2t", "sts")}
    assert carried == {protocol: pytest.approx(results[protocol]["metrics"]) for protocol in carried}

    monkeypatch.chdir(tmp_path)
    moved = choices.model_copy(update={"output": str(here / "runs")})
    with pytest.raises(ValueError, match=r"is not in the tracking store asked, .*; it was recorded in .*: export MLFLOW_TRACKING_URI="):
        register(moved)
    report(moved)
    assert "not logged to MLflow" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.e2e
def test_every_stage_tells_a_dead_server_before_its_work(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits(tmp_path)
    choices = recipe(tmp_path, teachers={"image": {"kind": "statistics"}})
    packed = choices.model_copy(update={"data": choices.data.model_copy(update={"source": recipe_source(), "root": str(tmp_path / "new")})})
    [port] = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    for stage in (lambda: pack(packed), lambda: teach(choices), lambda: train(choices)):
        with pytest.raises(DeadTracking, match=f"no answer from the tracking server at http://127.0.0.1:{port} .*set MLFLOW_TRACKING_URI"):
            stage()
    assert not [*tmp_path.rglob("new/**/*.tar"), *tmp_path.rglob("*.arrow"), *tmp_path.rglob("started.json")]


def recipe_source() -> Part:
    return Part(kind="scenes", options={"world": "tiny", "n_train": 4, "n_val": 2, "n_test": 2})


@pytest.mark.e2e
def test_the_run_of_a_pack_covers_its_work_and_fails_with_it(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = recipe(tmp_path)
    choices = choices.model_copy(update={"data": choices.data.model_copy(update={"source": recipe_source()})})

    def here(recipe: Recipe, jobs: list[packing.Job], title: str) -> dict[str, packing.Receipt]:
        if title == "pack test":
            raise ValueError("a worker died")
        return {job.uri: packing.Receipt.model_validate_json(packing.pack_shard(job)) for job in jobs}

    monkeypatch.setattr(packing, "_run_jobs", here)
    pack(choices, splits=["train"])
    with pytest.raises(ValueError, match="a worker died"):
        pack(choices, splits=["test"])
    found = client().get_experiment_by_name("itm")
    assert found is not None
    failed, train_run = client().search_runs([found.experiment_id])
    assert (train_run.info.status, failed.info.status) == ("FINISHED", "FAILED")
    made = (tmp_path / "shards" / "train" / "00000.tar").stat().st_mtime
    assert train_run.info.start_time / 1000 <= made + 0.01
    assert made <= train_run.info.end_time / 1000 + 0.01
    folder = local_path(failed.info.artifact_uri)
    assert folder is not None
    assert "a worker died" in next((folder / "log").iterdir()).read_text()
    assert json.loads((folder / "environment.json").read_text())["versions"]["python"]
