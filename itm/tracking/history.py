"""What a tracking server knows of a run that its folder does not: how validation went, and which registered versions came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from itm.tracking.runs import client

RELATED = ("isda_sum", "isda_mean")
CURVES = ("rsum", "t2i_r1", "i2t_r1", *(f"isd_{anchor}_{kind}" for anchor in ("L", "V") for kind in ("singular", "distributed")), *RELATED)


@dataclass(frozen=True)
class History:
    """validations: rows of `step` and the metrics of `CURVES`, by step; versions: e.g. `itm-matcher version 3 (champion)`."""

    validations: list[dict[str, float]] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


def history_of(run_id: str) -> History | None:
    """None where the server at the current tracking address does not know the run, or does not answer."""
    door = client()
    try:
        known = door.get_run(run_id).data.metrics
        rows: dict[int, dict[str, float]] = {}
        for name in CURVES:
            for logged in (full for full in (f"val_{name}", f"val/{name}") if full in known):
                for point in door.get_metric_history(run_id, logged):  # a step that was taken twice counts as it was taken last
                    rows.setdefault(point.step, {"step": point.step})[name] = point.value
        return History([rows[step] for step in sorted(rows)], _versions(door, run_id))
    except MlflowException:
        return None


def _versions(door: MlflowClient, run_id: str) -> list[str]:
    found = []
    for version in sorted(door.search_model_versions(f"run_id='{run_id}'"), key=lambda v: (v.name, int(v.version))):
        aliases = door.get_registered_model(version.name).aliases
        named = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
        found.append(f"{version.name} version {version.version}" + (f" ({', '.join(named)})" if named else ""))
    return found
