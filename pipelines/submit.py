"""Run a stage on a Ray cluster as a job: send the code and the recipe, follow the log, return the job's exit code.

    export RAY_ADDRESS=http://head:8265 MLFLOW_TRACKING_URI=http://mlflow:5000
    itm submit train -c demo data.root=s3://bucket/shards output=s3://bucket/runs
    itm submit --ship --address http://127.0.0.1:8265 teach -c mine.yaml data.root=/shared/coco output=/shared/runs

Everything behind the stage is the stage's own, and is checked here before anything is sent. The job sees the two packages of this
project, the recipe, and packages of your own that the recipe names: nothing else of this machine. Its folder goes when it ends, so what
it writes needs a URI, or a folder that every node mounts. Files that only this machine has are refused with the line that uploads them,
or go along with --ship where they are small. Interrupting leaves the job running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import re
import shlex
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import RECIPES, STAGES, module_of, parsed, recipe_from, recipe_path, script

if TYPE_CHECKING:
    from itm.config import Recipe
    from pipelines.places import Place

OWN = {"--address", "--env", "--no-wait", "--ship", "--no-code"}
HERE = {"init", "recipes", "submit"}  # stages that are of use on this machine alone
# Settings that travel. Secrets do not: a job's environment is on the dashboard, so they belong into the cluster's own.
PASSED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "ITM_PATIENCE",
    "ITM_LOG",
    "RAY_AUTH_MODE",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
OLDEST = {"Ray": (2, 60), "Python": (3, 11)}  # as pyproject.toml has them
SECRET = re.compile(r"SECRET|TOKEN|PASSW|ACCESS_KEY|API_?KEY|PRIVATE_KEY|CREDENTIAL", re.IGNORECASE)
WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
REMEDY = (
    "it would stand on the dashboard for all to read. Put it into the environment of the cluster's nodes: cluster/settings.yaml on "
    "Kubernetes, docker.env of the launcher file, or the environment of `ray start`"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="the cluster's dashboard, e.g. http://127.0.0.1:8265 (default: RAY_ADDRESS)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the job; may be repeated")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    parser.add_argument("--ship", action="store_true", help="send along what the stage reads and only this machine has, up to 20 MB a file")
    parser.add_argument("--no-code", action="store_true", help="the nodes have the code (a container of it): send the recipe only")
    parser.add_argument("stage", choices=sorted(set(STAGES) - HERE), metavar="stage", help="the stage to run")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the stage")


def run(args: argparse.Namespace) -> int:
    environment = {}
    for pair in args.env:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env {pair!r} is not of the form NAME=VALUE")
        environment[name] = value
    return submit(args.stage, args.rest, args.address, environment, wait=not args.no_wait, ship=args.ship, code=not args.no_code)


def submit(
    stage: str,
    arguments: list[str],
    address: str | None = None,
    environment: dict[str, str] | None = None,
    *,
    wait: bool = True,
    ship: bool = False,
    code: bool = True,
) -> int:
    """Submit `python -m pipelines.<stage> <arguments>`; returns its exit code, 130 when interrupted.

    Raises ValueError, before anything is uploaded, without an address, for arguments that the stage would refuse, for places that the job
    could not see or would lose, and for secrets that the dashboard would show.
    """
    if own := sorted(OWN & {word.partition("=")[0] for word in arguments}):
        raise ValueError(f"{own[0]} belongs to submit, not to the stage: itm submit {own[0]} ... {stage} ...")
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"the cluster's address is {address!r}; give --address or RAY_ADDRESS as http://<head>:8265, the dashboard's address"
        )
    check_secrets(environment or {}, arguments)
    wanted = Wanted(stage, arguments)
    wanted.check(ship)
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says when the log stream closes
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as error:
        raise ValueError(f"no Ray dashboard at {address}: {error}") from None
    check_versions(address)
    variables = job_environment(address, on_this_machine(address), wanted.read_here(ship)) | (environment or {})
    with tempfile.TemporaryDirectory(prefix="itm-job-") as folder:
        parcel = wanted.packed(Path(folder), ship, code)
        print(parcel.said(), flush=True)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", module_of(stage), *parcel.arguments]),
            runtime_env={"working_dir": folder, "env_vars": variables},
            metadata={"itm_stage": stage, "git_commit": variables["ITM_GIT_COMMIT"]},
        )
    print(f"job {job} on {address}", flush=True)
    return follow(client, job) if wait else 0


def check_versions(address: str) -> None:
    """Raises ValueError when the cluster runs a Ray or a Python that the job's code does not; prints where they only differ from here.

    A dashboard that does not tell is passed over.
    """
    import ray

    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/v0/cluster_metadata", timeout=5) as answer:
            said = json.load(answer)["data"]
        there = {"Ray": str(said["rayVersion"]), "Python": str(said["pythonVersion"])}
    except (OSError, ValueError, KeyError, TypeError):
        return
    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for name, least in OLDEST.items():
        if _numbers(there[name]) < least:
            needed = ".".join(map(str, least))
            raise ValueError(
                f"{address} runs {name} {there[name]}, this project needs {needed} or later: start the cluster from an image with "
                f"{name} {here[name]}, as here"
            )
    if others := [f"{name} {there[name]} (here {here[name]})" for name in here if _numbers(there[name])[:2] != _numbers(here[name])[:2]]:
        print(f"the cluster runs {' and '.join(others)}", flush=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def check_secrets(environment: Mapping[str, str], arguments: Iterable[str]) -> None:
    """Raises ValueError for what would make a password public."""
    for name in environment:
        if SECRET.search(name):
            raise ValueError(f"--env {name}: {REMEDY}")
    sent = [*(f"--env {pair[0]}" for pair in environment.items() if WITH_PASSWORD.search(pair[1]))]
    sent += [name for name in PASSED if WITH_PASSWORD.search(os.environ.get(name, "")) and name not in environment]
    sent += [f"the argument {word.partition('=')[0]}" for word in arguments if WITH_PASSWORD.search(word)]
    if sent:
        raise ValueError(f"{sent[0]} holds a password: {REMEDY}. MLflow takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


class Wanted:
    """A stage with its arguments, parsed as the stage parses them."""

    def __init__(self, stage: str, arguments: list[str]) -> None:
        """Raises ValueError for a recipe that does not hold; ends as argparse does for an argument that the stage does not know."""
        from pipelines.places import places_in, places_of

        self.arguments = list(arguments)
        self.parser, self.args = parsed(stage, import_module(module_of(stage)), self.arguments)
        self.recipes: list[Recipe] = _recipes(stage, self.args)
        self.places: list[Place] = list(places_of(self.parser, self.args))
        for recipe in self.recipes:
            self.places += [place for place in places_in(recipe) if place not in self.places]

    def check(self, ship: bool) -> None:
        """Raises ValueError for a relative output, which goes with the job's folder, and for what only this machine can read."""
        from pipelines.parcel import upload_line

        for place in self.places:
            if not place.local or place.absolute:
                continue
            if place.written:
                raise ValueError(
                    f"{place.key}={place.given} is relative: a job's folder goes when it ends. Say {place.key}=/shared/... or "
                    f"{place.key}=s3://bucket/..."
                )
            if not ship:
                raise ValueError(
                    f"{place.key}={place.given} lies on this machine only. Upload it, {upload_line(place.path)}; or send it along by --ship"
                )

    def sent(self, ship: bool) -> list[Place]:
        """What goes along. An absolute path that is too large may be a folder that the nodes have too: it is looked for there."""
        from pipelines.parcel import MOST, size_of

        return [place for place in self._found() if ship and (not place.absolute or size_of(place.path) <= MOST)]

    def read_here(self, ship: bool = False) -> list[str]:
        """Absolute paths that the stage reads, that this machine has and that do not go along: the cluster may have them as well."""
        sent = self.sent(ship)
        return [str(place.path) for place in self._found() if place.absolute and place not in sent]

    def _found(self) -> list[Place]:
        """What the stage reads and this machine has."""
        return [place for place in self.places if place.local and not place.written and place.path.exists()]

    def packed(self, folder: Path, ship: bool, code: bool) -> Any:
        """The parcel for the job: code, own packages, own recipe, and with `ship` the files that are read."""
        from itm.kinds import packages_of
        from pipelines.parcel import Parcel, own_packages

        parcel = Parcel(folder, self.arguments)
        if code:
            parcel.add_code()
        named = {name for recipe in self.recipes for name in (*packages_of(recipe.model_dump(mode="json")), *recipe.allow)}
        for package in own_packages({*named, *getattr(self.args, "allow", [])}):
            parcel.add_package(package)
        given = getattr(self.args, "recipe", None)
        if isinstance(given, str) and (path := recipe_path(given).resolve()).parent != RECIPES:
            parcel.add_recipe(self.args, path)
        elif isinstance(given, str) and given not in (path.stem, path.name):  # a shipped one by its path here
            parcel.rename(given, path.stem)
        for place in self.sent(ship):
            parcel.ship(place, self.recipes)
        return parcel


