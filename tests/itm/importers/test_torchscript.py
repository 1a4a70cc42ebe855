"""TorchScript archives: tensors and names as PyTorch reads them, OpenAI's CLIP with its features, nothing else ever read or run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from itm.importers.load import load_official, read_checkpoint
from itm.types import Captions, Images
from tests.support.openai_names import openai_class, openai_names, tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*", "ignore::torch.jit.TracerWarning")


def tree(state: dict[str, torch.Tensor]) -> nn.Module:
    """A module tree with these parameters, to be scripted."""
    root = nn.Module()
    for name, value in state.items():
        owner, (*path, leaf) = root, name.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.register_parameter(leaf, nn.Parameter(value))
    return root


def archive(path: Path, module: nn.Module) -> Path:
    torch.jit.script(module).save(str(path))
    return path


class Mixed(nn.Module):
    """Half precision, integers, a view with strides, a shared tensor, lists and numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).half())
        self.turned = nn.Parameter(torch.randn(5, 2).T)
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("shared", self.count[1:])
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.sizes, self.names, self.rate = [1, 2], {"a": 1}, 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sizes[0]


def test_every_tensor_is_the_one_that_pytorch_reads(tmp_path: Path):
    path = archive(tmp_path / "a.pt", Mixed())
    got, want = read_checkpoint(path), torch.jit.load(path).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)


def test_an_archive_under_openais_names_gives_hugging_faces_features(tmp_path: Path):
    model = tiny_clip()
    matcher: Any = load_official(archive(tmp_path / "ViT.pt", tree(openai_names(model)).half()))
    tokens = torch.tensor([[5, 6, 7, 59], [8, 9, 10, 59]])
    with torch.no_grad():
        got = matcher.encode_captions(Captions(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(2))).vector
        want = model.half().float().text_projection(model.text_model(input_ids=tokens).last_hidden_state[:, -1])
    torch.testing.assert_close(got, nn.functional.normalize(want, dim=-1), atol=1e-5, rtol=1e-5)


def test_a_traced_openai_model_gives_its_own_features(tmp_path: Path):
    sizes = {"embed_dim": 24, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16}
    sizes |= {"context_length": 9, "vocab_size": 60, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2}
    model = openai_class()(**sizes).eval()
    tokens = torch.tensor([[5, 6, 59, 0, 0, 0, 0, 0, 0], [8, 9, 10, 11, 59, 0, 0, 0, 0]])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.jit.trace(model, (torch.randn(2, 3, 32, 32), tokens)).save(str(tmp_path / "ViT-B-32.pt"))
    matcher: Any = load_official(tmp_path / "ViT-B-32.pt")
    images = Images(torch.arange(2), pixels=pixels)
    with torch.no_grad():
        want = model.encode_image(matcher.normalise(images)), model.encode_text(tokens)
        got = matcher.encode_images(images).vector, matcher.encode_captions(Captions(tokens, tokens > 0, torch.arange(2))).vector
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, nn.functional.normalize(theirs, dim=-1), atol=1e-5, rtol=1e-5)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def rewritten(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A copy of an archive with some records replaced; "data/0" is spelt data_0."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            key = name.partition("/")[2].removesuffix(".pkl").replace("/", "_")
            new.writestr(name, records.get(key, old.read(name)))
    return target


def test_a_hostile_archive_is_refused_and_does_not_run(tmp_path: Path):
    plain = archive(tmp_path / "plain.pt", nn.Linear(2, 2))
    bad = rewritten(plain, tmp_path / "bad.pt", data=pickle.dumps({"w": Hostile(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"refused: it holds (posix|nt)\.system"):
        load_official(bad)
    assert not (tmp_path / "ran").exists()


def huge(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """data.pkl of a module with one tensor of this size on the storage 0 of four floats."""

    class Writer(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", Global("torch", "FloatStorage"), "0", "cpu", 4) if value == "storage 0" else None

        def save(self, value: Any, save_persistent_id: bool = True) -> None:
            if isinstance(value, Global):
                self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
                return
            super().save(value, save_persistent_id)

    out = io.BytesIO()
    writer = Writer(out, 2)
    writer.write(pickle.PROTO + b"\x02")
    for part in (Global("__torch__", "M"), ()):
        writer.save(part)
    writer.write(pickle.NEWOBJ + pickle.EMPTY_DICT)
    for part in ("w", Global("torch._utils", "_rebuild_tensor_v2"), ("storage 0", 0, size, stride, False, None)):
        writer.save(part)
    writer.write(pickle.REDUCE + pickle.SETITEM + pickle.BUILD + pickle.STOP)
    return out.getvalue()


class Global:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


@pytest.mark.parametrize(
    ("size", "stride", "reason"),
    [((4,), (1,), None), ((10**6, 10**6), (0, 0), "on 4 numbers"), ((2,), (9,), "no whole"), ((-1, -1), (1, 1), "no whole")],
)
def test_a_tensor_beyond_its_bytes_is_refused(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], reason: str | None):
    plain = archive(tmp_path / "plain.pt", nn.Linear(2, 2))
    path = rewritten(plain, tmp_path / "bad.pt", data=huge(size, stride), data_0=torch.arange(4.0).numpy().tobytes())
    if reason is None:
        assert read_checkpoint(path)["w"].tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(ValueError, match=f"refused: .*{reason}"):
        read_checkpoint(path)


def test_compressed_records_and_cut_files_are_refused(tmp_path: Path):
    plain = archive(tmp_path / "plain.pt", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is compressed"):
        read_checkpoint(rewritten(plain, tmp_path / "small.pt", zipfile.ZIP_DEFLATED))
    (tmp_path / "cut.pt").write_bytes(plain.read_bytes()[:-40])
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(tmp_path / "cut.pt")
