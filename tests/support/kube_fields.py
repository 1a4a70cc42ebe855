"""The fields that Kubernetes and KubeRay take, written from their types: a misspelt key is silently dropped by the server, refused here.

KubeRay: ray.io/v1 of the operator 1.6 (raycluster_types.go, rayjob_types.go, rayservice_types.go). Of Kubernetes (1.30: v1, apps/v1) what
manifests here use.
None = any scalar; ANY = anything; ... = free names whose values are scalars; [x] = a list of x.
"""

from __future__ import annotations

from typing import Any

ANY = object()

FROM: dict[str, Any] = {"secretKeyRef": {"name": None, "key": None}, "configMapKeyRef": {"name": None, "key": None}}
POD_SPEC: dict[str, Any] = {
    "serviceAccountName": None,
    "nodeSelector": ...,
    "securityContext": {"runAsNonRoot": None, "runAsUser": None, "runAsGroup": None, "fsGroup": None},
    "containers": [
        {
            "name": None,
            "image": None,
            "imagePullPolicy": None,
            "command": [None],
            "args": [None],
            "env": [
                {
                    "name": None,
                    "value": None,
                    "valueFrom": FROM,
                }
            ],
            "envFrom": [{"configMapRef": {"name": None}, "secretRef": {"name": None}}],
            "ports": [{"containerPort": None, "name": None}],
            "readinessProbe": {"exec": {"command": [None]}, "tcpSocket": {"port": None}, "periodSeconds": None},
            "resources": {"requests": ..., "limits": ...},
            "volumeMounts": [{"name": None, "mountPath": None, "readOnly": None}],
        }
    ],
    "volumes": [{"name": None, "emptyDir": {"medium": None, "sizeLimit": None}, "persistentVolumeClaim": {"claimName": None}}],
    "tolerations": [{"key": None, "operator": None, "value": None, "effect": None}],
    "affinity": ANY,
}
METADATA: dict[str, Any] = {"name": None, "namespace": None, "labels": ..., "annotations": ...}
POD: dict[str, Any] = {"metadata": METADATA, "spec": POD_SPEC}
RESOURCES = {"requests": ..., "limits": ...}
CLUSTER_SPEC: dict[str, Any] = {
    "rayVersion": None,
    "authOptions": {"mode": None},
    "enableInTreeAutoscaling": None,
    "autoscalerOptions": {
        "version": None,
        "idleTimeoutSeconds": None,
        "upscalingMode": None,
        "image": None,
        "imagePullPolicy": None,
        "resources": RESOURCES,
        "env": ANY,
        "envFrom": ANY,
        "volumeMounts": ANY,
        "securityContext": ANY,
    },
    "headServiceAnnotations": ...,
    "gcsFaultToleranceOptions": ANY,
    "managedBy": None,
    "suspend": None,
    "headGroupSpec": {
        "labels": ...,
        "resources": ...,
        "rayStartParams": ...,
        "serviceType": None,
        "headService": ANY,
        "enableIngress": None,
        "template": POD,
    },
    "workerGroupSpecs": [
        {
            "groupName": None,
            "replicas": None,
            "minReplicas": None,
            "maxReplicas": None,
            "idleTimeoutSeconds": None,
            "numOfHosts": None,
            "suspend": None,
            "scaleStrategy": {"workersToDelete": [None]},
            "labels": ...,
            "resources": ...,
            "rayStartParams": ...,
            "template": POD,
        }
    ],
}
JOB_SPEC: dict[str, Any] = {
    "submissionMode": None,
    "entrypoint": None,
    "entrypointNumCpus": None,
    "entrypointNumGpus": None,
    "entrypointResources": None,
    "runtimeEnvYAML": None,
    "jobId": None,
    "metadata": ...,
    "clusterSelector": ...,
    "managedBy": None,
    "shutdownAfterJobFinishes": None,
    "ttlSecondsAfterFinished": None,
    "activeDeadlineSeconds": None,
    "preRunningDeadlineSeconds": None,
    "backoffLimit": None,
    "submitterConfig": {"backoffLimit": None},
    "submitterPodTemplate": POD,
    "deletionStrategy": ANY,
    "suspend": None,
    "rayClusterSpec": CLUSTER_SPEC,
}
SERVICE_SPEC: dict[str, Any] = {
    "serveConfigV2": None,
    "rayClusterConfig": CLUSTER_SPEC,
    "serviceUnhealthySecondThreshold": None,
    "deploymentUnhealthySecondThreshold": None,
    "rayClusterDeletionDelaySeconds": None,
    "excludeHeadPodFromServeSvc": None,
    "serveService": ANY,
    "upgradeStrategy": ANY,
}
SELECTOR: dict[str, Any] = {"matchLabels": ...}
CLAIM: dict[str, Any] = {"metadata": METADATA, "spec": {"accessModes": [None], "storageClassName": None, "resources": {"requests": ...}}}
WHOLE: dict[str, dict[str, Any]] = {  # kind -> what stands beside apiVersion, kind and metadata
    "ConfigMap": {"data": ...},
    "Secret": {"type": None, "stringData": ..., "data": ...},
    "ServiceAccount": {},
    "Service": {"spec": {"type": None, "clusterIP": None, "selector": ..., "ports": [{"port": None, "targetPort": None, "name": None}]}},
    "Deployment": {"spec": {"replicas": None, "selector": SELECTOR, "template": POD}},
    "StatefulSet": {
        "spec": {"replicas": None, "serviceName": None, "selector": SELECTOR, "template": POD, "volumeClaimTemplates": [CLAIM]}
    },
    "RayCluster": {"spec": CLUSTER_SPEC},
    "RayJob": {"spec": JOB_SPEC},
    "RayService": {"spec": SERVICE_SPEC},
}
VERSIONS = {"Deployment": "apps/v1", "StatefulSet": "apps/v1", "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "RayService": "ray.io/v1"}


def problems_of(manifest: dict[str, Any]) -> list[str]:
    """What the server would drop or refuse in one object."""
    kind = manifest["kind"]
    known = {"apiVersion": None, "kind": None, "metadata": METADATA, **WHOLE[kind]}
    wanted = VERSIONS.get(kind, "v1")
    return unknown_keys(manifest, known) + [f"apiVersion should be {wanted}"] * (manifest["apiVersion"] != wanted)


def unknown_keys(value: Any, known: Any, where: str = "") -> list[str]:
    if known is ANY:
        return []
    if known is None:
        return [] if not isinstance(value, dict | list) else [f"{where} should be a scalar"]
    if known is ...:
        return [f"{where}.{k} should be a scalar" for k, v in value.items() if isinstance(v, dict | list)]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{where} should be a list"]
        return [problem for n, item in enumerate(value) for problem in unknown_keys(item, known[0], f"{where}[{n}]")]
    if not isinstance(value, dict):
        return [f"{where} should be a mapping"]
    wrong = [f"{where}.{key}" for key in value if key not in known]
    return wrong + [problem for key in value if key in known for problem in unknown_keys(value[key], known[key], f"{where}.{key}")]
