"""A model that needs no weights: what it finds is written in the first pixel. As a program: a server of it."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from paqdetr.structures import ClassTable, Detections, OperatingPoint


@dataclass
class Stub:
    """Finds as many objects as the first pixel's red says, of classes 3 and 7 in turn, one below the other.

    Attributes:
        delay: seconds of a call.
        goes_on: a call waits until it is set, if there is one.
        calls: how many images came with each call, and the other arguments.
    """

    delay: float = 0.0
    goes_on: threading.Event | None = None
    name: str = "stub"
    operating_point: OperatingPoint = field(default_factory=lambda: OperatingPoint(threshold=0.5))
    classes: ClassTable = field(default_factory=lambda: ClassTable((3, 7), ("cat", "dog & <b>")))
    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def predict(self, images: Sequence[Image.Image], **how: Any) -> list[Detections]:
        self.calls.append((len(images), how))
        time.sleep(self.delay)
        if self.goes_on is not None:
            self.goes_on.wait(60)
        found = [self._one(image).above(self.operating_point.least_score(how.get("threshold"))) for image in images]
        return [detections.of(*how["classes"]) for detections in found] if "classes" in how else found

    def _one(self, image: Image.Image) -> Detections:
        red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
        if red == 255:
            raise RuntimeError("a defect")
        count = np.arange(red)
        boxes = np.stack([count * 0 + green, count * 12, count * 0 + green + 40, count * 12 + 10], 1) + blue / 256
        return Detections(
            boxes.astype(np.float32),
            np.linspace(0.95, 0.05, red, dtype=np.float32) if red > 1 else np.full(red, 0.95, np.float32),
            np.where(count % 2, 7, 3).astype(np.int64),
            names=self.classes.id_to_name,
        )


def picture(red: int, green: int = 5, blue: int = 0, size: tuple[int, int] = (160, 130), kind: str = "PNG") -> bytes:
    """An image file in which the stub finds `red` objects."""
    image = Image.new("RGB", size, (60, 70, 90))
    image.putpixel((0, 0), (red, green, blue))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


if __name__ == "__main__":
    from paqdetr.serving import server as module
    from paqdetr.serving.server import DetectionServer, Limits, listen, serve

    module._HEAD = float(sys.argv[3])
    listener = listen("127.0.0.1", 0)
    serve(
        DetectionServer(Stub(delay=float(sys.argv[1])), limits=Limits(max_wait_ms=float(sys.argv[2]))),
        listener,
        on_start=lambda: sys.stderr.write(f"{listener.getsockname()[1]}\n"),
    )
    sys.stderr.write("stopped\n")
