"""COCO figures: by hand on small cases, against pycocotools and faster-coco-eval on random ones and on published ones."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics import FIGURE_NAMES, CocoFigures, MatchTable, evaluate_detections, read_results
from paqdetr.structures import Detections


def truth(annotations: list[tuple], images: tuple = (1, 2), categories: tuple = ((1, "cat"), (2, "dog"))) -> dict:
    """A COCO json; an annotation is (image, category, [x, y, w, h])."""
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in images],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(annotations, start=1)
        ],
    }


def result(image: Any, category: Any, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


ENGINES = {
    "pycocotools": ("pycocotools.coco.COCO", "pycocotools.cocoeval.COCOeval"),
    "faster_coco_eval": ("faster_coco_eval.COCO", "faster_coco_eval.COCOeval_faster"),
}


def reference_stats(
    ground_truth: dict, results: list[dict], iou_type: str = "bbox", engine: str = "pycocotools"
) -> np.ndarray:
    pytest.importorskip(engine, reason="a reference to compare with")
    data_class, evaluation_class = map(pkgutil.resolve_name, ENGINES[engine])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = data_class()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        evaluation = evaluation_class(coco, coco.loadRes(copy.deepcopy(results)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats[:12])


def stats(figures: CocoFigures) -> np.ndarray:
    """In pycocotools' order, with its -1 where nothing is defined."""
    return np.nan_to_num([getattr(figures, name) for name in FIGURE_NAMES], nan=-1.0)


# ---------------------------------------------------------------------------------------------- by hand

A, B = [10.0, 10.0, 100.0, 100.0], [300.0, 200.0, 50.0, 20.0]  # areas 10,000 (large) and 1,000 (small)


def test_perfect_detections_score_one() -> None:
    gt = truth([(1, 1, A), (1, 2, B), (2, 1, B)])
    figures = evaluate_detections(gt, [result(1, 1, A, 0.9), result(1, 2, B, 0.8), result(2, 1, B, 0.3)])
    for name in ("AP", "AP50", "AP75", "APs", "APl", "AR1", "AR10", "AR100", "ARs", "ARl"):
        assert getattr(figures, name) == pytest.approx(1.0), name
    assert math.isnan(figures.APm) and math.isnan(figures.ARm)  # no object between 32^2 and 96^2
    assert figures.per_class == pytest.approx({"cat": 1.0, "dog": 1.0})


def test_a_duplicate_below_the_match_costs_nothing_and_above_it_costs_precision() -> None:
    gt = truth([(1, 1, A)])
    assert evaluate_detections(gt, [result(1, 1, A, 0.9), result(1, 1, A, 0.8)]).AP == pytest.approx(1.0)
    # Two objects, a duplicate ranked between them. Precision 1 up to recall .5, then 2/3:
    # 51 of the 101 recall points lie in [0, .5].
    gt = truth([(1, 1, A), (1, 1, B)])
    found = [result(1, 1, A, 0.9), result(1, 1, A, 0.8), result(1, 1, B, 0.7)]
    assert evaluate_detections(gt, found).AP == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_miss_caps_recall() -> None:
    figures = evaluate_detections(truth([(1, 1, A), (2, 1, B)]), [result(1, 1, A, 0.9)])
    assert figures.AP == pytest.approx(51 / 101)
    assert figures.AR100 == pytest.approx(0.5)
    assert (figures.APs, figures.APl) == pytest.approx((0.0, 1.0))


def test_iou_thresholds() -> None:
    shifted = [A[0] + 20, *A[1:]]  # IoU 80/120 = .667: right at .50, .55, .60 and .65
    figures = evaluate_detections(truth([(1, 1, A)]), [result(1, 1, shifted, 0.9)])
    assert (figures.AP, figures.AP50, figures.AP75) == pytest.approx((0.4, 1.0, 0.0))
    assert figures.per_class == pytest.approx({"cat": 0.4, "dog": math.nan}, nan_ok=True)
    assert figures.per_class_AP50 == pytest.approx({"cat": 1.0, "dog": math.nan}, nan_ok=True)


def test_a_class_without_ground_truth_does_not_count() -> None:
    figures = evaluate_detections(truth([(1, 1, A)]), [result(1, 1, A, 0.5), result(1, 2, A, 0.9)])
    assert figures.AP == pytest.approx(1.0)
    assert math.isnan(figures.per_class["dog"])


