"""Authors' checkpoints: read safely, recognised by their keys, refused with the reason."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from itm.importers import checkpoint as checkpoint_module
from itm.importers.checkpoint import import_checkpoint
from itm.importers.clip import RENAMED
from itm.importers.load import load_official
from itm.matchers.clip import CLIP
from itm.matchers.folder import load_matcher_folder
from itm.matchers.late.sgraf import SGR
from itm.types import Captions, Images
from tests.support import GOLDEN
from tests.support.openai_names import openai_names, tiny_clip

SGRAF = GOLDEN / "sgraf"
SIZES = {"vocab_size": 50, "image": {"in_width": 16, "width": 32}, "text": {"word_dim": 12, "width": 32}, "sim_dim": 8, "regions": 6}


def parts_of(matcher: torch.nn.Module) -> list[OrderedDict[str, torch.Tensor]]:
    """The authors' list [image, text, similarity] of one of our SGRAF matchers."""
    image, text, rest = OrderedDict(), OrderedDict(), OrderedDict()
    for key, value in matcher.state_dict().items():
        if key.startswith("image."):
            image[key.removeprefix("image.")] = value
        elif key.startswith("text."):
            text[key.removeprefix("text.").replace("rnn.", "cap_rnn.")] = value
        else:
            rest[key] = value
    return [image, text, rest]


def batch() -> tuple[Images, Captions]:
    tokens = torch.randint(4, 50, (3, 5))
    return Images(torch.arange(4), regions=torch.randn(4, 6, 16)), Captions(tokens, torch.ones(3, 5, dtype=torch.bool), torch.arange(3))


def scores_of(matcher: Any, inputs: tuple[Images, Captions]) -> torch.Tensor:
    with torch.no_grad():
        return matcher.score(matcher.encode_images(inputs[0]), matcher.encode_captions(inputs[1]))


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_checkpoint_in_either_format_gives_the_scores_of_the_model_it_was_taken_from(tmp_path: Path, zip_format: bool):
    ours, inputs = SGR(**SIZES).eval(), batch()
    opt = argparse.Namespace(module_name="SGR", no_imgnorm=False, no_txtnorm=False)
    content = {"epoch": 3, "model": parts_of(ours), "best_rsum": np.float64(400.5), "opt": opt, "Eiters": 7}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zip_format)
    assert torch.equal(scores_of(load_official(tmp_path / "a.pth.tar"), inputs), scores_of(ours, inputs))


