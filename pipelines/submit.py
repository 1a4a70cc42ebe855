"""Run a stage on a Ray cluster as a job: upload the code, follow the log, return the job's exit code.

    export RAY_ADDRESS=http://head:8265 MLFLOW_TRACKING_URI=http://mlflow:5000
    itm submit train -c demo.yaml data.root=s3://bucket/shards output=s3://bucket/runs
    itm submit --address http://127.0.0.1:8265 --env HF_HUB_OFFLINE=0 teach -c coco.yaml data.root=/shared/coco output=/shared/runs

Everything behind the stage is the stage's own. The job sees the repository and nothing else of this machine, and its folder goes
when it ends: paths must be absolute or URIs, and so must the tracking address. Interrupting leaves the job running.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from itm.config import Recipe, load_recipe
from itm.data import files
from itm.tracking.addresses import tracking_uri
from itm.tracking.lineage import git_commit
from pipelines.cli import RECIPES, STAGES, module_of, script

ROOT = Path(__file__).resolve().parents[1]
OWN = {"--address", "--env", "--no-wait"}
EXCLUDES = ["/.git/", "/.venv/", "/data/", "/runs/", "/mlruns/", "/mlflow.db*", "/tests/", "__pycache__/", "*.egg-info/"]
# Settings that travel. Secrets do not: a job's environment is on the dashboard, so they belong into the cluster's own.
PASSED = (
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "RAY_AUTH_MODE",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
LOCAL_HOSTS = (None, "localhost", "127.0.0.1", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="the cluster's dashboard, e.g. http://127.0.0.1:8265 (default: RAY_ADDRESS)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the job; may be repeated")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    parser.add_argument("stage", choices=sorted(set(STAGES) - {"submit"}), metavar="stage", help="the stage to run")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the stage")


def run(args: argparse.Namespace) -> int:
    environment = {}
    for pair in args.env:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env {pair!r} is not of the form NAME=VALUE")
        environment[name] = value
    return submit(args.stage, args.rest, args.address, environment, wait=not args.no_wait)


def submit(
    stage: str, arguments: list[str], address: str | None = None, environment: dict[str, str] | None = None, wait: bool = True
) -> int:
    """Submit `python -m pipelines.<stage> <arguments>`; returns its exit code, 130 when interrupted.

    Raises ValueError, before anything is uploaded, without an address and for paths that the job could not see or would lose.
    """
    if own := sorted(OWN & set(arguments)):
        raise ValueError(f"{own[0]} belongs to submit, not to the stage: itm submit {own[0]} ... {stage} ...")
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"the cluster's address is {address!r}; give --address or RAY_ADDRESS as http://<head>:8265, the dashboard's address"
        )
    arguments = check_arguments(arguments)
    variables = job_environment(address) | (environment or {})
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says when the log stream closes
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as error:
        raise ValueError(f"no Ray dashboard at {address}: {error}") from None
    job = client.submit_job(
        entrypoint=shlex.join(["python", "-m", module_of(stage), *arguments]),
        runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDES, "env_vars": variables},
        metadata={"itm_stage": stage, "git_commit": variables["ITM_GIT_COMMIT"]},
    )
    print(f"job {job} on {address}", flush=True)
    return follow(client, job) if wait else 0


def check_arguments(arguments: list[str]) -> list[str]:
    """The arguments as the job must get them: a recipe file by its place in the repository.

    Raises ValueError for a recipe outside the repository, and for outputs or data by a relative path.
    """
    arguments = list(arguments)
    for position, flag in enumerate(arguments[:-1]):
        if flag not in ("-c", "--recipe"):
            continue
        path = Path(arguments[position + 1])
        if path.exists():
            if not path.resolve().is_relative_to(ROOT):
                raise ValueError(f"{path} lies outside {ROOT}, the folder that is sent to the cluster; copy the recipe into it")
            arguments[position + 1] = str(path.resolve().relative_to(ROOT))
            _check_places(load_recipe(path, _overrides(arguments)))
        elif (shipped := RECIPES / f"{path.name.removesuffix('.yaml')}.yaml").exists():
            _check_places(load_recipe(shipped, _overrides(arguments)))
    return arguments


def _overrides(arguments: list[str]) -> list[str]:
    return [a for a in arguments if not a.startswith("-") and a.partition("=")[0].replace("_", "").replace(".", "").isalnum() and "=" in a]


def _check_places(recipe: Recipe) -> None:
    mixed = [(f"data.mix.{number}.root", one.root) for number, one in enumerate(recipe.data.mix)]
    for key, place in (("data.root", recipe.data.root), ("output", recipe.output), ("teachers.root", recipe.teachers.root), *mixed):
        if place and not place.startswith(("/", "file://")) and not files.is_remote(place):
            raise ValueError(f"{key}={place} is relative: a job's folder goes when it ends. Say {key}=/shared/... or {key}=s3://bucket/...")


def job_environment(address: str) -> dict[str, str]:
    """What the job is told of this machine. Raises ValueError for a tracking database that a remote cluster cannot reach."""
    tracking = tracking_uri()
    if urlparse(address).hostname not in LOCAL_HOSTS and urlparse(tracking).scheme in ("", "file", "sqlite"):
        raise ValueError(f"MLFLOW_TRACKING_URI is {tracking}, a file of this machine; set it to a tracking server that {address} can reach")
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    return {"MLFLOW_TRACKING_URI": tracking, "MLFLOW_DISABLE_TELEMETRY": "true", "ITM_GIT_COMMIT": git_commit(), **passed}


def follow(client: Any, job: str) -> int:
    """Print the job's log as it grows; returns its exit code when it has ended."""
    try:
        try:
            asyncio.run(_tail(client, job))
        except RuntimeError as error:  # the log can be had again, so a lost connection is no reason to stop waiting
            print(f"log connection lost ({error}); waiting for the end, see `ray job logs {job}`", file=sys.stderr)
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; `ray job logs --follow {job}` shows it, `ray job stop {job}` ends it", file=sys.stderr)
        return 130
    print(f"job {job}: {info.status.value.lower()}" + (f"\n{info.message}" if info.status.value == "FAILED" else ""), flush=True)
    if info.status.value == "SUCCEEDED":
        return 0
    return int(info.driver_exit_code or 1)


async def _tail(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    script(__file__)
