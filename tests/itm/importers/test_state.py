"""Wrappers and containers of any nesting are taken off, and what does not fit is named with its file."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from itm.importers.load import load_official
from itm.importers.state import bare_name, bare_tensors, fill, state_of
from itm.matchers.joint.uniter import UNITER
from tests.support import GOLDEN
from tests.support.openai_names import openai_names, tiny_clip

UNITER_SIZES = {"vocab_size": 20, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 24, "positions": 9, "region_dim": 6}
ORDERS = [order for n in (1, 2, 3) for order in itertools.permutations(("module.", "_orig_mod.", "model."), n)]


def renamed(state: dict[str, Any], prefix: str) -> OrderedDict[str, Any]:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def same(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(order))
def test_field_case_14_every_order_of_wrappers_gives_the_bare_name(order: tuple[str, ...]):
    for key in ("visual.proj", "uniter.encoder.layer.0.output.dense.weight", "SGR_module.0.graph_query_w.weight", "tau"):
        assert bare_name("".join(order) + key) == key


def test_torchs_own_wrappers_are_taken_off():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    model[1] = torch.compile(model[1], backend="eager")  # a layer inside
    wrapped = torch.nn.DataParallel(torch.compile(torch.nn.DataParallel(model), backend="eager"))
    assert sorted(wrapped.state_dict())[0] == "module._orig_mod.module.0.bias"
    found = bare_tensors(wrapped.state_dict())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_name_inside_a_model_is_no_wrapper():
    assert bare_name("feat_regress.net.0.weight") == "feat_regress.net.0.weight"
    assert bare_name("backbone.model.weight") == "backbone.model.weight"
    assert bare_name("module") == "module"


def test_the_state_is_found_below_any_nesting_of_containers():
    flat = {"visual.proj": torch.zeros(1)}
    for content in (
        flat,
        {"state_dict": flat},
        {"model": {"state_dict": flat, "lr": 1}},
        {"epoch": 1, "module": {"model_state_dict": flat}},
    ):
        assert state_of(content) == flat


@pytest.mark.parametrize("order", [("module.", "_orig_mod."), ("_orig_mod.", "module."), ("model.", "_orig_mod.", "module.")])
def test_field_case_14_wrapped_checkpoints_of_every_family_give_the_weights_of_the_bare_ones(tmp_path: Path, order: tuple[str, ...]):
    prefix = "".join(order)
    clip, uniter = openai_names(tiny_clip()), UNITER(**UNITER_SIZES).state_dict()
    for state, needed in ((clip, {}), ({f"clip_model.{key}": value for key, value in clip.items()}, {}), (uniter, {"heads": 2})):
        bare = load_official(saved(tmp_path, state), **needed)
        lightning = {"epoch": 3, "name": "n", "state_dict": renamed(state, prefix), "hyper_parameters": {"lr": 1.0}}
        assert same(load_official(saved(tmp_path, lightning), **needed), bare)
    authors = GOLDEN / "sgraf" / "sgr" / "model_best.pth.tar"
    content = torch.load(authors, weights_only=False)
    content["model"] = [renamed(part, prefix) for part in content["model"]]
    assert same(load_official(saved(tmp_path, content)), load_official(authors))


def test_a_model_beside_its_average_is_refused_with_both_keys(tmp_path: Path):
    state = openai_names(tiny_clip())
    both = renamed(state, "model.") | renamed(state, "module.")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .*holds \S+ twice, as model\.\S+ and as module\.\S+"):
        load_official(saved(tmp_path, both))


def test_keys_that_do_not_fit_are_named_with_the_file(tmp_path: Path):
    state = openai_names(tiny_clip())
    del state["visual.ln_pre.weight"]
    state["teacher.weight"] = torch.zeros(2)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt: .*missing backbone\.vision_model\.pre_layrnorm\.weight.*unexpected .*teacher\.weight"
    ):
        load_official(saved(tmp_path, renamed(state, "module._orig_mod.")))


def test_many_keys_that_do_not_fit_are_counted():
    wide = {f"k{n}": torch.zeros(1) for n in range(30)}
    with pytest.raises(ValueError, match=r"missing bias, weight; unexpected k0, .* and 22 more"):
        fill(torch.nn.Linear(2, 2), wide)


def test_every_tensor_that_is_missing_is_named(tmp_path: Path):
    clip, uniter = openai_names(tiny_clip()), UNITER(**UNITER_SIZES).state_dict()
    spared = {"visual.proj", "logit_scale", "rank_output.weight", "rank_output.bias"}  # decides the family; no weight; made from others
    for state in (clip, uniter):
        for key in state.keys() - spared:
            with pytest.raises(ValueError, match=r"checkpoint\.pt: checkpoint does not fit .*missing ") as told:
                load_official(
                    saved(tmp_path, {name: value for name, value in state.items() if name != key}),
                    **({} if state is clip else {"heads": 2}),
                )
            assert len(str(told.value)) < 600
