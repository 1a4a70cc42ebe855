"""Scoring, validation, teaching, search, verify and the registered model on a CUDA device: the answers of the CPU, and clear refusals."""

from __future__ import annotations

from contextlib import nullcontext

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.pretend import pretend  # before torch
import numpy as np
import pytest
import torch

import itm
from itm.config import Part, Train
from itm.data import sidecar
from itm.data.records import Caption, Record
from itm.data.shards import Manifest, write_manifest, write_shard
from itm.device import resolve_device, send
from itm.evaluation.scoring import score_matrix
from itm.kinds import build_part
from itm.matchers.late.uarda_pruned import Pruning
from itm.methods import METHODS
from itm.precision import computing, repeatable, resolve_precision
from itm.teachers.identity import build_teacher, embed_in_batches
from itm.training.switches import build_step
from pipelines import search
from pipelines.teaching import driver as teach
from pipelines.teaching.recompute import ACROSS_DEVICES, TOLERANCE, verify
from tests.support.every_matcher import KINDS, batch_of, captions_of, images_of, matcher_of
from tests.support.registry_world import matcher_folder, picture
from tests.support.small_teaching import pack, recipe, scenes, score_here
from tests.support.small_training import recipe as training_recipe, splits

CLOSE = {"bf16": (5e-2, 1e-2), "fp16": (1e-2, 1e-2)}


@pytest.fixture
def device():
    with pretend.cuda():
        yield


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", KINDS)
def test_scores_of_the_device_are_those_of_the_cpu(name: str, precision: str) -> None:
    matcher, images, captions = matcher_of(name), images_of(5), captions_of([5, 3, 7, 4])
    want = score_matrix(matcher, images, captions)
    with pretend.cuda():
        for prune in ("off", "on") if name == "uarda" else ("off",):
            if prune == "on":
                matcher.pruning = Pruning("on")
            got = score_matrix(matcher, images, captions, device="cuda", precision=precision)
            atol, rtol = CLOSE.get(precision, (1e-5, 1e-4))
            torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", KINDS)
def test_the_attention_that_a_report_draws_is_that_of_the_cpu(name: str) -> None:
    matcher, images, captions = matcher_of(name), images_of(3), captions_of([5, 3, 7])

    @torch.no_grad()
    def drawn() -> Any:
        there = next(matcher.parameters()).device
        left, right = matcher.encode_images(images.to(there)), matcher.encode_captions(captions.to(there))
        return matcher.attention(left, right)

    want = drawn()
    with pretend.cuda():
        matcher.to("cuda")
        got = drawn()
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_moved_matcher_moves_its_inputs(tmp_path: Path, device: None) -> None:
    matcher = itm.load_matcher(matcher_folder(tmp_path / "m"))
    images, captions = [picture("red"), picture("blue")], ["a red circle"]
    want = matcher.score(matcher.encode_images(matcher.inputs.images(images)), matcher.encode_captions(matcher.inputs.captions(captions)))
    matcher.to("cuda")
    got = matcher.score(matcher.encode_images(matcher.inputs.images(images)), matcher.encode_captions(matcher.inputs.captions(captions)))
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), want)
    matcher.to("cpu")
    assert matcher.inputs.captions(captions).tokens.device.type == "cpu"


