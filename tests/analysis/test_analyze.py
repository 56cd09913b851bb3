"""A report from end to end: by the command line, and as a reader sees it in a real browser."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import paqdetr
from paqdetr.analysis.subject import training_split
from paqdetr.analysis.summary import training_boxes
from paqdetr.cli import run
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.errors import ConfigError, DataError
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model

pytestmark = pytest.mark.integration

# Two models with random weights: what is shown means nothing, but all of it is there.
SMALL: dict[str, Any] = {
    "image_size": 96,
    "pretrained_backbone": False,
    "model.num_classes": 10,
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.num_queries": 20,
    "model.encoder_layers": 1,
}


def untrained(name: str, data: Path, **settings: Any) -> Detector:
    smaller = dict(SMALL)
    if name.startswith("paq"):
        smaller["model.num_patterns"] = 8
    return build_model(load_config(name, smaller | settings), classes=open_split(data, "val").classes).eval()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path) -> Path:
    """The folder of a report on two models, made by the command line; one lies in the folder of a run."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "run").mkdir()
    untrained("paq_dino_nano", tiny_digits).save(str(folder / "run/best.safetensors"))
    untrained("dino_nano", tiny_digits).save(str(folder / "other.safetensors"))
    records = [
        {"kind": "train", "step": step, "epoch": step / 10, "loss": 9.0 - step / 5, "lr": 1e-3, "mixture_entropy": 0.5,
         "loss_class": 3.0 - step / 10, "loss_l1": 1.0, "loss_giou": 1.0, "positives_gini": 0.3,
         "query_cosine": 0.2, "positives_per_box": [1.9, 1.8, 1.0]}
        for step in range(1, 21)
    ]  # fmt: skip
    records.append({"kind": "eval", "step": 20, "epoch": 2, "split": "val", "AP": 0.25, "AP50": 0.5, "loss": 4.0})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "run/metrics.jsonl").write_text(lines)
    command = ["analyze", folder / "run", "--against", folder / "other.safetensors", "--data", tiny_digits]
    command += ["--output", folder / "report", "--images", 4, "--resamples", 20]
    assert run(list(map(str, command))) == 0
    return folder / "report"


