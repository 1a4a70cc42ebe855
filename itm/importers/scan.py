"""The authors' SCAN and SGRAF checkpoints (`model_best.pth.tar`): list of state dicts [image, text(, similarity)] plus their options.

Layout: docs/methods/scan.md#checkpoints and docs/methods/sgraf.md#checkpoints. Sizes come from the tensors; what the tensors cannot tell
(direction, norms, temperatures) from `opt`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from itm.importers.state import bare_tensors, check_options, fill, tensor_of
from itm.matchers.late.scan import SCAN
from itm.matchers.late.sgraf import SAF, SGR
from itm.types import Matcher

FAMILY = "SCAN or SGRAF"
SCORING = ("cross_attn", "raw_feature_norm", "agg_func", "lambda_softmax", "lambda_lse")


def own_name(part: int, key: str) -> str:
    """The name a tensor of part 0 (image), 1 (text) or 2 (similarity) of the authors' list has in our matcher."""
    if part == 1:
        key = key.removeprefix("cap_")
    return ("image.", "text.", "")[part] + key


def load_scan(checkpoint: dict[str, Any], **needed: Any) -> Matcher:
    """SCAN, SGR or SAF with the weights of a checkpoint, in evaluation mode. `needed` overrules or supplies options of `opt`.

    Raises ValueError for NAAF's, and naming missing options, missing or unexpected keys, tensors of another shape, another `vocab_size`.
    """
    options = {**_as_dict(checkpoint.get("opt")), **needed}
    parts = checkpoint["model"]
    if "thres" in options or any("glove." in key for key in parts[1]):
        raise ValueError(
            "this is a checkpoint of NAAF (it holds a threshold, or GloVe vectors): its score has branches that no matcher here has. The "
            "recipes uarda-* train its positive feature branch"
        )
    towers_read = ("vocab_size", "no_imgnorm", "no_txtnorm")
    check_options(needed, (*towers_read, *SCORING) if len(parts) == 2 else towers_read, "SCAN" if len(parts) == 2 else "SGRAF")
    state = {own_name(i, key): value for i, part in enumerate(parts) for key, value in bare_tensors(part).items()}
    words = tensor_of(state, "text.embed.weight", FAMILY)
    wanted = needed.get("vocab_size")
    if wanted is not None and wanted != words.shape[0]:
        raise ValueError(f"the checkpoint embeds {words.shape[0]} words, the vocabulary has {wanted}: use its own vocabulary file")
    towers = {"vocab_size": words.shape[0], "image": _image(state, options), "text": _text(state, options)}
    matcher = _scan(towers, options) if len(parts) == 2 else _sgraf(towers, state)
    fill(matcher, state)
    return matcher.eval()


def _as_dict(opt: Any) -> dict[str, Any]:
    return dict(opt) if isinstance(opt, dict) else dict(vars(opt)) if opt is not None else {}


def _image(state: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    weight_norm = "image.fc.weight_v" in state
    weight = tensor_of(state, "image.fc.weight_v" if weight_norm else "image.fc.weight", FAMILY)
    if weight_norm and "image.fc.weight_g" in state:
        state["image.fc.weight_g"] = state["image.fc.weight_g"].reshape(())
    width, in_width = weight.shape
    return {"kind": "regions", "in_width": in_width, "width": width, "normalize": not options.get("no_imgnorm"), "weight_norm": weight_norm}


def _text(state: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    layers = sum(key.startswith("text.rnn.weight_hh_l") and not key.endswith("_reverse") for key in state)
    return {
        "kind": "gru",
        "word_dim": state["text.embed.weight"].shape[1],
        "width": tensor_of(state, "text.rnn.weight_hh_l0", FAMILY).shape[1],
        "layers": layers,
        "bidirectional": "text.rnn.weight_hh_l0_reverse" in state,
        "normalize": not options.get("no_txtnorm"),
    }


def _scan(towers: dict[str, Any], options: dict[str, Any]) -> Matcher:
    absent = [name for name in SCORING if name not in options]
    if absent:
        raise ValueError(f"the SCAN checkpoint does not say {', '.join(absent)}: pass them, e.g. load_official(path, {absent[0]}=...)")
    return SCAN(**towers, **{name: options[name] for name in SCORING})


def _sgraf(towers: dict[str, Any], state: dict[str, Tensor]) -> Matcher:
    sizes: dict[str, Any] = {
        "sim_dim": tensor_of(state, "sim_tranloc_w.weight", FAMILY).shape[0],
        "regions": tensor_of(state, "v_global_w.embedding_local.1.weight", FAMILY).shape[0],
    }
    towers["text"]["dropout"] = 0.4
    if any(key.startswith("SAF_module.") for key in state):
        return SAF(**towers, **sizes)
    steps = {key.split(".")[1] for key in state if key.startswith("SGR_module.")}
    if not steps:
        raise ValueError("the third part of the checkpoint holds neither SGR_module nor SAF_module: only SGR and SAF are known")
    return SGR(**towers, **sizes, steps=len(steps))
