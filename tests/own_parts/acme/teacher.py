"""A text teacher of two lines, and no reason to trust it."""

import numpy as np

from itm.teachers.text import TextTeacher


class Letters(TextTeacher):
    def vectors(self, texts: list[str]) -> np.ndarray:
        return np.array([[1 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
