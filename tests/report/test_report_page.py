"""The page as a file: what it must hold at 2, 10, 120 and 1,000 classes, and in a real Chromium."""

from __future__ import annotations

import html.parser
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import in_chromium, make_image
from tl_keras.evaluation.metrics import measure
from tl_keras.evaluation.robustness import measure_corruptions
from tl_keras.report.card import Card
from tl_keras.report.contents import Near, Shown, ShownFinding, ShownPair
from tl_keras.report.page import AuditShown, Report, escape_markdown, write_report
from tl_keras.report.pictures import encode_thumb
from tl_keras.run import RunFolder

EVIL = "<script>alert(\"x\")</script> & 'Söhne'"
WIDTHS = {"phone": (375, 740), "tablet": (820, 1100), "desk": (1280, 900)}
_WORST_CONTRAST = """() => {
    const linear = (level) => level <= 0.03928 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
    const shine = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).map((level) => linear(Number(level) / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = shine(getComputedStyle(document.querySelector("section")).backgroundColor);
    const texts = document.querySelectorAll("section p, section td, section th, section a, figcaption");
    return Math.min(...[...texts].map((one) => {
        const own = shine(getComputedStyle(one).color);
        return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
    }));
}"""
HISTORY = "stage,epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds\n"


def make_report(classes: int, count: int = 400) -> Report:
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, count)
    scores = random.normal(size=(count, classes))
    scores[np.arange(count), labels] += 3
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    names = [f"{EVIL} {number}" if number == 0 else f"class {number:04d}" for number in range(classes)]
    thumb = encode_thumb(make_image(1, size=(120, 160)), side=168)

    def shown(number: int, predicted: int = 1) -> Shown:
        near = [Near(f"train/{number}.jpg", names[0], thumb, 0.9)] * 3
        return Shown(f"test/{number}.jpg", names[0], names[predicted], 0.9, 0.05, thumb, thumb, "the upper left", near)

    robustness = measure_corruptions(
        np.stack([make_image(n, size=(12, 12)) for n in range(4)]),
        labels[:4],
        lambda images: np.tile(np.eye(classes)[0], (len(images), 1)),
        show_progress=lambda text: None,
    )
    figures = measure(probabilities.astype(np.float32), labels) | {"most_confused": []}
    metrics = {
        "test": figures,
        "reject": {"target_accuracy": 0.95, "threshold": None},
        "calibration": {"temperature": 1.3, "before": {"test": {"ece": 0.1, "nll": 1.0}}},
        "robustness": {"split": "test", **robustness},
        "environment": {"tl_keras": "0", "python": "3"},
        "timing": {"seconds": {"training": 1.5}},
    }
    config = {
        "mode": "finetune",
        "backbone": {"weights": "none"},
        "training": {"trainable": "head", "epochs": 2},
        "read": {"classifier": None},
        "data": {"dataset": "folder:x"},
        "probe": {"refit": "train"},
        "evaluation": {"target_accuracy": 0.95},
    }
    finding = ShownFinding("a.jpg", "label", "high", f"labelled {EVIL}", thumb, "b.jpg", thumb)
    return Report(
        name=f"{EVIL}-Net",
        dataset="data",
        backbone="Net",
        config=config,
        command="tl_keras finetune",
        metrics=metrics,
        counts={"train": 100, "val": 50, "test": count},
        class_names=names,
        probabilities=probabilities,
        labels=labels,
        before=probabilities,
        card=Card({"limits": EVIL}),
        notes=["warning: something"],
        worst=[shown(number) for number in range(12)],
        least_sure=[shown(number, 0) for number in range(12)],
        pairs=[ShownPair(names[0], names[1], 3, [shown(number) for number in range(3)]) for _ in range(6)],
        audit=AuditShown([("label", "label looks wrong", 3)], ["shift: none"], [finding] * 18),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Classes → the run folder of a report."""
    found = {}
    for classes in (2, 10, 120, 1000):
        folder = RunFolder(tmp_path_factory.mktemp(f"report{classes}"))
        folder.write_text("history.csv", HISTORY + "head,1,1.0,0.5,1.1,0.4,0.1,1\nhead,2,0.9,0.6,1.0,0.5,0.1,1\n")
        write_report(folder, make_report(classes, 10_000 if classes == 120 else 3000 if classes == 1000 else 400))
        found[classes] = folder.path
    return found


class Page(html.parser.HTMLParser):
    """Tags that are opened and not closed, images without words, ids, and addresses that leave the file."""

    VOID = {"meta", "img", "input", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wordless, self.ids, self.outside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img" and not values.get("alt"):
            self.wordless.append(values)
        self.ids += [values["id"]] if "id" in values else []
        for name in ("src", "href", "xlink:href"):
            address = values.get(name, "#")
            if not address.startswith(("#", "data:image/")):
                self.outside.append(address)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("classes", [2, 10, 120, 1000])
def test_the_page_is_whole_names_are_harmless_and_every_picture_has_words(written, classes):
    text = (written[classes] / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.wordless == []
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert text.count('<tr><th scope="row">') >= classes  # every class has its row
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text


def test_the_page_is_small(written):
    assert (written[120] / "report.html").stat().st_size < 10e6
    assert (written[1000] / "report.html").stat().st_size < 10e6


def test_plots_lie_in_the_run_folder(written):
    assert sorted(path.name for path in (written[120] / "plots").iterdir()) == [
        *("confusion.svg", "coverage.svg", "learning_accuracy.svg", "learning_loss.svg"),
        *("reliability.svg", "robustness.svg"),
    ]
    for classes in (2, 10):
        assert (written[classes] / "plots" / "confusion.svg").is_file()
        assert 'id="confusion' not in (written[classes] / "report.html").read_text()  # there the table says it all


def test_the_model_card_is_whole(written):
    from huggingface_hub import ModelCard

    text = (written[10] / "MODEL_CARD.md").read_text()
    assert ModelCard(text).data.model_name == f"{EVIL}-Net"
    assert f"## Limitations\n\n{EVIL}\n" in text  # the user's own Markdown
    assert "\\<script\\>" in text.partition("## Intended use")[0].rpartition("---")[2]
    assert "<script>" not in text.partition("## Intended use")[0].rpartition("---")[2]
    assert "Not stated. Who should use this classifier, and for which purpose?" in text
    assert "n=400 (95 % confidence interval)" in text


@pytest.fixture(params=[f"{size}-{scheme}" for size in WIDTHS for scheme in ("light", "dark")])
def open_page(request, browser):
    size, scheme = request.param.split("-")
    width, height = WIDTHS[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    errors: list[str] = []

    def visit(path: Path):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda one: errors.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
        page.goto((path / "report.html").as_uri())
        folder = os.environ.get("TL_KERAS_SCREENSHOTS")
        if folder:
            page.screenshot(path=Path(folder) / f"report-{path.name}-{request.param}.png", full_page=True)
        return page

    yield visit
    assert not errors
    context.close()


on_a_desk = pytest.mark.parametrize("open_page", ["desk-light"], indirect=True)


@in_chromium
def test_it_fits_the_screen_and_can_be_read(open_page, written):
    for classes in (2, 120):
        page = open_page(written[classes])
        widths = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        # contrast of text on its ground, WCAG 2.1, section 1.4.3
        worst = page.evaluate(_WORST_CONTRAST)
        assert worst >= 4.5


@in_chromium
@on_a_desk
def test_columns_are_sorted_with_mouse_and_keyboard(open_page, written):
    page = open_page(written[10])
    read = "() => [...document.querySelectorAll('#per-class tbody tr')].map((row) => row.cells[{0}].textContent)"
    page.click("#per-class th:nth-child(2) button")
    counts = [int(text) for text in page.evaluate(read.format(1))]
    assert counts == sorted(counts)
    page.focus("#per-class th:nth-child(2) button")
    page.keyboard.press("Enter")
    assert [int(text) for text in page.evaluate(read.format(1))] == sorted(counts, reverse=True)
    assert page.get_attribute("#per-class th:nth-child(2)", "aria-sort") == "descending"
    page.click("#per-class th:nth-child(1) button")
    names = page.evaluate(read.format(0))
    assert names[1:] == sorted(names[1:])
    assert len(names) == 10


@in_chromium
@on_a_desk
def test_a_class_is_found_among_a_thousand(open_page, written):
    page = open_page(written[1000])
    page.fill("#finder", "0042")
    visible = "() => [...document.querySelectorAll('#per-class tbody tr')].filter((row) => !row.hidden).length"
    assert page.evaluate(visible) == 1
    assert page.inner_text("#found") == "1 of 1000"
    page.fill("#finder", "")
    assert page.evaluate(visible) == 1000


@in_chromium
@on_a_desk
def test_it_prints_all_classes_and_pictures(open_page, written):
    page = open_page(written[120])
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"
    assert not page.is_visible("nav")
    assert len(page.pdf()) > 50_000
    seen = page.evaluate("() => [...document.images].filter((one) => one.complete && one.naturalWidth > 0).length")
    assert seen == page.evaluate("() => document.images.length") > 50
    assert page.evaluate("() => document.querySelectorAll('#per-class tbody tr').length") == 120


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("snake_case_name", "snake_case_name"),
        ("__pos__", "\\_\\_pos\\_\\_"),
        ("a*b", "a\\*b"),
        ("<img>", "\\<img\\>"),
        ("# title", "\\# title"),
        ("1. first", "1\\. first"),
        ("two\nlines", "two lines"),
        ("a|b [c](d) `e` ~f~ &amp;", "a\\|b \\[c\\](d) \\`e\\` \\~f\\~ \\&amp;"),
        ("5.5 % - plain, (really)", "5\\.5 % - plain, (really)"),
    ],
)
def test_markdown_is_escaped_only_where_it_would_be_read_as_such(text, escaped):
    assert escape_markdown(text) == escaped
