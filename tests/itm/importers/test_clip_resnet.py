"""OpenAI's ResNet CLIPs: every layer equals the package openai-clip, and the matcher works wherever another CLIP does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import itm
from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import WordVocabulary
from itm.exporters.huggingface import write_huggingface
from itm.importers import load_official
from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.matchers.clip import CLIP
from itm.matchers.folder import save_matcher
from itm.training.recompute import recompute_activations
from itm.types import Captions, Images
from tests.support.openai_names import openai_class

SIZES = {"embed_dim": 24, "image_resolution": 64, "vision_layers": (1, 2, 1, 2), "vision_width": 4, "vision_patch_size": None}
SIZES |= {"context_length": 9, "vocab_size": 60, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2}
TOKENS = torch.tensor([[5, 6, 59, 0, 0, 0, 0, 0, 0], [8, 9, 10, 11, 59, 0, 0, 0, 0]])
NAMES = {"visual.layer1": "vision_model.layer1", "visual.layer2": "vision_model.layer2", "visual.layer3": "vision_model.layer3"}
NAMES |= {"visual.bn3": "vision_model.bn3", "visual.layer2.1": "vision_model.layer2.1", "visual.layer4": "vision_model.layer4"}
NAMES |= {"visual.attnpool": "vision_model.attnpool", "ln_final": "text_model.final_layer_norm"}
NAMES |= {f"transformer.resblocks.{k}": f"text_model.encoder.layers.{k}" for k in range(2)}


def openai_resnet(**sizes: Any) -> Any:
    """OpenAI's own class with random weights, norms and running statistics (its own beginning leaves whole blocks at zero)."""
    torch.manual_seed(0)
    model = openai_class()(**{**SIZES, **sizes}).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value.copy_(torch.rand(value.shape) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            value.copy_(torch.randn(value.shape) / 5)
    return model


def pixels_of(rows: int, side: int = 64) -> Images:
    generator = torch.Generator().manual_seed(rows)
    return Images(torch.arange(rows), pixels=torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator))


