"""The authors' UNITER and IAIS checkpoints (`.pt`): pre-trained (230 tensors for base) and fine-tuned for retrieval (214).

Our UNITER has their names, so loading is a check: every key is consumed or belongs to a named pre-training head. Sizes come from the
tensors; only the number of heads cannot be seen in them (64 numbers a head in both published sizes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from itm.importers.state import bare_tensors, fill, tensor_of
from itm.matchers.joint.uniter import UNITER

FAMILY = "UNITER"
PRETRAINING_HEADS = ("cls.", "feat_regress.", "region_classifier.")
HEAD_WIDTH = 64


def load_uniter(state: Mapping[str, object], **needed: Any) -> UNITER:
    """The matcher of a flat state dict, float32, in evaluation mode; `matcher.dropped` names the pre-training keys that were left out.

    `rank_output`, absent from pre-trained files, is copied from row 1 (match) of `itm_output`. `needed`: `heads` for a hidden size that
    is no multiple of 64, `vocab_size` to be compared with the file, and any other option of UNITER (dropout, score_tokens, ...).
    Raises ValueError naming missing or unexpected keys, shapes that do not fit, another vocabulary size, or `heads` when it is needed.
    """
    tensors = {_own_name(key): value.float() for key, value in bare_tensors(state).items()}
    dropped = sorted(key for key in tensors if key.startswith(PRETRAINING_HEADS))
    kept = {key: value for key, value in tensors.items() if key not in set(dropped)}
    for part in ("weight", "bias"):
        if f"rank_output.{part}" not in kept and f"itm_output.{part}" in kept:
            kept[f"rank_output.{part}"] = kept[f"itm_output.{part}"][1:2].clone()
    matcher = UNITER(**{**_sizes(kept, needed), **{k: v for k, v in needed.items() if k != "vocab_size"}})
    fill(matcher, kept)
    matcher.dropped = dropped
    return matcher.eval()


def _own_name(key: str) -> str:
    """With today's names for the two parameters of a LayerNorm."""
    return ".".join({"gamma": "weight", "beta": "bias"}.get(part, part) for part in key.split("."))


def _sizes(state: dict[str, Tensor], needed: dict[str, Any]) -> dict[str, Any]:
    words = tensor_of(state, "uniter.embeddings.word_embeddings.weight", FAMILY)
    vocab_size, hidden = words.shape
    wanted = needed.get("vocab_size", vocab_size)
    if wanted != vocab_size:
        raise ValueError(f"the checkpoint embeds {vocab_size} word pieces, the tokenizer has {wanted}: use bert-base-cased, as UNITER does")
    if "heads" not in needed and hidden % HEAD_WIDTH:
        raise ValueError(f"the number of heads cannot be told from a hidden size of {hidden}: give heads=<number>")
    layers = {int(found[1]) for key in state if (found := re.match(r"uniter\.encoder\.layer\.(\d+)\.", key))}
    return {
        "vocab_size": vocab_size,
        "hidden": hidden,
        "layers": max(layers, default=0) + 1,
        "heads": hidden // HEAD_WIDTH,
        "intermediate": tensor_of(state, "uniter.encoder.layer.0.intermediate.dense.weight", FAMILY).shape[0],
        "positions": tensor_of(state, "uniter.embeddings.position_embeddings.weight", FAMILY).shape[0],
        "region_dim": tensor_of(state, "uniter.img_embeddings.img_linear.weight", FAMILY).shape[1],
    }
