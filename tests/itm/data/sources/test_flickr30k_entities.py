"""Phrases and boxes of Flickr30k Entities become words and regions of a caption: files written here as its authors publish them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from itm.data.records import Caption, Problem, Record, Regions
from itm.data.sources.flickr30k_entities import Flickr30kEntities, image_number, overlaps, read_boxes, read_sentence
from itm.data.sources.source import Source

SENTENCES = [
    "[/EN#11/people Two men] in [/EN#12/clothing green shirts] are standing on [/EN#0/notvisual it] .",
    "[/EN#11/people The men] saw [/EN#13/scene a yard] with [/EN#14/people/other a friend] of [/EN#11/people them] .",
]
OBJECTS = """<object><name>11</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>100</xmax><ymax>100</ymax></bndbox></object>
<object><name>11</name><name>14</name><bndbox><xmin>100</xmin><ymin>100</ymin><xmax>200</xmax><ymax>200</ymax></bndbox></object>
<object><name>12</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>40</xmax><ymax>100</ymax></bndbox></object>
<object><name>13</name><scene>1</scene><nobndbox>0</nobndbox></object>"""
# Of a photo of 200 x 200, as shares: the first man, three quarters of him, the second man and the friend, and nothing of theirs.
BOXES = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.375], [0.5, 0.5, 1, 1], [0.9, 0, 1, 0.1]]


class Held(Source):
    """Two images with regions, as any source gives them: the captions of the second are of no sentence."""

    def __init__(self, boxes: bool = True, filename: str = "flickr30k_000000000042.npz") -> None:
        self.splits, self.boxes, self.filename = ["test"], boxes, filename

    def count(self, split):
        return 1

    def identity(self):
        return {"source": "Held"}

    def item(self, split, index):
        place = np.array(BOXES, np.float32) if self.boxes else None
        captions = [
            Caption("a", "Two men in green shirts are standing on it."),
            Caption("b", "The men saw a yard with a friend of them ."),
            Caption("c", "A sentence of another photo."),
        ]
        regions = Regions(np.ones((4, 3), np.float16), place, 1, 1)
        return Record("42", "test", captions, regions=regions, meta={"filename": self.filename})


def annotation(folder: Path, sentences=SENTENCES, objects: str = OBJECTS, named: str = "42.jpg", size: str = "200") -> Path:
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "Sentences" / "42.txt").write_text("\n".join(sentences) + "\n")
    head = f"<filename>{named}</filename><size><width>{size}</width><height>200</height><depth>3</depth></size>"
    (folder / "Annotations" / "42.xml").write_text(f"<annotation>{head}{objects}</annotation>")
    return folder


def source(folder: Path, iou: float = 0.5, **held) -> Flickr30kEntities:
    return Flickr30kEntities(str(folder), {"kind": f"{__name__}:Held", "options": held}, iou)


def entities(caption: Caption) -> dict[str, tuple[list[str], list[int]]]:
    """Entity -> (the characters of its spans, its regions)."""
    return {e["entity"]: ([caption.text[a:b] for a, b in e["spans"]], e["regions"]) for e in caption.meta["entities"]}


def test_phrases_become_characters_of_the_caption_and_boxes_become_regions(tmp_path):
    record = source(annotation(tmp_path)).item("test", 0)
    assert isinstance(record, Record)
    first, second = record.captions[:2]
    assert entities(first)["11"] == (["Two men"], [0, 1, 2])
    # The box of 12 has an IoU of 4000 / 10000 with region 0 and of 3000 / 8500 with region 1.
    assert entities(first)["12"] == (["green shirts"], [])
    assert entities(second) == {"11": (["The men", "them"], [0, 1, 2]), "13": (["a yard"], []), "14": (["a friend"], [2])}
    assert json.loads(json.dumps(second.meta)) == second.meta


def test_the_threshold_is_the_option_iou(tmp_path):
    folder = annotation(tmp_path)
    regions = {iou: entities(source(folder, iou).item("test", 0).captions[0]) for iou in (0.3, 0.4, 0.75, 0.76)}
    assert [regions[iou]["12"][1] for iou in regions] == [[0, 1], [0], [], []]
    assert [regions[iou]["11"][1] for iou in regions] == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 2]]
    assert source(folder, 0.3).identity() != source(folder, 0.4).identity()


def test_a_caption_that_is_no_sentence_of_its_image_and_one_with_unreadable_markup_are_quarantined_alone(tmp_path):
    record = source(annotation(tmp_path, [SENTENCES[0], "[/EN#11/people The men saw a yard with a friend of them ."])).item("test", 0)
    assert [c.fault() is None for c in record.captions] == [True, False, False]
    assert "42.txt line 2: unreadable markup near" in record.captions[1].fault()
    assert "caption c is none of the sentences of" in record.captions[2].fault()


@pytest.mark.parametrize(
    ("change", "held", "reason"),
    [
        ({"named": "43.jpg"}, {}, "42.xml is the annotation of 43.jpg: the files are swapped"),
        ({"objects": "<object>"}, {}, "42.xml is no XML"),
        ({"objects": OBJECTS.replace(">40<", ">wide<")}, {}, "42.xml: a size or corner of a box is no number"),
        ({"size": "0"}, {}, "42.xml: the image has no size (0 x 200)"),
        ({}, {"boxes": False}, "its regions have no boxes"),
        ({}, {"filename": "7.jpg"}, "7.xml cannot be read"),
        ({}, {"filename": "photo.jpg"}, "image 'photo.jpg' does not end in the digits of a Flickr30k id"),
    ],
)
def test_an_image_whose_annotation_does_not_fit_is_quarantined_with_its_captions(tmp_path, change, held, reason):
    problem = source(annotation(tmp_path, **change), **held).item("test", 0)
    assert isinstance(problem, Problem) and reason in problem.reason and problem.captions == 3


def test_a_folder_that_is_not_the_data_set_and_a_wrong_threshold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder Sentences: give the folder of Flickr30k Entities"):
        source(tmp_path)
    with pytest.raises(ValueError, match=r"iou is above 0 and at most 1, not 1.5"):
        source(annotation(tmp_path), 1.5)


def test_sentences_keep_their_words_in_order_and_markup_that_is_none_is_refused():
    text, phrases = read_sentence(SENTENCES[0])
    assert text == "Two men in green shirts are standing on it ."
    assert [(entity, text[start:end]) for entity, start, end in phrases] == [("11", "Two men"), ("12", "green shirts"), ("0", "it")]
    for line in ("[/EN#1/people ] eat", "[/EN#/people a man] eats", "a man] eats", "[/EN#1/people a [/EN#2/people man] eats"):
        with pytest.raises(ValueError, match="unreadable markup near"):
            read_sentence(line)


def test_an_entity_without_a_box_has_none_and_others_have_all_of_theirs(tmp_path):
    boxes = read_boxes(str(annotation(tmp_path) / "Annotations" / "42.xml"), "42")
    assert sorted(boxes) == ["11", "12", "14"]
    np.testing.assert_allclose(boxes["11"], [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])


def test_overlaps_are_those_of_counted_cells():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (9, 2, 2)), 1)
    boxes, cells = corners.reshape(9, 4).astype(float), np.zeros((9, 12, 12), bool)
    for grid, ((x1, y1), (x2, y2)) in zip(cells, corners, strict=True):
        grid[x1:x2, y1:y2] = True
    both = (cells[:4, None] & cells[None, 4:]).sum((2, 3))
    either = (cells[:4, None] | cells[None, 4:]).sum((2, 3))
    np.testing.assert_allclose(overlaps(boxes[:4], boxes[4:]), both / np.maximum(either, 1))


def test_names_of_images_lead_to_the_same_number():
    names = ("65567.jpg", "flickr30k_000000065567.npz", "a/65567", "000065567.jpg")
    assert {image_number(name) for name in names} == {"65567"} and image_number("0.jpg") == "0"