def seen(module: nn.Module, names: Any, run: Any) -> dict[str, Tensor]:
    """What the named modules give while `run` runs; copies, since OpenAI's activations write over it."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: found.__setitem__(name, (out[0] if isinstance(out, tuple) else out).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def imported(tmp_path: Path) -> tuple[Any, Any]:
    model = openai_resnet()
    torch.save(model.state_dict(), tmp_path / "RN.pt")
    return model, load_official(tmp_path / "RN.pt", heads=[2, 1])


def test_every_layer_gives_what_openais_gives(imported: tuple[Any, Any]) -> None:
    model, matcher = imported
    images, captions = pixels_of(3), Captions(TOKENS, TOKENS > 0, torch.arange(2))
    theirs = seen(model, NAMES, lambda: (model.encode_image(matcher.normalise(images)), model.encode_text(TOKENS)))
    ours = seen(matcher.backbone, NAMES.values(), lambda: (matcher.encode_images(images), matcher.encode_captions(captions)))
    for name, own in NAMES.items():
        want, got = theirs[name], ours[own]
        if name.startswith("transformer"):  # theirs are (L,N,D), and padding differs
            want = want.transpose(0, 1)
        if want.dim() == 3:
            rows = TOKENS > 0
            want, got = want[:, : TOKENS.shape[1]][rows], got[rows]
        assert (got - want).abs().max() <= 1e-5 * max(1, float(want.abs().max())), name
        assert want.std() > 1e-3, name


def test_both_encoders_give_openais_vectors_at_unit_length(imported: tuple[Any, Any]) -> None:
    model, matcher = imported
    images = pixels_of(4)
    with torch.no_grad():
        want = model.encode_image(matcher.normalise(images)), model.encode_text(TOKENS)
        got = matcher.encode_images(images).vector, matcher.encode_captions(Captions(TOKENS, TOKENS > 0, torch.arange(2))).vector
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, nn.functional.normalize(theirs, dim=-1), atol=1e-5, rtol=1e-5)
    assert matcher.image_size == 64 and matcher.options["resnet"] == {"layers": [1, 2, 1, 2], "width": 4, "heads": 2, "image_size": 64}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*", "ignore::torch.jit.TracerWarning")
def test_an_archive_is_read_as_the_state_dict_is(imported: tuple[Any, Any], tmp_path: Path) -> None:
    model, matcher = imported
    torch.jit.trace(model, (torch.randn(2, 3, 64, 64), TOKENS)).save(str(tmp_path / "RN50.pt"))
    again: Any = load_official(tmp_path / "RN50.pt", heads=[2, 1])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in matcher.state_dict().items())


def test_heads_are_openais_at_its_own_widths_and_asked_for_elsewhere(tmp_path: Path) -> None:
    state = openai_resnet().state_dict()
    torch.save(state, tmp_path / "RN.pt")
    with pytest.raises(ValueError, match=r"do not tell num_attention_heads of the vision tower.*heads=<number>"):
        load_official(tmp_path / "RN.pt")
    with pytest.raises(ValueError, match=r"heads=3 do not divide the width 128 of the vision tower"):
        load_official(tmp_path / "RN.pt", heads=[3, 1])
    whole = openai_resnet(vision_layers=(1, 1, 1, 1), vision_width=64, image_resolution=32)
    torch.save(whole.state_dict(), tmp_path / "RN50.pt")
    matcher: Any = load_official(tmp_path / "RN50.pt")
    assert matcher.options["resnet"]["heads"] == whole.visual.attnpool.num_heads == 32
    images = pixels_of(2, side=32)
    with torch.no_grad():
        want = nn.functional.normalize(whole.encode_image(matcher.normalise(images)), dim=-1)
        torch.testing.assert_close(matcher.encode_images(images).vector, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["visual.layer3.0.bn2.running_var", "visual.attnpool.c_proj.weight", "visual.layer1.0.conv1.weight"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    state = openai_resnet().state_dict()
    del state[key]
    torch.save(state, tmp_path / "RN.pt")
    with pytest.raises(ValueError, match=rf"RN\.pt: .*missing backbone\.{key.replace('visual', 'vision_model')}"):
        load_official(tmp_path / "RN.pt", heads=[2, 1])


def test_a_folder_gives_the_same_vectors_and_transformers_has_no_class_for_it(imported: tuple[Any, Any], tmp_path: Path) -> None:
    _, matcher = imported
    matcher.inputs = Inputs(ImageInput(size=64), WordVocabulary.from_captions(["a red square on a blue circle"], max_length=9))
    save_matcher(matcher, tmp_path / "matcher")
    again: Any = itm.load_matcher(tmp_path / "matcher")
    with torch.no_grad():
        assert torch.equal(again.encode_images(pixels_of(2)).vector, matcher.encode_images(pixels_of(2)).vector)
    with pytest.raises(ValueError, match="a ResNet as its image tower, which transformers' CLIPModel has not: export it to onnx"):
        write_huggingface(again, tmp_path / "hf")


def test_it_trains_and_runs_again_with_the_same_gradients(imported: tuple[Any, Any]) -> None:
    _, matcher = imported
    images, gradients = pixels_of(4), []
    for again in (False, True):
        matcher.train().zero_grad()
        if again:
            recompute_activations(matcher)
        matcher.encode_images(images).vector[:, 0].sum().backward()
        gradients.append(matcher.backbone.vision_model.conv1.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_sizes_that_make_no_resnet_are_refused() -> None:
    text = {"text_config": {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}}
    resnet = {"layers": [1, 1, 1, 1], "width": 4, "heads": 2, "image_size": 64}

    def build(**options: Any) -> Any:
        return build_part(MATCHERS, "clip", {"config": text, **options}, "model", vocab_size=60)

    assert isinstance(build(resnet=resnet), CLIP)
    refused: dict[str, Any] = {
        "four stages": {"layers": [1, 1]},
        "multiple of 32": {"image_size": 40},
        "heads=3": {"heads": 3},
        "deep": {"deep": 1},
    }
    for said, wrong in refused.items():
        with pytest.raises(ValueError, match=said):
            build(resnet=resnet | wrong)
    with pytest.raises(ValueError, match="resnet needs layers, width, heads, image_size, and config in the place of path"):
        build(resnet={"layers": [1, 1, 1, 1]})