def test_image_without_objects_makes_false_positives() -> None:
    figures = evaluate_detections(truth([(1, 1, A)]), [result(2, 1, A, 0.9), result(1, 1, A, 0.5)])
    assert figures.AP == pytest.approx(0.5)


def test_crowds_are_neither_missed_nor_false() -> None:
    gt = truth([(1, 1, A), (1, 1, B)])
    gt["annotations"][1]["iscrowd"] = 1
    assert evaluate_detections(gt, [result(1, 1, B, 0.9), result(1, 1, A, 0.5)]).AP == pytest.approx(1.0)


def test_no_results_score_zero() -> None:
    figures = evaluate_detections(truth([(1, 1, A)]), [])
    assert (figures.AP, figures.AP50, figures.AR100, figures.per_class["cat"]) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(figures.APs) and math.isnan(figures.per_class["dog"])


@pytest.mark.parametrize("results", [[], [result(1, 1, A, 0.9)]])
def test_nothing_is_defined_without_ground_truth(results: list[dict]) -> None:
    figures = evaluate_detections(truth([]), results)
    assert np.isnan([getattr(figures, name) for name in FIGURE_NAMES]).all()


# ------------------------------------------------------------------------------------------ what comes in


@pytest.mark.parametrize("name", ["a\ud800", "\0", "$$", "\x1b[2J", ""])
def test_classes_of_any_name(name: str) -> None:
    found = evaluate_detections(truth([(1, 1, A)], categories=((1, name), (2, "dog"))), [result(1, 1, A, 0.9)])
    assert found.AP == pytest.approx(1) and found.per_class[name] == pytest.approx(1)


def test_string_ids_area_and_crowd_filled_in(tmp_path: Path) -> None:
    gt = truth([("b.jpg", 1, A), ("a.jpg", 2, B)], images=("b.jpg", "a.jpg"))
    for number, annotation in enumerate(gt["annotations"]):
        annotation["id"] = number  # from 0: the plain rules would read the first match as none
        del annotation["area"], annotation["iscrowd"]
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    figures = evaluate_detections(tmp_path / "gt.json", [result("b.jpg", 1, A, 0.9), result("a.jpg", 2, B, 0.9)])
    assert (figures.AP, figures.APs, figures.APl) == pytest.approx((1.0, 1.0, 1.0))


def test_detections_to_coco_fit() -> None:
    found = Detections(
        np.array([[10, 10, 110, 110]], np.float32), np.array([0.5], np.float32), np.array([1]), image_id=2
    )
    assert evaluate_detections(truth([(2, 1, A)]), found.to_coco()).AP == pytest.approx(1.0)


def test_same_name_twice_and_order_of_classes() -> None:
    gt = truth([(1, 7, A)], categories=((9, "cat"), (7, "cat"), (3, "dog")))
    figures = evaluate_detections(gt, [result(1, 7, A, 0.9)])
    assert list(figures.per_class) == ["dog", "cat (7)", "cat (9)"]
    next(category for category in gt["categories"] if category["id"] == 3)["name"] = "cat (7)"
    assert list(evaluate_detections(gt, []).per_class) == ["cat (7) (3)", "cat (7)", "cat (9)"]
    assert figures.per_class["cat (7)"] == pytest.approx(1.0)


def test_quiet_and_without_side_effects(capfd: pytest.CaptureFixture) -> None:
    gt, results = truth([(1, 1, A)]), [result(1, 1, A, 0.9)]
    before = copy.deepcopy((gt, results))
    evaluate_detections(gt, results)
    evaluate_detections(gt, [])
    assert capfd.readouterr() == ("", "")
    assert (gt, results) == before


