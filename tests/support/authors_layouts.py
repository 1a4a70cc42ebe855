"""Tiny data folders in exactly the layouts that the authors of SCAN, SGRAF, NAAF, CUSA and IAIS published, below one working folder.

data/{f30k,coco}_precomp/{train,dev,test(,testall)}_{ims.npy,caps.txt,ids.txt}, vocab/{f30k,coco}_precomp_vocab.json
data/{f30k,coco}/{new_{split}.json,{split}_unicom.npy,pics/*.jpg}
data/uniter/{img_db,txt_db}/...                     LMDBs; two text and two image databases for COCO's training
weights/{clip-224,clip-336,text,uniter}             what the recipes download, in a few numbers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from itm.data.preprocess import ImageInput, Inputs
from itm.data.text import SPECIAL, HFTokenizer
from itm.kinds import build_part
from itm.matchers import MATCHERS
from itm.matchers.folder import save_matcher

REGIONS, WIDTH = 36, 8
TRAIN, DEV, TEST = 16, 12, 10
WORDS = """a the red blue green dog cat horse man woman ball tree house runs sits near on with two small""".split()  # noqa: SIM905
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PHOTOS = {"f30k": 1000092795, "coco": 391895}  # the number of the first photo; Flickr30K names a photo by it, COCO pads it to 12 digits


def photo(name: str, number: int, split: str) -> str:
    return f"{number}.jpg" if name == "f30k" else f"COCO_{'train2014' if split == 'train' else 'val2014'}_{number:012d}.jpg"


def captions(number: int) -> list[str]:
    draws = np.random.default_rng(number)
    return [" ".join(draws.choice(WORDS, size=draws.integers(4, 9))) + " ." for _ in range(5)]


def sizes(name: str) -> dict[str, int]:
    return {"train": TRAIN, "dev": DEV, "test": TEST} | ({"testall": TEST} if name == "coco" else {})


def first_number(name: str, split: str) -> int:
    """Photos of different splits are different ones, but for COCO's test, which is the first part of testall."""
    return PHOTOS[name] + 100 * ["train", "dev", "testall", "test"].index("testall" if split == "test" else split)


def precomp(root: Path, name: str) -> None:
    """F30K's arrays hold an image once, COCO's training array once a caption (5x)."""
    folder = root / "data" / f"{name}_precomp"
    folder.mkdir(parents=True)
    for split, count in sizes(name).items():
        numbers = [first_number(name, split) + k for k in range(count)]
        rows = np.stack([np.random.default_rng(n).random((REGIONS, WIDTH), np.float32) for n in numbers])
        times = 5 if name == "coco" and split == "train" else 1
        np.save(folder / f"{split}_ims.npy", rows.repeat(times, 0))
        (folder / f"{split}_ids.txt").write_text("".join(f"{n}\n" for n in numbers for _ in range(times)))
        (folder / f"{split}_caps.txt").write_text("".join(f"{text}\n" for n in numbers for text in captions(n)))
    words = [*SPECIAL, ".", *WORDS]
    vocab = {"word2idx": {w: i for i, w in enumerate(words)}, "idx2word": {str(i): w for i, w in enumerate(words)}, "idx": len(words)}
    (root / "vocab").mkdir(exist_ok=True)
    (root / "vocab" / f"{name}_precomp_vocab.json").write_text(json.dumps(vocab))


def cusa(root: Path, name: str) -> None:
    """Lists of one row a caption, photos, and the image teacher's pickled dicts of (1, D) rows; training needs `train` alone."""
    folder = root / "data" / name
    (folder / "pics").mkdir(parents=True)
    for split, ours in (("train", "train"), ("val", "dev"), ("test", "test")):
        rows, vectors = [], {}
        for number in (first_number(name, ours) + k for k in range(sizes(name)[ours])):
            file, draws = photo(name, number, split), np.random.default_rng(number)
            Image.fromarray(draws.integers(0, 256, (24, 32, 3), np.uint8)).resize((320, 240)).save(folder / "pics" / file, quality=80)
            rows += [{"image_path": f"./pics/{file}", "caption": text, "image_id": file} for text in captions(number)]
            vectors[file] = draws.standard_normal((1, 12)).astype(np.float32)
        (folder / f"new_{split}.json").write_text(json.dumps(rows))
        np.save(folder / f"{split}_unicom.npy", np.array(vectors, dtype=object))


