"""`python -m tests.support.learning`: does every method learn, and is it the teacher's meaning that helps?

Every model is trained from scratch on scenes (equivalence world) by a step budget, through the real stages (pack, teach, train,
evaluate), with several seeds: its base, the base + CUSA, and the base + CUSA with the teacher's vectors shuffled over rows (control).
UNITER is trained with and without IAIS. SGRAF is the mean score of the SGR and SAF of the same seed. Finished runs are not
repeated; the table goes to docs/results/learning.md when --write is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from itm.config import Recipe, parse_recipe
from itm.matchers.late.uarda_threshold import relevance_threshold

REGIONS: dict[str, Any] = {"kind": "regions", "in_width": 358, "width": 128}
GRU: dict[str, Any] = {"kind": "gru", "word_dim": 64, "width": 128, "bidirectional": True}
LATE: dict[str, Any] = {"image": REGIONS, "text": GRU}
MATCHERS: dict[str, dict[str, Any]] = {
    "dual": {"image": {"kind": "conv", "image_size": 64}, "text": {"kind": "pooled_gru"}, "width": 128},
    "scan": LATE | {"agg_func": "Mean", "lambda_softmax": 9.0},
    "sgr": LATE | {"sim_dim": 64, "regions": 6, "steps": 2},
    "saf": LATE | {"sim_dim": 64, "regions": 6},
    "uarda": LATE | {"direction": "t2i"},
    "uniter": {"hidden": 96, "layers": 2, "heads": 4, "region_dim": 358, "init_std": 0.12},
}
BASE: dict[str, Any] = {"kind": "matching", "options": {"loss": "contrastive", "tau": 0.07}}
SOFT: dict[str, Any] = {"weight": 1.0, "student": "itc", "teacher": 0.05}
CUSA: dict[str, Any] = {"kind": "cusa", "options": {"itc": {"tau": 0.07, "reduction": "sum"}, "csa": SOFT, "usa": SOFT}}
TRUE: dict[str, Any] = {side: {"kind": f"scenes_{side}"} for side in ("image", "text")}
SHUFFLED: dict[str, Any] = {side: {"kind": "shuffled", "options": {"of": TRUE[side], "seed": 7}} for side in ("image", "text")}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"base": (BASE, {}), "cusa": (CUSA, TRUE), "shuffled": (CUSA, SHUFFLED)}
TRIPLET: dict[str, Any] = {"margin": 0.2, "official": True, "reduction": "mean"}
MINED_AT = {"published": 100, "all": 300}  # steps of all negatives before the hardest; in a run of 300 steps: none mined at all
SHARP: dict[str, Any] = {"student": 0.1, "teacher": 0.1}
SOFT_OF = {"sgr": ({"weight": 0.6}, {"weight": 0.75}), "saf": ({"weight": 1.0}, {"weight": 0.75})}  # as recipes cusa-{sgr,saf}-*
STEPS = {"dual": 400, "scan": 300, "sgr": 300, "saf": 300, "uarda": 300, "uniter": 500}
BATCH = {"dual": 128, "scan": 64, "sgr": 32, "saf": 32, "uarda": 64, "uniter": 32}
SHOWN = {
    "t2i_r1": "t2i R@1",
    "i2t_r1": "i2t R@1",
    "t2i_r10": "t2i R@10",
    "t2i_semantic_r1": "semantic R@1 t2i",
    "t2i_map_at_r": "mAP@R t2i",
    "i2t_map_at_r": "mAP@R i2t",
}


HEAD = """# What was learnt here

