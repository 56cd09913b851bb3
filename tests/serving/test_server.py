"""The server without a socket; tests/serving/test_serve_process.py has the real one."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient
from stub import Stub, picture

from paqdetr.cli import run
from paqdetr.errors import ConfigError
from paqdetr.serving.server import DetectionServer, Limits, Options, _from_json


@pytest.fixture
def client() -> Callable[..., TestClient]:
    def make(model: Any = None, **how: Any) -> TestClient:
        server = DetectionServer(model or Stub(), **how)
        return TestClient(server.app, raise_server_exceptions=False)

    return make


def test_the_image_comes_as_body_form_or_base64(client: Callable[..., TestClient]) -> None:
    stub, content = Stub(), picture(4, 10, 128)
    calls = client(stub)
    text = base64.b64encode(content).decode()
    answers = [
        calls.post("/v1/detect?threshold=0.3", content=content),
        calls.post("/v1/detect?threshold=0.3", content=content, headers={"content-type": "image/png"}),
        calls.post("/v1/detect?threshold=0.3", files={"file": ("a.png", content)}),
        calls.post("/v1/detect?threshold=0.3", json={"image": text}),
        calls.post("/v1/detect?threshold=0.3", json={"image": f"data:image/png;base64,{text}"}),
        calls.post("/v1/detect?threshold=0.3", json={"image": base64.encodebytes(content).decode()}),  # in lines
    ]
    wanted = {
        "model": "stub",
        "image": {"width": 160, "height": 130},
        "detections": [
            {"box": [10.5, 0.5, 50.5, 10.5], "score": 0.95, "label": "cat", "id": 3},
            {"box": [10.5, 12.5, 50.5, 22.5], "score": 0.65, "label": "dog & <b>", "id": 7},
            {"box": [10.5, 24.5, 50.5, 34.5], "score": 0.35, "label": "cat", "id": 3},
        ],
    }
    for answer in answers:
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert content.pop("ms") >= 0 and content == wanted
    assert [how for _, how in stub.calls] == [{"batch_size": 8, "threshold": 0.3}] * 6


def test_parameters_reach_the_model_or_filter_its_answer(client: Callable[..., TestClient]) -> None:
    stub = Stub()
    calls = client(stub)

    def ids(query: str) -> list[int]:
        answer = calls.post(f"/v1/detect?{query}", content=picture(4))
        assert answer.status_code == 200, answer.text
        return [row["id"] for row in answer.json()["detections"]]

    assert ids("") == [3, 7]  # the model's own threshold, 0.5
    assert ids("threshold=0&nms=0.7") == [3, 7, 3, 7]
    assert stub.calls[-1] == (1, {"batch_size": 8, "threshold": 0.0, "nms": 0.7})
    ids("nms=none")
    assert stub.calls[-1] == (1, {"batch_size": 8, "nms": 1.0})
    assert ids("threshold=0&classes=dog %26 <b>") == [7, 7]
    assert ids("threshold=0&classes=3&classes=7") == [3, 7, 3, 7]
    assert ids("threshold=0&classes=") == ids("threshold=0&classes=,") == [3, 7, 3, 7]
    assert ids('threshold=0&classes="dog %26 <b>", cat') == [3, 7, 3, 7]
    ids("tiles=64")
    assert stub.calls[-1] == (1, {"batch_size": 8, "tiles": 64})


def test_the_drawing(client: Callable[..., TestClient]) -> None:
    answer = client().post("/v1/detect", content=picture(1, 40), headers={"accept": "image/jpeg"})
    image = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/jpeg" and image.size == (160, 130)
    assert sum(abs(a - b) for a, b in zip(image.getpixel((40, 5)), (60, 70, 90), strict=True)) > 60  # type: ignore[arg-type]


def test_a_drawing_of_more_pixels_a_side_than_jpeg_holds_is_smaller(client: Callable[..., TestClient]) -> None:
    wide = picture(0, size=(70_000, 9))
    answer = client().post("/v1/detect", content=wide, headers={"accept": "image/jpeg"})
    assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).size == (65_500, 8)


@pytest.mark.parametrize("charset", ["undefined", "punycode", "nothing", "UTF-8"])
@pytest.mark.parametrize("key", ["charset", "charset*"])
def test_the_charset_of_a_form_is_not_the_callers_to_choose(
    client: Callable[..., TestClient], charset: str, key: str
) -> None:
    """Of Python's codecs `undefined` always fails, and `punycode` takes time in the square of the length."""
    value = f"utf-8''{charset}" if key.endswith("*") else charset
    head = {"content-type": f'multipart/form-data; {key}={value}; boundary="a;charset=b"'}
    parts = [b'--a;charset=b\r\nContent-Disposition: form-data; name="note"\r\n\r\n' + "ä".encode() * 50_000]
    parts += [b'--a;charset=b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + picture(1)]
    answer = client().post("/v1/detect", content=b"\r\n".join([*parts, b"--a;charset=b--\r\n"]), headers=head)
    assert answer.status_code == 400 and "has 'note' beside 'file'" in answer.json()["error"]


def bomb(width: int, height: int) -> bytes:
    """The first pixels of a PNG that claims to be large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * min(width, 10**5) + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("query", "content", "headers", "status", "said"),
    [
        ("", b"", {}, 400, "not an image"),
        ("", b"ab", {}, 400, "not an image"),
        ("", b"%PDF-1.4 of no use", {"content-type": "application/pdf"}, 400, "not an image"),
        ("", picture(1)[:200], {}, 400, "does not decode"),
        ("", bomb(10000, 10000), {}, 413, "10000x10000 pixels, more than 50 million"),
        ("", bomb(2**31 - 1, 2**31 - 1), {}, 400, "too large"),
        ("", b"x" * (2**20 + 1), {}, 413, "more than 1 MB"),
        ("", b"{}", {"content-type": "application/json"}, 400, "no text called 'image'"),
        ("", b'{"image": "@@"}', {"content-type": "application/json"}, 400, "no base64"),
        ("", b"[" * 100_000, {"content-type": "application/json"}, 400, "more than one text"),
        ("", b'{"image": "", "nms": 1}', {"content-type": "application/json"}, 400, "has 'nms' beside 'image'"),
        ("", b"\xff{", {"content-type": "application/json"}, 400, "no valid json"),
        ("", b"x", {"content-type": "multipart/form-data"}, 400, "its Content-Type has no boundary"),
        ("", b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}, 400, "no file called 'file'"),
        ("?threshold=nan", picture(1), {}, 400, "threshold: expected a number from 0 to 1, found 'nan'"),
        ("?nms=2", picture(1), {}, 400, "nms: expected an IoU from 0 to 1, or none, found '2'"),
        ("?tiles=64.5", picture(1), {}, 400, "tiles: expected a whole number"),
        ("?tiles=64", picture(1, size=(3000, 3000)), {}, 400, "more than 256 of an image"),
        ("?tresh=0.3", picture(1), {}, 400, "'tresh': unknown"),
        ("?nms=0.3&nms=0.4", picture(1), {}, 400, "given twice"),
        ("?classes=cow", picture(1), {}, 400, "no class 'cow'"),
        ("", picture(255), {}, 500, "internal error"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(
    client: Callable[..., TestClient], query: str, content: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    answer = client(limits=Limits(max_mb=1)).post(f"/v1/detect{query}", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"] and answer.json()["help"] and "the file again" not in answer.json()["help"]
    if said in ("not an image", "does not decode"):
        assert answer.json()["help"] == "Send a JPEG or PNG."


def test_a_body_of_no_declared_length_ends_at_the_limit(client: Callable[..., TestClient]) -> None:
    sent = []

    def endless():
        while len(sent) < 1000:
            sent.append(1)
            yield bytes(2**16)

    assert client(limits=Limits(max_mb=1)).post("/v1/detect", content=endless()).status_code == 413


def test_keys(client: Callable[..., TestClient]) -> None:
    calls, content = client(keys=["one", "zwei-ü"]), picture(1)
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer two"}, 401),
        ({"authorization": "Basic one"}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": "Bearer one"}, 200),
        ({"x-api-key": "one"}, 200),
    ):
        answer = calls.post("/v1/detect", content=content, headers=headers)
        assert answer.status_code == status, headers
    assert answer.json()["detections"]
    assert [calls.get(path).status_code for path in ("/", "/healthz", "/readyz", "/v1/model")] == [200] * 4
    assert calls.get("/v1/model").json()["key"] is True
    assert calls.get("/openapi.json").json()["paths"]["/v1/detect"]["post"]["security"]


def test_a_call_that_hangs_is_given_up_and_shows_in_health(client: Callable[..., TestClient]) -> None:
    goes_on = threading.Event()
    calls = client(Stub(goes_on=goes_on), limits=Limits(timeout=0.1, queue=1, max_batch=1))
    answer = calls.post("/v1/detect", content=picture(1))
    assert answer.status_code == 504 and "no answer within 0.1 s" in answer.json()["error"]
    assert calls.get("/healthz").status_code == 503
    goes_on.set()
    end = time.monotonic() + 30
    while calls.get("/healthz").status_code == 503 and time.monotonic() < end:
        time.sleep(0.02)
    assert calls.get("/healthz").text == "ok"


def test_requests_that_were_given_up_leave_room_for_others(client: Callable[..., TestClient]) -> None:
    goes_on = threading.Event()
    calls = client(Stub(goes_on=goes_on), limits=Limits(timeout=0.1, queue=1, max_batch=1))
    assert [calls.post("/v1/detect", content=picture(1)).status_code for _ in range(4)] == [504] * 4
    assert calls.get("/readyz").status_code == 200
    goes_on.set()


def test_the_image_of_a_caller_who_has_gone_is_not_looked_at() -> None:
    goes_on, stub = threading.Event(), Stub()
    stub.goes_on = goes_on
    server = DetectionServer(stub, limits=Limits(max_batch=1, max_wait_ms=0))
    first = server.batcher.submit(Image.new("RGB", (9, 9)), Options())
    scope = {"type": "http", "method": "POST", "path": "/v1/detect", "query_string": b"", "headers": []}
    messages: list[Any] = [{"type": "http.request", "body": picture(1)}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    asyncio.run(asyncio.wait_for(server.app(scope, receive, send), 30))
    goes_on.set()
    assert first.result(30) is not None and server.batcher.close(30) and len(stub.calls) == 1


def test_images_in_tiles_go_one_by_one(client: Callable[..., TestClient]) -> None:
    stub = Stub(delay=0.1)
    with client(stub) as calls, ThreadPoolExecutor(4) as pool:
        for query in ("?tiles=64", ""):
            answers = pool.map(lambda _, query=query: calls.post(f"/v1/detect{query}", content=picture(1)), range(4))
            assert [answer.status_code for answer in answers] == [200] * 4
    assert [count for count, how in stub.calls if "tiles" in how] == [1] * 4 and len(stub.calls) < 8


def test_more_pixels_than_memory_has_room_for_have_to_come_again(client: Callable[..., TestClient]) -> None:
    server = DetectionServer(Stub(), limits=Limits(max_megapixels=0.03))
    calls = TestClient(server.app)
    assert calls.post("/v1/detect", content=picture(1)).status_code == 200
    server._pixels = 110_000  # as if others held them
    answer = calls.post("/v1/detect", content=picture(1))
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert server._pixels == 110_000  # and what is refused holds none
    server._pixels, server._bytes = 0, 16 * 20 * 2**20
    assert calls.post("/v1/detect", content=picture(1)).status_code == 429
    server._bytes = 0
    assert calls.post("/v1/detect", content=picture(1)).status_code == 200
    assert calls.post("/v1/detect", content=b"ab").status_code == 400
    assert server._pixels == server._bytes == 0


def test_model_metrics_and_description(client: Callable[..., TestClient]) -> None:
    calls = client()
    for content in (picture(1), b"ab"):
        calls.post("/v1/detect", content=content)
    about = calls.get("/v1/model").json()
    assert about["classes"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog & <b>"}]
    assert about["threshold"] == 0.5 and about["nms"] is None and about["limits"]["queue"] == 64
    lines = calls.get("/metrics").text.splitlines()
    for line in (
        'paqdetr_requests_total{status="200"} 2',
        'paqdetr_requests_total{status="400"} 1',
        'paqdetr_detect_seconds_bucket{le="+Inf"} 1',
        "paqdetr_detect_seconds_count 1",
        "paqdetr_images_total 1",
    ):
        assert line in lines
    described = calls.get("/openapi.json").json()
    assert set(described["paths"]) == {"/v1/detect", "/v1/model", "/healthz", "/readyz", "/metrics"}
    assert calls.get("/nothing").status_code == 404 and calls.get("/v1/detect").json()["error"] == "Method Not Allowed"
    assert calls.get("/v1/detect").headers["allow"] == "POST"
    assert "default-src 'none'" in calls.get("/").headers["content-security-policy"]


def test_the_thread_of_the_model_ends_with_the_application() -> None:
    server = DetectionServer(Stub())
    with TestClient(server.app) as calls:
        assert calls.get("/readyz").status_code == 200
    assert not server.batcher.alive


@pytest.mark.parametrize("bad", [{"queue": 0}, {"max_mb": -1}, {"max_megapixels": float("nan")}, {"timeout": 0}])
def test_limits_have_ranges(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Limits(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m.onnx"], "m.onnx: no such file"),
        (["m.safetensors"], "m.safetensors"),
        (["m.onnx", "--api-key-env", "PAQDETR_NO_SUCH_KEY"], "PAQDETR_NO_SUCH_KEY is not set"),
        (["m.onnx", "--queue", "0"], "queue: expected"),
        (["m.onnx", "--host", "no.such.host.invalid"], "cannot be listened on"),
    ],
)
def test_mistakes_end_before_anything_is_served(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *arguments, "--port", "0"]) == 2
    assert said in capsys.readouterr().err


def test_blanks_in_base64_take_little_memory() -> None:
    """Four times the body at most, not the hundreds of MiB that a list of two million words would be."""
    body = b'{"image": "' + b"aaaa " * 2**18 + b'"}'
    tracemalloc.start()
    try:
        assert _from_json(body) == base64.b64decode(b"aaaa" * 2**18)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("idle", [True, False, None])
def test_python_does_not_end_below_a_model_that_computes(idle: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime aborts the process then, which ends with 134. None: Ctrl-C in the first call."""

    def serve(*_: object, **__: object) -> bool:
        if idle is None:
            raise KeyboardInterrupt
        return idle

    ended: list[int] = []
    monkeypatch.setattr("paqdetr.cli.serve.open_model", lambda *_: Stub())
    monkeypatch.setattr("paqdetr.serving.server.serve", serve)
    monkeypatch.setattr("os._exit", ended.append)
    assert run(["serve", "m.onnx", "--port", "0"]) == 0
    assert ended == [0] * (not idle)