class Python2Pickler(pickle._Pickler):
    """Protocol 2 with byte strings for str, as Python 2 wrote them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str) -> None:
        data = text.encode("latin1")
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(data)]) + data
            if len(data) < 256
            else pickle.BINSTRING + len(data).to_bytes(4, "little") + data
        )
        self.memoize(text)

    dispatch[str] = save_str


def test_strings_written_by_python_2_are_read(tmp_path: Path):
    ours, inputs = SGR(**SIZES).eval(), batch()
    opt = argparse.Namespace(no_imgnorm=False, no_txtnorm=False, data_path="caf\xe9")
    python2 = SimpleNamespace(
        Pickler=Python2Pickler, dump=lambda obj, f, protocol: Python2Pickler(f, protocol).dump(obj), __name__="pickle"
    )
    torch.save({"model": parts_of(ours), "opt": opt}, tmp_path / "a.pth.tar", pickle_module=python2, _use_new_zipfile_serialization=False)
    assert torch.equal(scores_of(load_official(tmp_path / "a.pth.tar"), inputs), scores_of(ours, inputs))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, zip_format: bool):
    torch.save({"model": [{}, {}], "opt": Hostile(tmp_path / "ran")}, tmp_path / "bad.pth.tar", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"refused: .*system"):
        load_official(tmp_path / "bad.pth.tar")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_and_a_text_file_are_refused(tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    (tmp_path / "b.pt").write_text("not a checkpoint")
    (tmp_path / "c.pt").write_bytes(b"")
    for name in "abc":
        with pytest.raises(ValueError, match="refused"):
            load_official(tmp_path / f"{name}.pt")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "absent.pt")


def test_missing_and_unexpected_keys_are_named(tmp_path: Path):
    image, text, rest = parts_of(SGR(**SIZES))
    del rest["t_global_w.embedding_common.0.weight"]
    rest["surprise"] = torch.zeros(1)
    torch.save({"model": [image, text, rest]}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match=r"missing t_global_w.embedding_common.0.weight.*unexpected surprise"):
        load_official(tmp_path / "a.pth.tar")


def test_absent_batch_counters_are_tolerated(tmp_path: Path):
    image, text, rest = parts_of(SGR(**SIZES))
    kept = OrderedDict((key, value) for key, value in rest.items() if not key.endswith("num_batches_tracked"))
    torch.save({"model": [image, text, kept]}, tmp_path / "a.pth.tar")
    assert load_official(tmp_path / "a.pth.tar").kind == "sgr"


def test_a_file_of_another_family_is_refused_with_what_it_holds(tmp_path: Path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"no known family.*layer\.weight"):
        load_official(tmp_path / "a.pt")


def test_a_scan_checkpoint_without_its_options_names_them_and_takes_them_from_the_caller(tmp_path: Path):
    content = torch.load(SGRAF / "scan_t2i_lse" / "model_best.pth.tar", weights_only=False)
    torch.save({"model": content["model"]}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="cross_attn, raw_feature_norm"):
        load_official(tmp_path / "a.pth.tar")
    options = dict(cross_attn="i2t", raw_feature_norm="l2norm", agg_func="Mean", lambda_softmax=4.0, lambda_lse=5.0)
    assert load_official(tmp_path / "a.pth.tar", **options).cross_attn == "i2t"


def vocabulary(path: Path, size: int) -> Path:
    words = ["<pad>", "<start>", "<end>", "<unk>", *(f"w{i}" for i in range(size - 4))]
    path.write_text(json.dumps({"word2idx": {word: i for i, word in enumerate(words)}, "idx2word": {}, "idx": size}))
    return path


@pytest.mark.parametrize("case", ["sgr", "saf", "scan_i2t_mean"])
def test_import_writes_a_folder_that_scores_as_the_checkpoint(tmp_path: Path, case: str):
    checkpoint = SGRAF / case / "model_best.pth.tar"
    import_checkpoint(checkpoint, tmp_path / "matcher", vocab=vocabulary(tmp_path / "v.json", 50))
    loaded, inputs = load_matcher_folder(tmp_path / "matcher"), batch()
    assert torch.equal(scores_of(loaded, inputs), scores_of(load_official(checkpoint), inputs))
    assert loaded.inputs.captions(["w1 w2 unheard"]).tokens.tolist() == [[1, 5, 6, 3, 2]]


def test_import_refuses_a_vocabulary_of_another_size_or_none(tmp_path: Path):
    checkpoint = SGRAF / "sgr" / "model_best.pth.tar"
    with pytest.raises(ValueError, match="has 40 words.*embeds 50"):
        import_checkpoint(checkpoint, tmp_path / "m", vocab=vocabulary(tmp_path / "v.json", 40))
    with pytest.raises(ValueError, match="needs --vocab"):
        import_checkpoint(checkpoint, tmp_path / "m")
    with pytest.raises(ValueError, match="the vocabulary has 7"):
        load_official(checkpoint, vocab_size=7)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("names", ["openai", "huggingface"])
def test_clip_under_either_naming_gives_hugging_faces_features(tmp_path: Path, names: str):
    model = tiny_clip()
    torch.save(openai_names(model) if names == "openai" else model.state_dict(), tmp_path / "clip.pt")
    matcher = load_official(tmp_path / "clip.pt", **({} if names == "openai" else {"heads": 1, "hidden_act": "quick_gelu"}))
    tokens = torch.tensor([[5, 6, 7, 59], [8, 9, 10, 59]])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        got = matcher.encode_captions(Captions(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(2))).vector
        want = model.text_projection(model.text_model(input_ids=tokens).last_hidden_state[:, -1])
        got_image = matcher.encode_images(Images(torch.arange(2), pixels=pixels)).vector
        want_image = model.visual_projection(
            model.vision_model(pixel_values=matcher.normalise(Images(torch.arange(2), pixels=pixels))).pooler_output
        )
    torch.testing.assert_close(got, torch.nn.functional.normalize(want, dim=-1))
    torch.testing.assert_close(got_image, torch.nn.functional.normalize(want_image, dim=-1))


def test_a_cusa_checkpoint_brings_its_heads_and_leaves_its_temperatures(tmp_path: Path):
    clip = {f"clip_model.{key}": value for key, value in openai_names(tiny_clip()).items() if key != "logit_scale"}
    heads = {
        f"{norm}{use}_{side}_projection.{kind}": torch.randn((24, 24) if kind == "weight" and not norm else (24,))
        for norm in ("ln_", "")
        for use in ("cross", "uni")
        for side in ("image", "text")
        for kind in ("weight", "bias")
    }
    taus = {name: torch.tensor(0.5) for name in ("tau", "cross_tau_image", "cross_tau_text", "uni_tau", "cross_the_softlabel_tau")}
    torch.save({"model": {**clip, **heads, **taus}, "config": {"lr": 1e-5}, "epoch": 2, "best": 1.0}, tmp_path / "best.pth")
    matcher = load_official(tmp_path / "best.pth")
    assert torch.equal(matcher.text_heads.uni.linear.weight, heads["uni_text_projection.weight"])
    assert torch.equal(matcher.image_heads.cross.norm.bias, heads["ln_cross_image_projection.bias"])
    assert checkpoint_module._is_cusa(matcher)
    assert not checkpoint_module._is_cusa(CLIP(vocab_size=matcher.backbone.config.text_config.vocab_size, config=matcher.options["config"]))
    assert len(RENAMED) == len({pattern for pattern, _ in RENAMED})


def test_a_clip_of_another_vocabulary_is_refused(tmp_path: Path):
    torch.save(openai_names(tiny_clip()), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"embeds 60 tokens, the tokenizer has 49408: use its own tokenizer"):
        load_official(tmp_path / "clip.pt", vocab_size=49408)


def test_a_clip_that_lacks_a_tensor_names_it(tmp_path: Path):
    state = openai_names(tiny_clip())
    del state["visual.ln_pre.weight"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (tmp_path / "clip.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"missing backbone\.vision_model\.pre_layrnorm\.weight"):
        load_official(tmp_path / "clip.pt")


def test_field_case_08_an_option_that_a_family_does_not_read_is_refused(tmp_path: Path):
    for case, option in (("sgr", "cross_attn"), ("scan_t2i_lse", "heads")):
        with pytest.raises(ValueError, match=f"unknown option {option}: a SC?A?N?G?R?A?F? checkpoint takes"):
            load_official(SGRAF / case / "model_best.pth.tar", **{option: 1})


@pytest.mark.parametrize("what", ["threshold", "glove"])
def test_a_checkpoint_of_naaf_is_no_scan(tmp_path: Path, what: str):
    content = torch.load(SGRAF / "scan_t2i_lse" / "model_best.pth.tar", weights_only=False)
    if what == "threshold":
        content["opt"].thres, content["opt"].thres_safe = 0.1, 0.2
    else:
        content["model"][1]["embed.glove.weight"] = content["model"][1].pop("embed.weight")
    torch.save(content, tmp_path / "naaf.pth.tar")
    with pytest.raises(
        ValueError, match=r"naaf\.pth\.tar: this is a checkpoint of NAAF.*recipes uarda-\* train its positive feature branch"
    ):
        load_official(tmp_path / "naaf.pth.tar")