`python -m tests.support.learning --write docs/results/learning.md` makes this page: every model from scratch on
synthetic scenes in which similarity is relevance
(`scenes`, world `equiv`: 1,500 training images, 600 test images, 100 for UNITER), {seeds} seeds, mean ± half the range.
Steps x batch: {sizes}.
`cusa` adds soft labels from the ground truth of scenes; `shuffled` gives the teacher's vectors to other rows, so that they mean nothing.
Recalls are percent, mAP@R a fraction over all pairs that truly hold. Negative results stay in.
"""


def head(seeds: int) -> str:
    return HEAD.format(seeds=seeds, sizes=", ".join(f"{model} {STEPS[model]} x {BATCH[model]}" for model in STEPS))


def iais(weight: float) -> dict[str, Any]:
    """Negatives at random: in so short a run from scratch mining costs twice the time and brings nothing (mAP@R t2i .117 against .120)."""
    ranking = {"loss": "softmax", "hard_negatives": 7, "random_steps": STEPS["uniter"]}
    return {"kind": "iais", "options": {"alignment": "singular", "weight": weight, "steps": STEPS["uniter"], "ranking": ranking}}


def published(kind: str, how: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The combination of the recipes cusa-sgr-* and cusa-saf-*: triplet loss and soft labels, temperatures and weights as there. All
    negatives come first, as so short a run from scratch needs it.

    how: `published`, or `all`, which never mines, and has the soft labels at a temperature of 0.1 beside those of the recipes.
    """
    csa, usa = SOFT_OF[kind]
    triplet = TRIPLET | {"warmup_steps": MINED_AT[how]}
    soft = {"kind": "cusa", "options": {"triplet": triplet, "csa": csa, "usa": usa}}
    sharp = {"kind": "cusa", "options": {"triplet": triplet, "csa": csa | SHARP, "usa": usa | SHARP}}
    variants = {
        "base": ({"kind": "matching", "options": {"loss": "triplet", **triplet}}, {}),
        "cusa": (soft, TRUE),
        "shuffled": (soft, SHUFFLED),
    }
    return variants if how == "published" else variants | {"cusa, tau .1": (sharp, TRUE), "shuffled, tau .1": (sharp, SHUFFLED)}


