"""The whole pipeline on embedded defaults, small enough for two cores and six minutes:

    scenes (equivalence world) -> pack -> teach -> train three times -> evaluate -> register the best -> search -> report

The three runs differ in one thing each: contrastive only; + CUSA soft labels; + CUSA with a *shuffled* teacher. The last is the control:
soft labels that do not belong to their pairs must not help, or the gain would be smoothing and not meaning.

    itm demo                       # writes below runs/demo
    itm demo train.steps=100       # overrides reach all three recipes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from itm.config import Recipe, load_recipe
from pipelines.cli import RECIPES, script

RUNS = ("demo", "demo-cusa", "demo-cusa-shuffled")
QUESTION = "a red circle to the left of a blue square"
COLUMNS = (
    ("rSum", "rsum", "{:.1f}"),
    ("semantic R@1 t2i", "t2i_semantic_r1", "{:.1f}"),
    ("semantic R@1 i2t", "i2t_semantic_r1", "{:.1f}"),
    ("mAP@R t2i", "t2i_map_at_r", "{:.3f}"),
    ("mAP@R i2t", "i2t_map_at_r", "{:.3f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all three recipes, e.g. train.steps=100 seed=1")


def run(args: argparse.Namespace) -> int:
    from pipelines import evaluate, pack, register, report, search, teach, train
    from pipelines.on_ray.session import connect

    recipes = [load_recipe(RECIPES / f"{name}.yaml", args.overrides) for name in RUNS]
    clock = Clock()
    clock("start Ray", connect)
    clock("pack", lambda: pack.pack(recipes[0]))
    for recipe in recipes[1:]:
        clock(f"teach {recipe.name}", partial(teach.teach, recipe))
    results = []
    for recipe in recipes:
        clock(f"train {recipe.name}", partial(train.train, recipe))
        results.append(clock(f"evaluate {recipe.name}", partial(evaluate.evaluate, recipe)))
    best = max(range(len(recipes)), key=lambda k: results[k]["metrics"][recipes[k].registry.metric])
    version = clock("register", lambda: register.register(recipes[best]))
    model = f"models:/{recipes[best].registry.model}@champion"
    shards = f"{recipes[0].data.root}/{recipes[0].data.test_split}"
    hits = clock("search", lambda: search.search(QUESTION, model=model, shards=shards, k=3))
    page = clock("report", lambda: report.report(recipes[best], compare=[r.folder for r in recipes]))
    print(summary(recipes, results))
    print(verdict(results))
    print(f"\n{hits}")
    print(clock)
    print(next_steps(recipes[best], version, Path(page), shards))
    return 0


class Clock:
    """Announces each stage, times it and keeps the table."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        print(f"\n--- {stage}", flush=True)
        start = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - start
        return result

    def __str__(self) -> str:
        lines = [f"  {stage:<32}{seconds:7.1f} s" for stage, seconds in self.seconds.items()]
        return "\nseconds\n" + "\n".join(lines) + f"\n  {'in all':<32}{sum(self.seconds.values()):7.1f} s"


def summary(recipes: list[Recipe], results: list[dict[str, Any]]) -> str:
    """The table of the three runs, with the chance level of the same gallery."""
    named = {recipe.name: result["metrics"] for recipe, result in zip(recipes, results, strict=True)} | {"chance": results[0]["chance"]}
    head = f"{'run':<20}" + "".join(f"{title:>18}" for title, _, _ in COLUMNS)
    lines = [f"{name:<20}" + "".join(f"{form.format(metrics[key]):>18}" for _, key, form in COLUMNS) for name, metrics in named.items()]
    return "\n".join(["", head, "-" * len(head), *lines])


def verdict(results: list[dict[str, Any]]) -> str:
    """What the three runs say about soft labels: gains of CUSA in mAP@R, against the base and against the control."""
    base, cusa, shuffled = ([result["metrics"][f"{way}_map_at_r"] for way in ("t2i", "i2t")] for result in results)
    gains = [tuple(ours - theirs for ours, theirs in zip(cusa, others, strict=True)) for others in (base, shuffled)]
    expected = all(gain >= least for pair, least in zip(gains, (0.03, 0.06), strict=True) for gain in pair)
    said = "meaning, not smoothing" if expected else "not the expected order (>= +.03 and >= +.06): too few steps, or a broken teacher join"
    over = "; ".join(
        f"over {name} {pair[0]:+.3f} t2i, {pair[1]:+.3f} i2t" for name, pair in zip(("contrastive", "shuffled"), gains, strict=True)
    )
    return f"\nCUSA in mAP@R: {over}: {said}"


def next_steps(recipe: Recipe, version: Any, page: Path, shards: str) -> str:
    model = f"models:/{recipe.registry.model}@champion"
    return f"""
report   {page.absolute()}
model    {model} (version {version.version})

Try next:
  itm search "two green stars" --model {model} --shards {shards}
  itm inspect {shards}
  itm verify -c demo-cusa
  itm evaluate -c {recipe.name} --split val
  mlflow ui --backend-store-uri sqlite:///mlflow.db     # runs, curves, registry
  itm recipes                                          # the published results, one recipe each"""


if __name__ == "__main__":
    script(__file__)