def test_to_json() -> None:
    gt = truth([(1, 1, A)])
    written = evaluate_detections(gt, [result(1, 1, A, 0.9)]).to_json()
    assert list(written) == [*"AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(), "per_class"]
    assert written["APs"] is None and written["per_class"]["dog"] is None
    assert json.loads(json.dumps(written, allow_nan=False)) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "image_id 9 is none of the 2 images"),
        ({"image_id": "1"}, "image_id '1' is none"),
        ({"image_id": None}, "image_id None"),
        ({"image_id": [1]}, "image_id"),
        ({"category_id": 0}, r"image 1\): category_id 0 is none of the categories"),
        ({"category_name": "cow"}, "category_id 1 is 'cat' in .*, and category_name is 'cow'"),
        ({"category_id": 0, "category_name": "cow"}, "category_id 0 is none of the categories"),
        ({"score": math.nan}, "score: found nan"),
        ({"score": None}, "score: found None"),
        ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
        ({"bbox": [1, 2, math.inf, 4]}, "found inf"),
        ({"bbox": None}, "bbox is None"),
        ({"bbox": "1234"}, "found '1'"),
        ({"bbox": ["1", "2", "3", "4"]}, "found '1', expected a finite number from -1e"),
        ({"bbox": [1, 2, -3, 4]}, "found -3, expected a finite number from 0 to 1e"),
        ({"bbox": [1, 2, 3, 10**400]}, r"bbox \[1, 2, 3, 1000"),
        ({"bbox": [True] * 4}, "found True"),
        ({"bbox": [1, 2, 3, 1e300]}, r"found 1e\+300"),
        ({"score": 10**400}, "score: found 1000000"),
        ({"score": 10**5000}, "score: found a int, expected a finite number"),
        ({"score": math.inf}, "score: found inf"),
        ({"score": True}, "score: found True"),
        ({"score": "0.5"}, "score: found '0.5'"),
        ({"image_id": 10**400}, "image_id 1000000"),
        ({"image_id": True}, "image_id True is none"),
    ],
)
def test_malformed_results(change: dict, message: str) -> None:
    good = result(1, 1, A, 0.9)
    with pytest.raises(DataError, match=message) as caught:
        evaluate_detections(truth([(1, 1, A)]), [good, good | change])
    assert "result number 1" in caught.value.message and caught.value.remedy


def test_a_category_of_another_id_is_found_by_its_name() -> None:
    gt = truth([(1, 1, A), (1, 2, B)])
    rows = [result(1, 1, A, 0.9), result(1, 2, B, 0.8)]
    for ids in ((0, 1), (2, 1), ("cat", "dog")):
        other = [
            row | {"category_id": i, "category_name": n} for row, i, n in zip(rows, ids, ("Cat", "dog"), strict=True)
        ]
        assert evaluate_detections(gt, other).to_json() == evaluate_detections(gt, rows).to_json()
    for name in ("CAT", "class 1"):  # the latter is what a class without a name is called
        other = [row | {"category_name": name} for row in rows[:1]]
        assert evaluate_detections(gt, other).to_json() == evaluate_detections(gt, rows[:1]).to_json()


def test_malformed_ground_truth(tmp_path: Path) -> None:
    good = truth([(1, 1, A)])
    for key in ("images", "categories", "annotations"):
        with pytest.raises(DataError, match=key):
            evaluate_detections({k: v for k, v in good.items() if k != key}, [])
    with pytest.raises(DataError, match="no list under the key 'images'"):
        evaluate_detections([result(1, 1, A, 0.9)], [])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="more than once"):
        evaluate_detections(truth([], images=(1, 1)), [])
    with pytest.raises(DataError, match="annotation 1: image_id 5"):
        evaluate_detections(truth([(5, 1, A)]), [])
    with pytest.raises(DataError, match="number 0 has the id None"):
        evaluate_detections(good | {"images": [{}]}, [])
    for side in ("tall", [1], -5, math.inf, 10**400, 1e300, True):
        with pytest.raises(DataError, match="image 1: height: found"):
            evaluate_detections(good | {"images": [{"id": 1, "height": side, "width": 5}]}, [])
    with pytest.raises(DataError, match="number 0 is 3"):
        evaluate_detections(good | {"annotations": [3]}, [])
    with pytest.raises(DataError, match="area: found 'big'"):
        evaluate_detections(good | {"annotations": [good["annotations"][0] | {"area": "big"}]}, [])
    for area in (-1, math.nan, 10**400, "1"):
        with pytest.raises(DataError, match="area: found"):
            evaluate_detections(good | {"annotations": [good["annotations"][0] | {"area": area}]}, [])
    for crowd in ("maybe", 2, [1]):
        with pytest.raises(DataError, match="annotation 1: iscrowd is"):
            evaluate_detections(good | {"annotations": [good["annotations"][0] | {"iscrowd": crowd}]}, [])
    with pytest.raises(DataError, match=r"absent\.json"):
        evaluate_detections(tmp_path / "absent.json", [])
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"half\.json: no valid json"):
        evaluate_detections(tmp_path / "half.json", [])
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"deep\.json: the json is nested too deeply"):
        evaluate_detections(tmp_path / "deep.json", [])
    with pytest.raises(ConfigError, match="keypoints"):
        evaluate_detections(good, [], iou_type="keypoints")  # type: ignore[arg-type]


