"""The first command where a GPU is at hand: what no CPU can tell, in one run of at most six minutes, one JSON line a finding.

    python tests/support/pretend/gpu_day.py                  # real CUDA
    python tests/support/pretend/gpu_day.py --pretend        # rehearsal without a GPU: tiny sizes, figures mean nothing

It runs from a plain checkout with Python 3.11 or later and torch 2.11 or later, and needs beside torch: numpy, pillow, simplejpeg,
pydantic, pyyaml, safetensors, transformers, pyarrow (which `itm` imports). Each part prints as it ends; a part that fails says so and the
next one begins; no part begins after five minutes.
"""

import sys
from pathlib import Path

PRETEND = "--pretend" in sys.argv
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
if PRETEND:
    from tests.support.pretend import pretend
import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

warnings.simplefilter("ignore")
from itm.config import Train
from itm.evaluation.scoring import score_matrix
from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.methods import METHODS
from itm.precision import products
from itm.matchers import chunked
from itm.training.switches import build_step
from itm.types import Batch, Captions, Images
from tests.support.every_matcher import KINDS, batch_of, matcher_of

WORDS = {"word_dim": 6, "width": 10, "dropout": 0.4}
LAST_START = 300.0
MOST_SCALES = 20
CUDA = torch.device("cuda")


def say(what: str, **facts: Any) -> None:
    print(json.dumps({"what": what, **{k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}}), flush=True)


def method_of(name: str, kind: str, options: dict[str, Any], **matcher: Any) -> nn.Module:
    torch.manual_seed(3)
    method: nn.Module = build_part(METHODS, kind, options, "method", matcher=matcher_of(name, **matcher)).train()
    return method


