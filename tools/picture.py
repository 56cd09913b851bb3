"""The picture of the README: what a detector finds in an image, and where the queries behind it look in the last decoder layer.

python tools/picture.py CHECKPOINT IMAGE OUTPUT         # docs/assets/attention.jpg is that of the README
"""

from __future__ import annotations

import sys

import numpy as np

import paqdetr
from paqdetr.analysis.inside import look_inside
from paqdetr.drawing import Canvas, mark, tiled
from paqdetr.images import read_image

SIDE, SHOWN, THRESHOLD = 440, 5, 0.5


def main(checkpoint: str, image: str, output: str) -> None:
    """Write the picture: detections on the left, the sampling points of the `SHOWN` surest queries on the right.

    Raises:
        SystemExit: nothing is found in the image.
    """
    model = paqdetr.load(checkpoint)
    assert isinstance(model, paqdetr.Detector)
    picture = read_image(image)
    detections = model.predict(picture, threshold=THRESHOLD, nms=0.5)[0]
    if not len(detections):
        raise SystemExit(f"{image}: the model finds nothing over {THRESHOLD}; take another image, or train longer")
    size = np.array(picture.size * 2, dtype=float)
    found, looked = Canvas(picture, size=SIDE, smooth=True), Canvas(picture, size=SIDE, smooth=True, dim=0.45)
    assert detections.query_indices is not None
    queries = detections.query_indices[:SHOWN].tolist()
    sampling = look_inside(model, picture, chosen=queries).decoder[-1]
    for place, box in reversed(list(enumerate(detections.boxes / size))):
        label = int(detections.labels[place])
        text = f"{detections.names[label]}  {detections.scores[place]:.2f}"
        found.box(box, mark(label), label=text, width=1.2)
        if place < len(queries):
            weights = sampling.weights[place].reshape(-1)
            radii = np.maximum(9.0 * np.sqrt(weights / weights.max()), 1.0)
            looked.box(box, mark(label), dashed=True)
            looked.dots(sampling.locations[place].reshape(-1, 2), mark(label), radii=radii, strength=0.8)
    sheet = tiled([[found.picture(), looked.picture()]], gap=12)
    sheet.save(output, quality=78, optimize=True, progressive=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
