"""What `kubectl apply -k` would send, for the few things that the overlays of cluster/ use: resources, strategic merges, JSON patches.

Written from the documents of kustomize v5, since its program cannot be had in tests. What is not known here is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

KEYS = {"apiVersion", "kind", "resources", "patches"}
Object = dict[str, Any]


def rendered(folder: Path) -> list[Object]:
    """All objects of a kustomization. Raises ValueError for a key, a patch or a target that this merge does not know."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(said) - KEYS:
        raise ValueError(f"{folder}: {sorted(unknown)} are not known to this merge")
    objects: list[Object] = []
    for name in said["resources"]:
        path = (folder / name).resolve()
        if path.is_file() and path.parent != folder.resolve():
            raise ValueError(f"{name} lies outside of {folder}: kustomize refuses that")
        objects += rendered(path) if path.is_dir() else [o for o in yaml.safe_load_all(path.read_text()) if o]
    for patch in said.get("patches", []):
        objects = _patched(objects, patch, folder)
    return objects


def _patched(objects: list[Object], patch: Object, folder: Path) -> list[Object]:
    content = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
    target = patch.get("target") or {"kind": content["kind"], "name": content["metadata"]["name"]}
    hits = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (target["kind"], target["name"])]
    if len(hits) != 1:
        raise ValueError(f"{patch} fits {len(hits)} objects")
    changed = _operated(hits[0], content) if isinstance(content, list) else merged(hits[0], content)
    return [changed if o is hits[0] else o for o in objects]


def merged(below: Any, above: Any) -> Any:
    """Strategic merge: mappings by key, null deletes, lists of named things by name, other lists are replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {k: merged(below.get(k), v) for k, v in above.items() if v is not None}
        return {k: v for k, v in below.items() if k not in above} | both
    if isinstance(below, list) and isinstance(above, list) and all(isinstance(x, dict) and "name" in x for x in below + above):
        by_name = {x["name"]: x for x in below}
        return list((by_name | {x["name"]: merged(by_name.get(x["name"]), x) for x in above}).values())
    return copy.deepcopy(above)


def _operated(target: Object, operations: list[Object]) -> Object:
    """JSON patch (RFC 6902): add, replace and remove."""
    whole = copy.deepcopy(target)
    for operation in operations:
        *way, last = operation["path"].lstrip("/").split("/")
        inner: Any = whole
        for name in way:
            inner = inner[int(name)] if isinstance(inner, list) else inner[name]
        if operation["op"] != "add" and last not in inner:
            raise ValueError(f"{operation['path']} is not there")
        if operation["op"] == "remove":
            del inner[last]
        elif operation["op"] in ("add", "replace"):
            inner[last] = operation["value"]
        else:
            raise ValueError(f"operation {operation['op']!r} is not known to this merge")
    return whole
