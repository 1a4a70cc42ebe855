"""Questions to the model registry: versions with aliases, figures beside chance, data, teachers, code.

    itm models                                     # all of them
    itm models itm-matcher                         # one, the newest version first
    itm models show itm-matcher@champion           # one version; --recipe prints the recipe it was trained with
    itm models diff itm-matcher@champion itm-matcher/3
    itm models promote itm-matcher/3               # past the gate of `itm register`, by hand
    itm models rollback itm-matcher                # champion and previous change places
    itm models --data data/shards/train            # which models came from this data (a folder of shards, or a fingerprint)
    itm models --teacher minilm-0a1b2c3d           # or from this store of teacher vectors (its folder, or its id)
    itm models --runs itm                          # the newest runs of an experiment, dead ones told apart

A version is name@alias, name/3, either after models:/, or a bare name: its champion, else its newest. --json prints what other programs
read. The registry is that of MLFLOW_TRACKING_URI, else mlflow.db in the working directory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.cli import script

if TYPE_CHECKING:
    from itm.tracking.lookup import Version

SHOWN = ("rsum", "i2t_r1", "t2i_r1")
ACTIONS = {"show": 1, "diff": 2, "promote": 1, "rollback": 1}  # and how many names each takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="[show|diff|promote|rollback] NAME", help="a model, or what to do with which")
    parser.add_argument("--recipe", action="store_true", help="show: print the recipe of the training, as YAML")
    parser.add_argument(
        "--data", metavar="SHARDS", help="only versions trained or tested on this data: a folder of shards or a fingerprint"
    )
    parser.add_argument("--teacher", metavar="STORE", help="only versions whose training read this teacher store: its folder or its id")
    parser.add_argument("--runs", metavar="EXPERIMENT", help="list the newest runs of an experiment instead")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    said, text = _answer(args)
    print(json.dumps(said, indent=1) if args.json else text)


def _answer(args: argparse.Namespace) -> tuple[Any, str]:
    """What to print, as data and as text."""
    from itm.tracking import lookup, registry
    from itm.tracking.addresses import check_alive

    check_alive()
    if args.runs:
        rows = lookup.runs(args.runs)
        return rows, "\n".join(map(_run_line, rows)) or f"experiment {args.runs} has no run"
    action, *names = args.words if args.words and args.words[0] in ACTIONS else ("list", *args.words)
    if action == "list":
        return _listed(names, args)
    if len(names) != ACTIONS[action]:
        raise ValueError(f"itm models {action} takes {ACTIONS[action]} name{'s' * (ACTIONS[action] > 1)}, e.g. itm-matcher@champion")
    if action == "rollback":
        return _done(registry.rollback(names[0].removeprefix("models:/").partition("@")[0]))
    chosen = [lookup.version_of(name) for name in names]
    if action == "promote":
        return _done(registry.crown(chosen[0].name, chosen[0].version))
    if action == "diff":
        told = lookup.difference(*chosen)
        return told, difference_text(told)
    return _shown(chosen[0], lookup.recipe_of(chosen[0]), args.recipe)


def _done(said: str) -> tuple[Any, str]:
    return {"done": said}, said


def _listed(names: Sequence[str], args: argparse.Namespace) -> tuple[Any, str]:
    from itm.tracking import lookup

    if len(names) > 1:
        raise ValueError(f"one model at a time, not {' '.join(names)}; two are compared by `itm models diff {' '.join(names[:2])}`")
    found = lookup.versions(names[0].removeprefix("models:/") if names else None)
    for given, asked in ((args.data, came_from_data), (args.teacher, came_from_teacher)):
        if given:
            wanted = asked(given)
            found = [version for version in found if wanted(version)]
    return [version.plain() for version in found], "\n\n".join(map(described, found)) or "no version; `itm register` adds one"


def came_from_data(given: str) -> Callable[[Version], bool]:
    """Whether a version was trained or tested on data: a split, a folder of splits, or a manifest's fingerprint."""
    from itm.data import files
    from itm.data.manifest import NAME
    from itm.data.shards import read_manifest

    prints = [given]
    if files.is_remote(given) or files.exists(given):
        folders = [folder for folder in (given, *files.list_folders(given)) if files.exists(files.join(folder, NAME))]
        if not folders:
            raise ValueError(f"{given} holds no {NAME}: name a folder of packed shards, or the fingerprint that `itm inspect` shows")
        prints = [read_manifest(folder).fingerprint() for folder in folders]
    return lambda version: bool(set(prints) & {word.strip(",") for text in version.data.values() for word in text.split()})


def came_from_teacher(given: str) -> Callable[[Version], bool]:
    from itm.data import files

    return lambda version: files.name_of(given) in version.teachers


def described(version: Version) -> str:
    """A version in a few lines."""
    tags, metrics, chance = version.tags, version.metrics, version.chance
    shown = [name for name in SHOWN if name in metrics] or list(metrics)[:3]
    lines = [
        f"{version.name} {version.version}  {', '.join(version.aliases) or '-'}  {version.created}  {tags.get('recipe_name', '')}".rstrip(),
        "  " + ", ".join(f"{name} {_number(metrics[name])} (chance {_number(chance.get(name))})" for name in shown),
        f"  trained on {version.data['train'] or '-'}, tested on {version.data['test'] or '-'}",
        f"  teachers {', '.join(version.teachers) or 'none'}, code {tags.get('git_commit') or '-'}",
    ]
    return "\n".join(line for line in lines if line.strip())


def _shown(version: Version, recipe: dict[str, Any], only_recipe: bool) -> tuple[Any, str]:
    import yaml

    if only_recipe:
        if not recipe:
            raise ValueError(f"the run of {version.uri} ({version.run_id or 'none'}) kept no recipe, or is no longer in this store")
        return recipe, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    width = max(map(len, version.metrics), default=0)
    rows = [
        f"  {name:<{width}}  {_number(value):>10}  chance {_number(version.chance.get(name))}" for name, value in version.metrics.items()
    ]
    rows += [f"  {group}: " + ", ".join(f"{name} {_number(v)}" for name, v in found.items()) for group, found in version.others.items()]
    ends = [f"  run {version.run_id or '-'}, licence {version.tags.get('licence') or 'not stated'}", *rows]
    return version.plain() | {"recipe_choices": recipe}, "\n".join([described(version), *ends])


def difference_text(told: dict[str, Any]) -> str:
    first, second = told["versions"]
    lines = [f"{first} -> {second}", "recipe:" if told["recipe"] else "recipe: the same"]
    lines += [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in told["recipe"].items()]
    lines.append("data:" if told["data"] else "data: the same")
    lines += [f"  {name}: {old or '-'} -> {new or '-'}" for name, (old, new) in told["data"].items()]
    lines.append(
        "metrics:" + "" * told["comparable"] + " (of other test data or protocols: they do not compare)" * (not told["comparable"])
    )
    width = max(map(len, told["metrics"]), default=0)
    for name, (old, new, chance) in told["metrics"].items():
        gain = f"{new - old:+.4g}" if None not in (old, new) else ""
        lines.append(f"  {name:<{width}}  {_number(old):>10} -> {_number(new):>10}  {gain:>9}  chance {_number(chance)}".rstrip())
    return "\n".join(lines)


def _run_line(row: dict[str, Any]) -> str:
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f} s"
    return f"{row['started']}  {row['status']:<10}{seconds:>9}  {row['stage'] or '-':<7}{row['name']}  {row['run_id']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


if __name__ == "__main__":
    script(__file__)
