from __future__ import annotations

import http.server
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import yaml

from itm.arguments import read_from, written_to
from itm.config import load_recipe
from pipelines.cli import RECIPES, STAGES, module_of, parsed, stage_main
from pipelines.parcel import overriding
from pipelines.submit import HERE, Wanted, check_secrets, check_versions, job_environment, submit

SHARED = ["data.root=/shared/data", "output=s3://bucket/runs"]


def packed(folder: Path, stage: str, arguments: list[str], ship: bool = False, code: bool = False) -> list[str]:
    folder.mkdir()
    wanted = Wanted(stage, arguments)
    wanted.check(ship)
    return wanted.packed(folder, ship, code).arguments


def test_a_recipe_of_ones_own_travels_as_one_file_with_what_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "base.yaml").write_text("name: base\nmodel: {kind: dual, options: {width: 32}}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\ntrain: {steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    for number, given in enumerate((["-c", "mine.yaml"], ["--recipe=mine.yaml"], ["-cmine.yaml"], ["--rec", "./mine.yaml"])):
        job = tmp_path / f"job{number}"
        sent = packed(job, "train", [*given, *SHARED])
        assert sent[-2:] == SHARED
        monkeypatch.chdir(job)
        _, args = parsed("train", sys.modules[module_of("train")], sent)
        assert load_recipe(args.recipe) == load_recipe(tmp_path / "mine.yaml")
        assert os.listdir(job) == ["recipes"]
        monkeypatch.chdir(tmp_path)


def test_a_shipped_recipe_goes_by_its_name_wherever_the_submitter_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(RECIPES)
    assert packed(tmp_path / "a", "train", ["-c", "demo.yaml", *SHARED]) == ["-c", "demo.yaml", *SHARED]
    assert packed(tmp_path / "b", "train", ["-c", str(RECIPES / "demo.yaml"), *SHARED]) == ["-c", "demo", *SHARED]
    monkeypatch.chdir("/")
    assert packed(tmp_path / "c", "train", ["-c", "demo", *SHARED]) == ["-c", "demo", *SHARED]


def test_the_code_is_two_packages_and_runs_from_where_it_was_sent(tmp_path: Path):
    packed(tmp_path / "job", "train", ["-c", "demo", *SHARED], code=True)
    assert sorted(os.listdir(tmp_path / "job")) == ["itm", "pipelines"]
    assert not [path for path in (tmp_path / "job").rglob("*") if path.suffix == ".pyc" or path.name.startswith(".")]
    assert sum(path.stat().st_size for path in (tmp_path / "job").rglob("*") if path.is_file()) < 4e6
    command = [sys.executable, "-c", "import itm, pipelines.cli; print(itm.__file__); print(pipelines.cli.RECIPES)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=True)
    assert all(line.startswith(str(tmp_path / "job")) for line in done.stdout.split())


def test_a_package_of_the_users_own_goes_along_when_the_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "acme_parts_sent"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("class Net: ...\n")
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {kind: 'acme_parts_sent.nets:Net'}\n")
    monkeypatch.chdir(tmp_path)
    packed(tmp_path / "job", "train", ["-c", "mine.yaml", *SHARED])
    assert sorted(os.listdir(tmp_path / "job")) == ["acme_parts_sent", "recipes"]
    assert (tmp_path / "job" / "acme_parts_sent" / "nets.py").read_text() == "class Net: ...\n"


def test_places_that_a_job_would_lose_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {kind: dual}\n")
    for stage, arguments, said in (
        ("train", ["-c", "demo", SHARED[0]], r"output=.* is relative.*Say output=/shared"),
        ("train", ["-c", "demo", SHARED[1]], r"data\.root=.* is relative"),
        ("train", ["--recipe=mine.yaml", SHARED[1]], r"data\.root=.* is relative"),
        ("demo", [], r"data\.root=.* is relative"),
        (
            "search",
            ["x", "--model", "models:/m@champion", "--shards", "s3://b/t", "--html", "page.html"],
            r"--html=page\.html is relative",
        ),
        ("export", ["matcher", "models:/m@champion", "--to", "onnx", "-o", "out"], r"--output=out is relative"),
    ):
        with pytest.raises(ValueError, match=said):
            Wanted(stage, arguments).check(ship=False)


def test_what_only_this_machine_has_is_refused_with_the_line_that_uploads_it_or_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a")
    (tmp_path / "vocab.json").write_text("{}")
    given = ["-c", "demo", *SHARED, "text.path=vocab.json", "data.source.kind=imagefolder", "data.source.options={images: ./photos}"]
    with pytest.raises(
        ValueError, match=rf"text\.path=vocab\.json lies on this machine only.*aws s3 cp {tmp_path}/vocab\.json s3://.*--ship"
    ):
        Wanted("train", given[:5]).check(ship=False)
    with pytest.raises(ValueError, match=r"data\.source\.options\.images=\./photos .*aws s3 cp --recursive"):
        Wanted("train", given).check(ship=False)
    sent = packed(tmp_path / "job", "train", given, ship=True)
    monkeypatch.chdir(tmp_path / "job")
    recipe = load_recipe(RECIPES / "demo.yaml", sent[2:])
    assert Path(recipe.text.path or "").read_text() == "{}"
    assert recipe.data.source is not None
    assert os.listdir(recipe.data.source.options["images"]) == ["a.txt"]


def test_too_much_to_ship_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "vocab.json").open("wb") as out:
        out.truncate(21 << 20)
    with pytest.raises(ValueError, match=r"vocab\.json holds 22 MB, --ship sends up to 21: aws s3 cp"):
        packed(tmp_path / "job", "train", ["-c", "demo", *SHARED, "text.path=./vocab.json"], ship=True)


def test_an_absolute_path_goes_along_as_a_copy_that_is_named_so_or_is_looked_for_there_where_it_is_too_large(tmp_path: Path):
    (tmp_path / "vocab.json").write_text("{}")
    wanted = Wanted("train", ["-c", "demo", *SHARED, f"text.path={tmp_path}/vocab.json"])
    assert wanted.read_here() == [f"{tmp_path}/vocab.json"] and wanted.read_here(ship=True) == []
    (tmp_path / "job").mkdir()
    parcel = wanted.packed(tmp_path / "job", True, False)
    assert f"a copy of {tmp_path}/vocab.json" in parcel.said()
    assert "text.path=sent/0/vocab.json" in parcel.arguments
    with (tmp_path / "vocab.json").open("wb") as out:
        out.truncate(21 << 20)
    assert wanted.read_here(ship=True) == [f"{tmp_path}/vocab.json"]
    (tmp_path / "other").mkdir()
    assert f"text.path={tmp_path}/vocab.json" in wanted.packed(tmp_path / "other", True, False).arguments


def test_an_element_of_a_list_is_replaced_by_an_override_of_the_list():
    choices = {"evaluation": {"ensemble": ["a", "b"]}, "data": {"mix": [{"root": "x", "weight": 1.0}]}}
    [word] = overriding(choices, "evaluation.ensemble.1", "sent/0/b")
    assert yaml.safe_load(word.partition("=")[2]) == ["a", "sent/0/b"]
    [word] = overriding(choices, "data.mix.0.root", "s")
    assert (word.partition("=")[0], yaml.safe_load(word.partition("=")[2])) == ("data.mix", [{"root": "s", "weight": 1.0}])
    assert overriding({"text": {"path": "v"}}, "text.path", "s") == ["text.path=s"]


def test_arguments_that_the_stage_would_refuse_are_refused_before_anything_is_sent(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        submit("train", ["-c", "demo", "--no-such-flag", *SHARED], "http://127.0.0.1:9")
    assert "--no-such-flag" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown key 'train.stepps'; did you mean"):
        submit("train", ["-c", "demo", "train.stepps=3", *SHARED], "http://127.0.0.1:9")


def test_secrets_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "my_api_key"):
        with pytest.raises(ValueError, match=rf"--env {name}: it would stand on the dashboard.*cluster/settings\.yaml"):
            check_secrets({name: "x"}, [])
    with pytest.raises(ValueError, match=r"the argument data\.root holds a password"):
        check_secrets({}, ["data.root=s3://key:secret@bucket/shards"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.com")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI holds a password.*MLFLOW_TRACKING_USERNAME") as caught:
        check_secrets({}, [])
    assert "secret@" not in str(caught.value)
    check_secrets({"MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_HUB_OFFLINE": "1"}, ["a red circle", "data.root=s3://bucket/a:b@c"])


def test_a_local_tracking_file_serves_only_a_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ITM_GIT_COMMIT", "c0ffee")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    told = job_environment("http://127.0.0.1:8265", same_machine=True)
    assert told["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert told["ITM_GIT_COMMIT"] == "c0ffee"
    assert "secret" not in told.values()
    assert "MLFLOW_TRACKING_URI" not in job_environment("http://127.0.0.1:8265", same_machine=False)  # the end of a tunnel
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ValueError, match="set it to a tracking server that http://head:8265 can reach"):
        job_environment("http://head:8265", same_machine=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert job_environment("http://head:8265", same_machine=False)["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_a_job_says_which_machine_has_a_file_and_which_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setenv("ITM_SUBMITTED_FROM", "laptop")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("ITM_READ_THERE", json.dumps([str(tmp_path), f"{tmp_path}/vocab.json"]))
    assert stage_main("train", ["-c", "demo"]) == 2
    assert f"{tmp_path}/vocab.json lies on laptop, which submitted this job, and not on" in capsys.readouterr().err


def test_a_job_without_any_tracking_address_ends_before_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setenv("ITM_SUBMITTED_FROM", "laptop")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert stage_main("pack", ["-c", "demo", f"data.root={tmp_path}/shards", f"output={tmp_path}/runs"]) == 2
    assert "MLFLOW_TRACKING_URI is set neither on laptop" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_every_argument_that_names_a_file_says_whether_it_is_read_or_written():
    """What `itm submit` checks; an argument that tells of a file, folder or URI and is neither is one that it would let through."""
    for stage in set(STAGES) - HERE:
        module = __import__(module_of(stage), fromlist=["add_arguments"])
        parser, _ = parsed(stage, module, MINIMAL.get(stage, []))
        for action in parser._actions:
            told = f"{action.metavar} {action.help}".lower()
            names = any(word in told.replace(",", " ").replace(":", " ").split() for word in ("file", "folder", "uri", "folders", "files"))
            if (
                names
                and action.nargs != 0
                and action.dest not in ("recipe", "allow", "overrides", "traceback", "log", "words", "data", "teacher", "needed")
            ):
                assert action.type in (read_from, written_to), (stage, action.dest)


MINIMAL = {
    "explain": ["-c", "demo", "--pair", "x"],
    "export": ["matcher", "m", "--to", "onnx", "-o", "o"],
    "import": ["c", "-o", "o"],
    "index": ["--model", "m", "--shards", "s"],
    "repair": ["u", "--output", "o"],
    "search": ["x", "--model", "m", "--shards", "s"],
} | {stage: ["-c", "demo"] for stage in ("features", "pack", "plan", "run", "sweep", "teach", "train", "verify", "register", "report")}


def test_an_address_that_is_missing_or_answers_nothing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert stage_main("submit", ["train", "-c", "demo", *SHARED]) == 2
    assert "give --address or RAY_ADDRESS" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        submit("train", ["-c", "demo", *SHARED], "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        stage_main("submit", ["trane"])
    assert stage_main("submit", ["--env", "X", "train"]) == 2
    assert stage_main("submit", ["train", "-c", "demo", *SHARED, "--address", "http://127.0.0.1:9"]) == 2
    assert "--address belongs to submit, not to the stage: itm submit --address ... train" in capsys.readouterr().err


@contextmanager
def dashboard(**said: str) -> Iterator[str]:
    """What a cluster of other versions answers."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/v0/cluster_metadata" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"result": True, "data": said}).encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_cluster_of_older_versions_is_refused_and_of_other_ones_told(capsys: pytest.CaptureFixture[str]):
    here = {"rayVersion": ray.__version__, "pythonVersion": platform.python_version()}
    with dashboard(**here) as address:
        check_versions(address)
    assert capsys.readouterr().out == ""
    with (
        dashboard(**here | {"pythonVersion": "3.10.14"}) as address,
        pytest.raises(ValueError, match=r"runs Python 3\.10\.14, .* needs 3\.11"),
    ):
        check_versions(address)
    with dashboard(**here | {"rayVersion": "2.9.3"}) as address, pytest.raises(ValueError, match=r"runs Ray 2\.9\.3, .* needs 2\.60"):
        check_versions(address)
    with dashboard(**here | {"rayVersion": "2.99.0"}) as address:
        check_versions(address)
    assert capsys.readouterr().out == f"the cluster runs Ray 2.99.0 (here {ray.__version__})\n"
    with dashboard() as address:
        check_versions(address)
    check_versions("http://127.0.0.1:9")
