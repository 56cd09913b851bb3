"""Made-up detection problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Problem = tuple[dict[str, Any], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """`make_problem(seed, images=, classes=, objects=)`: ground truth with crowds, and results with near misses, wrong
    classes, duplicates and inventions. No two scores are equal. Some classes and images may be empty."""

    def make(seed: int, *, images: int = 6, classes: int = 3, objects: float = 4.0) -> Problem:
        rng = np.random.default_rng(seed)
        truth: dict[str, Any] = {
            "images": [{"id": int(i), "width": 500, "height": 500} for i in rng.permutation(3 * images)[:images]],
            "categories": [{"id": 2 * c + 1, "name": f"class {c}"} for c in range(classes)],
            "annotations": [],
        }
        results: list[dict[str, Any]] = []

        def detect(image: int, category: int, box: np.ndarray) -> None:
            results.append({"image_id": image, "category_id": category, "bbox": box.tolist(), "score": 0.0})

        for image in (entry["id"] for entry in truth["images"]):
            for _ in range(rng.poisson(objects)):
                category = 2 * int(rng.integers(classes)) + 1
                box = np.concatenate([rng.uniform(0, 250, 2), np.exp(rng.uniform(2, 5.5, 2))])
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": image,
                        "category_id": category,
                        "bbox": box.tolist(),
                        "area": float(box[2] * box[3] * rng.uniform(0.5, 1)),
                        "iscrowd": int(rng.random() < 0.1),
                    }
                )
                for _ in range(rng.integers(0, 4)):
                    moved = box * np.concatenate([np.ones(2), rng.uniform(0.7, 1.3, 2)])
                    moved[:2] += rng.normal(0, 0.05, 2) * box[2:]
                    detect(image, category if rng.random() < 0.8 else 2 * int(rng.integers(classes)) + 1, moved)
            for _ in range(rng.integers(0, 4)):
                box = np.concatenate([rng.uniform(0, 250, 2), np.exp(rng.uniform(2, 5.5, 2))])
                detect(image, 2 * int(rng.integers(classes)) + 1, box)
        for result, score in zip(results, rng.permutation(len(results)), strict=True):
            result["score"] = (float(score) + 0.5) / len(results)
        return truth, results

    return make
