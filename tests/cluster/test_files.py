"""The cluster files against the schemas of what reads them. KubeRay's own schema accepts unknown keys; the fields stand in kube_fields."""

from __future__ import annotations

import ast
import re
import shlex
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from pipelines.cli import RECIPES, STAGES
from tests.support import ROOT
from tests.support.kube_fields import CLUSTER_SPEC, JOB_SPEC, SERVICE_SPEC, unknown_keys

CLUSTER = ROOT / "cluster"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_specs() -> list[dict[str, Any]]:
    return [manifest("raycluster.yaml")["spec"], manifest("rayjob.yaml")["spec"]["rayClusterSpec"]]


def all_specs() -> list[dict[str, Any]]:
    return [*cluster_specs(), manifest("rayservice.yaml")["spec"]["rayClusterConfig"]]


def test_the_walk_finds_a_misspelt_key_at_any_depth():
    spec = cluster_specs()[0]
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert unknown_keys(spec, CLUSTER_SPEC) == [".workerGroupSpecs[0].template.spec.containers[0].imagee"]


MANIFESTS = [
    ("raycluster.yaml", "RayCluster", CLUSTER_SPEC),
    ("rayjob.yaml", "RayJob", JOB_SPEC),
    ("rayservice.yaml", "RayService", SERVICE_SPEC),
]


@pytest.mark.parametrize(("name", "kind", "known"), MANIFESTS)
def test_a_kuberay_manifest_has_only_fields_that_kuberay_knows(name: str, kind: str, known: dict[str, Any]):
    document = manifest(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert unknown_keys(document["spec"], known) == []


def test_the_head_promises_the_gpus_to_which_the_groups_can_grow():
    for spec in all_specs():
        containers = [(group["maxReplicas"], group["template"]["spec"]["containers"][0]) for group in spec["workerGroupSpecs"]]
        most = sum(count * int(container["resources"]["requests"].get("nvidia.com/gpu", 0)) for count, container in containers)
        assert spec["headGroupSpec"]["labels"] == {"itm/gpus": str(most)}


def test_job_and_standing_cluster_are_the_same_cluster():
    standing, of_job = cluster_specs()
    assert standing == of_job


def test_a_cluster_runs_the_pinned_ray_with_authentication_and_no_work_on_the_head():
    for spec in all_specs():
        assert spec["rayVersion"] == version("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert f"rayproject/ray:{version('ray')}-py311\n" in (CLUSTER / "Dockerfile").read_text()


def test_every_pod_mounts_its_object_store_in_memory_and_reads_settings_that_exist():
    settings = {document["metadata"]["name"] for document in yaml.safe_load_all((CLUSTER / "settings.yaml").read_text())}
    for spec in all_specs():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            memory = {v["name"] for v in pod["volumes"] if v["emptyDir"]["medium"] == "Memory"}
            for container in pod["containers"]:
                assert any(m["mountPath"] == "/dev/shm" and m["name"] in memory for m in container["volumeMounts"])
                assert container["resources"]["requests"] == container["resources"]["limits"]
                assert {next(iter(source.values()))["name"] for source in container["envFrom"]} == settings


def test_gpu_pods_ask_for_a_gpu_have_its_image_and_shared_memory_for_ray_and_nccl():
    sizes = {"Gi": 1.0, "Mi": 1 / 1024}
    for spec in cluster_specs():
        pods = [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
        (gpu,) = [pod for pod in pods if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]]
        (container,), (shm,) = gpu["containers"], [v["emptyDir"]["sizeLimit"] for v in gpu["volumes"]]
        assert container["image"].endswith("-gpu")
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        assert int(container["resources"]["limits"]["cpu"]) >= 4, "one core trains, the others decode for it"
        assert [t["key"] for t in gpu["tolerations"]] == ["nvidia.com/gpu"]
        memory = container["resources"]["limits"]["memory"]
        assert float(shm[:-2]) * sizes[shm[-2:]] >= 0.3 * float(memory[:-2]) * sizes[memory[-2:]]
    assert "EXTRAS=all,gpu" in (CLUSTER / "Dockerfile").read_text()


def test_the_settings_that_are_commented_out_are_settings():
    text = (CLUSTER / "settings.yaml").read_text()
    switched_on = re.sub(r"^  # ([A-Z_]+: )", r"  \1", text, flags=re.MULTILINE)
    before, after = (next(yaml.safe_load_all(t))["data"] for t in (text, switched_on))
    added = {name: value for name, value in after.items() if name not in before}
    assert {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"} <= set(added)
    assert all(isinstance(value, str) for value in added.values()), "a ConfigMap holds strings"
    assert all(name.startswith(("NCCL_", "TORCH_")) for name in added)


def test_the_entry_point_of_the_job_is_a_stage_with_a_shipped_recipe_and_shared_places():
    words = shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert words[2].removeprefix("pipelines.") in STAGES
    assert (RECIPES / f"{words[words.index('-c') + 1]}.yaml").exists()
    places = dict(word.split("=", 1) for word in words if "=" in word)
    assert all("://" in places[key] for key in ("data.root", "output"))


@pytest.mark.filterwarnings("ignore")
def test_the_launcher_file_passes_the_schema_of_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text()))
    validate_config(config)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any("ray start" in c and "RAY_AUTH_MODE=token" in c for c in commands)


def test_the_launcher_schema_rejects_a_misspelt_key():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    config["setup_comands"] = []
    config = prepare_config(config)
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(config)


def test_the_image_copies_what_exists_and_both_packages():
    copied = {
        word
        for line in (CLUSTER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert {"itm", "pipelines", "constraints.txt"} <= copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_tracking_server_of_compose_is_the_pinned_mlflow():
    services = yaml.safe_load((ROOT / "mlflow" / "compose.yaml").read_text())["services"]
    assert set(services) == {"database", "objects", "bucket", "mlflow"}
    assert f"mlflow=={version('mlflow')} " in (ROOT / "mlflow" / "Dockerfile").read_text()
    variables = {line.partition("=")[0] for line in (ROOT / "mlflow" / "example.env").read_text().splitlines() if "=" in line}
    required = set(re.findall(r"\$\{(\w+):\?", (ROOT / "mlflow" / "compose.yaml").read_text()))
    assert required <= variables


def test_the_python_in_the_documents_is_python():
    for line in (ROOT / "docs" / "registry-and-serving.md").read_text().splitlines():
        if found := re.search(r'python -c "(.+)"$', line):
            ast.parse(found.group(1))


def test_the_service_is_what_ray_serve_reads_and_asks_for_a_token():
    from ray.serve.schema import ServeDeploySchema

    from pipelines.serving.app import Settings, application

    said = ServeDeploySchema.model_validate(yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"]))
    (app,) = said.applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    settings = Settings.of(app.args)
    assert settings.auth and settings.replicas == 2 and settings.places[0].model == "models:/itm-matcher@champion"
    secrets = [d for d in yaml.safe_load_all((CLUSTER / "settings.yaml").read_text()) if d["kind"] == "Secret"]
    assert len(secrets[0]["stringData"]["ITM_TOKEN"]) >= 16
