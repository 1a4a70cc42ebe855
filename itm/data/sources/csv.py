"""Tables of image paths and captions: CSV, TSV, or any other delimiter."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from itm.data.records import Caption, Json
from itm.data.sources.source import ListedImages, group_by_path, paths_by_split

_Row = tuple[str, list[Caption], Json]


class CsvPairs(ListedImages):
    """One row a caption (repeated paths are the same image), or several caption columns a row.

    `path`: a file name with `{split}`, a mapping split: file, or one file, all train unless `split_column` says more.
    `delimiter`: default a tab for .tsv and a comma otherwise. Raises ValueError naming the columns there are.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        image_root: str = ".",
        image_column: str = "image",
        caption_columns: list[str] | str = "caption",
        split_column: str | None = None,
        delimiter: str | None = None,
    ) -> None:
        captions = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns)
        self.image, self.captions, self.split, self.delimiter = image_column, captions, split_column, delimiter
        paths = paths_by_split(path)
        rows: dict[str, list[_Row]] = {}
        for split, file in paths.items():
            for chosen, row in self._rows(file, split):
                rows.setdefault(chosen, []).append(row)
        super().__init__(image_root, {split: group_by_path(r) for split, r in rows.items()}, paths.values())

    def identity(self) -> Json:
        columns = {"image": self.image, "captions": self.captions, "split": self.split, "delimiter": self.delimiter}
        return super().identity() | {"columns": columns}

    def _rows(self, path: Path, split: str) -> Iterator[tuple[str, _Row]]:
        delimiter = self.delimiter or ("\t" if path.suffix == ".tsv" else ",")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, delimiter=delimiter, skipinitialspace=True)
            named = [name.strip() for name in table.fieldnames or []]
            table.fieldnames = named
            wanted = [self.image, *self.captions, *([self.split] if self.split else [])]
            if missing := [name for name in wanted if name not in named]:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; it has {', '.join(named)} (set image_column, caption_columns)"
                )
            for row in table:
                captions = [Caption("", row[name] or "") for name in self.captions]
                yield row[self.split] if self.split else split, (row[self.image], captions, {})
