"""Several crops of an image, each a row of its own: what teach writes, verify recomputes, training reads and export hands on."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image
from pyarrow import ipc

from itm.config import Part, parse_recipe
from itm.data.pairs import Pairs, Work
from itm.data.pixels import decode
from itm.data.plan import Plan
from itm.data.preprocess import ImageInput, Inputs, draw, random_box
from itm.data.records import Caption, Record
from itm.data.shards import read_manifest
from itm.data.sidecar import find_store, open_store, read_sidecar
from itm.data.text import WordVocabulary
from itm.exporters.teachers import export_stores
from itm.teachers.identity import build_teacher, choice_of
from itm.teachers.image import StatisticsTeacher
from itm.teachers.online import Online, OnlineTeachers
from itm.types import Batch, Captions, Images
from pipelines.teaching import driver as stage
from pipelines.teaching.inspection import inspect
from pipelines.teaching.recompute import verify
from pipelines.training.preparation import store_of
from tests.support.small_teaching import pack, recipe, samples

pytest_plugins = ["tests.support.teaching_fixtures"]
SMALL = {"kind": "statistics", "options": {"size": 16}}
VIEWS = {"kind": "views", "options": {"of": SMALL, "count": 3, "seed": 5, "flip": True}}


def photos(count: int, bad: int | None = None) -> list[Record]:
    """Smooth random colours, so that a crop by the training path and one by the teacher's differ by rounding alone."""
    records = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((100, 80), Image.Resampling.BICUBIC).save(out, "PNG")
        data = b"\x89PNG broken" if number == bad else out.getvalue()
        records.append(Record(f"k{number}", "train", [Caption(f"c{number}", "a photo of colours")], data, "png"))
    return records


def unit(vectors: np.ndarray) -> np.ndarray:
    whole = np.asarray(vectors, np.float64)
    return whole / np.linalg.norm(whole, axis=-1, keepdims=True)


def crops(sample, seed: int = 5, count: int = 3) -> list[Image.Image]:
    """What the teacher must have seen, cut with PIL alone."""
    whole, found = decode(sample.image), []
    for view in range(count):
        numbers = draw(seed, view, sample.key)
        left, top, right, bottom = random_box(*whole.size, numbers)
        side = max(1, round(max(right - left, bottom - top)))
        crop = whole.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        found.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if numbers.mirror < 0.5 else crop)
    return found


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_every_crop_has_a_row_of_its_own_and_the_vector_of_that_crop(here):
    pack(here, photos(6, bad=4))
    wanted = recipe(here, VIEWS, max_reject_rate=0.3)
    uri = stage.teach(wanted)["image"]
    store = open_store(uri)
    assert (store.views, len(store.shards)) == (3, 2)
    assert stage.flow_line(uri) == "6 images, 3 views each = 5 with a vector + 1 rejected"
    rows = [store.sidecar(f"{n:05d}.tar") for n in range(2)]
    assert rows[0].header.format == 2
    assert rows[0].keys == [f"k{n}" for n in range(4) for _ in range(3)]
    assert rows[1].ok.tolist() == [False] * 3 + [True] * 3, "an image that cannot be read has no view"
    teacher = StatisticsTeacher(16)
    for row, sample in enumerate(samples(here)[:4]):
        live = teacher([type(sample)(sample.key, png(crop), None, [], {}) for crop in crops(sample)])
        assert np.abs(unit(live) - rows[0].vectors[3 * row : 3 * row + 3]).max() < 1e-3
    assert np.abs(rows[0].vectors[0].astype(float) - rows[0].vectors[1]).max() > 1e-2, "crops of these images differ"
    assert verify(wanted, rows=4)[0].ok
    assert inspect(uri).healthy


def test_the_control_of_views_hands_all_views_of_an_image_to_another(here):
    pack(here, photos(5))
    shuffled = {"kind": "shuffled", "options": {"of": VIEWS, "seed": 1}}
    wanted = recipe(here, shuffled)
    stage.teach(wanted)
    root = str(here / "train" / "teachers")
    true, wrong = (find_store(root, choice_of(Part.model_validate(part), "image", "fp16")) for part in (VIEWS, shuffled))
    assert wrong.views == 3
    given, handed = (
        np.concatenate([s.sidecar(x.name).vectors for x in read_manifest(str(here / "train")).shards]).reshape(5, 3, -1)
        for s in (true, wrong)
    )
    donors = [[j for j in range(5) if np.abs(handed[i] - given[j]).max() < 1e-3] for i in range(5)]
    assert sorted(j for (j,) in donors) == list(range(5))
    assert all(donor != [i] for i, donor in enumerate(donors))
    assert verify(wanted, rows=4)[0].ok


def batches(here, store, crop: str = "center", flip: bool = False):
    """The pairs of two epochs of one step, by epoch: keys, teacher vectors and pixels in the order of the keys."""
    manifest = read_manifest(str(here / "train"))
    inputs = Inputs(ImageInput(size=32, crop=crop, flip=flip), WordVocabulary.from_captions(["a photo of colours"] * 5))
    pairs = Pairs(str(here / "train"), manifest, Plan.of(manifest, seed=0, batch=4), inputs, {"image": store})
    for step in range(2):
        columns = pairs.prepare(pairs.fetch(Work(step, 0, 0)))
        order = np.argsort(columns["key"])
        yield columns["teacher_image"][order], columns["pixels"].reshape(4, 32, 32, 3)[order]