NUMBERS = st.one_of(
    st.sampled_from([1e400, -1e400, math.nan, 10**400, 10**5000, True, None, "1", [], {}, 2**63, 1e308, -1.0]),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
)


@given(
    change=st.dictionaries(
        st.sampled_from(["score", "image_id", "category_id", "bbox"]), NUMBERS | st.lists(NUMBERS, max_size=5)
    ),
    ground=st.dictionaries(
        st.sampled_from(["id", "image_id", "bbox", "area", "iscrowd"]), NUMBERS | st.lists(NUMBERS, max_size=5)
    ),
    height=NUMBERS,
)
def test_any_values_are_figures_or_one_line(change: dict, ground: dict, height: Any) -> None:
    good = truth([(1, 1, A)])
    good["annotations"][0] |= ground
    good["images"][0]["height"] = height
    with contextlib.suppress(DataError):
        evaluate_detections(good, [result(1, 1, A, 0.9) | change])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[math.nan] * 6], "no finite numbers of pixels"),
        ([[10**400] * 6], "no finite numbers of pixels"),
        ([["1"] * 6], "no finite numbers of pixels"),
        ([[1, 2]], "no usable segmentation"),
        ("abc", "no usable segmentation"),
        ({"size": [100, 100], "counts": [10**9]}, "no usable segmentation"),
        ({"size": [10**400, 100], "counts": [1]}, "no usable segmentation"),
        ({"size": ["a", 100], "counts": "1"}, "no usable segmentation"),
    ],
)
def test_polygons_that_are_none(segmentation: Any, message: str) -> None:
    good = truth([(1, 1, A)])
    good["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(DataError, match=f"annotation 1.*{message}"):
        evaluate_detections(good, [], iou_type="segm")


def test_read_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result(1, 1, A, 0.9)]))
    assert read_results(path) == [result(1, 1, A, 0.9)]
    path.write_text('[{"score": 1, "score": 2}]')
    with pytest.raises(DataError, match="an object has the key 'score' twice"):
        read_results(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a pipe, expected a file"):
        read_results(path)
    path.unlink()
    path.write_text(json.dumps(truth([])))
    with pytest.raises(DataError, match="expected a list of detections"):
        read_results(path)


# ------------------------------------------------------------------------------------------- names of images


def named(*names: str | None) -> dict[str, Any]:
    """Ground truth whose images 1, 2... are called so; an object in each."""
    gt = truth([(n, 1, A) for n in range(1, len(names) + 1)], images=tuple(range(1, len(names) + 1)))
    for image, name in zip(gt["images"], names, strict=True):
        image |= {} if name is None else {"file_name": name}
    return gt


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.jpg", 1),
        ("val/a.jpg", 1),
        ("/data/val/a.jpg", 1),
        ("C:\\data\\val\\a.jpg", 1),
        ("caf\u00e9.png", 2),
        ("cafe\u0301.png", 2),  # as macOS writes it
        ("north/c.jpg", 3),
        ("x/south/c.jpg", 4),
        ("c.jpg", 5),  # the whole name
    ],
)
def test_images_are_found_by_file_name(name: str, image: int) -> None:
    gt = named("val/a.jpg", "cafe\u0301.png", "north/c.jpg", "south/c.jpg", "c.jpg", None)
    expected = evaluate_detections(gt, [result(image, 1, A, 0.9)]).AP
    assert expected == pytest.approx(17 / 101)  # one object of six
    row = result(name, 1, A, 0.9)
    for found in (row, row | {"image_id": None, "file_name": name}, row | {"image_id": 77, "file_name": name}):
        assert evaluate_detections(gt, [found]).AP == expected
    both = row | {"image_id": float(image), "file_name": name}  # pandas writes 1.0
    assert evaluate_detections(gt, [both]).AP == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_id": 1, "file_name": "b.jpg"},
            "image_id 1 is 'val/a.jpg' in the ground truth, and file_name is 'b.jpg'",
        ),
        ({"image_id": 9, "file_name": "z.jpg"}, "image_id 9 with file_name 'z.jpg' is none of the 3 images"),
        ({"image_id": 9, "file_name": "other/a.jpg"}, "is none of the 3 images"),
        ({"image_id": "c.jpg"}, "2 images are called 'c.jpg'"),
        ({"image_id": "", "file_name": ""}, "is none of the 3 images"),
        ({"image_id": None, "file_name": 3}, "is none of the 3 images"),
    ],
)
def test_file_names_that_lead_nowhere(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        evaluate_detections(named("val/a.jpg", "x/c.jpg", "y/c.jpg"), [result(1, 1, A, 0.9) | change])
    assert caught.value.remedy


def test_another_ending_is_the_same_image() -> None:
    """Results of images that were converted."""
    row = result(1, 1, A, 0.9) | {"file_name": "a.png"}
    assert evaluate_detections(named("val/a.jpg"), [row]).AP == pytest.approx(1)


def test_files_with_a_byte_order_mark(tmp_path: Path) -> None:
    gt, rows = named("a.jpg"), [result("a.jpg", 1, A, 0.9)]
    for name, content in (("gt.json", gt), ("rows.json", rows)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
    assert evaluate_detections(tmp_path / "gt.json", read_results(tmp_path / "rows.json")).AP == pytest.approx(1)


# ------------------------------------------------------------------------------------------- crowded images


def test_more_objects_than_detections_that_count() -> None:
    """400 objects in a picture, all found: 100 of them at COCO's default."""
    boxes = [[50.0 * (n % 20), 50.0 * (n // 20), 40.0, 40.0] for n in range(400)]
    gt = truth([(1, 1, box) for box in boxes], images=(1,))
    rows = [result(1, 1, box, 0.5 + n / 1000) for n, box in enumerate(boxes)]
    assert evaluate_detections(gt, rows).AP == pytest.approx(26 / 101)  # recall 0, .01 ... .25
    assert stats(evaluate_detections(gt, rows)) == pytest.approx(reference_stats(gt, rows))
    for count, share in ((400, 1), (1000, 1), (200, 0.5), (40, 0.1), (1, 1 / 400)):
        figures = evaluate_detections(gt, rows, max_detections=count)
        assert (figures.AR100, figures.ARm) == pytest.approx((share, share))
        assert figures.AP == pytest.approx((math.floor(100 * share) + 1) / 101)
        assert figures.AR1 == pytest.approx(1 / 400)
        table = MatchTable.match(gt, rows, max_detections=count)
        again = {name: values[0] for name, values in table.figures().figures.items()}
        assert again == pytest.approx({name: getattr(figures, name) for name in FIGURE_NAMES}, nan_ok=True)
    for use in (evaluate_detections, MatchTable.match):
        with pytest.raises(ConfigError, match="max_detections: expected at least 1, found 0"):
            use(gt, rows, max_detections=0)


# --------------------------------------------------------------------------------------------------- masks


def test_masks_as_polygons_and_run_lengths() -> None:
    gt = {
        "images": [{"id": 1, "height": 6, "width": 8}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]]}],
    }
    # Columns first: 6 cells of column 0, then in each of the columns 1..4 rows 1..3.
    runs = [7, 3, 3, 3, 3, 3, 3, 3, 20]
    mask = {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": {"size": [6, 8], "counts": runs}}
    assert evaluate_detections(gt, [mask], iou_type="segm").AP == pytest.approx(1.0)
    for bad in (None, {"size": [8, 6], "counts": runs}, {"size": [6, 8]}, [[1, 2]], "abc"):
        with pytest.raises(DataError, match=r"result number 0 \(image 1\): no usable segmentation"):
            evaluate_detections(gt, [mask | {"segmentation": bad}], iou_type="segm")


# ------------------------------------------------------------------------------------ against other programs


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equal_to_other_programs_on_random_problems(engine: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, classes = rng.permutation(50)[: rng.integers(1, 8)].tolist(), [3, 1, 90]
    gt, results = truth([], images=tuple(images), categories=tuple((c, f"class {c}") for c in classes)), []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            c, box = int(rng.choice(classes)), [*rng.uniform(0, 300, 2), *rng.uniform(5, 200, 2)]
            crowd = int(rng.random() < 0.1)
            number = len(gt["annotations"]) + 1
            entry = {"id": number, "image_id": image, "category_id": c, "bbox": box, "iscrowd": crowd}
            gt["annotations"].append(entry | {"area": box[2] * box[3] * rng.uniform(0.5, 1)})
            for _ in range(rng.integers(0, 4)):  # near misses, some under a wrong class, scores with ties
                near = (np.array(box) * rng.uniform(0.85, 1.15, 4)).tolist()
                label = c if rng.random() < 0.8 else int(rng.choice(classes))
                results.append(result(image, label, near, float(rng.integers(0, 10)) / 10))
    if not results:
        results = [result(images[0], 1, [0, 0, 10, 10], 0.5)]
    expected = reference_stats(gt, results, engine=engine)
    np.testing.assert_allclose(stats(evaluate_detections(gt, results)), expected, atol=1e-12)


def published_figures(folder: Path) -> dict[str, list[float]]:
    """The twelve figures of boxes and of masks, as pycocotools' authors printed them, to three decimals."""
    found: dict[str, list[float]] = {}
    kind = ""
    for line in (folder / "val2014_fake_eval_res.txt").read_text().splitlines():
        if line.startswith("type="):
            kind = line.removeprefix("type=")
        elif "@[" in line:
            found.setdefault(kind, []).append(float(line.split("=")[-1]))
    return found


@pytest.mark.parametrize(
    ("iou_type", "known"), [("bbox", {"AP": 0.504581, "AP50": 0.696973, "AP75": 0.572982}), ("segm", {"AP": 0.319545})]
)
def test_published_figures(shared_data: Callable[[str], Path], iou_type: Any, known: dict[str, float]) -> None:
    folder = shared_data("cocoeval_fixture")
    path = folder / "instances_val2014_100.json"
    results = read_results(folder / f"instances_val2014_fake{iou_type}100_results.json")
    figures = evaluate_detections(path, results, iou_type=iou_type)
    for name, value in known.items():
        assert getattr(figures, name) == pytest.approx(value, abs=5e-7)
    published = published_figures(folder)[iou_type]
    assert len(published) == 12
    np.testing.assert_allclose(stats(figures), published, atol=5.001e-4)
    for engine in ENGINES:
        expected = reference_stats(json.loads(path.read_text()), results, iou_type, engine)
        np.testing.assert_allclose(stats(figures), expected, atol=1e-12, err_msg=engine)
    defined = [value for value in figures.per_class.values() if not math.isnan(value)]
    assert np.mean(defined) == pytest.approx(figures.AP)
    assert np.nanmean(list(figures.per_class_AP50.values())) == pytest.approx(figures.AP50)


# --------------------------------------------------------------------------------------------- suppression


def test_suppression_by_class() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    found = Detections(
        boxes, np.array([0.5, 0.9, 0.8, 0.7], np.float32), np.array([1, 1, 2, 1]), {1: "cat"}, "x", np.arange(4)
    )
    kept = found.without_duplicates(0.7)  # 0 overlaps 1 by .9 in the same class, 2 is of another class
    assert kept.query_indices is not None and kept.query_indices.tolist() == [1, 2, 3]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert kept.labels.tolist() == [1, 2, 1] and kept.names == {1: "cat"} and kept.image_id == "x"
    assert kept.boxes.dtype == np.float32 and kept.boxes.shape == (3, 4)
    assert len(found.without_duplicates(0.95)) == 4
    assert len(found) == 4


def test_suppression_of_nothing() -> None:
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    kept = empty.without_duplicates()
    assert kept.boxes.shape == (0, 4) and len(kept) == 0 and kept.query_indices is None


def test_suppression_raises_ap_where_copies_outrank_objects() -> None:
    gt = truth([(1, 1, A), (1, 1, B)])
    xyxy = np.array([[10, 10, 110, 110], [10, 10, 110, 108], [300, 200, 350, 220]], np.float32)
    found = Detections(xyxy, np.array([0.9, 0.8, 0.7], np.float32), np.array([1, 1, 1]), image_id=1)
    with_copy = evaluate_detections(gt, found.to_coco()).AP
    assert with_copy == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert evaluate_detections(gt, found.without_duplicates().to_coco()).AP == pytest.approx(1.0)
