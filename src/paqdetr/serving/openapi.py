"""What `/openapi.json` says of the server: one table of parameters, which requests are also checked against."""

from __future__ import annotations

from typing import Any

from paqdetr._version import __version__

_SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
_IOU: dict[str, Any] = {"anyOf": [_SHARE, {"const": "none"}]}
_SIDE: dict[str, Any] = {"type": "integer", "minimum": 64, "maximum": 16384}
_ABOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("The least score of a detection; the model's own if absent.", _SHARE),
    "nms": ("Boxes that overlap a better one of their class by more than this IoU are dropped; none: none are.", _IOU),
    "classes": ("Names or ids of the only classes that are wanted, with commas between them.", {"type": "string"}),
    "tiles": ("Cut the image into tiles of this side in pixels, for small objects in large images.", _SIDE),
}
PARAMETERS = {name: {"description": text, "schema": schema} for name, (text, schema) in _ABOUT.items()}
"""Query parameters of `/v1/detect`."""

_TEXT, _NUMBER, _INTEGER = ({"type": kind} for kind in ("string", "number", "integer"))
_DETECTION = {
    "box": {"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4, "description": "x1, y1, x2, y2 in pixels"},
    "score": _NUMBER,
    "label": {**_TEXT, "description": "name of the class"},
    "id": {**_INTEGER, "description": "category id of the class"},
}
_ERRORS = {
    "400": "no readable image, or a parameter out of its range",
    "401": "no valid key",
    "408": "the request did not arrive in time",
    "413": "too many bytes or pixels",
    "429": "too many images wait",
    "503": "the server stops",
    "504": "no answer in time",
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_OTHERS = {
    "/v1/model": "Name, classes, threshold and limits",
    "/healthz": "200 while the model answers",
    "/readyz": "200 while requests are taken",
    "/metrics": "Counters in the text format of Prometheus",
}


def openapi(*, key: bool) -> dict[str, Any]:
    """The description, in OpenAPI 3.1.

    Args:
        key: requests need one.
    """
    image = {"schema": {**_TEXT, "format": "binary"}}
    fault = {"application/json": {"schema": _object({"error": _TEXT, "help": _TEXT})}}
    size = _object({"width": _INTEGER, "height": _INTEGER})
    found = {"type": "array", "items": _object(_DETECTION)}
    spent = {**_NUMBER, "description": "from the request to its answer"}
    answer = _object({"model": _TEXT, "image": size, "detections": found, "ms": spent})
    detect = {
        "summary": "Detect the objects of one image",
        "parameters": [{"name": name, "in": "query", **about} for name, about in PARAMETERS.items()],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": image,
                "multipart/form-data": {"schema": _object({"file": image["schema"]})},
                "application/json": {"schema": _object({"image": {**_TEXT, "contentEncoding": "base64"}})},
            },
        },
        "responses": {
            "200": {
                "description": "what was found, best first; the drawn image with `Accept: image/jpeg`",
                "content": {"application/json": {"schema": answer}, "image/jpeg": image},
            },
            **{status: {"description": text, "content": fault} for status, text in _ERRORS.items()},
        },
        **({"security": [{"bearer": []}, {"header": []}]} if key else {}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "paqdetr", "version": __version__},
        "paths": {
            "/v1/detect": {"post": detect},
            **{
                path: {"get": {"summary": text, "responses": {"200": {"description": text}}}}
                for path, text in _OTHERS.items()
            },
        },
        "components": {"securitySchemes": _KEYS},
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
