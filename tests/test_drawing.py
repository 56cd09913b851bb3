"""Drawing: where pixels change, what is left alone, and that nothing odd stops it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from paqdetr import drawing
from paqdetr.drawing import PALETTE, Canvas, class_key, draw_boxes, mark, tiled
from paqdetr.errors import ConfigError
from paqdetr.structures import Detections

NAMES = {1: "cat", 7: "Straßenbahn", 90: "кошка"}


def found(boxes: list, labels: list[int], scores: list[float] | None = None) -> Detections:
    given = scores or np.linspace(0.9, 0.3, len(boxes)).tolist()
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(given, np.float32), np.array(labels, np.int64), NAMES
    )


def drawn_detections(image: Image.Image | np.ndarray, given: Detections) -> Image.Image:
    return draw_boxes(image, given.boxes, given.labels, given.names, given.scores)


def changed(before: np.ndarray, after: Image.Image) -> np.ndarray:
    return (np.asarray(after) != before).any(axis=2)


@pytest.mark.parametrize("side", [64, 320, 1000, 2500])
def test_pixels_change_on_the_box_and_its_label_only(side: int) -> None:
    canvas = np.full((side, side, 3), 128, np.uint8)
    box = [0.3 * side, 0.4 * side, 0.7 * side, 0.8 * side]
    mask = changed(canvas, drawn_detections(canvas, found([box], [1])))
    x0, y0, x1, y1 = (round(value) for value in box)
    for x, y in [((x0 + x1) // 2, y1), (x0, (y0 + y1) // 2), (x1, (y0 + y1) // 2)]:
        assert mask[y, x], "the box's lines are drawn"
    rows, columns = np.nonzero(mask)
    line = max(2, side // 100)
    assert rows.max() <= y1 + line and columns.min() >= x0 - line, "nothing below or left of the box"
    assert rows.min() >= y0 - max(24, side // 20), "nothing above the label"
    inner = mask[y0 + line + 20 * (side < 200) : y1 - line, x0 + line : x1 - line]
    assert not inner.any(), "the inside of the box is left as it was"
    assert (canvas == 128).all(), "the given image is not touched"


def test_text_grows_with_the_image() -> None:
    heights = []
    for side in (320, 1000, 4000):
        canvas = np.zeros((side, side, 3), np.uint8)
        box = [0.3 * side, 0.4 * side, 0.7 * side, 0.8 * side]
        rows, _ = np.nonzero(changed(canvas, drawn_detections(canvas, found([box], [1]))))
        heights.append(0.4 * side - rows.min())  # of the label, which stands on the box
    assert heights[0] >= 9, "readable on a small image"
    assert heights[0] < heights[1] < heights[2]
    assert heights[2] >= 0.015 * 4000, "readable on a large image shown at the size of a screen"


def test_a_label_at_the_top_edge_stays_in_the_image() -> None:
    canvas = np.zeros((200, 300, 3), np.uint8)
    drawn = np.asarray(drawn_detections(canvas, found([[250, 0, 299, 150]], [1])))
    label = drawn[:14, 230:]
    assert (label > 0).any(axis=2).sum() > 300, "the label's background lies inside, though the box starts at row 0"


def test_colour_by_class() -> None:
    canvas = np.zeros((300, 300, 3), np.uint8)
    boxes = [[20, 50, 80, 90], [120, 50, 180, 90], [220, 50, 280, 90]]
    drawn = np.asarray(draw_boxes(canvas, boxes, [1, 7, 1], NAMES))
    first, second, third = (drawn[90, x].tolist() for x in (50, 150, 250))
    assert first == third != second
    assert first == np.asarray(drawn_detections(canvas, found([boxes[0]], [1])))[90, 50].tolist()


def test_targets_carry_no_score() -> None:
    canvas, box = np.zeros((300, 300, 3), np.uint8), [[50, 100, 250, 200]]
    plain = changed(canvas, draw_boxes(canvas, box, [1], NAMES)).sum()
    scored = changed(canvas, drawn_detections(canvas, found(box, [1]))).sum()
    assert scored > plain
    unnamed = draw_boxes(canvas, box, [5], NAMES)  # shown by its number
    assert changed(canvas, unnamed).any()


def test_the_better_of_two_boxes_lies_on_top() -> None:
    canvas, box = np.zeros((300, 300, 3), np.uint8), [50, 100, 250, 200]
    for labels, winner in (([1, 7], 1), ([7, 1], 7)):
        drawn = np.asarray(drawn_detections(canvas, found([box, box], labels, [0.9, 0.2])))
        alone = np.asarray(drawn_detections(canvas, found([box], [winner])))
        assert drawn[200, 150].tolist() == alone[200, 150].tolist()


def test_nothing_to_draw_gives_a_copy() -> None:
    image = Image.new("RGB", (40, 30), "red")
    for drawn in (drawn_detections(image, found([], [])), draw_boxes(image, [], [], NAMES)):
        assert drawn is not image and drawn.tobytes() == image.tobytes() and drawn.size == (40, 30)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    drawn = drawn_detections(Image.new("RGB", (100, 80), "gray").convert(mode), found([[10, 30, 60, 70]], [90]))
    assert drawn.mode == "RGB" and drawn.size == (100, 80)


def test_the_exif_turn_is_applied() -> None:
    image = Image.new("RGB", (100, 60))
    image.getexif()[0x0112] = 6  # to be turned by a quarter
    drawn = draw_boxes(image, [[10, 50, 50, 90]], [1], NAMES)
    assert drawn.size == (60, 100)
    assert np.asarray(drawn)[90, 30].any()


def test_boxes_outside_and_without_area() -> None:
    image = Image.new("RGB", (100, 80))
    for box in ([-50, -50, 500, 500], [200, 200, 300, 300], [20, 20, 20, 20], [99, 79, 100, 80]):
        assert drawn_detections(image, found([box], [7])).size == (100, 80)


def test_labels_move_apart() -> None:
    canvas, box = np.zeros((300, 300, 3), np.uint8), [50, 100, 250, 200]
    once = changed(canvas, draw_boxes(canvas, [box], [1], NAMES))
    twice = changed(canvas, draw_boxes(canvas, [box, box], [1, 7], NAMES))
    assert not once[205:].any() and twice[205:].any(), "the second label stands below the box"


def test_detections_draw() -> None:
    image, detections = Image.new("RGB", (100, 80)), found([[10, 30, 60, 70]], [1])
    assert detections.draw(image).tobytes() == drawn_detections(image, detections).tobytes()


# ----------------------------------------------------------------------------------------- many boxes, labels


def close(pixel: np.ndarray, colour: str) -> bool:
    return bool((np.abs(pixel.astype(int) - ImageColor.getrgb(colour)) < 40).all())


def label_areas(drawn: np.ndarray, colour: str) -> int:
    return int((np.abs(drawn.astype(int) - ImageColor.getrgb(colour)).max(-1) < 3).sum())


@pytest.mark.parametrize("count", [1, 3, 10, 11, 15, 60])
def test_more_than_ten_boxes_have_a_key_in_place_of_labels(count: int) -> None:
    """Apart from each other, so that all labels would find a place."""
    canvas = np.full((800, 800, 3), 128, np.uint8)
    places = np.arange(count)
    boxes = np.stack(
        [100 * (places % 8), 60 + 90 * (places // 8), 100 * (places % 8) + 60, 100 + 90 * (places // 8)], 1
    )
    drawn = np.asarray(draw_boxes(canvas, boxes, [1] * count, NAMES))
    colour = ImageColor.getrgb(mark(1))
    inked = np.abs(drawn.astype(int) - colour).max(-1) < 3
    labelled = [inked[y0 - 12 : y0 - 3, x0 + 4 : x0 + 20].any() for x0, y0 in boxes[:, :2]]
    if count <= 10:
        assert all(labelled) and not (drawn > 250).all(-1).any()
    else:
        assert not any(labelled)
        assert (drawn[-25:] > 200).all(-1).sum() > 200 or (drawn[:25] > 200).all(-1).sum() > 200, "the key"


def test_the_key_of_a_narrow_picture_shows_the_counts() -> None:
    """Of a name that is wider than the picture, the beginning is shown."""
    names = {1: "a class with a name of many words"}
    drawn = [
        np.asarray(draw_boxes(Image.new("RGB", (90, 200)), [[10, 150, 60, 190]] * count, [1] * count, names))
        for count in (11, 88)
    ]
    assert (drawn[0] != drawn[1])[:100].any()


def test_the_key_stands_where_it_hides_no_box() -> None:
    canvas = np.full((600, 600, 3), 128, np.uint8)
    boxes = [[10 * i, 10 * j, 10 * i + 200, 10 * j + 200] for i in range(6) for j in range(3)]  # at the top left
    boxes += [[500, 450, 599, 599], [450, 0, 599, 100]]
    drawn = np.asarray(draw_boxes(canvas, boxes, [1] * 18 + [7, 90], NAMES))
    assert (drawn[520:, :60] > 200).all(-1).sum() > 500, "at the bottom left"
    assert not (drawn[:50, :60] > 200).all(-1).any()


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (120, 400)])
def test_the_key_names_all_classes(size: tuple[int, int]) -> None:
    """Of sixty boxes that fill a picture, ten classes: in as many columns as it takes."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.8, (60, 2)) * size
    boxes = np.concatenate([corners, corners + 0.2 * np.array(size)], 1)
    drawn = np.asarray(draw_boxes(Image.new("RGB", size), boxes, np.arange(60) % 10, {}))
    for number in range(10):  # a square of the key has more of a colour than a line of one pixel in any window
        inked = (drawn == ImageColor.getrgb(mark(number))).all(-1)
        assert any(inked[y : y + 7, x : x + 7].all() for y, x in np.argwhere(inked)), number