def gradients(method: nn.Module, device: str, **settings: Any) -> Tensor:
    step = build_step(method, Train(lr=1e-3, schedule="constant", **settings), lambda _: 1e-3, 7, torch.device(device))
    torch.manual_seed(1)
    for _ in range(MOST_SCALES if settings.get("precision") == "fp16" else 1):
        step([batch_of(6)] * settings.get("accumulate", 1), 0)
        if all(p.grad.isfinite().all() for p in step.plain.parameters() if p.grad is not None):
            break  # a step that overflows leaves the weights as they are, and halves the scale for the next one
    return torch.cat([p.grad.detach().float().cpu().flatten() for p in step.plain.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def every_step() -> None:
    """Crashes, and how far gradients are from the CPU's (no dropout)."""
    settings = {"plain": {}, "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}, "ema accumulate": {"ema": 0.9, "accumulate": 2}}
    for name in KINDS:
        for kind, options in (("matching", {"loss": "triplet"}), ("cusa", {}), ("iais", {"ranking": {"hard_negatives": 2}})):
            plain: dict[str, Any] = {"dropout": 0.0} if name in ("sgr", "saf", "uniter") else {}
            if name in ("sgr", "saf"):
                plain["text"] = {**WORDS, "dropout": 0.0}
            try:
                here = gradients(method_of(name, kind, options, **plain), "cpu")
            except ValueError:
                continue
            for label, given in settings.items():
                with telling("step", matcher=name, method=kind, setting=label) as facts:
                    there = gradients(method_of(name, kind, options, **plain), "cuda", **given)
                    facts["cosine"] = cosine(here, there)


@contextlib.contextmanager
def telling(what: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Prints the facts, those that are added inside too, or that it crashed."""
    try:
        yield facts
    except Exception as error:
        say(f"CRASH {what}", **facts, error=f"{type(error).__name__}: {error}"[:300])
    else:
        say(what, **facts)


def second_passes() -> None:
    """Gradients with the second pass against those of the same draws without it: cosine 1 or the generators were not put back."""
    for name in ("sgr", "saf", "scan"):
        for settings in ({"cache_chunk": 2}, {"checkpoint_activations": True}):
            given = {"text": WORDS} | ({"dropout": 0.4} if name in ("sgr", "saf") else {})
            with telling("second pass", matcher=name, setting=next(iter(settings))) as facts:
                found = []
                for direct in (False, True):
                    with contextlib.ExitStack() as undo:
                        if direct:
                            undo.callback(setattr, chunked, "checkpoint", chunked.checkpoint)
                            chunked.checkpoint = lambda run, *rows, **_: run(*rows)
                        found.append(gradients(method_of(name, "matching", {"loss": "triplet"}, **given), "cuda", **settings))
                facts["cosine"] = cosine(*found)


def scores() -> None:
    """Every precision against the CPU's fp32; pairs a second at the published loops' sizes."""
    n, t = (4, 6) if PRETEND else (200, 1000)
    for kind in ("scan", "sgr", "uarda"):
        torch.manual_seed(0)
        matcher = build_part(MATCHERS, kind, {}, "model", vocab_size=500).eval()
        mask = torch.arange(15) < torch.randint(6, 15, (t, 1))
        captions = Captions(torch.randint(4, 500, (t, 15)) * mask, mask, torch.arange(t))
        images = Images(torch.arange(n), regions=torch.randn(n, 36, 2048))
        want = score_matrix(matcher, images[:4], captions[:6])
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            with telling("scores", matcher=kind, precision=precision) as facts:
                got = score_matrix(matcher, images[:4], captions[:6], device="cuda", precision=precision)
                facts["difference"] = float((got - want).abs().max())
                score_matrix(matcher, images, captions, device="cuda", precision=precision)
                torch.cuda.synchronize()
                start = time.perf_counter()
                score_matrix(matcher, images, captions, device="cuda", precision=precision)
                facts["pairs_per_s"] = n * t / (time.perf_counter() - start)


def clip_config() -> dict[str, Any]:
    """ViT-B/32."""
    tower = {"num_hidden_layers": 1 if PRETEND else 12}
    text = {**tower, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 49408}
    vision = {**tower, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "patch_size": 32, "image_size": 224}
    return {"projection_dim": 512, "text_config": text, "vision_config": vision}


def clip_batch(rows: int) -> Batch:
    mask = torch.arange(32) < torch.randint(8, 32, (rows, 1))
    tokens = torch.randint(1, 49000, (rows, 32)) * mask
    pixels = torch.randint(0, 256, (rows, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(Images(torch.arange(rows), pixels), Captions(tokens, mask, torch.arange(rows)))


def clip_step() -> None:
    """ms a step and images/s by precision and setting, with the copy of the batch and without; peak memory."""
    rows, rounds = (4, 1) if PRETEND else (1024, 10)
    here = clip_batch(rows)
    settings: list[dict[str, Any]] = [{"precision": p} for p in ("fp32", "tf32", "bf16")]
    settings += [{"precision": "bf16", "checkpoint_activations": True}, {"precision": "bf16", "deterministic": True}]
    for given in settings:
        with telling("clip step", rows=rows, **given) as facts:
            torch.manual_seed(0)
            matcher = build_part(MATCHERS, "clip", {"config": clip_config()}, "model", vocab_size=49408)
            method = build_part(METHODS, "matching", {}, "method", matcher=matcher)
            step = build_step(method, Train(batch_size=rows, **given), lambda _: 1e-4, 0, CUDA)
            torch.cuda.reset_peak_memory_stats()
            for where, batch in (("host", here), ("device", here.to("cuda"))):
                seconds = timed(step, batch, rounds)
                facts |= {f"ms_from_{where}": 1000 * seconds, f"images_per_s_from_{where}": rows / seconds}
            facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            del step, method, matcher
            torch.cuda.empty_cache()


def timed(step: Any, batch: Batch, rounds: int) -> float:
    """Seconds a step, after some to warm up."""
    for number in range(min(3, rounds)):
        step([batch], number)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(rounds):
        step([batch], number)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def copies() -> None:
    """GB/s out of both kinds of memory; is a batch that was packed and moved the one that it was?"""
    from itm.data.moving import Mover, parts_of

    batch = clip_batch(4 if PRETEND else 1024)
    assert batch.images.pixels is not None
    pixels = batch.images.pixels.permute(0, 2, 3, 1)
    for where, x in (("pageable", pixels), ("pinned", pixels.pin_memory())):
        x.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        x.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        say("copy", memory=where, gb_per_s=x.numel() / 1e9 / (time.perf_counter() - start))
    mover, wrong = Mover(CUDA), 0
    for seed in range(4 if PRETEND else 40):
        torch.manual_seed(seed)
        small = clip_batch(4 if PRETEND else 64)
        there = mover(small)
        wrong += sum(not torch.equal(a, b.cpu()) for a, b in zip(parts_of(small)[0], parts_of(there)[0], strict=True))
    say("packed copies", tensors_that_differ=wrong)


def host_waits() -> None:
    """Real CUDA says itself where the host waits for it: a line for each place of one step."""
    for name, kind in (("clip", "matching"), ("clip", "cusa"), ("scan", "matching"), ("sgr", "matching"), ("uarda", "matching")):
        method = method_of(name, kind, {"loss": "triplet"} if kind == "matching" else {})
        step = build_step(method, Train(precision="bf16"), lambda _: 1e-3, 7, CUDA)
        step([batch_of(6)], 0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if not PRETEND:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                step([batch_of(6)], 1)
            finally:
                if not PRETEND:
                    torch.cuda.set_sync_debug_mode("default")
        places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchronizing" in str(w.message)})
        say("waits", matcher=name, method=kind, waits=sum("synchronizing" in str(w.message) for w in said), places=places)


def repeatable() -> None:
    """Two equal runs of 20 steps: the same bits? With train.deterministic they must be, or an operator is named."""
    cases = (("scan", "matching"), ("dual", "matching"), ("uniter", "iais"), ("clip", "cusa"))
    for name, kind in cases:
        options = {"matching": {"loss": "triplet"}, "iais": {"ranking": {"hard_negatives": 2}}, "cusa": {}}[kind]
        for deterministic in (False, True):
            with telling("repeatable", matcher=name, method=kind, deterministic=deterministic) as facts:
                ends = []
                for _ in range(2):
                    train = Train(lr=1e-2, schedule="constant", deterministic=deterministic)
                    step = build_step(method_of(name, kind, options), train, lambda _: 1e-2, 7, CUDA)
                    torch.manual_seed(1)
                    batch = batch_of(6)
                    for number in range(2 if PRETEND else 20):
                        step([batch], number)
                    ends.append(torch.cat([p.detach().cpu().flatten() for p in step.plain.parameters()]))
                facts |= {"same_bits": bool(torch.equal(*ends)), "difference": float((ends[0] - ends[1]).abs().max())}


def compiled_step() -> None:
    """torch.compile of the encoders (Triton): gradients of the uncompiled step."""
    if PRETEND:
        say("compile", skipped="the pretend device has no Triton")
        return
    with telling("compile", matcher="clip") as facts:
        found = [gradients(method_of("clip", "matching", {"loss": "triplet"}), "cuda", compile=on) for on in (False, True)]
        facts["cosine"] = cosine(*found)


def one_rank_groups() -> None:
    """NCCL, DDP and FSDP2 in a group of one rank: do they start, and give the plain step's gradient?"""
    if PRETEND:
        say("group", skipped="the pretend device has no NCCL")
        return
    import os
    import tempfile

    import torch.distributed as dist
    from itm.training.optim import build_optimizer
    from itm.training.ranked import RankedStep
    from itm.training.sharding import ShardedStep
    from itm.training.step import Step

    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            want = gradients(method_of("clip", "matching", {"loss": "triplet"}), "cuda")

            def compared(step: Step) -> float:
                torch.manual_seed(1)
                step([batch_of(6)], 0)
                whole = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in step.plain.parameters() if p.grad is not None]
                return cosine(want, torch.cat([g.float().cpu().flatten() for g in whole]))

            with telling("group", form="DDP") as facts:
                method, train = method_of("clip", "matching", {"loss": "triplet"}).to("cuda"), Train(lr=1e-3, schedule="constant")
                step = RankedStep(method, build_optimizer(method, train), train, lambda _: 1e-3, None, 7)
                facts["cosine"] = compared(step)
                facts["looks_for_unused"] = step.method.find_unused_parameters
            for precision in ("fp32", "bf16"):
                with telling("group", form="FSDP2", precision=precision) as facts:
                    train = Train(lr=1e-3, schedule="constant", shard_weights=True, precision=precision)
                    sharded = ShardedStep(method_of("clip", "matching", {"loss": "triplet"}), train, lambda _: 1e-3, 7, CUDA)
                    facts["cosine"] = compared(sharded)
        finally:
            dist.destroy_process_group()


def attention_kernels() -> None:
    """Which fused attention this card takes in bf16, against the mathematical form in fp32."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q = torch.randn(2, 4, 50, 64, device="cuda")
    with products("fp32"):
        want = scaled_dot_product_attention(q, q, q)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with telling("attention", kernel=backend.name) as facts, sdpa_kernel(backend if not PRETEND else SDPBackend.MATH):
            facts["difference"] = float((scaled_dot_product_attention(*[q.bfloat16()] * 3).float() - want).abs().max())


PARTS = (every_step, second_passes, scores, copies, host_waits, clip_step, repeatable, attention_kernels, one_rank_groups, compiled_step)


def main() -> None:
    began = time.perf_counter()
    say("machine", python=sys.version.split()[0], torch=torch.__version__, device=torch.cuda.get_device_name(), pretend=PRETEND)
    for part in PARTS:
        start = time.perf_counter()
        if start - began > LAST_START:
            say("part", name=part.__name__, skipped="no time left")
            continue
        try:
            part()
        except Exception as error:
            say("CRASH", part=part.__name__, error=f"{type(error).__name__}: {error}"[:300])
        say("part", name=part.__name__, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    with pretend.cuda() if PRETEND else contextlib.nullcontext():
        main()
