from __future__ import annotations

import json
from itertools import islice, product

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from itm.config import Text
from itm.data.text import HFTokenizer, WordVocabulary, build_tokenizer, clean_caption, clip_tokenizer, load_tokenizer, words
from itm.data.treebank import treebank_words

CAPTIONS = ["A red circle, left of a blue square.", "a blue disc; a red square"]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [("Two  dogs,   playing!", "two dogs playing"), ("<PERSON>'s T-shirt/cap", "person s t shirt cap"), ("a\tb ends.\n\n", "a\tb ends")],
)
def test_clean_up_follows_the_eight_steps(raw, cleaned):
    assert clean_caption(raw) == cleaned


def test_clean_up_keeps_the_first_64_words():
    assert clean_caption(" ".join(map(str, range(80)))).split(" ") == [str(i) for i in range(64)]


@pytest.mark.parametrize("raw", ["", "  ", "...!?", "\n", "--//--"])
def test_a_caption_without_a_word_is_refused(raw):
    with pytest.raises(ValueError, match="no word after the clean-up"):
        clean_caption(raw)


def test_words_split_contractions_and_keep_hyphens_as_scan_did():
    assert words("The dog's T-shirt doesn't fit.") == ["the", "dog", "'s", "t-shirt", "does", "n't", "fit", "."]


def test_a_vocabulary_does_not_depend_on_the_order_of_the_captions():
    a, b = WordVocabulary.from_captions(CAPTIONS), WordVocabulary.from_captions(CAPTIONS[::-1])
    assert a.word2idx == b.word2idx
    assert list(a.word2idx)[:5] == ["<pad>", "<start>", "<end>", "<unk>", "a"]


def test_rare_and_unseen_words_become_unknown_and_padding_is_masked():
    vocabulary = WordVocabulary.from_captions(CAPTIONS, min_count=2)
    tokens, mask = vocabulary(["a red zebra", "a"])
    ids = vocabulary.word2idx
    assert tokens.tolist() == [[1, ids["a"], ids["red"], 3, 2], [1, ids["a"], 2, 0, 0]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_a_cut_caption_keeps_its_end_and_is_counted():
    vocabulary = WordVocabulary.from_captions(CAPTIONS, max_length=5)
    tokens, _ = vocabulary(["a red blue square", "a red square"])
    assert tokens.shape == (2, 5)
    assert tokens[:, -1].tolist() == [2, 2]
    assert vocabulary.truncated == 1


def test_an_sgraf_vocabulary_file_is_read_and_keeps_its_ids(tmp_path):
    word2idx = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "zebra": 4, "a": 5, ".": 6}
    (tmp_path / "f30k_precomp_vocab.json").write_text(json.dumps({"word2idx": word2idx, "idx2word": {}, "idx": 7}))
    vocabulary = WordVocabulary.from_json(tmp_path / "f30k_precomp_vocab.json", clean=False)
    assert vocabulary(["A zebra."])[0].tolist() == [[1, 5, 4, 6, 2]]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A man's dog can't run, but the boys' can.", "a man 's dog ca n't run , but the boys ' can ."),
        ('He said "hi" to 3,000 people at 3:00 (twice).', "he said `` hi '' to 3,000 people at 3:00 ( twice ) ."),
        ('"Stop" and/or t-shirt... x -- y; z.\n', "`` stop '' and/or t-shirt ... x -- y ; z ."),
        ("They cannot wait: it's gonna rain & I'm wet!", "they can not wait : it 's gon na rain & i 'm wet !"),
        ("Mr. Smith. A dog.", "mr. smith . a dog ."),
        ("rock 'n' roll, 'quoted'.", "rock 'n ' roll , ' quoted ' ."),
    ],
)
def test_treebank_words_are_those_of_the_authors_vocabularies(caption, found):
    assert treebank_words(caption, {"mr."}) == found.split()


def test_an_authors_vocabulary_cuts_as_it_was_made_and_keeps_that_when_saved(tmp_path):
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "``", "''", "and/or", "u.s.", ".", "flag"]
    content = {
        "word2idx": {word: i for i, word in enumerate(words)},
        "idx2word": {str(i): w for i, w in enumerate(words)},
        "idx": len(words),
    }
    (tmp_path / "f30k_precomp_vocab.json").write_text(json.dumps(content))
    vocabulary = WordVocabulary.from_json(tmp_path / "f30k_precomp_vocab.json", clean=False)
    vocabulary.save(tmp_path / "saved")
    for each in (vocabulary, load_tokenizer(tmp_path / "saved")):
        assert each(['A "U.S." flag. And/or a'])[0].tolist() == [[1, 4, 5, 8, 6, 10, 9, 7, 4, 2]]


def test_a_vocabulary_with_holes_is_refused_with_its_file_named(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "a": 9}}))
    with pytest.raises(ValueError, match=r"bad\.json.*each id below 5 once"):
        WordVocabulary.from_json(tmp_path / "bad.json")


def test_a_word_vocabulary_survives_saving(tmp_path):
    before = build_tokenizer(Text(max_length=9, clean=False), CAPTIONS)
    before.save(tmp_path)
    after = load_tokenizer(tmp_path)
    assert (after.word2idx, after.max_length, after.clean) == (before.word2idx, 9, False)


def tiny_hf(folder):
    """A word-level Hugging Face tokenizer on disk: [CLS] words [SEP]."""
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle"])}
    raw = RawTokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_a_hugging_face_tokenizer_pads_cuts_counts_and_survives_saving(tmp_path):
    tokenizer = HFTokenizer(tiny_hf(tmp_path / "hf"), max_length=5)
    tokens, mask = tokenizer(["A red circle!", "a red circle a red", "a"])
    assert tokens.tolist() == [[2, 4, 5, 6, 3], [2, 4, 5, 6, 3], [2, 4, 3, 0, 0]]
    assert mask.sum(1).tolist() == [5, 5, 3]
    assert (tokenizer.truncated, tokenizer.vocab_size) == (1, 7)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(["a red circle a red"])[0].tolist() == [[2, 4, 5, 6, 3]]


def test_a_clip_merges_file_makes_clips_tokenizer(tmp_path):
    """256 bytes, the same at a word's end, then the merges: `h` is 71, `he` at a word's end is the first merge, 512."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    others = [f"{a} {b}" for a, b in islice(product(letters, letters), 48893)]
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(["#version: 0.2", "h e</w>", *others, "not read"]))
    tokenizer = clip_tokenizer(merges)
    assert len(tokenizer) == 49408
    assert tokenizer("he h")["input_ids"] == [49406, 512, 71 + 256, 49407]


def test_missing_sources_are_named():
    with pytest.raises(ValueError, match=r"text\.path"):
        build_tokenizer(Text(kind="hf"))
    with pytest.raises(ValueError, match="training captions"):
        build_tokenizer(Text())
    with pytest.raises(ValueError, match="holds no Hugging Face tokenizer"):
        HFTokenizer("/nowhere/at/all")


def test_field_case_07_a_caption_of_punctuation_gives_a_vocabulary_no_word_and_stops_nothing():
    assert WordVocabulary.from_captions(["a man", "...", "!?"]).word2idx == WordVocabulary.from_captions(["a man"]).word2idx