def test_training_reads_the_mean_of_the_views(here):
    pack(here, photos(4))
    wanted = recipe(here, VIEWS)
    stage.teach(wanted)
    store = store_of(wanted, read_manifest(str(here / "train")), "image")
    views = store.sidecar("00000.tar").vectors.reshape(4, 3, -1).astype(np.float64)
    for vectors, _ in batches(here, store):
        assert np.abs(vectors - views.mean(1)).max() < 1e-6


def test_training_reads_one_view_an_epoch_and_the_model_sees_the_crop_of_the_teacher(here):
    pack(here, photos(4))
    wanted = recipe(here, VIEWS, crop="random", flip=True)
    stage.teach(wanted)
    one = wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"views": "one"})})
    store = store_of(one, read_manifest(str(here / "train")), "image")
    views = store.sidecar("00000.tar").vectors.reshape(4, 3, -1)
    for epoch, (vectors, pixels) in enumerate(batches(here, store, "random", flip=True)):
        assert np.array_equal(vectors, views[:, epoch].astype(np.float32))
        for sample, seen in zip(samples(here), pixels, strict=True):
            theirs = np.asarray(crops(sample)[epoch].resize((32, 32), Image.Resampling.BILINEAR), float)
            others = [np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR), float) for crop in crops(sample)]
            assert np.abs(theirs - seen).mean() < 4
            assert np.argmin([np.abs(other - seen).mean() for other in others]) == epoch


def test_an_online_teacher_of_views_gives_the_mean_that_a_store_would(here):
    pack(here, photos(4))
    wanted = recipe(here, VIEWS)
    stage.teach(wanted.model_copy(update={"teachers": wanted.teachers.model_copy(update={"dtype": "fp32"})}))
    online = OnlineTeachers({"image": Online.of(wanted.teachers, "image")}, 64, torch.device("cpu"))
    payloads = [online.prepare["image"](sample) for sample in samples(here)]
    empty = Images(torch.arange(4)), Captions(torch.ones(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool), torch.arange(4))
    taught = online.taught(Batch(*empty), {"online_image": payloads}).teacher.image
    (folder,) = (here / "train" / "teachers").glob("views-*")
    stored = open_store(str(folder)).sidecar("00000.tar").vectors.reshape(4, 3, -1)
    assert np.abs(taught.numpy() - stored.mean(1)).max() < 1e-6
    with pytest.raises(ValueError, match=r"take image out of teachers\.online"):
        Online.of(wanted.teachers.model_copy(update={"views": "one"}), "image")


def test_what_cannot_be_read_one_view_at_a_time_is_refused_by_name(here):
    pack(here, photos(4))
    wanted = recipe(here, VIEWS)
    stage.teach(wanted)
    manifest = read_manifest(str(here / "train"))

    def with_views(part, **data):
        at = parse_recipe(recipe(here, part, **data).model_dump() | {"teachers": {"image": part, "views": "one"}})
        return store_of(at, manifest, "image")

    with pytest.raises(ValueError, match=r"set data\.crop=random and data\.flip=true"):
        with_views(VIEWS)
    with pytest.raises(ValueError, match=r"set data\.crop=random and data\.flip=true"):
        with_views(VIEWS, crop="random")
    stage.teach(recipe(here, SMALL))
    with pytest.raises(ValueError, match=r"has one vector an image; take the teacher `views`"):
        with_views(SMALL, crop="random")
    with pytest.raises(ValueError, match=r"count 1; one view is the teacher 'statistics' itself"):
        build_teacher(Part(kind="views", options={"of": SMALL, "count": 1}), "image")
    with pytest.raises(ValueError, match="several views of each image already"):
        build_teacher(Part(kind="views", options={"of": VIEWS}), "image")
    with pytest.raises(ValueError, match="is a teacher of texts"):
        build_teacher(Part(kind="views", options={"of": {"kind": "scenes_text"}}), "image")


def test_export_hands_on_every_view_and_cusas_form_the_mean(here, tmp_path):
    pack(here, photos(4))
    uri = stage.teach(recipe(here, VIEWS))["image"]
    store, split = open_store(uri), str(here / "train")
    views = store.sidecar("00000.tar").vectors.reshape(4, 3, -1).astype(np.float32)
    for form in ("parquet", "webdataset", "npy"):
        (done,) = export_stores(form, [store], split, str(tmp_path / form))
        if form == "parquet":
            table = pq.read_table(done.uri)
            assert table["view"].to_pylist() == [0, 1, 2] * 4
            assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32).reshape(views.shape), views)
        elif form == "webdataset":
            read = list(wds.WebDataset(str(tmp_path / form / "00000.tar"), shardshuffle=False, empty_check=False))
            assert all(np.array_equal(np.load(io.BytesIO(x["teacher_image.npy"])), v) for x, v in zip(read, views, strict=True))
        else:
            held = np.load(done.uri, allow_pickle=True).item()
            assert done.vectors == 4
            assert all(np.allclose(held[f"k{n}"][0], unit(views[n].mean(0)), atol=1e-5) for n in range(4))


def test_a_sidecar_whose_views_are_not_whole_is_refused(here):
    pack(here, photos(4))
    uri = stage.teach(recipe(here, VIEWS))["image"]
    path = f"{uri}/00000.arrow"
    rows = read_sidecar(path)
    other = str(here / "other.arrow")
    with open(other, "wb") as sink, ipc.new_file(sink, rows.table.schema) as writer:
        writer.write_table(rows.table.slice(0, 11))
    with pytest.raises(ValueError, match="its rows are not 3 views a sample"):
        read_sidecar(other)


def test_the_device_of_the_teacher_is_that_of_its_views():
    teacher = build_teacher(Part.model_validate(VIEWS), "image").to("cpu")
    assert teacher.device == torch.device("cpu")
