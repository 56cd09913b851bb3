from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from patches import scene

from paqdetr.errors import DataError
from paqdetr.runtime import sources
from paqdetr.runtime.sources import Source, list_sources, read_sources


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures and a video at three depths, with what belongs to nobody's data."""
    for name in ("b.png", "a.png", "in/c.png", "in/deep/d.png", ".hidden/e.png", "__MACOSX/f.png", "in/._c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scene((8, 8)).save(path)
    for name in ("in/clip.MP4", "in/notes.txt", "a[1].png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "recursive", "names"),
    [
        ("a.png", False, ["a.png"]),
        ("in/deep/d.png", False, ["d.png"]),
        (".", False, ["a.png", "a[1].png", "b.png"]),
        ("in", False, ["c.png", "clip.MP4"]),
        (".", True, ["a.png", "a[1].png", "b.png", "in/c.png", "in/clip.MP4", "in/deep/d.png"]),
        ("in/*", False, ["c.png", "clip.MP4"]),
        ("*.png", False, ["a.png", "a[1].png", "b.png"]),
        ("in/**/*.png", False, ["c.png", "deep/d.png"]),
        ("./*/c.*", False, ["in/c.png"]),
        ("a[1].png", False, ["a[1].png"]),  # a file of that very name, not the pattern
        ("[ab].png", False, ["a.png", "b.png"]),
        ("rtsp://me:secret@10.0.0.1:554/stream?key=1", False, ["rtsp-10-0-0-1-554-stream"]),
        ("camera:0", False, ["camera-0"]),
        ("https://example.org/a/b%20c.jpg?x=1", False, ["b c.jpg"]),
        ("https://example.org/..%2f..%2fetc", False, ["etc"]),
        ("https://example.org", False, ["picture"]),
    ],
)
def test_what_a_source_holds(tree: Path, given: str, recursive: bool, names: list[str]) -> None:
    found = list(list_sources([given], recursive=recursive))
    assert [source.name for source in found] == names
    kinds = {"MP4": "video", "png": "picture", "stream": "live", "camera-0": "live"}
    for source in found:
        kind = next((kind for ending, kind in kinds.items() if source.name.endswith(ending)), "address")
        assert source.kind == kind
        assert kind in ("live", "address") or (isinstance(source.address, Path) and source.address.is_file())


@pytest.mark.parametrize("given", ["empty", "none.png", "*.gif", "in/notes.txt", "nowhere/*.png"])
def test_what_holds_nothing(tree: Path, given: str) -> None:
    if given == "in/notes.txt":
        Path(given).write_text("notes", encoding="utf-8")
    with pytest.raises(DataError, match=given.replace("*", r"\*")):
        list(list_sources([given]))


def test_pictures_in_folders_below(tree: Path) -> None:
    (tree / "above").mkdir()
    (tree / "in").rename(tree / "above" / "in")
    with pytest.raises(DataError, match=r"above: holds no .* below it do, such as in/c\.png \(add --recursive"):
        list(list_sources(["above"]))


def test_links_in_a_circle(tree: Path) -> None:
    (tree / "in" / "loop").symlink_to(tree)
    assert len(list(list_sources([tree], recursive=True))) == 6


def test_folders_that_are_linked(tree: Path) -> None:
    (tree / "links").mkdir()
    for name in ("one", "two"):
        (tree / "links" / name).symlink_to(tree / "in" / "deep")
    names = [source.name for source in list_sources(["links"], recursive=True)]
    assert names == ["one/d.png"]  # once


def test_a_list_on_standard_input(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are kept, since a list names files of many folders; each line is worked on before the next is there."""
    given: list[str] = []

    def lines() -> Iterator[str]:
        for line in ("in/c.png\n", "\n", f"{tree}/b.png\r\n", "in/deep\n", "none.png\n", "../x/../a.png\n", "camera:1"):
            given.append(line)
            yield line

    monkeypatch.setattr("sys.stdin", lines())
    (tree.parent / "x").mkdir(exist_ok=True)
    monkeypatch.chdir(tree / "in" / "..")
    left_out: list[str] = []
    found = list_sources(["-"], on_unreadable=lambda source, error: left_out.append(error.message))
    assert next(found).name == "in/c.png" and given == ["in/c.png\n"]
    assert [source.name for source in found] == ["b.png", "d.png", "camera-1"]
    assert ["none.png: no such file" in left_out[0], "a.png: no such file" in left_out[1]] == [True, True]


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """`server(body, type="image/png", status=200)` is the address of an answer."""
    answers: dict[str, tuple[bytes, str, int, bool]] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, kind, status, stated = answers[self.path]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status == 302:
                self.send_header("Location", body.decode())
            if stated:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()

    def address(body: bytes, kind: str = "image/png", status: int = 200, *, stated: bool = True) -> str:
        path = f"/{len(answers)}/a.png"
        answers[path] = body, kind, status, stated
        return f"http://127.0.0.1:{http.server_address[1]}{path}"

    yield address
    http.shutdown()
    http.server_close()


def _read(*given: str | Path, **how: object) -> list[tuple[str, tuple[int, int]]]:
    return [(p.source.name, p.image.size) for p in read_sources(list_sources(given), **how)]  # type: ignore[arg-type]


def test_pictures_and_videos_at_an_address(server: Callable[..., str], clip: Callable[..., Path]) -> None:
    picture = io.BytesIO()
    scene((20, 10)).save(picture, "PNG")
    plain = server(picture.getvalue())
    assert _read(plain) == [("a.png", (20, 10))]
    assert _read(server(picture.getvalue(), "application/octet-stream", stated=False)) == [("a.png", (20, 10))]
    assert _read(server(plain.encode(), status=302)) == [("a.png", (20, 10))]
    assert _read(server(clip([0, 0.1, 0.2]).read_bytes(), "video/mp4"), max_frames=2) == [("a.png", (96, 64))] * 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((b"", "text/html", 404), "the server answers 404 Not Found"),
        ((b"", "text/html", 500), "the server answers 500"),
        ((b"<html>", "text/html", 200), "not an image in a known format"),
        ((b"", "image/png", 200), "not an image in a known format"),
        ((b"x" * 5001, "image/png", 200), "has more than 0 MB"),
        ((b"file:///etc/passwd", "image/png", 302), "302"),
    ],
)
def test_what_an_address_does_not_give(
    server: Callable[..., str], monkeypatch: pytest.MonkeyPatch, answer: tuple[bytes, str, int], message: str
) -> None:
    monkeypatch.setattr(sources, "MAX_DOWNLOAD", 5000)
    for stated in (True, False):
        url = server(*answer, stated=stated)
        with pytest.raises(DataError, match=message) as caught:
            _read(url)
        assert caught.value.message.startswith(url)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://127.0.0.1:9/a.png", "http://[::1/a.png", "http://127.0.0.1:9/a b.png", "http:///a.png"):
        with pytest.raises(DataError, match="cannot be fetched"):
            _read(url)


def test_a_slow_answer_ends(server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WHOLE", -1.0)
    with pytest.raises(DataError, match="not complete after"):
        _read(server(b"x" * 100))


def test_what_cannot_be_read_is_left_out(tree: Path) -> None:
    (tree / "b.png").write_bytes(b"no image")
    (tree / "a[1].png").unlink()
    left_out: list[Source] = []
    found = _read(tree, on_unreadable=lambda source, error: left_out.append(source))
    assert [name for name, _ in found] == ["a.png"] and [source.name for source in left_out] == ["b.png"]
