"""All that was measured on the matcher of a run: one result for each split, protocol and way of scoring, under a name of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from itm.data import files
from itm.data.formats import Json, read_json
from pipelines.evaluating import FORMAT, group_of

RESULT = re.compile(r"evaluation[\w.@+-]*\.json")


def measured(folder: str) -> dict[str, Json]:
    """Name -> result of every evaluation*.json in a run's folder that is of the weights of evaluation.json, which comes first.

    The name is that of MLflow, <split>/<protocol>; a second file of the same two, as a screened one, has what its own name adds behind it.
    Nothing where there is no evaluation.json.
    """
    main = files.join(folder, "evaluation.json")
    if not files.exists(main):
        return {}
    first = read_json(main, FORMAT)
    found = {group_of(first): first}
    for uri in sorted(files.list_files(folder, ".json")):
        name = files.name_of(uri)
        if name == "evaluation.json" or not RESULT.fullmatch(name):
            continue
        result = read_json(uri, FORMAT)
        if result.get("matcher_hash") == first.get("matcher_hash") and "protocol_name" in result:
            group = group_of(result)
            found[group if group not in found else f"{group} ({name.removesuffix('.json')})"] = result
    return found


def answers_of(output: str) -> str:
    """Where the answers to all queries lie that a result counts (`itm.report.answers`): answers*.json beside its evaluation*.json."""
    folder, slash, name = output.rpartition("/")
    return folder + slash + (name.replace("evaluation", "answers", 1) if "evaluation" in name else f"answers-{name}")


def figures_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Name -> metrics."""
    return {name: {metric: float(value) for metric, value in result["metrics"].items()} for name, result in results.items()}
