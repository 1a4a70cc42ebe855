"""Teachers by kind: callable rows -> vectors. A new teacher costs one file and one line here."""

from __future__ import annotations

from itm.kinds import Kinds

TEACHERS: Kinds[object] = Kinds(
    "itm.teachers.identity:Teacher",
    {
        "hf_vision": "itm.teachers.image:HFVisionTeacher",
        "unicom": "itm.teachers.unicom:UnicomTeacher",
        "efficientnet_lite0": "itm.teachers.cells:EfficientNetTeacher",
        "region_mean": "itm.teachers.cells:RegionMeanTeacher",
        "statistics": "itm.teachers.image:StatisticsTeacher",
        "scenes_image": "itm.teachers.image:ScenesImageTruth",
        "views": "itm.teachers.views:ViewsTeacher",
        "hf_text": "itm.teachers.text:HFTextTeacher",
        "minilm": "itm.teachers.text:MiniLMTeacher",
        "scenes_text": "itm.teachers.text:ScenesTextTruth",
        "matcher": "itm.teachers.matcher:MatcherTeacher",
        "cusa_npy": "itm.teachers.cusa_npy:CusaNpyTeacher",
    },
)