def _recipes(stage: str, args: argparse.Namespace) -> list[Recipe]:
    from itm.config import load_recipe

    if stage == "demo":
        return [load_recipe(RECIPES / "demo.yaml", args.overrides)]
    return [recipe_from(args)] if isinstance(getattr(args, "recipe", None), str) else []


def on_this_machine(address: str) -> bool:
    """Whether all nodes of the cluster are this machine and see what lies here. A tunnel ends at localhost too, so nodes are asked."""
    import psutil
    from ray.util.state import list_nodes

    own = {one.address for addresses in psutil.net_if_addrs().values() for one in addresses}
    nodes = list_nodes(address=address, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
    return bool(nodes) and all(node.node_ip in own or node.node_ip.startswith("127.") for node in nodes)


def job_environment(address: str, same_machine: bool, read_here: Iterable[str] = ()) -> dict[str, str]:
    """What the job is told of this machine. Raises ValueError for a tracking database that a remote cluster cannot reach.

    Without MLFLOW_TRACKING_URI here, that of the cluster counts.
    """
    from itm.tracking.addresses import tracking_uri
    from itm.tracking.lineage import git_commit

    given = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if same_machine:
        given["MLFLOW_TRACKING_URI"] = tracking_uri()
    elif "MLFLOW_TRACKING_URI" in given and tracking_uri().startswith(("/", "file:", "sqlite:")):
        raise ValueError(
            f"MLFLOW_TRACKING_URI is {tracking_uri()}, a file of this machine; set it to a tracking server that {address} can reach, "
            "or leave it out where the cluster's nodes have it set"
        )
    told = {"MLFLOW_DISABLE_TELEMETRY": "true", "ITM_GIT_COMMIT": git_commit(), **given}
    if not same_machine:
        told |= {"ITM_SUBMITTED_FROM": socket.gethostname(), "ITM_READ_THERE": json.dumps(list(read_here))}
    return told


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
    code = 0 if info.status.value == "SUCCEEDED" else int(info.driver_exit_code or 1)
    told = info.status.value == "FAILED" and info.driver_exit_code is None  # else the stage has said in its log what was wrong
    print(f"job {job}: {info.status.value.lower()}" + (f"\n{info.message}" if told else ""), flush=True)
    return code


async def _tail(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    script(__file__)
