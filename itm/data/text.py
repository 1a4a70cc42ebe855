"""Captions to token ids: CUSA's clean-up, a word vocabulary (SCAN family) and any Hugging Face tokenizer behind one call.

    tokens, mask = tokenizer(["a red circle", ...])      # int64 (N,L), bool (N,L), padded to the longest of the call

A tokenizer has `vocab_size`, `max_length` (start and end included) and `truncated`, the number of captions it has cut so far.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from itm.config import Text
from itm.data import files
from itm.data.formats import check_format
from itm.data.treebank import treebank_words
from itm.packaged import located

Rules = Literal["plain", "treebank"]
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
SETTINGS, FORMAT = "text.json", 1
VOCABULARY = "vocabulary.json"

_PUNCTUATION = str.maketrans(dict.fromkeys(",.'!?\"()*#:;~-/", " "))
_SPACES = re.compile(r"\s{2,}")
_WORD = re.compile(r"\w+(?=n't\b)|n't\b|'\w+|\w+(?:-\w+)*|[^\w\s]")


def clean_caption(text: str, max_words: int = 64) -> str:
    """CUSA's caption clean-up (docs/methods/cusa.md#caption-clean-up): lower case, punctuation to spaces, first `max_words` words.

    Raises ValueError when nothing is left.
    """
    cleaned = text.lower().translate(_PUNCTUATION).replace("<person>", "person")
    cleaned = _SPACES.sub(" ", cleaned).rstrip("\n").strip(" ")
    cleaned = " ".join(cleaned.split(" ")[:max_words])
    if not cleaned:
        raise ValueError(f"caption {text!r} holds no word after the clean-up; drop it, or set text.clean=false")
    return cleaned


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, n't and 's split off, hyphens kept."""
    return _WORD.findall(text.lower())


class WordVocabulary:
    """Word -> id. Ids 0..3 are <pad> <start> <end> <unk>; the others follow in alphabetical order unless read from a file.

    rules: `plain` cuts captions by `words`, `treebank` as the authors' vocabulary files were made.
    """

    def __init__(self, word2idx: dict[str, int], *, max_length: int = 64, clean: bool = True, rules: Rules = "plain") -> None:
        """Raises ValueError when the four special words do not have the ids 0..3 or an id is used twice."""
        if [word2idx.get(word) for word in SPECIAL] != [0, 1, 2, 3]:
            raise ValueError(f"a word vocabulary must map {', '.join(SPECIAL)} to 0, 1, 2, 3")
        if sorted(word2idx.values()) != list(range(len(word2idx))):
            raise ValueError(f"a word vocabulary of {len(word2idx)} words must use each id below {len(word2idx)} once")
        self.word2idx = dict(word2idx)
        self.vocab_size = len(word2idx)
        self.max_length = max_length
        self.clean, self.rules = clean, rules
        self.truncated = 0

    @classmethod
    def from_captions(cls, texts: Iterable[str], min_count: int = 1, *, max_length: int = 64, clean: bool = True) -> WordVocabulary:
        """The words seen at least `min_count` times; the same for the same set of captions in any order.

        A caption that cleans to nothing has none: whoever reads it quarantines it.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            with contextlib.suppress(ValueError):
                counts.update(words(clean_caption(text) if clean else text))
        kept = sorted(word for word, count in counts.items() if count >= min_count)
        return cls({word: i for i, word in enumerate([*SPECIAL, *kept])}, max_length=max_length, clean=clean)

    @classmethod
    def from_json(cls, path: str | Path, *, max_length: int = 64, clean: bool = True) -> WordVocabulary:
        """A vocabulary file of SCAN or SGRAF (`word2idx` and `idx2word` inside; treebank rules), or one of ours.

        Their captions were not cleaned: give clean=False for their weights. Raises ValueError naming the file when it holds no vocabulary.
        """
        try:
            content = json.loads(files.read_bytes(path))
            rules = content.get("rules", "treebank" if "idx2word" in content else "plain")
            return cls(content["word2idx"], max_length=max_length, clean=clean, rules=rules)
        except OSError as error:
            raise ValueError(f"cannot read the word vocabulary {path}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no word vocabulary (json with word2idx): {error}") from None

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N,L) int64 ids with start and end, and (N,L) bool mask. Raises ValueError for a caption that cleans to nothing."""
        rows = [self._encode(text) for text in texts]
        return _pad(rows, 0)

    def _encode(self, text: str) -> list[int]:
        unknown = self.word2idx["<unk>"]
        text = clean_caption(text) if self.clean else text
        found = treebank_words(text, self.word2idx) if self.rules == "treebank" else words(text)
        ids = [self.word2idx.get(word, unknown) for word in found]
        self.truncated += len(ids) > self.max_length - 2
        return [1, *ids[: self.max_length - 2], 2]

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / VOCABULARY).write_text(json.dumps({"word2idx": self.word2idx, "rules": self.rules}))
        _write_settings(folder, kind="words", max_length=self.max_length, clean=self.clean)


