"""Training side by side with open_clip 3.3 on the same tars: CPU per sample, whole process trees, runs in turn.

    pip install --no-deps --target peer open_clip_torch==3.3.0 webdataset==0.2.86 braceexpand ftfy wcwidth timm 'torchvision==0.28.*' pandas six pytz tzdata python-dateutil
    python -m tests.support.bench_open_clip --peer peer

2,048 photos of 400x300 in 8 tars of the img2dataset layout; both train the same small CLIP (towers of 2 layers and width 128, patches of
32 pixels, 49,408 tokens, 7.6 M parameters) in float32 by AdamW, batches of 64, one thread, one process or actor that decodes.
A run of 1 and a run of 3 epochs: the difference is the cost of a sample, the rest that of the start. Augmentation is each one's own
(random resized crop): theirs crops 0.9 to 1 of the image and resizes by PIL's bicubic, ours 0.5 to 1 by scaled decode and bilinear.
"""  # noqa: E501

from __future__ import annotations

import argparse
import importlib.util
import io
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
from PIL import Image

from pipelines.on_ray.session import quiet
from tests.support.bench_data import SAMPLES, SHARDS, WORDS, Tree, photo

BATCH, TOKENS, VOCABULARY = 64, 32, 49408
EPOCHS = (1, 3)
THEIRS = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 128, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": TOKENS, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 2},
}


def make_tars(root: Path) -> Path:
    """<root>/pairs/00000.tar ...: jpg, txt, json; made once."""
    import webdataset as wds

    folder = root / "pairs"
    if not (folder / f"{SHARDS - 1:05d}.tar").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(SHARDS):
            with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
                for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                    text = " ".join(WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(11))
                    tar.write({"__key__": f"{number:06d}", "jpg": smaller(photo(number)), "txt": text, "json": {"caption": text}})
    return folder


def smaller(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((400, 300)).save(out, "JPEG", quality=85)
    return out.getvalue()


def theirs(root: Path, epochs: int) -> None:
    # Their torchvision wants operators that a CPU build of torch lacks; nothing here calls them.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip_train.main import main as train

    (root / "tiny-peer.json").write_text(json.dumps(THEIRS))
    open_clip.add_model_config(root / "tiny-peer.json")
    choices = f"--train-data {root}/pairs/{{00000..{SHARDS - 1:05d}}}.tar --train-num-samples {SHARDS * SAMPLES} --dataset-type webdataset"
    choices += f" --model tiny-peer --device cpu --precision fp32 --batch-size {BATCH} --workers 1 --epochs {epochs} --warmup 10"
    train(f"{choices} --save-frequency 0 --log-every-n-steps 1000 --logs {root}/logs --name {os.getpid()}".split())


def ours(root: Path, epochs: int) -> None:
    """In one process: of Ray's workers, which have ended by then, no CPU time would be known."""
    from transformers import CLIPConfig, CLIPModel

    from itm.config import parse_recipe
    from pipelines.train import train

    if not (root / "tiny-ours").exists():
        tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "bos_token_id": 49406, "eos_token_id": 49407}
        config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 224, "patch_size": 32}, projection_dim=128)
        CLIPModel(config).save_pretrained(root / "tiny-ours")
    clip = importlib.util.find_spec("clip")
    assert clip is not None and clip.origin is not None, "make setup installs openai-clip, whose merges file is read"
    merges = Path(clip.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    choices = {
        "name": f"{epochs}-{os.getpid()}",
        "output": f"{root}/runs",
        "data": {"root": str(root), "train_split": "pairs", "val_split": "", "image_size": 224, "crop": "random", "decode_workers": 1},
        "text": {"kind": "hf", "path": str(merges), "max_length": TOKENS},
        "model": {"kind": "clip", "options": {"path": f"{root}/tiny-ours"}},
        "method": {"kind": "matching", "options": {"loss": "contrastive"}},
        "train": {"batch_size": BATCH, "epochs": epochs, "workers": 0, "lr": 5e-4, "checkpoint_every": 1000, "log_every": 1000},
    }
    train(parse_recipe(choices))


ROWS: dict[str, Callable[[Path, int], None]] = {
    "open_clip 3.3": theirs,
    "itm train, workers=0": ours,
}


def measure(row: str, root: Path, epochs: int) -> dict[str, float]:
    tree, born = Tree(), time.perf_counter()
    ROWS[row](root, epochs)
    return {"cpu": tree.cpu(), "wall": time.perf_counter() - born}


def cost(runs: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """ms a sample and s of the start, from the medians of the short and the long runs."""
    few, many = EPOCHS
    samples, found = SHARDS * SAMPLES, {}
    for kind in ("cpu", "wall"):
        short, long = (statistics.median(run[kind] for run in runs[epochs]) for epochs in EPOCHS)
        each = (long - short) / (many - few)
        found |= {f"{kind}_ms": each / samples * 1e3, f"{kind}_start": short - few * each}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder of the packages of open_clip; unset: ours alone")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "itm-bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", choices=ROWS, help="measure this row alone, in this process")
    parser.add_argument("--epochs", type=int, default=1, help="of --row")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    make_tars(args.root)
    if args.row:
        print(json.dumps(measure(args.row, args.root, args.epochs)), flush=True)
        return
    found: dict[str, Any] = {name: {epochs: [] for epochs in EPOCHS} for name in ROWS if args.peer or not name.startswith("open")}
    for name, epochs in [(name, epochs) for _ in range(args.rounds) for name in found for epochs in EPOCHS]:
        path = os.pathsep.join(filter(None, [args.peer if name.startswith("open") else None, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "tests.support.bench_open_clip", "--row", name, "--root", str(args.root), "--epochs", str(epochs)]
        environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{args.root}/mlflow.db"}
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
        found[name][epochs].append(json.loads(said.splitlines()[-1]))
        print(f"  {name:<22} {epochs} epochs  {found[name][epochs][-1]}", file=sys.stderr, flush=True)
    print("| | CPU-ms/sample | wall ms/sample | start, CPU s | start, wall s |\n|---|---|---|---|---|")
    for name, runs in found.items():
        row = cost(runs)
        print(f"| {name} | {row['cpu_ms']:.2f} | {row['wall_ms']:.2f} | {row['cpu_start']:.1f} | {row['wall_start']:.1f} |")


if __name__ == "__main__":
    main()
