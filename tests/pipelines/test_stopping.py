"""How stages end before their time, seen by child processes: a line or a few on stderr, the exit code, and what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from mlflow.exceptions import MlflowException
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from itm.data.patience import StoreGone
from pipelines import cli
from pipelines.cli import stage_main
from pipelines.on_ray.errors import cause_of
from pipelines.pack import pack
from pipelines.stopping import stopped
from pipelines.train import train
from tests.support.chaos import recipe as scenes_recipe
from tests.support.small_training import final, recipe, same, splits


def heed_interrupts() -> None:
    """A test that runs in the background has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped_when(made: Path, stage: str, choices: Path, by: signal.Signals) -> tuple[int, str]:
    """(exit code, stderr) of a stage in a process group of its own, which gets a signal as soon as the file `made` is there.

    Ctrl-C in a terminal reaches the whole group, SIGTERM the driver alone.
    """
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{choices.parent}/mlflow.db"}
    command = [sys.executable, "-m", f"pipelines.{stage}", "-c", str(choices)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 120
    while not made.exists():
        assert child.poll() is None and time.monotonic() < deadline, f"no {made}"
        time.sleep(0.005)
    (os.killpg if by == signal.SIGINT else os.kill)(child.pid, by)
    _, said = child.communicate(timeout=60)
    return child.returncode, said


@pytest.mark.e2e
def test_a_training_stopped_twice_says_what_is_kept_and_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path)
    given: dict[str, Any] = {"steps": 200, "data": {"val_split": ""}}
    train(recipe(tmp_path, name="whole", **given))
    choices = tmp_path / "r.json"
    choices.write_text(recipe(tmp_path, name="stopped", **given).model_dump_json())
    folder = tmp_path / "runs" / "stopped"
    for by, step in ((signal.SIGINT, 8), (signal.SIGTERM, 60)):
        code, said = stopped_when(folder / "checkpoints" / f"{step:09d}.json", "train", choices, by)
        assert code == 130 and "Traceback" not in said
        kept = max(int(path.stem) for path in (folder / "checkpoints").glob("*.json"))
        last = said.splitlines()[-1]
        assert last == f"itm train: stopped; the checkpoint of step {kept} is kept in {folder}. To go on: itm train -c {choices}"
        assert not (folder / "run.json").exists()
    done = train(recipe(tmp_path, name="stopped", **given))
    assert done["rows_in"] == 200 * 6
    assert same(final(tmp_path, "stopped", 200), final(tmp_path, "whole", 200))


@pytest.mark.e2e
def test_a_stopped_packing_on_ray_keeps_its_whole_shards_and_makes_the_others_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: object
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    choices, recipe = tmp_path / "r.json", scenes_recipe(tmp_path)
    assert recipe.data.source is not None
    many = {**recipe.data.source.options, "n_train": 240}  # so many that they are not through before a busy machine brings the signal
    source = recipe.data.source.model_copy(update={"options": many})
    data = recipe.data.model_copy(update={"source": source, "shard_samples": 1})
    recipe = recipe.model_copy(update={"data": data})
    choices.write_text(recipe.model_dump_json())
    train_split = tmp_path / "shards" / "train"
    code, said = stopped_when(train_split / "00001.index.json", "pack", choices, signal.SIGTERM)
    assert code == 130 and "Traceback" not in said
    kept = {path: (path.stat().st_ino, path.read_bytes()) for path in train_split.glob("*.tar") if path.with_suffix(".index.json").exists()}
    told = f"itm pack: stopped; {len(kept)} whole shards are kept in {tmp_path}/shards. To go on: itm pack -c {choices}"
    assert said.splitlines()[-1] == told
    assert 0 < len(kept) < 240
    assert pack(recipe)["train"].samples == 240
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in kept} == kept


def stage_that_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """`itm verify` becomes a stage that raises."""
    module = ModuleType("raises")

    def run(args: Any) -> None:
        raise error

    module.add_arguments, module.run = (lambda parser: parser.add_argument("rest", nargs="*")), run  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "import_module", lambda name: module)


def test_the_command_that_goes_on_does_not_overwrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stage_that_raises(KeyboardInterrupt(), monkeypatch)
    assert stage_main("verify", ["a b", "c"]) == 130
    assert capsys.readouterr().err == "itm verify: stopped; what it had finished is kept. To go on: itm verify 'a b' c\n"
    assert stopped("train", None, SimpleNamespace(), ["-c", "r", "--overwrite"]).endswith("itm train -c r")


