"""What the stages add to a bare model: `itm train` against a plain torch loop over collated batches, `itm teach` against its teacher.

    python -m tests.support.bench_steps                      # both
    python -m tests.support.bench_steps train --steps 60 --rounds 3

The matcher is a small CLIP, the teacher a small ViT, both of random weights. Each row runs in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from itm.config import Recipe, parse_recipe
from itm.data.shards import Sample, read_manifest, read_samples
from pipelines.on_ray.session import quiet
from tests.support.bench_data import Tree, make_split

BATCH = 64


def recipe(root: Path, workers: int, steps: int) -> Recipe:
    """Where the small models lie is part of it; they are made here when they are missing."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    if not (root / "vit").exists():
        torch.manual_seed(0)
        tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = {**tower, "image_size": 224, "patch_size": 32}
        text = {**tower, "vocab_size": 1000, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).save_pretrained(root / "clip")
        ViTModel(
            ViTConfig(**{**vision, "num_hidden_layers": 4, "patch_size": 16, "hidden_size": 192, "intermediate_size": 768})
        ).save_pretrained(root / "vit")
    given = {
        "name": f"{workers}-{os.getpid()}",
        "output": f"{root}/runs",
        "data": {"root": str(root), "image_size": 224, "val_split": "", "train_split": "train"},
        "text": {"max_length": 32},
        "teachers": {"root": f"{root}/stores/{os.getpid()}", "image": {"kind": "hf_vision", "options": {"path": f"{root}/vit"}}},
        "model": {"kind": "clip", "options": {"path": f"{root}/clip"}},
        "method": {"kind": "matching"},
        "train": {"batch_size": BATCH, "steps": steps, "workers": workers, "checkpoint_every": steps},
    }
    return parse_recipe(given)


def plain(root: Path, steps: int, whole_step: bool) -> dict[str, float]:
    """The loop that everybody writes, or our `Step`, over eight collated batches in memory."""
    from itm.data.collate import to_batch
    from itm.data.pairs import Pairs, Work
    from itm.training.optim import build_optimizer
    from itm.training.step import Step
    from pipelines.training.driver import located
    from pipelines.training.job import build_method
    from pipelines.training.preparation import prepare

    at = located(recipe(root, 0, steps))
    job = prepare(at, read_manifest(f"{root}/train"))
    pairs = Pairs(f"{root}/train", job.manifest, job.plan, job.inputs, {})
    batches = [to_batch(pairs(Work(step, 0, 0))) for step in range(8)]
    method = build_method(at, job.inputs)
    optimizer = build_optimizer(method, at.train)
    ours = Step(method, optimizer, at.train, lambda step: 1e-3, None, 0)
    method.train()
    cpu, begin = time.process_time(), time.perf_counter()
    for number in range(steps):
        batch = batches[number % 8]
        if whole_step:
            ours([batch], number)
            continue
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(method(batch, step=number).values())).sum().backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    return {"step_ms": seconds / steps * 1e3, "cpu_ms": (time.process_time() - cpu) / steps * 1e3, "start": 0.0, "whole_cpu": 0.0}


def stage(root: Path, steps: int, workers: int) -> dict[str, float]:
    """`itm train`; a step's time is that of the run's own clock, which begins with the first batch. start: all seconds besides."""
    from pipelines.train import train

    tree, born = Tree(), time.perf_counter()
    done = train(recipe(root, workers, steps))
    total = time.perf_counter() - born
    return {"step_ms": done["seconds"] / steps * 1e3, "cpu_ms": 0.0, "start": total - done["seconds"], "whole_cpu": tree.cpu()}


def teacher(root: Path, through_stage: bool) -> dict[str, float]:
    """Images a second of the teacher alone, fed from memory, or of `itm teach`: once it runs (from its first sidecar on), and in all."""
    from itm.teachers.identity import build_teacher, embed_in_batches
    from pipelines.teach import teach

    at = recipe(root, 0, 1)
    manifest = read_manifest(f"{root}/train")
    assert at.teachers.image is not None
    if through_stage:
        tree, begin = Tree(), time.perf_counter()
        folder = Path(teach(at)["image"])
        seconds = time.perf_counter() - begin
        ends = sorted(sidecar.stat().st_mtime for sidecar in folder.glob("*.arrow"))
        steady = (manifest.samples - manifest.shards[0].samples) / (ends[-1] - ends[0])
        return {"images_s": steady, "whole_images_s": manifest.samples / seconds, "cpu_ms": tree.cpu() / manifest.samples * 1e3}
    built = build_teacher(at.teachers.image, "image")
    rows = [s for shard in manifest.shards[:2] for s in read_samples(f"{root}/train/{shard.name}") if isinstance(s, Sample)]
    begin, cpu = time.perf_counter(), time.process_time()
    payloads = [built.prepare(row) for row in rows]
    prepared = time.process_time() - cpu
    begin, cpu = time.perf_counter(), time.process_time()
    embed_in_batches(built, payloads, at.teachers.batch_size)
    seconds, spent = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "images_s": len(rows) / seconds,
        "whole_images_s": 0.0,
        "cpu_ms": spent / len(rows) * 1e3,
        "prepare_ms": prepared / len(rows) * 1e3,
    }


ROWS: dict[str, dict[str, Callable[[Path, int], dict[str, float]]]] = {
    "train": {
        "plain loop, batches in memory": lambda root, steps: plain(root, steps, False),
        "our Step, batches in memory": lambda root, steps: plain(root, steps, True),
        "itm train, workers=0": lambda root, steps: stage(root, steps, 0),
        "itm train, workers=1": lambda root, steps: stage(root, steps, 1),
    },
    "teach": {
        "teacher alone, from memory": lambda root, steps: teacher(root, False),
        "itm teach": lambda root, steps: teacher(root, True),
    },
}


def table(what: str, root: Path, rounds: int, steps: int) -> str:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS[what]}
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/mlflow.db"
    for _ in range(rounds):
        for name in ROWS[what]:
            command = [sys.executable, "-m", "tests.support.bench_steps", what, "--row", name, "--root", str(root), "--steps", str(steps)]
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            found[name].append(json.loads(said.splitlines()[-1]))
            print(f"  {name:<30}" + "  ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items()), file=sys.stderr, flush=True)
    middle = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    first: dict[str, Any] = next(iter(middle.values()))
    heads = [what, *first, f"x {next(iter(first))}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in middle.items():
        figures = [f"{row[key]:.4g}" if row.get(key) else "" for key in first]
        lines.append(f"| {name} | {' | '.join(figures)} | {row[next(iter(first))] / first[next(iter(first))]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(ROWS))
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "itm-bench", help="where the made-up data lies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--row", help="measure this row alone, in this process")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    make_split(args.root)
    if args.row:
        print(json.dumps(ROWS[args.what[0]][args.row](args.root, args.steps)), flush=True)
        return
    print(f"{os.cpu_count()} cores, one thread, batch {BATCH}, medians of {args.rounds} runs in turn", flush=True)
    for what in args.what:
        print(table(what, args.root, args.rounds, args.steps) + "\n", flush=True)


if __name__ == "__main__":
    main()
