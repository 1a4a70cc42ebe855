"""`python -m tests.support.uarda_thresholds`: what another threshold of evaluation does to a UARDA that learnt scenes.

R@K, pruned share and time.

The matcher is the one of `tests.support.learning` (uarda, base, a seed), trained if it is not there. Each threshold is what
`itm evaluate --eval-threshold T` sets; times are medians of CPU seconds of scoring all pairs of the test split, one thread, with and
without pruning in turns. Prints the table of docs/methods/uarda.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.learning import learn, recipe_of

THRESHOLDS: tuple[Any, ...] = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, "t_safe", "t")


def rows(output: str, seed: int, rounds: int) -> list[str]:
    import itm
    from itm.data import files
    from itm.data.shards import read_manifest
    from itm.evaluation.dataset import exact_relevance
    from itm.evaluation.metrics import retrieval_metrics
    from itm.evaluation.scoring import score_matrix
    from itm.matchers.late.uarda_pruned import Pruning
    from pipelines.evaluating.driver import encode

    recipe = recipe_of(output, "uarda", "base", seed)
    learn(recipe)
    torch.set_num_threads(1)
    split = files.join(recipe.data.root, recipe.data.test_split)
    manifest = read_manifest(split)
    matcher: Any = itm.load_matcher(files.join(recipe.folder, "matcher"))
    seen = encode(matcher, split, manifest, recipe)
    relevance = exact_relevance(manifest.source, seen.names)
    state = matcher.thresholds["t2i"]
    lines = ["| threshold | words pruned, p | i2t R@1, 5, 10 | t2i R@1, 5, 10 | CPU s | pruned | ratio |", "|---" * 7 + "|"]
    for given in THRESHOLDS:
        matcher.eval_threshold = given
        spans: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds + 1):
            for prune in spans:
                matcher.pruning = Pruning("on") if prune else None
                started = time.process_time()
                scores = score_matrix(matcher, seen.images, seen.captions)
                if turn:
                    spans[prune].append(time.process_time() - started)
        found = retrieval_metrics(scores, seen.names.positives, relevance)
        recalls = ["{:.1f} {:.1f} {:.1f}".format(*(found[f"{way}_r{k}"] for k in (1, 5, 10))) for way in ("i2t", "t2i")]
        plain, pruned = statistics.median(spans[False]), statistics.median(spans[True])
        name = f"{given:g}" if isinstance(given, float) else f"`{given}` = {float(getattr(state, given)):.3f}"
        p = matcher.pruning.report()["p"]
        lines.append(f"| {name} | {p:.1%} | {' | '.join(recalls)} | {plain:.3f} | {pruned:.3f} | {pruned / plain:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/learning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("\n".join(rows(str(Path(args.output).absolute()), args.seed, args.rounds)))


if __name__ == "__main__":
    main()