class HFTokenizer:
    """A Hugging Face tokenizer by hub name or folder; a CLIP merges file (`bpe_simple_vocab_16e6.txt.gz`) also does."""

    def __init__(self, path: str | Path, *, max_length: int = 64, clean: bool = True) -> None:
        """Raises ValueError when `path` holds no tokenizer."""
        self.hf = clip_tokenizer(path) if str(path).endswith((".txt", ".txt.gz")) else _load_hf(path)
        if self.hf.pad_token is None and self.hf.eos_token is not None:
            self.hf.pad_token = self.hf.eos_token
        self.vocab_size = len(self.hf)
        self.max_length = min(max_length, self.hf.model_max_length)
        self.clean = clean
        self.truncated = 0

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N,L) int64 ids and (N,L) bool mask; a longer caption keeps its end token. Raises ValueError as `clean_caption`."""
        cleaned = [clean_caption(text) if self.clean else text for text in texts]
        rows = self.hf(cleaned, truncation=True, max_length=self.max_length)["input_ids"]
        full = [i for i, row in enumerate(rows) if len(row) == self.max_length]
        if full:
            whole = self.hf([cleaned[i] for i in full], verbose=False)["input_ids"]
            self.truncated += sum(len(row) > self.max_length for row in whole)
        return _pad(rows, self.hf.pad_token_id or 0)  # where it has none the mask hides what stands there

    def save(self, folder: str | Path) -> None:
        self.hf.save_pretrained(str(folder))
        _write_settings(folder, kind="hf", max_length=self.max_length, clean=self.clean)


Tokenizer = WordVocabulary | HFTokenizer


def build_tokenizer(text: Text, captions: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of a recipe. A word vocabulary without `text.path` is made from `captions`.

    Raises ValueError naming the key that is missing.
    """
    if text.kind == "hf":
        if text.path is None:
            raise ValueError("text.kind=hf needs text.path: a tokenizer's hub name or folder")
        return HFTokenizer(text.path, max_length=text.max_length, clean=text.clean)
    if text.path is not None:
        return WordVocabulary.from_json(text.path, max_length=text.max_length, clean=text.clean)
    if captions is None:
        raise ValueError("text.kind=words needs text.path (a word-vocabulary json) or the training captions")
    return WordVocabulary.from_captions(captions, text.min_count, max_length=text.max_length, clean=text.clean)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """What `save` wrote. Raises ValueError when the folder holds no tokenizer of ours, NewerFormat."""
    path = Path(folder) / SETTINGS
    if not path.exists():
        raise ValueError(f"no {path}: the folder does not hold a saved tokenizer")
    settings = json.loads(path.read_text())
    check_format(str(path), settings, FORMAT)
    settings.pop("format", None)
    kind = settings.pop("kind")
    if kind == "words":
        return WordVocabulary.from_json(Path(folder) / VOCABULARY, **settings)
    return HFTokenizer(folder, **settings)


def clip_tokenizer(merges: str | Path) -> Any:
    """CLIP's tokenizer from its merges file: 256 bytes, the same at a word's end, 48,894 merges, start and end (49,408 ids, length 77)."""
    from transformers import CLIPTokenizer

    data = Path(merges).read_bytes()
    lines = (gzip.decompress(data) if str(merges).endswith(".gz") else data).decode().split("\n")
    pairs = lines[1 : 49152 - 256 - 2 + 1]
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(pair.replace(" ", "") for pair in pairs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair.split()) for pair in pairs], model_max_length=77)  # type: ignore[misc]


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in CLIP's order: the printable bytes first, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def brief(error: BaseException, most: int = 300) -> str:
    """The first lines of a message of another library, some of which list all they know over thousands of characters."""
    said = " ".join(str(error).split())
    return said if len(said) <= most else f"{said[:most].rsplit(' ', 1)[0]} ..."


def _load_hf(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(located(str(path)))
    except (OSError, ValueError) as error:
        raise ValueError(f"text.path={str(path)!r} holds no Hugging Face tokenizer: {brief(error)}") from None


def _pad(rows: list[list[int]], filler: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows), default=0)
    tokens = torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), longest)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return tokens, torch.arange(longest) < lengths[:, None]


def _write_settings(folder: str | Path, **settings: object) -> None:
    (Path(folder) / SETTINGS).write_text(json.dumps(settings))
