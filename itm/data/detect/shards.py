"""Tars: shards that stages read as they are (ours, img2dataset's, any WebDataset), or archives of photos."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from itm.config import Part
from itm.data.detect.finding import Answers, Finding, Question, choose, roles_of
from itm.data.detect.images import looks_like_image
from itm.data.manifest import NAME, Manifest

LOOKED_AT = 300  # members of a tar
SAID = (".json", ".txt", ".cls", ".cap")
_AS = {"shards": "WebDataset shards, read as they are", "photos": "an archive of photos, with a .txt beside each where it has one"}


def members_of(archive: Path) -> list[str]:
    """Names of the first files of a tar or a zip, a Mac's twins left out. Raises ValueError naming a damaged one."""
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as held:
                names = [info.filename for info in held.infolist() if not info.is_dir()]
        else:
            with tarfile.open(archive) as held_tar:
                names = [member.name for member in islice(held_tar, LOOKED_AT) if member.isfile()]
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} cannot be read: {error}; copy it again") from None
    return [name for name in names if not name.startswith("__MACOSX") and "/._" not in f"/{name}"][:LOOKED_AT]


def look_at_archive(archive: Path, answers: Answers) -> Finding:
    """A single tar, zip or packed table of photos."""
    names = members_of(archive)
    images = [name for name in names if looks_like_image(name)]
    if not images and not any(name.endswith(".regions.npz") for name in names):
        raise ValueError(f"{archive} holds no image among its first {len(names)} files, e.g. {', '.join(names[:3]) or 'none at all'}")
    if archive.suffix.lower() == ".tar" and _reading([names], answers) == "shards":
        found = shards_finding(archive.parent, {"train": archive.parent.name}, archive.parent.parent, names)
        others = len(list(archive.parent.glob("*.tar"))) - 1
        note = f"{others} other tars of {archive.parent.name} are read as well, a split is a folder: move {archive.name} to be read alone"
        return replace(found, notes=(*found.notes, note)) if others else found
    captioned = any(name.endswith(".txt") for name in names) or any(Path(name).name.startswith("metadata.") for name in names)
    tables = [
        name for name in names if name.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".xlsx")) or name.endswith("captions.txt")
    ]
    if not captioned and tables and answers.get("annotations") != "none":
        raise Question(
            f"{archive.name} holds photos and {', '.join(tables[:3])}, which is not read inside an archive (unpack it and init the folder)",
            "annotations",
            {"none": "photos without captions"},
        )
    what = f"an archive of {'captioned photos' if captioned else 'photos without captions'}: {archive.name}"
    return Finding(what, Part(kind="imagefolder", options={"path": str(archive)}), captioned=captioned)


def look_at_tars(folder: Path, answers: Answers) -> Finding | None:
    """Shards right inside a folder, or in its folders, one a split; None where there are none."""
    inside = {f.name: f for f in sorted(folder.iterdir()) if f.is_dir() and (any(f.glob("*.tar")) or (f / NAME).exists())}
    here = sorted(folder.glob("*.tar"))
    if here:
        return _of_tars(here, folder, answers)
    if not inside:
        return None
    roles = roles_of(list(inside)) or {"train": next(iter(inside))}
    if "train" not in roles:
        roles = {"train": next(iter(roles.values()))} | roles
    tars = sorted(inside[roles["train"]].glob("*.tar"))
    return shards_finding(inside[roles["train"]], roles, folder, members_of(tars[0]) if tars else [])


def _of_tars(tars: list[Path], folder: Path, answers: Answers) -> Finding:
    names = members_of(tars[0])
    if len(set(roles_of([tar.stem for tar in tars]))) > 1:
        raise ValueError(f"{folder} holds the tars of several splits: put {tars[0].name} into a folder {tars[0].stem}, and so on")
    if (folder / NAME).exists() or _reading([names], answers) == "shards":
        return shards_finding(folder, {"train": folder.name}, folder.parent, names)
    if len(tars) == 1:
        return look_at_archive(tars[0], {**answers, "as": "photos"})
    raise ValueError(f"{folder} holds {len(tars)} tars of photos: name one of them, or unpack them into one folder")


def _reading(listings: list[list[str]], answers: Answers) -> str:
    """`shards`, where images and captions of a name stand together in flat tars; `photos`, where nothing but images does."""
    names = [name for listing in listings for name in listing]
    said = any(name.endswith(SAID) for name in names)
    if any(name.endswith((".json", ".regions.npz", ".cls")) for name in names):
        possible = ["shards"]
    elif not said:
        possible = ["photos"]
    else:  # a .txt beside each image is both
        possible = ["shards", "photos"] if any("/" in name for name in names) else ["shards"]
    return choose("the tar may be a shard or an archive", "as", {name: _AS[name] for name in possible}, answers)


def shards_finding(train: Path, roles: dict[str, str], root: Path, names: list[str]) -> Finding:
    """Shards below `root`. names: members of the first tar of the training split."""
    ours = (train / NAME).exists()
    regions = any(name.endswith(".regions.npz") for name in names) and not any(map(looks_like_image, names))
    captioned = any(name.endswith((".json", ".txt")) for name in names)
    if ours:
        said = Manifest.model_validate_json((train / NAME).read_bytes())
        captioned = said.captions > 0
        layout = f"packed shards ({said.source}), splits {', '.join(roles.values())}"
    else:
        kinds = sorted({name.rpartition("/")[2].partition(".")[2] for name in names})
        layout = (
            f"WebDataset shards of others, members {', '.join(kinds)}, splits {', '.join(roles.values())}: read as they are, not packed"
        )
    return Finding(layout, None, str(root), roles, "regions" if regions else "pixels", captioned)
