"""Unicom: files under the released names, an independent forward pass in float64, its preparation, and files that are none."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines
from itm.config import Part, load_recipe
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.data.sidecar import teacher_id
from itm.importers import load_official
from itm.teachers import unicom
from itm.teachers.identity import build_teacher
from itm.teachers.unicom import Unicom, UnicomTeacher
from tests.support.tiny_unicom import DEPTH, EMBEDDING, HEADS, PATCH, PATCHES, SIDE, WIDTH, saved, weights


@pytest.fixture
def file(tmp_path: Path) -> str:
    return saved(tmp_path / "FP16-tiny.pt", weights())


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def by_hand(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Both taps of one image (3,S,S), float64: a patch and a head at a time."""
    w = {key: value.double().numpy() for key, value in weights().items()}
    kernel = w["patch_embed.proj.weight"].reshape(WIDTH, -1)
    corners = [(top, left) for top in range(0, SIDE, PATCH) for left in range(0, SIDE, PATCH)]
    patches = [pixels[:, top : top + PATCH, left : left + PATCH].ravel() for top, left in corners]
    x = np.stack([kernel @ patch + w["patch_embed.proj.bias"] for patch in patches]) + w["pos_embed"][0]
    for block in (f"blocks.{k}" for k in range(DEPTH)):
        qkv = layer_norm(x, w, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T
        size, read = WIDTH // HEADS, []
        for head in range(HEADS):
            q, k, v = (qkv[:, part * WIDTH + head * size :][:, :size] for part in range(3))
            logits = q @ k.T / np.sqrt(size)
            share = np.exp(logits - logits.max(1, keepdims=True))
            read.append(share / share.sum(1, keepdims=True) @ v)
        x = x + np.concatenate(read, 1) @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]
        inner = layer_norm(x, w, f"{block}.norm2") @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        x = x + np.clip(inner, 0, 6) @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"]
    trunk = vector = layer_norm(x, w, "norm").ravel()
    for linear, norm in ((0, 1), (2, 3)):
        vector = w[f"feature.{linear}.weight"] @ vector
        vector = (vector - w[f"feature.{norm}.running_mean"]) / np.sqrt(w[f"feature.{norm}.running_var"] + 2e-5)
        vector = vector * w[f"feature.{norm}.weight"] + w[f"feature.{norm}.bias"]
    return {"trunk": trunk, "final": vector}


def sample(image: Image.Image, kind: str = "PNG", **said: Any) -> Sample:
    buffer = io.BytesIO()
    image.save(buffer, kind, **said)
    return Sample("k", buffer.getvalue(), None, [Caption("0", "a photo")], {})


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("tap", ["trunk", "final"])
def test_both_taps_are_those_of_an_independent_forward_pass(file: str, tap: str) -> None:
    teacher = build_teacher(Part(kind="unicom", options={"path": file, "tap": tap}), "image")
    images = [noise(k, 24, 24) for k in range(3)]
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    want = [by_hand(((np.asarray(image) / 255 - mean) / deviation).transpose(2, 0, 1))[tap] for image in images]
    assert teacher.width == len(want[0]) == {"trunk": PATCHES * WIDTH, "final": EMBEDDING}[tap]
    assert np.abs(teacher([sample(image) for image in images]) - np.stack(want)).max() < 2e-5


def test_a_photo_is_resized_at_its_short_side_and_cut_at_the_centre_as_torchvision_rounds_it(file: str) -> None:
    teacher, image = UnicomTeacher(file), noise(1, 59, 48)  # 59 -> 29 beside 24: of 5 too many, 2 go on the left
    want = np.asarray(image.resize((29, 24), Image.Resampling.BICUBIC).crop((2, 0, 26, 24)))
    prepare = pickle.loads(pickle.dumps(teacher.prepare))
    assert prepare(sample(image)) == want.tobytes()


def test_photos_are_turned_as_their_exif_says_unless_as_released(file: str) -> None:
    exif, image = Image.Exif(), noise(2, 24, 24)
    exif[0x0112] = 3  # upside down
    photo = sample(image, exif=exif)
    as_released = UnicomTeacher(file, exif=False)
    assert as_released.prepare(photo) == image.tobytes()
    assert UnicomTeacher(file).prepare(photo) == image.transpose(Image.Transpose.ROTATE_180).tobytes()


def test_a_file_may_have_the_prefix_of_a_wrapper_and_lie_below_a_container(tmp_path: Path, file: str) -> None:
    wrapped = saved(tmp_path / "w.pt", {"state_dict": {f"module.{key}": value for key, value in weights().items()}})
    rows = [sample(noise(3, 24, 24))]
    assert np.array_equal(UnicomTeacher(wrapped)(rows), UnicomTeacher(file)(rows))