def variants_of(model: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    kind, _, how = model.partition("-")
    if how:
        return published(kind, how)
    return {"base": (iais(0.0), {}), "iais": (iais(8.0), {})} if model == "uniter" else VARIANTS


def recipe_of(output: str, model: str, variant: str, seed: int) -> Recipe:
    method, teachers = variants_of(model)[variant]
    name, (model, _, how) = f"{model}-{variant}-{seed}".replace(", tau .", "-tau"), model.partition("-")
    # Every pair of a single-stream matcher is a forward pass: a smaller test set.
    sizes = {"n_val": 40, "n_test": 100} if model == "uniter" else {"n_val": 60, "n_test": 600}
    world = {"kind": "scenes", "options": {"world": "equiv", "regions": True, **sizes}}
    choices = {
        "name": name,
        "seed": seed,
        "output": output,
        "data": {
            "source": world,
            "root": f"{output}/shards-{sizes['n_test']}{'' if model == 'dual' else '-regions'}",
            "image_size": 64,
            "crop": "squash",
            "max_regions": 6,
        },
        "text": {"kind": "words", "max_length": 24},
        "teachers": teachers,
        "model": {"kind": model, "options": MATCHERS[model]},
        "method": method,
        "train": {
            "batch_size": BATCH[model],
            "steps": STEPS[model],
            "workers": 0,
            "lr": 1.5e-3 if model == "uniter" else 2.0e-3,
            "min_lr": 1.0e-4,
            "warmup_steps": 50,
            "clip_norm": 2.0,
            "validate_every": STEPS[model],
            "log_shares": len(teachers) > 0 and how != "",
        },
        "registry": {"experiment": "learning"},
    }
    choices["data"]["image"] = "pixels" if model == "dual" else "regions"
    return parse_recipe(choices)


def learn(recipe: Recipe) -> dict[str, float]:
    """Pack, teach, train and evaluate what is not there yet; the metrics on the test split."""
    from pipelines import evaluate, pack, teach, train

    pack.pack(recipe)
    if recipe.teachers.image:
        teach.teach(recipe)
    train.train(recipe)
    metrics: dict[str, float] = evaluate.evaluate(recipe)["metrics"]
    return metrics


def ensemble(first: Recipe, second: Recipe) -> dict[str, float]:
    """Metrics of the mean score of two trained recipes."""
    import itm
    from itm.data import files
    from itm.data.shards import read_manifest
    from itm.evaluation.dataset import exact_relevance
    from itm.evaluation.metrics import retrieval_metrics
    from itm.evaluation.scoring import score_matrix
    from pipelines.evaluating.driver import encode

    split = files.join(first.data.root, first.data.test_split)
    manifest = read_manifest(split)
    members = [itm.load_matcher(files.join(recipe.folder, "matcher")) for recipe in (first, second)]
    encoded = [encode(member, split, manifest, first) for member in members]
    scores = score_matrix(members, [e.images for e in encoded], [e.captions for e in encoded])
    names = encoded[0].names
    return retrieval_metrics(scores, names.positives, exact_relevance(manifest.source, names))


def rows(output: str, models: list[str], seeds: list[int]) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """(model, variant, metrics of each seed)."""
    for model in models:
        if model == "sgraf":
            for variant in VARIANTS:
                pairs = [(recipe_of(output, "sgr", variant, seed), recipe_of(output, "saf", variant, seed)) for seed in seeds]
                yield model, variant, [ensemble(*pair) for pair in pairs]
            continue
        for variant in variants_of(model):
            yield model, variant, [learn(recipe_of(output, model, variant, seed)) for seed in seeds]


def distances(output: str, seeds: list[int]) -> list[str]:
    """ISD of UNITER with and without IAIS: how far the relations among words and among regions are apart, lower = closer."""
    import itm
    from itm.data import files
    from itm.evaluation.relations import isd_of_split

    lines: list[str] = []
    for variant in variants_of("uniter"):
        found: list[dict[str, float]] = []
        for recipe in (recipe_of(output, "uniter", variant, seed) for seed in seeds):
            matcher = itm.load_matcher(files.join(recipe.folder, "matcher"))
            found.append(isd_of_split(matcher, files.join(recipe.data.root, recipe.data.test_split), annotated=False).metrics)
        if not lines:
            lines = ["", "| UNITER | " + " | ".join(found[0]) + " |", "|---" * (1 + len(found[0])) + "|"]
        lines.append(f"| {variant} | " + " | ".join(cell([row[name] for row in found]) for name in found[0]) + " |")
    return lines


def thresholds(output: str, seeds: list[int]) -> list[str]:
    """UARDA's threshold over training against what the solver says of the statistics of the same step."""
    lines = ["", "| UARDA, seed | step | t | solver, capped | mu+ | sd+ | mu- | sd- | words cut: matched | mismatched |", "|---" * 10 + "|"]
    for seed in seeds:
        told = [json.loads(line) for line in Path(recipe_of(output, "uarda", "base", seed).folder, "losses.jsonl").read_text().splitlines()]
        for row in told[len(told) // 3 - 1 :: len(told) // 3]:
            seen = {name.rpartition(".")[2]: value for name, value in row.items() if ".thresholds." in name}
            moments = [seen[name] for name in ("mu_pos", "sigma_pos", "mu_neg", "sigma_neg")]
            solved = min(float(relevance_threshold(*moments)), moments[0] - moments[1])
            numbers = [seen["t"], solved, *moments, seen["pruned_matched"], seen["pruned_mismatched"]]
            lines.append(f"| {seed} | {row['step']} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return lines


def shares(output: str, model: str, seeds: list[int]) -> list[str]:
    """What part of the gradient each loss had: means over the seeds at the first and the last logged step, and over all of them."""
    lines: list[str] = []
    for variant, (_, teachers) in variants_of(model).items():
        if not teachers:
            continue
        logs = [Path(recipe_of(output, model, variant, seed).folder, "losses.jsonl").read_text().splitlines() for seed in seeds]
        told = [
            [{k.removeprefix("share_"): v for k, v in json.loads(line).items() if k.startswith("share_")} for line in log] for log in logs
        ]
        if not lines:
            lines = ["", f"| {model}, share of the gradient | " + " | ".join(told[0][0]) + " |", "|---" * (1 + len(told[0][0])) + "|"]
        for when, rows in (
            ("first", [log[0] for log in told]),
            ("mean", [row for log in told for row in log]),
            ("last", [log[-1] for log in told]),
        ):
            means = [statistics.fmean(row[name] for row in rows) for name in told[0][0]]
            lines.append(f"| {variant}, {when} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return lines


def cell(values: list[float]) -> str:
    """mean ± half the range."""
    digits = 3 if max(values) <= 1 else 1
    spread = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dual", "scan", "sgr", "saf", "sgraf", "uarda", "uniter"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="runs/learning")
    parser.add_argument("--write", metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    lines = ["| model | variant | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    print("\n".join(lines), flush=True)
    for model, variant, found in rows(str(Path(args.output).absolute()), args.models, args.seeds):
        lines.append(f"| {model} | {variant} | " + " | ".join(cell([m[key] for m in found]) for key in SHOWN) + " |")
        print(lines[-1], flush=True)
    for model, more in (("uniter", distances), ("uarda", thresholds)):
        if model in args.models:
            lines += (rows_of_it := more(str(Path(args.output).absolute()), args.seeds))
            print("\n".join(rows_of_it))
    for model in args.models:
        if "-" in model:
            lines += (rows_of_it := shares(str(Path(args.output).absolute()), model, args.seeds))
            print("\n".join(rows_of_it))
    if args.write:
        Path(args.write).write_text("\n".join([head(len(args.seeds)), *lines]) + "\n")


if __name__ == "__main__":
    main()