SERVER_GONE = MlflowException(
    "API request to http://x/api failed with exception HTTPConnectionPool(host='x', port=9): Max retries exceeded"
)


def error_of_a_task(cause: Exception) -> Exception:
    """What `ray.get` raises when a task raised `cause`: an error whose text is the trace of the worker."""
    trace = f"ray::task()\n  File 'x.py', line 1, in f\n{type(cause).__name__}: {cause}"
    return ray.exceptions.RayTaskError("task", trace, cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ValueError("no such split"), "itm verify: no such split\n", 2),
        (error_of_a_task(ValueError("no such split")), "itm verify: no such split\n", 2),
        (error_of_a_task(error_of_a_task(OSError(28, "No space left"))), "itm verify: [Errno 28] No space left\n", 2),
        (
            WorkerGroupError("traces", {0: RuntimeError("peer gone"), 1: UserExceptionWithTraceback(ValueError("loss is nan"), "trace")}),
            "itm verify: loss is nan\n",
            2,
        ),
        (
            WorkerGroupError("traces", {0: RuntimeError("peer gone"), 1: UserExceptionWithTraceback(SERVER_GONE, "trace")}),
            "itm verify: the tracking server at http://127.0.0.1:9 does not answer any more; what was finished is kept: run the stage "
            "again when it is back, it resumes\n",
            2,
        ),
        (error_of_a_task(StoreGone("s3://b/x: the store did not answer")), "itm verify: s3://b/x: the store did not answer\n", 2),
        (ControllerError(ValueError("no room")), "itm verify: no room\n", 2),
        (KeyError("width"), "itm verify: KeyError: 'width'; --traceback shows the way there\n", 1),
        (RuntimeError("\n".join("abcdefgh")), "itm verify: RuntimeError: a\nb\nc\nd\ne\nf ...; --traceback shows the way there\n", 1),
    ],
)
def test_an_error_is_told_once_in_a_few_lines_without_the_traces_around_it(
    error: Exception, said: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ITM_TRACEBACK", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    stage_that_raises(error, monkeypatch)
    assert stage_main("verify", []) == code
    assert capsys.readouterr().err == said


def test_with_traceback_the_error_comes_as_python_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITM_TRACEBACK", "")  # what --traceback sets in its place goes with the test
    stage_that_raises(ValueError("no such split"), monkeypatch)
    with pytest.raises(ValueError, match="no such split"):
        stage_main("verify", ["--traceback"])


def test_a_fault_of_this_project_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ITM_TRACEBACK", raising=False)
    try:
        cli.module_of("no stage")
    except KeyError as error:
        stage_that_raises(error, monkeypatch)
    assert stage_main("verify", []) == 1
    assert re.search(r"KeyError: 'no stage' \(pipelines/cli.py:\d+\); --traceback", capsys.readouterr().err)


def test_an_actor_that_died_is_told_in_rays_own_words_and_one_that_could_not_begin_in_those_of_its_error() -> None:
    died = ray.exceptions.ActorDiedError()
    assert cause_of(died) is died
    begun = ray.exceptions.ActorDiedError(ray.exceptions.RayTaskError("task", "trace\nValueError: no weights", ValueError("no weights")))
    assert str(cause_of(begun)) == "ValueError: no weights"


@pytest.mark.parametrize("ctrl_c", [signal.SIG_DFL, signal.SIG_IGN])
def test_sigterm_stops_also_what_a_script_started_in_the_background_where_ctrl_c_is_ignored(ctrl_c: signal.Handlers) -> None:
    waits = "import time; from pipelines.stopping import sigterm_as_interrupt as s\nwith s(): print('begun', flush=True); time.sleep(60)"
    piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", waits], preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c), **piped)
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    child.terminate()
    _, said = child.communicate(timeout=20)
    assert said.splitlines()[-1] == "KeyboardInterrupt"


def test_a_tracking_server_that_answers_with_a_page_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Login(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    splits(tmp_path)
    (tmp_path / "r.json").write_text(recipe(tmp_path).model_dump_json())
    with ThreadingHTTPServer(("127.0.0.1", 0), Login) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        assert stage_main("train", ["-c", str(tmp_path / "r.json")]) == 2
        server.shutdown()
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"itm train: the tracking server at http://127.0.0.1:{server.server_port} gives an answer")
    assert "set MLFLOW_TRACKING_URI to an MLflow server" in said
