"""The page in a real browser, on a narrow and a wide screen: type, filter, compare, drop a photo, hover over words; and what axe finds."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.registry_world import picture
from tests.support.serving_process import QUESTION, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAVE = CHROMIUM and importlib.util.find_spec("playwright") and importlib.util.find_spec("axe_playwright_python")
pytestmark = pytest.mark.skipif(not HAVE, reason="SKIPPED: the page is NOT tested here; it needs Chromium and the extra dev (playwright)")
SECONDS = 30.0
WIDTHS = {"phone": (390, 844), "desk": (1600, 1000)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[("phone", "dark"), ("desk", "light")], ids=lambda p: "-".join(p))
def page(request: pytest.FixtureRequest, browser: Any, service: SimpleNamespace) -> Iterator[Any]:
    """The page, opened. At the end: it asked no other host, and the browser had nothing to complain about."""
    width, scheme = request.param
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page, asked, faulty = context.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faulty.append(str(error)))
    page.on("console", lambda message: faulty.append(message.text) if message.type == "error" else None)
    page.goto(service.address)
    until(lambda: page.locator("#model option").count() == 2, SECONDS)
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((service.address, "data:", "blob:"))] == []
    assert faulty == []


def ask(page: Any, text: str = QUESTION) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".tile")
    answered(page)


def said(page: Any) -> str:
    """The line above the answers. Asked again and again from here: the page's own policy forbids a script that is made of text."""
    return str(page.locator("#said").text_content())


def answered(page: Any) -> None:
    until(lambda: "ms, version" in said(page), SECONDS)


def keys(page: Any, place: int = 0) -> list[str]:
    """Of the answers, by the addresses of their photos."""
    sources = page.locator(f"section >> nth={place}").locator(".tile img").evaluate_all("all => all.map((one) => one.src)")
    return [re.search(r"/v1/images/([^?]+)", source)[1] for source in sources]  # type: ignore[index]


def faults(page: Any) -> list[str]:
    """Serious and critical ones, as axe-core counts them."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found if one["impact"] in ("serious", "critical")]


def test_typed_filtered_compared_and_explained(page: Any, service: SimpleNamespace):
    ask(page)
    wanted = [answer["key"] for answer in service.client.search(QUESTION, k=30, model="dual")["answers"]]
    assert keys(page) == wanted
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"

    page.click("#filters summary")
    page.check("input[name=shard][value='00001.tar']")
    until(lambda: "best of 30 photos" in said(page), SECONDS)
    assert keys(page) == [a["key"] for a in service.client.search(QUESTION, k=30, where={"shard": ["00001.tar"]}, model="dual")["answers"]]
    page.uncheck("input[name=shard][value='00001.tar']")

    page.select_option("#beside", "scan")
    until(lambda: page.locator("#results section").count() == 2, SECONDS)
    assert keys(page, 0) == wanted
    assert keys(page, 1) == [answer["key"] for answer in service.client.search(QUESTION, k=30, model="scan")["answers"]]
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"

    page.locator("section >> nth=1").locator(".tile >> nth=0").click()
    page.wait_for_selector(".words .list button")
    told = service.client.explain(QUESTION, keys(page, 1)[0], model="scan")
    assert page.locator(".words .list button").all_text_contents() == told["words"]
    for word in (1, 3):
        page.hover(f".words .list button >> nth={word}")
        weights = told["weights"][word]
        shades = [
            float(shade) for shade in page.locator(".stage rect").evaluate_all("all => all.map((r) => r.getAttribute('fill-opacity'))")
        ]
        assert shades == pytest.approx([0.55 * weight / max(weights) for weight in weights], abs=1e-3)
    until(lambda: page.evaluate("document.querySelector('.stage img').naturalWidth > 0"), SECONDS)
    box, frame = page.locator(".stage svg").bounding_box(), page.locator(".stage img").bounding_box()
    assert box == pytest.approx(frame, abs=1), "the boxes lie on the photo"
    assert faults(page) == []

    page.click(".similar")
    page.wait_for_selector("#chip:not([hidden])")
    answered(page)
    liked = page.locator("#chip span").text_content().removeprefix("like ")
    until(lambda: keys(page)[:1] == [liked], SECONDS)
    assert keys(page)[0] == liked, "nothing is as similar to a photo as itself"


def test_a_photo_is_dropped_and_a_keyboard_is_enough(page: Any, tmp_path: Path, service: SimpleNamespace):
    import base64

    data = base64.b64encode(picture("red", 64)).decode()
    handle = page.evaluate_handle(
        """data => { const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)); const moved = new DataTransfer();
        moved.items.add(new File([bytes], 'disc.png', { type: 'image/png' })); return moved; }""",
        data,
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": handle})
    page.wait_for_selector("#drop:not([hidden])")
    page.dispatch_event("body", "drop", {"dataTransfer": handle})
    page.wait_for_selector(".tile")
    answered(page)
    wanted = service.client.search(image=picture("red", 64), find="images", k=30, model="dual")["answers"]
    assert keys(page) == [answer["key"] for answer in wanted]
    page.click("#chip button")

    ask(page)
    page.focus("#text")
    for _ in range(40):  # by Tab to the first photo
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tile')"):
            break
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("1. ")
    page.keyboard.press("Enter")
    page.wait_for_selector("#large[open]")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('tile')"), "the focus goes back to where it was"
    page.fill("#text", " ")
    page.keyboard.press("Enter")
    until(lambda: "Type what to look for" in said(page), SECONDS)