def test_a_key_outside_of_the_picture() -> None:
    canvas = Canvas(Image.new("RGB", (300, 200), "#808080"))
    for number in range(12):
        canvas.box(
            [0.05 * number, 0.1, 0.05 * number + 0.2, 0.9], mark(number % 2), label="word", key=f"word {number % 2}"
        )
    plain, below = (np.asarray(canvas.picture(place)) for place in ("none", "below"))
    assert plain.shape == (200, 300, 3) and (below[:200] == plain).all() and len(below) > 215
    assert not (plain > 250).all(-1).any(), "nothing white is drawn into it"
    assert all(label_areas(below[200:], mark(number)) > 50 for number in range(2))


@pytest.mark.parametrize("side", [1, 12, 30])
def test_a_key_that_is_wider_than_its_sheet(side: int) -> None:
    colours, key = class_key([1, 2, 3], {1: "person", 2: "rider", 3: "x"})
    sheet = np.asarray(tiled([[Image.new("RGB", (side, side))]], gap=4, key=key))
    below = sheet[side:]
    assert all((below == ImageColor.getrgb(colour)).all(-1).any() for colour in colours.values())
    assert (below[:, -1] == 255).all()  # nothing is cut off


def test_pictures_of_a_sheet_share_their_colours() -> None:
    """Two classes of one place in the palette, each in a picture of its own, differ; labels stay."""
    ids = [0, len(PALETTE)]
    colours, key = class_key(ids, {0: "cat"})
    assert [(name, colour) for name, _, colour in key] == [
        ("cat", colours[0]),
        (str(len(PALETTE)), colours[len(PALETTE)]),
    ]
    drawn = [
        np.asarray(
            draw_boxes(np.zeros((300, 300, 3), np.uint8), [[20, 50, 80, 90]], [own], {0: "cat"}, colours=colours)
        )
        for own in ids
    ]
    assert drawn[0][90, 50].tolist() != drawn[1][90, 50].tolist()
    assert all(label_areas(one[:48], colours[own]) > 20 for one, own in zip(drawn, ids, strict=True))


