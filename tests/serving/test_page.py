"""The page in a real Chromium: drop, result, error, phone and desk, light and dark."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_chromium

SIZES = {"desk": (1280, 900), "phone": (375, 740)}
pytestmark = in_chromium
_DROP = """([contents]) => {
    const transfer = new DataTransfer();
    for (const [name, type, data] of contents) {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type}));
    }
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


@pytest.fixture(params=["desk-light", "desk-dark", "phone-light"])
def page(request, browser, server) -> Iterator[object]:
    size, scheme = request.param.split("-")
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    opened, errors = context.new_page(), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    opened.goto(server.rest + "/")
    opened.wait_for_selector("#model option", state="attached")
    yield opened
    folder = os.environ.get("TL_KERAS_SCREENSHOTS")
    if folder:
        opened.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    assert not errors
    context.close()


on_a_desk = pytest.mark.parametrize("page", ["desk-light"], indirect=True)


def drop(page, *files: tuple[str, str, bytes]) -> None:
    page.evaluate(_DROP, [[[name, kind, base64.b64encode(content).decode()] for name, kind, content in files]])
    page.wait_for_function("(count) => document.querySelectorAll('#results > li').length >= count", arg=len(files))
    page.wait_for_function("() => document.getElementById('status').textContent.endsWith('done.')")


def test_dropped_images_get_their_labels(page, photographs):
    drop(page, *[(f"photo {number}.jpg", "image/jpeg", one) for number, one in enumerate(photographs[::3])])
    found = {
        card.locator(".file").inner_text().split(" · ")[0]: card.locator(".label").inner_text()
        for card in page.locator("#results > li").all()
    }
    assert found == {"photo 0.jpg": "blue", "photo 1.jpg": "green", "photo 2.jpg": "red"}
    card = page.locator("#results > li").first
    assert card.locator(".bars li").count() == 3
    assert card.locator(".bars li").first.inner_text().strip().endswith("%")
    assert card.locator("img").get_attribute("alt").startswith("photo ")
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    assert page.locator("#status").inner_text() == "3 images done."


def test_what_is_no_image_is_said_to_be_invalid(page, photographs):
    drop(page, ("broken.jpg", "image/jpeg", photographs[0][:300]), ("good.jpg", "image/jpeg", photographs[0]))
    broken = page.locator("#results > li.invalid")
    assert broken.count() == 1
    assert "Invalid" in broken.inner_text()
    assert "Not a readable image" in broken.inner_text()


@on_a_desk
def test_a_file_that_is_too_large_is_not_even_sent(page):
    drop(page, ("large.jpg", "image/jpeg", b"x" * 3_000_001))
    assert "exceeds the size limit of the server" in page.locator("#results > li.invalid").inner_text()


def test_results_are_downloaded_as_csv(page, photographs):
    drop(page, ('a "b", c.jpg', "image/jpeg", photographs[0]), ("bad.png", "image/png", b"bad"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    lines = sorted(Path(download.value.path()).read_text().splitlines()[1:])
    assert lines[0].startswith('"a ""b"", c.jpg",blue,0.')
    assert lines[1].startswith("bad.png,,,,")
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#results > li").count() == 0
    assert page.locator("#tools").is_hidden()


@on_a_desk
def test_a_dropped_folder_is_read_to_its_end(page, colour_folder):
    """Through the browser's own drag and drop: a page can't make a folder's entries itself."""
    page.locator("#drop").scroll_into_view_if_needed()
    box = page.locator("#drop").bounding_box()
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send(
            "Input.dispatchDragEvent",
            {
                "type": kind,
                "x": box["x"] + 20,
                "y": box["y"] + 20,
                "data": {"items": [], "files": [str(colour_folder / "red")], "dragOperationsMask": 1},
            },
        )
    wanted = len(list((colour_folder / "red").iterdir()))
    assert wanted > 3
    page.wait_for_function("(count) => document.querySelectorAll('#results > li').length === count", arg=wanted)
    assert set(page.locator("#results .label").all_inner_texts()) == {"red"}


@on_a_desk
def test_a_folder_can_be_chosen(page, colour_folder):
    page.locator("#folder").set_input_files(colour_folder / "blue")
    wanted = len(list((colour_folder / "blue").iterdir()))
    page.wait_for_function("(count) => document.querySelectorAll('#results > li').length === count", arg=wanted)
    assert set(page.locator("#results .label").all_inner_texts()) == {"blue"}


@on_a_desk
def test_an_image_can_be_pasted(page, photographs):
    page.evaluate(
        """(data) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], "image.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
        }""",
        base64.b64encode(photographs[0]).decode(),
    )
    page.wait_for_selector("#results > li")
    assert page.locator("#results .label").inner_text() == "blue"


@on_a_desk
def test_a_picture_is_taken_with_the_camera(page):
    page.context.grant_permissions(["camera"])
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    page.get_by_role("button", name="Take the picture").click()
    page.wait_for_selector("#results > li:not(.invalid)")
    assert page.locator("#results .file").inner_text().startswith("camera-")
    assert not page.locator("#viewfinder").is_visible()
    assert page.evaluate("document.getElementById('video').srcObject") is None


@on_a_desk
def test_a_camera_that_may_not_be_used_is_said_to_be(page):
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('denied')); }")
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('No camera')")


def test_files_can_be_chosen_and_everything_reached_by_keyboard(page, colour_folder):
    page.locator("#files").set_input_files([colour_folder / "red" / "001.jpg"])
    page.wait_for_selector("#results > li")
    assert page.locator("#results .label").inner_text() == "red"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "version", "choose", "choose-folder", "camera", "download", "clear", "SUMMARY"} <= reached


def test_models_versions_and_classes_are_listed(page, model):
    assert page.locator("#model option").all_inner_texts() == [model]
    assert page.locator("#version option").all_inner_texts() == ["latest", "1"]
    assert page.locator("#models td").all_inner_texts() == ["1", "AVAILABLE"]
    page.locator("summary").click()
    assert page.locator(".classes li").all_inner_texts() == ["blue", "green", "red"]


def test_nothing_is_wider_than_the_window(page, photographs):
    drop(page, ("a_very_long_name_without_any_space_in_it_" * 4 + ".jpg", "image/jpeg", photographs[0]))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@on_a_desk
def test_a_server_that_is_gone_is_said_to_be(page, photographs):
    page.route("**/v1/**", lambda route: route.abort())
    page.evaluate(_DROP, [[["photo.jpg", "image/jpeg", base64.b64encode(photographs[0]).decode()]]])
    page.wait_for_selector("#results > li.invalid")
    assert "The server does not answer." in page.locator("#results > li.invalid").inner_text()
