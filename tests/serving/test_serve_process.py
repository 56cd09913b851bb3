"""The server as a process: many callers, bad files, signals, and its page in a real browser with no network."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from stub import Stub, picture
from test_server import bomb

pytestmark = pytest.mark.integration
STUB = Path(__file__).with_name("stub.py")


@contextlib.contextmanager
def served(delay: float, max_wait_ms: float = 5, head: float = 60) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of the stub with its port."""
    command = [sys.executable, str(STUB), str(delay), str(max_wait_ms), str(head)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process, int(process.stderr.readline())
    finally:
        process.kill()
        process.communicate()


def post(connection: http.client.HTTPConnection, content: bytes, query: str = "") -> tuple[int, Any]:
    connection.request("POST", f"/v1/detect{query}", content)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.split()[0] == name)


def wait_until_begun(port: int, count: int) -> None:
    """Until the server has this many requests' images, each of the size that `picture` gives it, or has answered them."""
    end = time.monotonic() + 30
    while metric(port, "paqdetr_detect_seconds_count") + metric(port, "paqdetr_pixels_in_memory") / (160 * 130) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_thousand_requests_from_sixteen_threads() -> None:
    answers: dict[int, list[dict[str, Any]]] = {}
    with served(0.002) as (_, port):

        def work(thread: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for number in range(thread, 1000, 16):
                status, found = post(connection, picture(number % 23, number % 97, number // 4), "?threshold=0.2")
                assert status == 200, found
                answers[number] = found["detections"]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batches, images = metric(port, "paqdetr_batches_total"), metric(port, "paqdetr_images_total")
    assert sorted(answers) == list(range(1000))
    for number, rows in answers.items():
        image = Image.open(io.BytesIO(picture(number % 23, number % 97, number // 4)))
        [wanted] = Stub().predict([image], threshold=0.2)
        assert [row["id"] for row in rows] == wanted.labels.tolist()
        assert [row["score"] for row in rows] == pytest.approx(wanted.scores.tolist(), abs=1e-6)
        assert [x for row in rows for x in row["box"]] == pytest.approx(wanted.boxes.ravel().tolist(), abs=1e-3)
    assert images == 1001 and batches < 700  # with the first, of its own


def test_bad_files_cost_no_memory_and_a_slow_caller_keeps_nobody_waiting() -> None:
    whole = io.BytesIO()
    Image.new("L", (13_300, 13_300)).save(whole, "PNG", compress_level=1)  # under 1 MB for 177 million pixels
    with served(0.0) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        assert post(connection, picture(3))[0] == 200
        before, peak, running = psutil.Process(process.pid).memory_info().rss, 0, True

        def watch() -> None:
            nonlocal peak
            while running:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.002)

        watching = threading.Thread(target=watch)
        watching.start()
        slow = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        slow.putrequest("POST", "/v1/detect")
        slow.putheader("Content-Length", "1000")
        slow.endheaders(b"\x89PNG")
        bad = [bomb(20000, 2600), bomb(10000, 10000), bomb(30000, 30000), b"ab", b"#!/bin/sh\n", b"\xff\xd8\xff"]
        for content in bad * 5:
            assert 400 <= post(connection, content)[0] < 500
        assert post(connection, whole.getvalue())[0] == 413
        assert post(connection, picture(3))[0] == 200
        running = False
        watching.join()
        assert peak - before < 50 * 2**20


def test_connections_that_send_no_request_are_ended() -> None:
    """One that says nothing, one that sends a byte of a head now and then, and one that does so after an answer; not one whose
    answer takes longer."""
    with served(1.5, head=0.4) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        silent, slow, after = (socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3))
        after.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET")
        assert after.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(ConnectionError):
            for byte in b"POST /v1/detect HTTP/1.1\r\n":
                slow.sendall(bytes([byte]))
                time.sleep(0.1)
        for one in (silent, slow, after):
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass
        assert post(connection, picture(3))[0] == 200


def test_a_caller_who_looks_for_an_answer_at_the_end_gets_it() -> None:
    with served(0.0) as (_, port):
        for megabytes, status in ((25, 413), (1, 400)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            assert post(connection, b"x" * (megabytes * 2**20))[0] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_has_begun(number: signal.Signals) -> None:
    with served(0.5, 50) as (process, port):
        found: list[tuple[int, Any]] = []

        def ask() -> None:
            found.append(post(http.client.HTTPConnection("127.0.0.1", port, timeout=60), picture(3)))

        threads = [threading.Thread(target=ask) for _ in range(12)]  # a batch of eight, and another
        for thread in threads:
            thread.start()
        wait_until_begun(port, 12)
        process.send_signal(number)
        assert process.wait(20) == 0
        for thread in threads:
            thread.join()
        assert [status for status, _ in found] == [200] * 12
        assert process.stderr is not None and process.stderr.read().endswith("stopped\n")


def test_work_of_more_than_five_seconds_is_given_up() -> None:
    with served(1.0) as (process, port):
        connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(64)]
        for connection in connections:  # eight batches
            connection.request("POST", "/v1/detect", picture(3))
        wait_until_begun(port, 64)
        started = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0 and 4.5 < time.monotonic() - started < 7
        assert {connection.getresponse().status for connection in connections} == {200, 503}
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


# ------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with served(0.0) as (_, port):
        yield port


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, server: int, browser: Any) -> Iterator[Any]:
    """The page in a window of that width; nothing but its server is asked, nor anything said on the console."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    home = f"http://127.0.0.1:{server}/"
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda call: asked.append(call.url))
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith(home) else route.abort())
    opened.goto(home)
    opened.asked = asked
    yield opened
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
    assert said == []
    context.close()


def count(page: Any) -> int:
    return int(page.locator("#status").inner_text().split()[0])


def upload(page: Any, content: bytes, name: str = "street.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def screenshot(page: Any, name: str) -> None:
    if folder := os.environ.get("PAQDETR_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}-{page.viewport_size['width']}.png", full_page=True)


def test_a_visitor_uploads_slides_filters_and_downloads(page: Any, tmp_path: Path) -> None:
    page.wait_for_selector("#classes label:nth-child(2)")
    assert page.locator("#classes").inner_text().split("\n")[-1] == "dog & <b>"  # text, no markup
    screenshot(page, "empty")
    upload(page, picture(10, 30))
    page.wait_for_selector("#canvas:not([hidden])")
    assert count(page) == 5  # from 0.95 to 0.55 over the model's own threshold
    screenshot(page, "found")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    requests = len(page.asked)

    page.locator("#threshold").focus()
    page.keyboard.press("Home")
    assert count(page) == 10 and page.locator("#value").inner_text() == "0.05"
    page.locator("#classes input").first.focus()
    page.keyboard.press("Space")
    assert count(page) == 5
    page.locator("#none").press("Enter")
    assert count(page) == 0
    page.locator("#all").press("Enter")
    assert count(page) == 10
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    assert count(page) == 0
    page.keyboard.press("Home")
    with page.expect_download() as download:
        page.locator("#save").press("Enter")
    assert download.value.suggested_filename == "street.json"
    written = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert written["image"] == {"width": 160, "height": 130} and len(written["detections"]) == 10
    assert [url for url in page.asked[requests:] if not url.startswith("blob:")] == []

    # A box is where the model has it: the first at (30, 0) to (70, 10), drawn in the first class's orange.
    assert page.evaluate("[...document.querySelector('#canvas').getContext('2d').getImageData(50, 10, 1, 1).data]") == [
        0xE6, 0x9F, 0x00, 255,
    ]  # fmt: skip


def test_paste_drop_and_the_order_of_the_tab_key(page: Any) -> None:
    for kind, target in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([kind, target, bytes]) => {
                const files = new DataTransfer();
                files.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));
                const make = kind === 'paste' ? ClipboardEvent : DragEvent;
                document.body.dispatchEvent(new make(kind, {[target]: files, bubbles: true, cancelable: true}));
            }""",
            [kind, target, list(picture(1 if kind == "paste" else 2))],
        )
        page.wait_for_selector(f"#status:has-text('1 of {1 + (kind == 'drop')} ')")
    seen = []
    page.locator("h1").click()
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.type"))
    assert seen == ["file", "camera", "threshold", "all", "none", "checkbox", "checkbox", "save"]


def test_what_goes_wrong_is_said_on_the_page(server: int, browser: Any) -> None:
    """In a page of its own: a browser notes an answer of 400 on its console."""
    opened = browser.new_page()
    opened.goto(f"http://127.0.0.1:{server}/")
    upload(opened, b"ab", "no.png")
    opened.wait_for_selector("#status.bad")
    assert "not an image in a known format" in opened.locator("#status").inner_text()
    opened.locator("#camera").click()  # there is none
    opened.wait_for_selector("#status:has-text('camera cannot be used')")
    upload(opened, picture(3))
    opened.wait_for_selector("#canvas:not([hidden])")
    assert opened.locator("#status").get_attribute("class") == ""
    opened.close()
