"""What `itm evaluate` writes: under which name, with which identity, and how it is shown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from itm.config import Recipe
from itm.data import files
from itm.data.formats import Json, check_format
from itm.evaluation.dataset import Names
from itm.evaluation.protocols import Outcome, Scored
from itm.report.gallery import Example, examples, histogram
from itm.report.neighbours import Query, neighbours
from itm.report.ranks import ranks_and_worst
from pipelines.evaluating import FORMAT, group_of


def table(result: Json) -> str:
    """The metrics both ways, with chance, readable in a terminal."""
    metrics, chance = result["metrics"], result["chance"]
    ways = [way for way in ("i2t", "t2i", "i2i", "t2t") if any(n.startswith(f"{way}_") for n in metrics)]
    names = list(dict.fromkeys(n.partition("_")[2] for n in metrics if n.startswith(tuple(f"{way}_" for way in ways))))
    lines = [result["protocol"], "  ".join(f"{key} {value:,}" for key, value in result["counts"].items()), ""]
    lines.append(f"{'':<18}" + "".join(f"{way:>12}{'chance':>12}" for way in ways))
    for name in names:
        cells = (f"{_number(metrics.get(f'{way}_{name}')):>12}{_number(chance.get(f'{way}_{name}')):>12}" for way in ways)
        lines.append(f"{name:<18}" + "".join(cells))
    for name in metrics:
        if name == "rsum" or not ways:
            lines.append(f"{name:<18}{_number(metrics[name]):>12}{_number(chance.get(name)):>12}")
    return "\n".join(lines)


def flow_line(result: Json) -> str | None:
    """Images and captions in, scored and rejected; None for a result that does not say (a score file)."""
    if "captions_in" not in result:
        return None
    copies = f" ({result['copies']:,} of them copies of an image)" if "copies" in result else ""
    return (
        f"{result['rows_in']:,} images = {result['rows_out']:,} scored{copies} + {result['rows_rejected']:,} rejected, "
        f"{result['captions_in']:,} captions = {result['captions_out']:,} scored + {result['captions_rejected']:,} rejected"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def content(outcome: Outcome, scored: Scored, score_type: str) -> Json:
    names = scored.names
    ranks, worst = ranks_and_worst(scored)
    return {
        "protocol": outcome.protocol,
        "score_type": score_type,
        "metrics": outcome.metrics,
        "chance": outcome.chance,
        "counts": outcome.counts,
        "examples": _all_named(examples(scored), names),
        "worst": _all_named(worst, names),
        "ranks": ranks,
        "histogram": histogram(scored),
        "similar": {way: [_near(row, names, way) for row in rows] for way, rows in neighbours(scored).items()},
    }


def _all_named(found: dict[str, list[Example]], names: Names) -> Json:
    return {way: [_named(row, names, way) for row in rows] for way, rows in found.items()}


def _named(row: Example, names: Names, way: str) -> Json:
    """An example with keys and texts in place of row numbers."""
    asked, found = (_image, _caption) if way == "i2t" else (_caption, _image)
    hits = [{**hit, **found(names, hit["row"])} for hit in row["hits"]]
    answer = {**row["answer"], **found(names, row["answer"]["row"])}
    return {**row, **asked(names, row["query"]), "hits": hits, "answer": answer}


def _near(row: Query, names: Names, way: str) -> Json:
    """A query within one side, as `_named`."""
    named = _image if way == "i2i" else _caption
    return {**named(names, row["query"]), "hits": [{**hit, **named(names, hit["row"])} for hit in row["hits"]]}


def _image(names: Names, row: int) -> Json:
    return {"image": names.image_keys[row], "shard": names.image_shards[row] if names.image_shards else None}


def _caption(names: Names, row: int) -> Json:
    return {"caption": names.caption_ids[row], "text": names.texts[row] if names.texts else names.caption_ids[row]}


def output_of(recipe: Recipe, matchers: Sequence[str], split: str, protocol: str, pairs: Sequence[str] = ()) -> str:
    """`evaluation.json` for what the recipe says; another split, protocol, matcher or list of files of pairs gets a name of its own.

    A matcher is named by the last words of its folder and a digest of its whole name, an ensemble by all its members.
    """
    words = ["evaluation"] + [split] * (split != recipe.data.test_split)
    words += [re.sub(r"[^\w.-]", "-", protocol)] * (protocol != recipe.evaluation.protocol)
    words += [re.sub(r"\W+", "_", files.name_of(uri).partition(".")[0])[:40] for uri in pairs]
    if len(matchers) > 1:
        words += [re.sub(r"\W+", "_", uri.removesuffix("/matcher").rsplit("/", 1)[-1])[:40] for uri in matchers]
    if matchers:
        words.append(hashlib.sha256(" ".join(matchers).encode()).hexdigest()[:8])
    return files.join(recipe.folder, "-".join(words) + ".json")


def stored(output: str, identity: Json) -> Json | None:
    """The result at `output` if it is of this identity. Raises NewerFormat, so that nothing of a later version is replaced."""
    if not files.exists(output):
        return None
    result: Json = json.loads(files.read_bytes(output))
    check_format(output, result, FORMAT)
    return result if all(result.get(key) == value for key, value in identity.items()) else None


def check_track(recipe: Recipe) -> None:
    """Before the work: raises DeadTracking where `track` would wait for a server, and says where it has no run to write to."""
    if files.exists(files.join(recipe.folder, "run.json")):
        from itm.tracking.runs import run_to_log

        run_to_log(recipe.folder)


def track(recipe: Recipe, result: Json, output: str) -> None:
    """Metrics, as <split>/<protocol>/<name>, and file into the MLflow run of the training, where there is one."""
    if not files.exists(files.join(recipe.folder, "run.json")):
        return
    from itm.tracking.loggers import loggers_of
    from itm.tracking.runs import Tracker, run_to_log

    if (run_id := run_to_log(recipe.folder, quiet=True)) is None:
        return
    group = group_of(result)
    with Tracker.resume(run_id, loggers=loggers_of(recipe, run_id)) as tracker:
        flow = {name: result[name] for name in ("rows_in", "rows_out", "rows_rejected") if name in result}
        tracker.metrics({f"{group}/{name}": value for name, value in (result["metrics"] | flow).items()})
        tracker.tags({f"{group}/protocol": result["protocol"], f"{group}/split_hash": result["split_hash"]})
        with files.local_copy(output) as written:
            tracker.artifact(written)