@pytest.mark.parametrize("name", ["scan", "sgr", "dual"])
def test_the_score_of_record_uses_no_tf32_and_tf32_does(name: str, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device rounds operands of convolutions, recurrent layers and products as TF32 does wherever it is allowed to."""
    monkeypatch.setattr(pretend, "tf32", True)
    matcher, images, captions = matcher_of(name), images_of(5), captions_of([5, 3, 7, 4])
    rounded = score_matrix(matcher, images, captions, device="cuda", precision="tf32")
    exact = score_matrix(matcher, images, captions, device="cuda")
    want = score_matrix(matcher, images, captions, device="cpu")
    assert float((exact - want).abs().max()) < 2e-6
    assert float((rounded - want).abs().max()) > 5e-6


def test_flags_of_precision_are_put_back(device: None) -> None:
    def flags() -> Any:
        matmul = torch.backends.cuda.matmul
        return torch.backends.cudnn.allow_tf32, matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction

    before = flags()
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        with computing(precision, torch.device("cuda")):
            assert flags() == (precision == "tf32", precision == "tf32", False)
        assert flags() == before
    with repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_training_on_the_device_logs_and_validates_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.train import train

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path)
    given = {"steps": 4, "validate_every": 4, "checkpoint_every": 4, "lr": 1e-4}
    here = train(training_recipe(tmp_path, name="cpu", **given))
    with pretend.cuda():
        there = train(training_recipe(tmp_path, name="gpu", use_gpu=True, **given))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "losses.jsonl").read_text().splitlines()]
        for name in ("cpu", "gpu")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert there["best"]["metrics"].keys() == here["best"]["metrics"].keys()
    assert there["best"]["metrics"]["rsum"] == pytest.approx(here["best"]["metrics"]["rsum"], abs=15)
    kept = itm.load_matcher(f"{tmp_path}/runs/gpu/matcher")
    assert all(p.device.type == "cpu" for p in kept.parameters())


def taught(root: Path, folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A split with a store that a matcher taught on the device there is."""
    monkeypatch.setattr(teach, "_score", score_here)
    monkeypatch.setattr(teach, "_tracked", lambda *a: nullcontext())
    wanted = recipe(root, {"kind": "matcher", "options": {"uri": str(folder)}})
    wanted = wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"dtype": dtype})})
    return wanted, teach.teach(wanted)["image"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_teaching_on_the_device_gives_the_vectors_of_the_cpu_and_verifies_on_either(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = matcher_folder(tmp_path / "m")
    stores = {}
    for kind in ("cpu", "cuda"):
        pack(tmp_path / kind, scenes(6))
        if kind == "cpu":
            wanted, uri = taught(tmp_path / kind, folder, dtype, monkeypatch)
            stores[kind] = sidecar.open_store(uri).sidecar("00000.tar")
            assert verify(wanted)[0].tolerance == TOLERANCE[dtype]
            continue
        with pretend.cuda():
            wanted, uri = taught(tmp_path / kind, folder, dtype, monkeypatch)
            stores[kind] = sidecar.open_store(uri).sidecar("00000.tar")
            same, other = verify(wanted)[0], verify(wanted, device="cpu")[0]
        assert same.ok and same.tolerance == TOLERANCE[dtype]
        assert other.ok and other.tolerance == ACROSS_DEVICES[dtype]
        assert verify(wanted)[0].tolerance == ACROSS_DEVICES[dtype], "no such device here any more: the CPU, with room for its digits"
    assert [stores[kind].header.device for kind in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert b'"device"' not in stores["cpu"].table.schema.metadata[b"itm"], "what a CPU writes is as it was"
    np.testing.assert_allclose(*(store.vectors.astype(np.float32) for store in stores.values()), atol=1e-3 if dtype == "fp16" else 1e-6)


def test_pixels_of_a_teacher_are_normalised_on_the_device(tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
    ViTModel(ViTConfig(**sizes, patch_size=16)).save_pretrained(tmp_path / "vit")
    teacher = build_teacher(Part(kind="hf_vision", options={"path": str(tmp_path / "vit")}), "image")
    pixels = [bytes(range(256)) * 12, bytes(reversed(range(256))) * 12]
    want, sent = teacher.embed(pixels), []
    teacher.to("cuda")
    monkeypatch.setattr("itm.teachers.image.send", lambda x, device: sent.append(x.dtype) or send(x, device))
    np.testing.assert_allclose(teacher.embed(pixels), want, atol=1e-5)
    assert sent == [torch.float32, torch.uint8], "the scale, and the pixels as bytes"


def test_a_batch_of_a_teacher_runs_on_the_device(tmp_path: Path, device: None) -> None:
    part = Part(kind="matcher", options={"uri": str(matcher_folder(tmp_path / "m"))})
    teacher = build_teacher(part, "text")
    want = teacher.embed([b"a red circle", b"a blue square"])
    got = teacher.to("auto").embed([b"a red circle", b"a blue square"])
    assert teacher.device.type == "cuda"
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    records = [Record(f"k{n}", "test", [Caption(f"k{n}-0", f"a {c} circle")], picture(c), "png", None, {}) for n, c in enumerate(COLOURS)]
    uri = tmp_path / "shards" / "test"
    write_manifest(str(uri), Manifest(split="test", source="discs", shards=[write_shard(str(uri / "00000.tar"), records)]))
    return str(uri)


COLOURS = ["red", "blue", "green", "black"]


@pytest.mark.parametrize(
    "part", [None, Part(kind="scan", options={"image": {"kind": "conv", "image_size": 32, "hidden": 16}, "text": {"width": 128}})]
)
def test_search_on_the_device_finds_what_the_cpu_finds(part: Part | None, shards: str, tmp_path: Path) -> None:
    model, photo = str(matcher_folder(tmp_path / "m", 2, part)), tmp_path / "q.png"
    photo.write_bytes(picture("blue"))
    questions = ({"text": "a red circle"}, {"image": str(photo)})
    want = [search.search(**q, model=model, shards=shards, device="cpu", index=str(tmp_path / "here")) for q in questions]
    with pretend.cuda():
        got = [search.search(**q, model=model, shards=shards, index=str(tmp_path / "there")) for q in questions]
    for a, b in zip(want, got, strict=True):
        assert [hit.key for hit in a.hits] == [hit.key for hit in b.hits]
        assert [hit.score for hit in a.hits] == pytest.approx([hit.score for hit in b.hits], abs=1e-5)


def test_the_registered_model_runs_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    from itm.pyfunc import ItmModel

    context = SimpleNamespace(artifacts={"matcher": str(matcher_folder(tmp_path / "m"))}, model_config=None)
    rows = pd.DataFrame({"text": ["a red circle"]})
    model = ItmModel()
    model.load_context(context)
    want = model.predict(context, rows)
    with pretend.cuda():
        model.load_context(context)
        assert next(model.matcher.parameters()).is_cuda
        np.testing.assert_allclose(model.predict(context, rows), want, atol=1e-5)
        both = pd.DataFrame({"text": ["a red circle"], "image": [picture("red")]})
        assert model.predict(context, both, {"output": "scores"}).shape == (1, 1)
        monkeypatch.setenv("ITM_DEVICE", "cpu")
        model.load_context(context)
        assert not next(model.matcher.parameters()).is_cuda


def test_a_tile_that_does_not_fit_is_halved_and_scoring_goes_on(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher, images, captions = matcher_of("sgr"), images_of(7), captions_of([5, 3, 7, 4])
    want, whole, tried = score_matrix(matcher, images, captions), type(matcher).score, []

    def small(self: Any, left: Any, right: Any) -> Any:
        tried.append(len(left))
        if len(left) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return whole(self, left, right)

    monkeypatch.setattr(type(matcher), "score", small)
    with pytest.warns(UserWarning, match=r"out of memory with 7 images a tile; going on with evaluation.block=3"):
        got = score_matrix(matcher, images, captions, device="cuda", block=7)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert tried[:3] == [7, 3, 1]
    monkeypatch.setattr(type(matcher), "score", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(ValueError, match="with one image and 4 captions a tile: use a device with more memory or --precision bf16"):
        score_matrix(matcher, images, captions, device="cuda")


def test_what_does_not_fit_names_the_setting_and_a_value_to_try(tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    matcher = matcher_of("scan")
    monkeypatch.setattr(type(matcher), "encode_images", full)
    with pytest.raises(ValueError, match=r"out of memory with evaluation.batch_size=256: try evaluation.batch_size=128 \(CUDA"):
        score_matrix(matcher, images_of(3), captions_of([3, 4, 5]), device="cuda")
    method = build_part(METHODS, "matching", {"loss": "triplet"}, "method", matcher=matcher)
    step = build_step(method, Train(batch_size=6), lambda _: 1e-3, 0, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"train.batch_size=6: try train.batch_size=3 with twice .* train.cache_chunk"):
        step([batch_of(6)], 0)
    part = Part(kind="matcher", options={"uri": str(matcher_folder(tmp_path / "m"))})
    teacher = build_teacher(part, "text").to("cuda")
    monkeypatch.setattr(teacher, "embed", full)
    with pytest.raises(ValueError, match=r"with teachers.batch_size=64: try teachers.batch_size=32"):
        embed_in_batches(teacher, [b"a red circle"], 64)


def test_training_without_a_gpu_is_refused_before_a_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.train import train

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    splits(tmp_path)
    with pytest.raises(ValueError, match=r"train.use_gpu=true: device 'cuda' was asked for, but .*; set train.use_gpu=false"):
        train(training_recipe(tmp_path, use_gpu=True))
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "runs" / "run" / "started.json").exists()


def test_bf16_is_refused_by_a_device_without_it_and_auto_is_fp32_there(
    tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.train import train

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    splits(tmp_path)
    refusal = "precision bf16: Pretend H100 has no bfloat16; use fp16 or fp32"
    with pytest.raises(ValueError, match=refusal):
        train(training_recipe(tmp_path, use_gpu=True, precision="bf16"))
    assert not (tmp_path / "runs" / "run" / "started.json").exists()
    with pytest.raises(ValueError, match=refusal):
        score_matrix(matcher_of("scan"), images_of(3), captions_of([3, 4]), device="cuda", precision="bf16")
    assert resolve_precision("auto", torch.device("cuda")) == "fp32"


def test_the_optimiser_of_a_device_updates_all_weights_in_one_kernel(device: None) -> None:
    for name in ("adam", "adamw"):
        method = build_part(METHODS, "matching", {}, "method", matcher=matcher_of("scan"))
        step = build_step(method, Train(batch_size=6, optimizer=name), lambda _: 1e-3, 0, torch.device("cuda"))
        assert all(group["fused"] for group in step.optimizer.param_groups)


def test_a_loaded_matcher_lies_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = matcher_folder(tmp_path / "m")
    with pytest.raises(ValueError, match=r"device 'cuda' was asked for, but torch .* is built without CUDA: use auto or cpu"):
        itm.load_matcher(folder, device="cuda")
    with pytest.raises(ValueError, match="device 'gpu' is unknown: use auto, cpu, cuda or cuda:0"):
        itm.load_matcher(folder, device="gpu")
    assert resolve_device("meta") == torch.device("meta"), "other devices are torch's own"
    with pretend.cuda():
        for name, type_ in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda"), ("cpu", "cpu")):
            assert next(itm.load_matcher(folder, device=name).parameters()).device.type == type_
        with pytest.raises(ValueError, match="device 'cuda:3' was asked for, but there are 1 GPUs"):
            itm.load_matcher(folder, device="cuda:3")
