"""Kinds by import path: what is refused and how, who may name a package, and what is said of where a part comes from."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import itm
from itm.config import Part, parse_recipe
from itm.data.sources import SOURCES
from itm.evaluation import PROTOCOLS
from itm.kinds import MissingPackage, check_allowed, find_part, local_packages, origins, packages_of, requirements
from itm.matchers import MATCHERS
from itm.matchers.encoders.build import IMAGE_ENCODERS, TEXT_ENCODERS
from itm.matchers.encoders.poolings import POOLINGS
from itm.matchers.folder import build_matcher, load_matcher_folder, save_matcher, take_weights
from itm.methods import METHODS
from itm.methods.terms import TERMS
from itm.teachers import TEACHERS
from itm.tracking.loggers import LOGGERS
from tests.support.registry_world import TEXTS, picture, tiny_matcher

pytest_plugins = ["tests.support.own_parts"]
TABLES = {
    "model": MATCHERS,
    "image encoder": IMAGE_ENCODERS,
    "text encoder": TEXT_ENCODERS,
    "pooling": POOLINGS,
    "method": METHODS,
    "teacher": TEACHERS,
    "source": SOURCES,
    "protocol": PROTOCOLS,
    "loss term": TERMS,
    "logger": LOGGERS,
}
OPTIONS = {
    "image": {"kind": "conv", "image_size": 32, "hidden": 16},
    "text": {"kind": "acme.parts:Reader"},
    "width": 8,
    "pooling": {"image": {"kind": "acme.parts:Largest"}},
}
OWN = Part(kind="acme.parts:Vectors", options=OPTIONS)


@pytest.mark.parametrize("what", TABLES)
def test_a_kind_of_any_table_that_does_not_exist_is_refused_with_what_there_is(what: str) -> None:
    known = next(iter(TABLES[what]))
    with pytest.raises(ValueError, match=rf"unknown {what} 'zzzzz'; known: {known}.*package\.module:Name"):
        find_part(TABLES[what], "zzzzz", what)
    with pytest.raises(ValueError, match=rf"unknown {what} '{known}x'; did you mean '{known}'"):
        find_part(TABLES[what], f"{known}x", what)


@pytest.mark.parametrize("what", TABLES)
def test_a_part_of_the_wrong_base_is_refused_by_the_name_of_the_base(what: str, acme: Path) -> None:
    base = TABLES[what].base.replace(":", ".")
    for wrong in ("acme.parts:Record", "acme.parts:json", "os:system", "subprocess:Popen"):
        with pytest.raises(ValueError, match=rf"{what} '{wrong}' is not a subclass of {base}"):
            find_part(TABLES[what], wrong, what)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (":Vectors", "is no import path; write package.module:Name"),
        ("acme.parts:", "is no import path"),
        ("acme parts:Vectors", "is no import path"),
        ("acme.parts:Vectors:x", "is no import path"),
        ("acme.parts:Vektors", "acme.parts has no 'Vektors'; did you mean 'Vectors'"),
        ("acme.prats:Vectors", "the package 'acme' that is installed here has no module 'acme.prats'"),
        (
            "nowhere_to_be.found:X",
            "needs the package 'nowhere_to_be', which is not installed here: install it, or put its folder on PYTHONPATH",
        ),
    ],
)
def test_an_import_path_that_leads_nowhere_says_where_it_ends(path: str, message: str, acme: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_part(MATCHERS, path, "model")


def test_what_a_package_lacks_itself_is_named_and_its_own_faults_are_its_own(package) -> None:
    package("lacking", "import nowhere_to_be\n")
    with pytest.raises(ValueError, match="'lacking:X' imports 'nowhere_to_be', which is not installed"):
        find_part(MATCHERS, "lacking:X", "model")
    package("faulty", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        find_part(MATCHERS, "faulty:X", "model")


def scores(matcher) -> torch.Tensor:
    with torch.inference_mode():
        images = matcher.encode_images(matcher.inputs.images([picture("red"), picture("blue")]))
        return matcher.score(images, matcher.encode_captions(matcher.inputs.captions(TEXTS)))


def test_a_matcher_of_own_parts_is_loaded_by_whoever_allows_the_package(acme: Path, tmp_path: Path) -> None:
    matcher = tiny_matcher(3, OWN)
    save_matcher(matcher, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["kind"] == "acme.parts:Vectors"
    assert torch.equal(scores(itm.load_matcher(tmp_path / "m", allow=["acme"])), scores(matcher))
    again = build_matcher(OWN, matcher.inputs).eval()
    take_weights(again, str(tmp_path / "m"), allow=["acme.parts"])
    assert torch.equal(scores(again), scores(matcher))


def stranger(folder: Path, **changes: object) -> Path:
    """A matcher folder whose config.json was changed by hand."""
    save_matcher(tiny_matcher(0), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("where", ["kind", "text", "pooling"])
def test_what_a_stranger_names_is_refused_before_it_is_imported(where: str, package, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    package("evil", f"open({str(mark)!r}, 'w')\n")
    part = "evil:Anything"
    changes = {
        "kind": {"kind": part},
        "text": {"options": {"text": {"kind": part}}},
        "pooling": {"options": {"pooling": {"image": {"kind": part}}}},
    }
    folder = stranger(tmp_path / "m", **changes[where])
    for allow in ([], ["evi"], ["evil2"], ["acme"], [""]):
        with pytest.raises(ValueError, match=r"m/config\.json names .*'evil:Anything', code of the package 'evil'.*--allow evil"):
            load_matcher_folder(folder, allow)
    assert "evil" not in sys.modules
    assert not mark.exists()
    with pytest.raises(ValueError, match="evil has no 'Anything'"):
        load_matcher_folder(folder, allow="evil")
    assert mark.exists()


def test_os_system_is_refused_whether_it_is_allowed_or_not(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "m", kind="os:system")
    with pytest.raises(ValueError, match="code of the package 'os'"):
        itm.load_matcher(folder)
    with pytest.raises(ValueError, match="'os:system' is not a subclass of"):
        itm.load_matcher(folder, allow=["os"])


def test_a_folder_of_a_package_that_is_not_here_asks_for_it_by_name_and_version(package, tmp_path: Path) -> None:
    package("shared", "from itm.matchers.dual import DualEncoder\nclass Mine(DualEncoder): ...\n", version="2.5")
    options = {name: value for name, value in OPTIONS.items() if name in ("image", "width")}
    save_matcher(tiny_matcher(0, Part(kind="shared:Mine", options=options)), tmp_path / "m")
    (tmp_path / "site").rename(tmp_path / "elsewhere")
    del sys.modules["shared"]
    with pytest.raises(
        MissingPackage, match=r"needs the package 'shared', which is not installed.*made with shared:Mine of shared-parts 2\.5"
    ):
        itm.load_matcher(tmp_path / "m", allow=["shared"])


def test_the_packages_that_a_recipe_names_are_allowed_and_change_no_fingerprint() -> None:
    recipe = parse_recipe({"name": "a.b:c", "about": "x.y:z", "model": OWN.model_dump(), "allow": ["other"]})
    assert recipe.allowed == ["acme", "other"]
    assert recipe.fingerprint() == recipe.model_copy(update={"allow": []}).fingerprint()
    assert packages_of({"root": "s3://bucket/x", "at": "12:30", "uri": "models:/a@b", "deep": [{"k": ("one.two:Three",)}]}) == ["one"]
    check_allowed({"kind": "dual", "root": "C:/x"}, [], "here")


def test_where_a_part_comes_from_is_its_version_and_the_hash_of_its_source(package, acme: Path) -> None:
    source = "from itm.tracking.loggers import Logger\nclass Mine(Logger): ...\n"
    folder = package("installed", source, version="1.4")
    choices = {"loggers": [{"kind": "installed:Mine"}, {"kind": "acme.parts:JsonLines"}, {"kind": "console"}]}
    assert "installed:Mine" not in origins(choices)
    find_part(LOGGERS, "installed:Mine", "logger")
    find_part(LOGGERS, "acme.parts:JsonLines", "logger")
    files = {"a": acme / "parts.py", "i": folder / "__init__.py"}
    digest = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in files.items()}
    assert origins(choices) == {
        "installed:Mine": f"installed-parts 1.4, sha256 {digest['i']}",
        "acme.parts:JsonLines": f"acme (no version), sha256 {digest['a']}",
    }
    assert requirements(choices) == ["installed-parts==1.4"]
    assert local_packages(choices) == [acme]
    assert acme in local_packages()
    (next(folder.parent.glob("*.dist-info")) / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    assert requirements(choices) == []
    assert local_packages(choices) == sorted([acme, folder])
