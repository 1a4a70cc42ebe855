"""The overlay for S3 and PostgreSQL, rendered by our own small merge (the program kustomize is not there), and the Dockerfile's lines."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.kube_fields import problems_of
from tests.support.kustomize import merged, rendered

CLUSTER = ROOT / "cluster"
OVERLAY = CLUSTER / "overlays" / "s3-postgres"


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(o["kind"], o["metadata"]["name"]): o for o in objects}


def containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every container of every pod of a rendered overlay."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(value.get("containers", []))
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(objects)
    return found


def test_the_merge_does_what_the_documents_of_kustomize_say(tmp_path: Path) -> None:
    below = {"a": {"x": 1, "y": 2}, "list": [1, 2], "named": [{"name": "p", "v": 1}, {"name": "q", "v": 2}]}
    above = {"a": {"y": None, "z": 3}, "list": [9], "named": [{"name": "q", "w": 5}, {"name": "r"}]}
    assert merged(below, above) == {
        "a": {"x": 1, "z": 3},
        "list": [9],
        "named": [{"name": "p", "v": 1}, {"name": "q", "v": 2, "w": 5}, {"name": "r"}],
    }
    (tmp_path / "kustomization.yaml").write_text("resources: []\nimages: []\n")
    with pytest.raises(ValueError, match="images"):
        rendered(tmp_path)


def test_the_base_is_the_standing_cluster_as_it_is_applied_without_kustomize() -> None:
    plain = [o for name in ("settings.yaml", "raycluster.yaml") for o in yaml.safe_load_all((CLUSTER / name).read_text())]
    assert rendered(CLUSTER) == plain


def test_every_object_of_the_overlay_has_only_fields_that_its_kind_knows() -> None:
    objects = rendered(OVERLAY)
    assert {f"{o['kind']}/{o['metadata']['name']}": problems for o in objects if (problems := problems_of(o))} == {}
    assert len(by_name(objects)) == len(objects), "no object is there twice"
    objects[-1]["spec"]["replica"] = 1
    assert problems_of(objects[-1]) == [".spec.replica"]


def test_the_overlay_leaves_no_key_in_the_cluster_and_no_endpoint_that_is_not_there() -> None:
    objects = by_name(rendered(OVERLAY))
    settings = objects["ConfigMap", "itm-settings"]["data"]
    assert "AWS_ENDPOINT_URL" not in settings and settings["AWS_REGION"]
    assert not [name for name in objects["Secret", "itm-storage"]["stringData"] if name.startswith("AWS_")]
    spec = objects["RayCluster", "itm"]["spec"]
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    pods += [objects["Deployment", "mlflow"]["spec"]["template"]["spec"]]
    assert {pod["serviceAccountName"] for pod in pods} == {"itm"} and ("ServiceAccount", "itm") in objects
    text = OVERLAY.joinpath("tracking.yaml").read_text()
    assert not re.search(r"(?i)password: *[\"']?\w", text), "the password comes from a secret that nobody commits"


def test_names_that_one_object_of_the_overlay_says_of_another_are_there() -> None:
    objects = by_name(rendered(OVERLAY))
    names = {"ConfigMap": set[str](), "Secret": {"itm-database"}}  # made by hand, as the comment says
    for kind, name in objects:
        names.setdefault(kind, set()).add(name)
    for container in containers(list(objects.values())):
        for source in container.get("envFrom", []):
            ((how, where),) = source.items()
            assert where["name"] in names[{"configMapRef": "ConfigMap", "secretRef": "Secret"}[how]]
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                assert variable["valueFrom"]["secretKeyRef"]["name"] in names["Secret"]
    settings = objects["ConfigMap", "itm-settings"]["data"]
    host, port = re.fullmatch(r"http://([\w-]+):(\d+)", settings["MLFLOW_TRACKING_URI"]).groups()  # type: ignore[union-attr]
    assert objects["Service", host]["spec"]["ports"][0]["port"] == int(port)
    for kind, name in (("StatefulSet", "database"), ("Deployment", "mlflow")):
        labels = objects[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert objects[kind, name]["spec"]["selector"]["matchLabels"] == labels == objects["Service", name]["spec"]["selector"]
    variables = [one for container in containers(list(objects.values())) for one in container.get("env", [])]
    (database,) = [one["value"] for one in variables if one["name"] == "MLFLOW_BACKEND_STORE_URI"]
    assert ("Service", database.rpartition("@")[2].partition("/")[0]) in objects
    assert f"itm-mlflow:{version('mlflow')}" in OVERLAY.joinpath("tracking.yaml").read_text()


# --- the image --------------------------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_has_its_base_by_argument_ends_as_a_user_that_is_not_root_and_takes_wheels_of_the_constraints() -> None:
    said = instructions()
    assert said[0][0] == "ARG" and said[0][1].startswith("BASE=") and said[1] == ("FROM", "${BASE}")
    users = [rest for word, rest in said if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:\d+", users[-1]), "by numbers: Kubernetes checks runAsNonRoot by them"
    installs = [part for word, rest in said if word == "RUN" for part in re.split(r"&&|;", rest) if "pip install" in part]
    assert installs and all("-c constraints.txt" in part for part in installs)
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("torch==") and "+" not in line for line in pinned), "with a local version there would be no CUDA wheel"
    assert 'torch --index-url "${TORCH_INDEX}"' in " ".join(installs)


def test_the_shell_lines_of_the_image_and_of_the_batch_script_are_shell() -> None:
    for line in [rest for word, rest in instructions() if word == "RUN"]:
        assert subprocess.run(["sh", "-n", "-c", line], check=False).returncode == 0
        assert shlex.split(line)
    assert subprocess.run(["bash", "-n", str(CLUSTER / "slurm" / "itm.sbatch")], check=False).returncode == 0