def test_everything_is_there_and_bounded(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 12 * 2**20 and {p.name for p in report.iterdir()} == {"index.html", "data"}
    open_ones, folded = page.split('<details id="fold-2">')
    for key in (
        "findings",
        "images",
        "summary",
        "classes",
        "mistakes",
        "confusion",
        "curves",
        "calibration",
        "training",
    ):
        assert f'<section id="{key}"' in open_ones, key
    for key in ("layers", "query-use", "patterns", "inside"):
        assert f'<section id="{key}"' in folded, key
    names = ("findings_a", "findings_b", "comparison", "figures", "classes", "images", "training_ap", "training_loss")
    for name in (*names, "attention_0", "refinement_0", "proposals_0"):
        content = json.loads((report / f"data/{name}.json").read_text())
        assert content["caption"] and content["data"], name
    # What one model has and the other has not is said.
    assert (report / "data/pairs_0.json").exists() and not (report / "data/against/pairs_0.json").exists()
    assert "Not shown for dino_nano: it was trained with one-to-one assignment" in page
    assert "dino_nano: its checkpoint lies in no run folder" in page


def test_figures_are_those_of_the_evaluation(report: Path, tiny_digits: Path, tmp_path: Path) -> None:
    model = paqdetr.load(report.parent / "run")
    rows = json.loads((report / "data/figures.json").read_text())["data"]["rows"]
    expected = paqdetr.evaluate(model, data=tiny_digits, split="val").figures
    for row in rows:
        value = getattr(expected, row["figure"])
        assert row["a"] is None if value != value else row["a"] == pytest.approx(value, abs=1e-9)
        assert row["difference"] is None if value != value else row["difference"] == pytest.approx(row["b"] - row["a"])

    # A model in memory, of a host with neither proposals nor patterns, on data without a training split.
    (tmp_path / "data").mkdir()
    for name in ("val.json", "val"):
        (tmp_path / "data" / name).symlink_to(tiny_digits / name)
    host = untrained("deformable_detr_one_stage_nano", tiny_digits)
    seen: dict[str, tuple[int, int]] = {}
    found = paqdetr.analyze(
        host, data=tmp_path / "data", output=tmp_path / "out", images=1, samples=5,
        progress=lambda stage, done, total: seen.__setitem__(stage, (done, total)),
    )  # fmt: skip
    assert found.page == tmp_path / "out/index.html" and found.against == ()
    assert found.figures == paqdetr.evaluate(host, data=tiny_digits, split="val").to_json() | {
        "images_per_second": found.figures["images_per_second"]
    }
    inside = next(section for section in found.sections if section.key == "inside")
    names = [part.name for part in inside.parts]
    assert names == ["attention_0", "refinement_0", "encoder_0"]
    assert "no encoder proposals" in inside.lead and "one-to-one assignment" in inside.lead
    assert "training" not in {section.key for section in found.sections}
    assert seen["evaluate deformable_detr_one_stage_nano"] == (4, 4)


def test_mistakes_are_told_before_the_work(tiny_digits: Path, tmp_path: Path) -> None:
    model = untrained("dino_nano", tiny_digits)

    def never(stage: str, done: int, total: int) -> None:
        raise AssertionError(f"{stage} began")

    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        paqdetr.analyze(model, data=tiny_digits, output=tmp_path / "busy", progress=never)
    with pytest.raises(DataError, match="'dev'"):
        paqdetr.analyze(model, data=tiny_digits, split="dev", output=tmp_path / "out", progress=never)
    with pytest.raises(ConfigError, match="at least 1"):
        paqdetr.analyze(model, data=tiny_digits, output=tmp_path / "out", images=0, progress=never)
    half = untrained("dino_nano", tiny_digits).half()
    with pytest.raises(ConfigError, match=r"dino_nano is in torch\.float16"):
        paqdetr.analyze(half, data=tiny_digits, output=tmp_path / "out", progress=never)
    other = build_model(load_config("dino_nano", SMALL | {"model.num_classes": 3}))
    with pytest.raises(DataError, match="does not fit the model"):
        paqdetr.analyze(model, against=other, data=tiny_digits, output=tmp_path / "out", progress=never)
    assert not (tmp_path / "out").exists()
    missing = ["analyze", str(tmp_path / "no.safetensors"), "--data", str(tiny_digits), "--output", "x"]
    assert run(missing) == 2


WITHOUT_OBJECTS = {
    "no boxes": lambda rows: [],
    "crowds": lambda rows: [row | {"iscrowd": 1} for row in rows],
    "no area": lambda rows: [row | {"bbox": [*row["bbox"][:3], 0]} for row in rows],
    "outside": lambda rows: [row | {"bbox": [500, 500, 9, 9]} for row in rows],
}


@pytest.mark.parametrize("kind", WITHOUT_OBJECTS)
def test_a_split_without_objects(tiny_digits: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text())
        content["annotations"] = WITHOUT_OBJECTS[kind](content["annotations"])
        (folder / f"{split}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"val\.json: none of its 4 images has an object to be found \((0|\d\d) crowds"):
        paqdetr.analyze(untrained("dino_nano", tiny_digits), data=folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert training_split(folder) == (None, "") and training_split(tiny_digits)[0] is not None


def test_without_the_images_that_a_model_learned_from(tiny_digits: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    for picture in (folder / "train").iterdir():
        picture.unlink()
    made = paqdetr.analyze(
        untrained("dino_nano", tiny_digits), data=folder, output=tmp_path / "out", samples=20, images=1
    )
    page = made.page.read_text(encoding="utf-8")
    assert "The training split cannot be used, and what needs it is left out: " in page and "images are missing" in page


def test_data_that_has_grown_since(tiny_digits: Path, tmp_path: Path) -> None:
    """A class more in train than the model knows, and other ids in it: what is said of classes goes by their names."""
    folder = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    file = folder / "train.json"
    content = json.loads(file.read_text())
    counts = Counter(own["category_id"] for own in content["annotations"])
    names = {own["id"]: own["name"] for own in content["categories"]}
    for own in content["categories"]:
        own["id"] += 1
    for own in content["annotations"]:
        own["category_id"] += 1
    file.write_text(json.dumps(content))
    learning, _ = training_split(folder)
    assert training_boxes(learning, open_split(folder, "val").classes) == {i: counts[i] for i in names}
    content["categories"].append({"id": 99, "name": "ten"})
    file.write_text(json.dumps(content))
    made = paqdetr.analyze(
        untrained("dino_nano", tiny_digits), data=folder, output=tmp_path / "out", samples=20, images=1
    )
    page = made.page.read_text(encoding="utf-8")
    assert "The training split cannot be used, and what needs it is left out: " in page and "category 99" in page


# ------------------------------------------------------------------------------------------------ browser


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The report in a window of that width; nothing may be asked of the network, nor said on the console."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    asked, said = [], []
    opened.on("request", lambda call: asked.append(call.url))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    address = (report / "index.html").as_uri()
    opened.goto(address)
    yield opened
    assert [url for url in asked if not url.startswith("data:") and url.partition("#")[0] != address] == []
    assert said == []
    context.close()


def column(page: Any, number: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#a-classes tbody tr > :nth-child({number})", "all => all.map(c => c.dataset.value)"
    )


def wait_until(page: Any, expression: str) -> None:
    """playwright's own `wait_for_function` has the page evaluate text again and again, which its security policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def test_a_reader_filters_and_enlarges_pictures(page: Any) -> None:
    tiles = page.locator(".tile:visible")
    everything, first = tiles.count(), page.locator(".tile").first
    assert everything == 4 and page.locator(".filters output").inner_text() == "4 of 4 pictures"
    kind, name = page.locator(".filters select").nth(1), page.locator(".filters select").nth(0)
    kind.select_option("missed")
    missed = tiles.count()
    assert 0 < missed <= 4 and page.locator(".filters output").inner_text() == f"{missed} of 4 pictures"
    chosen = name.locator("option").nth(1).get_attribute("value")
    name.select_option(chosen)
    expected = page.locator(".tile").evaluate_all(
        "(all, c) => all.filter((t) => JSON.parse(t.dataset.tags).some(([a, b]) => a === c && b === 'missed')).length",
        chosen,
    )
    assert tiles.count() == expected <= missed
    name.select_option("")
    kind.select_option("")

    box = page.locator("#lightbox")
    assert box.is_hidden()
    first.locator("button").focus()
    page.keyboard.press("Enter")
    words = [box.locator("p").inner_text()]
    path = first.locator(".path").get_attribute("data-path")
    assert box.is_visible() and path in words[0] and Path(path).is_file()
    wait_until(
        page,
        "(i => i.naturalWidth > 0 && i.getBoundingClientRect().right <= innerWidth)(document.querySelector('#lightbox img'))",
    )
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        words.append(box.locator("p").inner_text())
    assert len(set(words[:4])) == 4 and words[4] == words[0], "around, back to the first"
    page.keyboard.press("ArrowLeft")
    assert box.locator("p").inner_text() == words[3]
    page.keyboard.press("Escape")
    assert box.is_hidden()
    # The event by which focus goes back comes after the dialog has closed.
    wait_until(page, "document.activeElement.closest('.tile') === document.querySelectorAll('.tile')[3]")


def test_what_a_person_needs_is_short_and_research_is_folded(page: Any) -> None:
    width = page.viewport_size["width"]
    if width > 1000:
        page.set_viewport_size({"width": 1200, "height": 800})
        assert page.evaluate("document.documentElement.scrollHeight") <= 8000
        sides = page.locator("#curves .parts > *").evaluate_all("all => all.map((e) => e.getBoundingClientRect().left)")
        assert len(set(sides)) == 2, "two columns"
    assert page.locator("#layers").is_hidden()
    page.locator("nav a", has_text="How queries are used").click()
    page.wait_for_selector("#layers", state="visible")
    # Nothing reaches beyond the window, unfolded either; wide tables scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    advice = page.locator("#findings")
    assert "B - A" in advice.inner_text() and "`" not in advice.inner_text()
    link = advice.locator("li a").first
    target = link.get_attribute("href")
    link.click()
    assert page.locator(target).is_visible()


def test_a_reader_sorts_slides_and_switches_the_theme(page: Any) -> None:
    page.locator("summary").click()

    boxes = page.locator("#a-classes thead button", has_text="boxes")
    boxes.click()
    numbers = [int(value) for value in column(page, 2)]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) > 1
    boxes.press("Enter")  # by keyboard, the other way round
    assert [int(value) for value in column(page, 2)] == sorted(numbers)
    assert page.locator("#a-classes th[aria-sort=ascending]").inner_text().startswith("boxes")
    page.locator("#a-classes thead button", has_text="class").click()
    names = column(page, 1)
    assert names == sorted(names)

    # The slider shows one layer at a time, and the other model's moves along.
    shown = "#{} .slide.on .which"
    for side in ("a", "b"):
        assert page.locator(shown.format(f"{side}-attention_0")).text_content() == "layer 6"
    slider = page.locator("#a-attention_0 input")
    slider.focus()
    slider.press("Home")
    for side in ("a", "b"):
        assert page.locator(shown.format(f"{side}-attention_0")).text_content() == "layer 1"
        assert page.locator(f"#{side}-attention_0 .slide:visible").count() == 1
        assert page.locator(f"#{side}-attention_0 output").inner_text() == "layer 1"
    assert page.locator("#a-attention_0 .slide.on img").evaluate("i => i.complete && i.naturalWidth > 0")
    assert slider.get_attribute("aria-valuetext") == "layer 1"

    # The system's theme at first, then the reader's choice; plots stay white cards.
    colours = "[document.body, document.querySelector('.plot img')].map((e) => getComputedStyle(e).backgroundColor)"
    white, dark = "rgb(255, 255, 255)", "rgb(22, 25, 29)"
    before = page.evaluate(colours)
    page.locator("#theme").click()
    after = page.evaluate(colours)
    assert {before[0], after[0]} == {white, dark} and before[1] == after[1] == white
    page.reload()
    assert page.evaluate(colours) == after


def test_printed_every_layer_is_there(page: Any) -> None:
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("#lightbox").is_hidden() and page.locator(".filters").is_hidden()
    assert page.locator("#a-attention_0 .slide:visible").count() == 6
    assert page.locator("nav").is_hidden() and page.locator("#theme").is_hidden()
