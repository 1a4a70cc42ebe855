"""train.checkpoint_activations, train.compile and train.shard_weights: the numbers of a run without them."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from itm.config import Part, Train
from itm.data.plan import Position
from itm.distributed import rank
from itm.matchers.folder import load_matcher_folder
from itm.methods.cusa import CUSA
from itm.methods.iais import IAIS
from itm.methods.matching import Matching
from itm.training import compiled
from itm.training.checkpoint import State, load_checkpoint, save_checkpoint
from itm.training.compiled import as_written, check_compiler, compile_encoders
from itm.training.optim import moving_average
from itm.training.recompute import recompute_activations
from itm.training.step import Step
from itm.training.switches import build_step
from itm.types import Batch, Matcher, SoftLabels
from pipelines.train import train
from tests.support.every_matcher import TOWER, WORDS, batch_of, captions_of, images_of, matcher_of
from tests.support.joint_matcher import Crossed
from tests.support.ranks import joined, spawn_ranks
from tests.support.small_training import die_at, final, recipe, same, splits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch.compile's own imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # its look at a checkpoint's inputs
]
LAYERS = {**TOWER, "num_hidden_layers": 3, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}
HF_IMAGE = {"kind": "hf_vision", "config": {"model_type": "vit", "image_size": 16, "patch_size": 4, **LAYERS}}
HF_TEXT = {"kind": "hf_text", "config": {"model_type": "bert", "max_position_embeddings": 12, **LAYERS}}
RESNET = {"kind": "hf_vision", "config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}}
ROWS = 6


MATCHERS: dict[str, Any] = {
    "hf": lambda: matcher_of("dual", image=HF_IMAGE, text=HF_TEXT),
    "vit": lambda: matcher_of("dual", image=HF_IMAGE),
    "bert": lambda: matcher_of("vse", text=HF_TEXT),
    "resnet": lambda: matcher_of("dual", image=RESNET, text=HF_TEXT),
    **{name: lambda name=name: matcher_of(name) for name in ("dual", "clip", "saf", "sgr", "uarda", "uniter")},
}


def method_of(name: str) -> nn.Module:
    torch.manual_seed(2)
    if name in ("iais", "iais of one's own"):
        matcher = matcher_of("uniter") if name == "iais" else Crossed(vocab_size=WORDS)
        return IAIS(matcher, ranking={"hard_negatives": 2}).double().train()
    return Matching(MATCHERS[name](), loss="triplet", margin=0.5).double().train()


def one_step(method: nn.Module, chunk: int | None = None, batch: Batch | None = None) -> dict[str, Tensor]:
    """Gradients after a forward and backward pass, and the buffers it leaves."""
    torch.manual_seed(4)
    method.zero_grad()
    losses = method(batch or batch_of(ROWS), chunk=chunk)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {name: buffer.double() for name, buffer in method.named_buffers()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def bytes_saved(method: nn.Module) -> int:
    """What autograd keeps for the backward pass, apart from parameters."""
    sizes: dict[int, int] = {p.data_ptr(): 0 for p in method.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
        method(batch_of(ROWS))
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["hf", "resnet", "dual", "clip", "saf", "sgr", "uarda", "uniter", "iais", "iais of one's own"])
def test_recomputed_activations_change_no_gradient_no_dropout_no_statistic_and_save_memory(name: str) -> None:
    plain, saving = method_of(name), method_of(name)
    recompute_activations(saving.matcher)
    wanted = one_step(copy.deepcopy(plain))
    assert_equal(one_step(copy.deepcopy(saving)), wanted)
    assert max(float(v.abs().max()) for v in wanted.values()) > 1e-3
    assert bytes_saved(saving) < 0.8 * bytes_saved(plain)


def test_recomputation_inside_chunks_and_in_a_moving_average() -> None:
    method = method_of("hf")
    wanted = one_step(copy.deepcopy(method), chunk=4)
    recompute_activations(method.matcher)
    average = moving_average(method, 0.9)
    assert_equal(one_step(method, chunk=4), wanted)
    assert_equal(one_step(average.module, chunk=4), wanted)


def ragged(rows: int, longest: int) -> Batch:
    """As many words as rows in a chunk of four, or more, or fewer."""
    return Batch(images_of(rows), captions_of([3 + k % (longest - 2) for k in range(rows)]))


@pytest.mark.parametrize(
    ("name", "backend", "recompute", "chunk"),
    [
        ("vit", "aot_eager", True, 4),
        ("bert", "eager", False, None),
        ("dual", "eager", False, None),
        ("uniter", "eager", False, None),
        ("iais of one's own", "aot_eager", True, None),
    ],
)
def test_compiled_layers_change_no_number_no_name_and_are_compiled_once(
    name: str, backend: str, recompute: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These backends trace as inductor does, but draw the dropout of uncompiled code and need no compiler."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(compiled, "BACKEND", graphs)
    method = method_of(name)
    plain = copy.deepcopy(method)
    if recompute:
        recompute_activations(method.matcher)
    average = moving_average(method, 0.9)
    compile_encoders(method.matcher)
    assert list(method.state_dict()) == list(plain.state_dict())
    made = []
    for rows, longest in ((8, 4), (8, 7), (6, 5), (8, 4)):
        given = ragged(rows, longest)
        assert_equal(one_step(method, chunk, given), one_step(plain, chunk, given))
        made.append(graphs.frame_count)
    assert made[0] > 0
    assert made[1:] == made[:-1], "another shape is no new graph"
    average.update_parameters(method)
    with as_written(True), torch.no_grad():
        method.eval()
        method.matcher.encode_images(batch_of(2).images)
    assert graphs.frame_count == made[-1], "evaluation compiles nothing"
    assert not any(m._compiled_call_impl for m in average.module.modules())


def test_the_default_backend_computes_the_same() -> None:
    torch._dynamo.reset()
    method = Matching(matcher_of("vse"))
    plain = copy.deepcopy(method)
    compile_encoders(method.matcher)
    assert_equal(one_step(method), one_step(plain), tolerance=1e-5)
    assert [name for name, m in method.named_modules() if m._compiled_call_impl] == ["matcher.image_encoder"], "no recurrent tower"


def test_a_missing_compiler_is_said_before_the_start(tmp_path: Path) -> None:
    check_compiler(torch.device("cpu"))
    splits(tmp_path)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match=r"torch\.compile needs a C\+\+ compiler: install g\+\+"),
    ):
        train(recipe(tmp_path, compile=True))
    assert not (tmp_path / "runs/run/started.json").exists()


def test_a_matcher_that_declares_no_layers_is_refused_where_they_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"train\.checkpoint_activations: matcher 'bare' declares no layers\(\)"):
        recompute_activations(Bare())
    with pytest.raises(ValueError, match=r"train\.compile: matcher 'bare' declares no layers\(\)"):
        compile_encoders(Bare())


class Bare(Matcher):
    kind = "bare"


@pytest.mark.e2e
def test_a_run_with_switches_ends_like_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled, "BACKEND", graphs)
    splits(tmp_path, regions=True)
    given: dict[str, Any] = {"data": {"image": "regions", "val_split": ""}, "steps": 3, "checkpoint_every": 3, "ema": 0.9}
    model = Part(kind="scan", options={"image": {"in_width": 3, "width": 8}, "text": {"word_dim": 6, "width": 8}})
    for name, on in (("plain", False), ("switched", True)):
        train(recipe(tmp_path, name=name, compile=on, checkpoint_activations=on, **given).model_copy(update={"model": model}))
    assert graphs.frame_count == 1
    assert_equal(final(tmp_path, "switched", 3), final(tmp_path, "plain", 3), tolerance=1e-6)


def test_the_switches_do_not_change_what_a_run_is(tmp_path: Path) -> None:
    switches = {"compile": True, "checkpoint_activations": True, "shard_weights": True}
    assert recipe(tmp_path, **switches).fingerprint() == recipe(tmp_path).fingerprint()


WORLD, SAVED, LAST = 2, 1, 2
SHARDED: dict[str, dict[str, Any]] = {
    "dual": {"accumulate": 2, "ema": 0.9},
    "cusa": {"checkpoint_activations": True, "clip_norm": 0.1, "ema": 0.9},
    "iais": {},
    "iais of one's own": {},
}


def step_of(name: str, shard: bool) -> Step:
    torch.manual_seed(2)
    method = CUSA(matcher_of("clip")).double() if name == "cusa" else method_of(name)
    options = Train(batch_size=ROWS, lr=0.01, shard_weights=shard, **SHARDED[name])
    return build_step(method, options, lambda step: 0.01 / (step + 1), seed=1, device=torch.device("cpu"))


def advance(step: Step, first: int, last: int) -> list[float]:
    """Losses of the steps [first, last), on batches that differ between ranks, also in their lengths."""
    losses = []
    for number in range(first, last):
        micro = []
        for k in range(step.train.accumulate):
            seed = 1 + rank() + WORLD * (k + 2 * number)
            noise = torch.Generator().manual_seed(seed)
            labels = SoftLabels(torch.randn(ROWS, 7, generator=noise), torch.randn(ROWS, 9, generator=noise))
            micro.append(Batch(images_of(ROWS + seed)[:ROWS], captions_of([3 + (seed * j) % 8 for j in range(ROWS)]), labels))
        losses.append(float(step(micro, number)["loss"]))
    return losses


def ends_of(step: Step) -> dict[str, Tensor]:
    """On rank 0 whole weights, moving average and optimiser state; on the others their buffers."""
    found = {f"{kind}.{name}": v.clone() for kind in step.modules for name, v in step.gathered(kind).state_dict().items()}
    state = step.optimizer_state()["state"]
    if rank():
        return dict(step.plain.named_buffers())
    return found | {f"optimizer.{n}.{name}": v for n, values in state.items() for name, v in values.items()}


def worker(number: int, port: int, folder: Path) -> None:
    with joined(number, port, WORLD):
        warnings.simplefilter("ignore")
        for name in SHARDED:
            found: dict[str, Any] = {}
            for kind, shard in (("ddp", False), ("fsdp", True)):
                step = step_of(name, shard)
                losses = advance(step, 0, SAVED)
                save_checkpoint(str(folder / name / kind), State(Position(SAVED), ""), step)
                losses += advance(step, SAVED, LAST)
                share = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in step.plain.parameters())
                found[kind] = losses, ends_of(step), share
            for kind, shard in (("ddp", True), ("fsdp", False)):
                torch.distributed.barrier()
                step = step_of(name, shard)
                load_checkpoint(str(folder / name / kind), State(Position(SAVED), ""), step)
                found[f"resumed from {kind}"] = advance(step, SAVED, LAST), ends_of(step), 0
            torch.save(found, folder / f"{name}-{number}.pt")


@pytest.mark.e2e
def test_sharded_ranks_compute_save_and_resume_as_ddp_does(tmp_path: Path) -> None:
    spawn_ranks(worker, WORLD, tmp_path)
    for name in SHARDED:
        for number in range(WORLD):
            found = torch.load(tmp_path / f"{name}-{number}.pt")
            losses, ends, whole = found.pop("ddp")
            assert found["fsdp"][2] < 0.7 * whole
            for kind, (got_losses, got_ends, _) in found.items():
                assert got_losses == pytest.approx(losses[-len(got_losses) :], rel=1e-6), (name, number, kind)
                assert_equal(got_ends, ends, tolerance=1e-6)
        alone = step_of(name, shard=True)
        assert type(alone) is Step, "one process shards nothing"
        load_checkpoint(str(tmp_path / name / "fsdp"), State(Position(SAVED), ""), alone)
        assert math.isfinite(advance(alone, SAVED, LAST)[0])


@pytest.mark.e2e
def test_a_run_of_one_process_goes_on_sharded_over_two_ray_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: object
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path)
    given: dict[str, Any] = {"steps": 4, "validate_every": 2, "checkpoint_every": 1, "ema": 0.9, "checkpoint_activations": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(2, patch)
        train(recipe(tmp_path, **given))
    before = final(tmp_path, step=2)
    done = train(recipe(tmp_path, workers=2, shard_weights=True, **given))
    assert done["steps"] == 4
    after = final(tmp_path, step=4)
    assert {name: v.shape for name, v in after.items()} == {name: v.shape for name, v in before.items()}
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))
    folder = tmp_path / "runs/run"
    best = load_file(folder / f"checkpoints/best-{done['best']['step']:09d}.safetensors")
    assert same(dict(load_matcher_folder(folder / "matcher").state_dict()), best)
    assert len((folder / "losses.jsonl").read_text().splitlines()) == 4