def test_labels_never_lie_on_each_other() -> None:
    """Two colours at one place: both labels are whole. Nine at one place in a small picture: a key takes over."""
    canvas = Canvas(Image.new("RGB", (200, 100), "#808080"))
    for number in range(2):
        canvas.box([0.1, 0.4, 0.5, 0.8], mark(number), label="word", key="word")
    drawn = np.asarray(canvas.picture())
    assert all(label_areas(drawn, mark(number)) > 150 for number in range(2))
    canvas = Canvas(Image.new("RGB", (60, 40), "#808080"))
    for number in range(9):
        canvas.box([0.1, 0.4, 0.5, 0.8], mark(number), label="a word", key="word")
    assert (np.asarray(canvas.picture()) > 200).all(-1).any()


def test_classes_of_one_colour_differ_within_a_picture() -> None:
    ids = [0, len(PALETTE)]  # the same place in the palette
    drawn = np.asarray(draw_boxes(np.zeros((300, 300, 3), np.uint8), [[20, 50, 80, 90], [120, 50, 180, 90]], ids, {}))
    assert drawn[90, 50].tolist() != drawn[90, 150].tolist()


@pytest.mark.parametrize("smooth", [False, True])
def test_marks_are_where_they_should_be(smooth: bool) -> None:
    canvas = Canvas(Image.new("RGB", (50, 25), "#808080"), size=200, smooth=smooth)
    canvas.box([0.25, 0.2, 0.75, 0.8], mark(0), width=4)
    canvas.dots([[0.5, 0.5], [2.0, 2.0]], mark(1), radii=[6, 6])
    canvas.label([0.9, 0.0], "beyond the edge", mark(3))
    picture = canvas.picture()
    assert picture.size == (200, 100) and picture.mode == "RGB"
    drawn = np.asarray(picture)
    for x, y in ((51, 50), (148, 50), (100, 21), (100, 78)):
        assert close(drawn[y, x], mark(0)), (x, y)
    assert close(drawn[50, 100], mark(1))
    assert drawn[50, 70].tolist() == [128, 128, 128]
    assert close(drawn[2, 195], mark(3)), "a label is moved into the picture"
    assert mark(len(PALETTE)) == mark(0)


@pytest.mark.parametrize("side", [1, 3000])
def test_pictures_of_any_size_are_drawn_on(side: int) -> None:
    canvas = Canvas(Image.new("RGB", (side, 1)), size=64)
    canvas.box([-1, -1, 2, 2], mark(0), dashed=True, label="word", key="word")
    assert max(canvas.picture().size) == 64


def test_a_font_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = Image.new("RGB", (200, 100), "white")

    def drawn() -> bytes:
        drawing._font.cache_clear()
        canvas = Canvas(picture)
        canvas.box([20, 40, 150, 80], "#0072B2", label="illuminated")
        return canvas.picture().tobytes()

    usual = drawn()
    monkeypatch.setenv("PAQDETR_FONT", str(drawing.font_path().with_name("DejaVuSansMono.ttf")))
    assert drawn() != usual
    (tmp_path / "none.ttf").write_text("x")
    for name in ("none.ttf", "gone.ttf"):
        monkeypatch.setenv("PAQDETR_FONT", str(tmp_path / name))
        with pytest.raises(ConfigError, match=f"{name}: no font can be read"):
            drawn()
    monkeypatch.setenv("PAQDETR_FONT", "")
    assert drawn() == usual