def test_half_precision_is_near_another_identity_and_never_trains(file: str) -> None:
    rows = [sample(noise(k, 24, 24)) for k in range(4)]
    whole, half = UnicomTeacher(file, "final"), UnicomTeacher(file, "final", precision="fp16")
    off = np.abs(whole(rows) - half(rows)).max() / np.abs(whole(rows)).max()
    assert 0 < off < 2e-2
    assert not half.model.training and not any(p.requires_grad for p in half.model.parameters())


def test_the_identity_follows_weights_tap_precision_and_exif_but_not_the_folder(tmp_path: Path, file: str) -> None:
    base = UnicomTeacher(file).identity
    (tmp_path / "moved").mkdir()
    assert UnicomTeacher(saved(tmp_path / "moved" / "FP16-tiny.pt", weights())).identity == base
    other = saved(tmp_path / "moved" / "FP16-tiny.pt", weights(1))
    changed = [{"tap": "final"}, {"precision": "fp16"}, {"exif": False}, {"heads": 4}]
    ids = [teacher_id(UnicomTeacher(file, **options).identity) for options in changed] + [teacher_id(UnicomTeacher(other).identity)]
    assert len({*ids, teacher_id(base)}) == 6


def test_a_released_file_is_known_by_its_bytes(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert UnicomTeacher(file).identity["model"] == "FP16-tiny.pt"
    monkeypatch.setitem(unicom.RELEASED, hashlib.sha256(Path(file).read_bytes()).hexdigest(), "ViT-B-32")
    assert UnicomTeacher(file).identity["model"] == "ViT-B-32"
    assert teacher_id(UnicomTeacher(file).identity).startswith("unicom-ViT-B-32-")


def test_the_released_sizes_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Unicom(patch=32, patches=49, width=768, hidden=3072, depth=12, heads=12, embedding=512)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(116.72, abs=0.005)
    assert model.width == {"trunk": 37632, "final": 512} and model.image_size == 224


def test_a_published_recipe_takes_the_weights_in_place_of_the_stored_vectors(file: str) -> None:
    given = f"teachers.image={{kind: unicom, options: {{path: {file}, exif: false}}}}"  # as docs/methods/cusa.md#teachers has it
    part = load_recipe(Path(pipelines.__file__).parent / "recipes" / "cusa-clip-b32-f30k.yaml", [given]).teachers.image
    assert part is not None
    assert build_teacher(part, "image").identity == UnicomTeacher(file, exif=False).identity


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights().items() if name != key}


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a key is missing": (without("blocks.1.attn.proj.bias"), {}, r"missing blocks\.1\.attn\.proj\.bias"),
    "a class token": (weights() | {"cls_token": torch.zeros(1, 1, WIDTH)}, {}, "unexpected cls_token"),
    "another model": ({"visual.proj": torch.zeros(4, 4)}, {}, r"does not fit Unicom: missing pos_embed"),
    "another size": (
        weights() | {"feature.0.weight": torch.zeros(WIDTH, 5)},
        {},
        rf"feature\.0\.weight is \(128, 5\), expected \(128, {PATCHES * WIDTH}\)",
    ),
    "no square": (weights() | {"pos_embed": torch.zeros(1, 10, WIDTH)}, {}, "10 positions"),
    "flat positions": (weights() | {"pos_embed": torch.zeros(PATCHES, WIDTH)}, {}, r"pos_embed is \(9, 128\), expected 3 axes"),
    "heads": (weights(), {"heads": 3}, "heads=3 do not divide the width 128"),
    "no weights": ([1, 2], {}, "it holds a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_unicom_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, options, said = WRONG[name]
    with pytest.raises(ValueError, match=rf"(?s)teacher unicom, path \S+wrong\.pt: .*{said}"):
        UnicomTeacher(saved(tmp_path / "wrong.pt", content), **options)


def test_other_refusals_name_the_option_or_the_file(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match=r"path \S+absent\.pt: no checkpoint"):
        UnicomTeacher(str(tmp_path / "absent.pt"))
    with pytest.raises(ValueError, match="tap 'pooled'; known: trunk, final"):
        UnicomTeacher(file, tap="pooled")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision 'bf16'"):
        UnicomTeacher(file, precision="bf16")  # type: ignore[arg-type]
    narrow = {key: torch.zeros(1, PATCHES, 60) if key == "pos_embed" else value for key, value in weights().items()}
    with pytest.raises(ValueError, match=r"number of heads at width 60: give the teacher option heads"):
        UnicomTeacher(saved(tmp_path / "narrow.pt", narrow))
    with pytest.raises(ValueError, match=r"FP16-tiny\.pt is a vision transformer alone.*kind: unicom"):
        load_official(file)