def uniter(root: Path, name: str) -> None:
    """Image databases of 10 to 100 regions; text databases of word pieces alone, as IAIS tokenises, so that the vocabulary is needed."""
    images = {"f30k": {"flickr30k": ["train", "dev", "test"]}, "coco": {"coco_train2014": ["train"], "coco_val2014": ["dev", "test"]}}
    base = root / "data" / "uniter"
    names = {split: _archives(name, split) for split in ("train", "dev", "test")}
    for folder, splits in images[name].items():
        held = [file for split in splits for file in names[split] if name == "f30k" or folder in file]
        held += [file for file in names["train"] if folder in file and file not in held]
        _image_database(base / "img_db" / folder, held)
    (base / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    if name == "f30k":
        parts = {f"itm_flickr30k_{theirs}_base-cased.db": names[ours] for theirs, ours in THEIR_SPLITS.items()}
    else:
        parts = {f"itm_coco_{theirs}_base-cased.db": names[ours] for theirs, ours in THEIR_SPLITS.items() if theirs != "train"}
        parts["itm_coco_train_base-cased.db"] = [n for n in names["train"] if "train2014" in n]
        parts["itm_coco_restval_base-cased.db"] = [n for n in names["train"] if "val2014" in n]
    for folder, held in parts.items():
        _text_database(base / "txt_db" / folder, held)


THEIR_SPLITS = {"train": "train", "val": "dev", "test": "test"}


def _archives(name: str, split: str) -> list[str]:
    """COCO's training images come from train2014 and, its restval part, from val2014."""
    numbers = [first_number(name, split) + k for k in range(sizes(name)[split])]
    if name == "f30k":
        return [f"flickr30k_{number:012d}.npz" for number in numbers]
    return [f"coco_{'train2014' if split == 'train' and k % 4 else 'val2014'}_{number:012d}.npz" for k, number in enumerate(numbers)]


def _number(archive: str) -> int:
    return int(archive.removesuffix(".npz").rpartition("_")[2])


def _write(folder: Path, entries: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as writing:
        for key, value in entries.items():
            writing.put(key.encode(), value)


def _image_database(folder: Path, names: list[str]) -> None:
    entries: dict[str, bytes] = {"__keys__": json.dumps(names).encode()}
    counts = {}
    for name in names:
        draws = np.random.default_rng(_number(name))
        counts[name] = int(draws.integers(10, 15))
        corners = np.sort(draws.random((counts[name], 2, 2)), 1).reshape(-1, 4)
        held = {"norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1), "conf": draws.random(counts[name])}
        held["features"] = draws.random((counts[name], WIDTH))
        entries[name] = msgpack.packb({key: _packed(value.astype(np.float16)) for key, value in held.items()})
    _write(folder / "feat_th0.2_max100_min10", entries)
    (folder / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))


def _packed(array: np.ndarray) -> dict[bytes, Any]:
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def _text_database(folder: Path, names: list[str]) -> None:
    entries, owner, lengths = {}, {}, {}
    for name in names:
        for place, text in enumerate(captions(_number(name))):
            key, ids = f"{_number(name)}{place}", [PIECES.index(word) for word in text.removesuffix(" .").split()]
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "lz4") as out:
                out.write(msgpack.packb({"input_ids": ids, "img_fname": name}))
            entries[key], owner[key], lengths[key] = sink.getvalue().to_pybytes(), name, len(ids)
    _write(folder, entries)
    by_image = {name: [key for key in owner if owner[key] == name] for name in names}
    said = {"id2len": lengths, "txt2img": owner, "img2txts": by_image, "meta": {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1}}
    for file, value in said.items():
        (folder / f"{file}.json").write_text(json.dumps(value))


def weights(root: Path) -> None:
    """CLIP for 224 and 336 pixels, a sentence model, and a UNITER matcher folder, each with its tokenizer."""
    torch.manual_seed(0)
    for size in (224, 336):
        folder = root / "weights" / f"clip-{size}"
        _clip_tokenizer(folder)
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = tower | {"vocab_size": len(WORDS) + 3, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
        vision = tower | {"image_size": size, "patch_size": size // 2}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    words = root / "weights" / "text"
    _bert_tokenizer(words)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(PIECES), **config)).save_pretrained(words)
    options = {"hidden": 16, "layers": 2, "heads": 2, "region_dim": WIDTH}
    matcher = build_part(MATCHERS, "uniter", options, "model", vocab_size=len(PIECES))
    matcher.inputs = Inputs(ImageInput("regions", max_regions=100), HFTokenizer(words, max_length=62, clean=False))
    save_matcher(matcher, root / "weights" / "uniter")


def _bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)


def _clip_tokenizer(folder: Path) -> None:
    vocab = {word: i for i, word in enumerate(["<start>", "<end>", "<unk>", *WORDS])}
    raw = RawTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    made.model_max_length = 77
    folder.mkdir(parents=True)
    made.save_pretrained(folder)


def everything(root: Path) -> None:
    for name in PHOTOS:
        precomp(root, name)
        cusa(root, name)
        uniter(root, name)
    weights(root)
