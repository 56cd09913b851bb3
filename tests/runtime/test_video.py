from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
from patches import Patches, scene
from PIL import Image

from paqdetr.errors import BackendError, DataError
from paqdetr.runtime import video
from paqdetr.runtime.predict import predict_sources, stream
from paqdetr.runtime.video import VideoWriter, public_address, read_live, read_video


@pytest.mark.parametrize(
    ("rotation", "mirrored", "red"),
    [
        (0, False, (4, 4, 20, 20)),
        (90, False, (4, 76, 20, 92)),  # against the clock: the left side is below
        (180, False, (76, 44, 92, 60)),
        (270, False, (44, 4, 60, 20)),
        (0, True, (76, 4, 92, 20)),
        (90, True, (44, 76, 60, 92)),
    ],
)
def test_frames_are_upright(
    patches: Patches, clip: Callable[..., Path], rotation: int, mirrored: bool, red: tuple[int, ...]
) -> None:
    frame = next(read_video(clip([0, 0.1], rotation=rotation, mirrored=mirrored)))
    assert frame.image.size == ((64, 96) if rotation in (90, 270) else (96, 64))
    [found] = patches.predict([frame.image])
    assert np.abs(found.boxes[found.labels == 7] - red).max() <= 1


def test_times_are_those_of_the_file(clip: Callable[..., Path]) -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.004, 0.2, size=40))
    frames = list(read_video(clip(times), every=3))
    assert [frame.index for frame in frames] == list(range(0, 40, 3))
    assert [frame.time for frame in frames] == pytest.approx(list(times[::3]), abs=1e-3)


def test_a_writer_keeps_size_times_and_order(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", comment="paqdetr predict 1")
    for seconds, size in ((0.0, (33, 21)), (0.5, (33, 21)), (0.5, (66, 42)), (0.4, (33, 21)), (7.25, (33, 21))):
        writer.add(scene(size, (0, 0, size[0], size[1])), seconds)
    writer.close()
    frames = list(read_video(tmp_path / "a.mp4"))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.5, 0.5, 0.5, 7.25], abs=1e-3)
    assert {frame.image.size for frame in frames} == {(34, 22)}  # H.264 has even sides alone
    assert np.asarray(frames[2].image)[21, 33, 0] > 200


def test_the_clock_of_a_recording_may_begin_anywhere_and_anew(tmp_path: Path) -> None:
    """As in transport streams, and in such that were joined."""
    writer = VideoWriter(tmp_path / "a.mp4")
    for seconds in (36_000, 36_000.5, 36_001, 34_000, 34_000.25, 34_000.25, 10, 11):
        writer.add(scene((32, 20), (0, 0, 32, 20)), seconds)
    writer.close()
    times = [frame.time for frame in read_video(tmp_path / "a.mp4")]
    assert times == pytest.approx([0, 0.5, 1, 1.5, 1.75, 1.75, 1.75, 2.75], abs=1e-3)


def test_a_video_that_ends_early(clip: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """What is damaged in the middle is skipped; what cannot be opened is an error."""
    whole = clip([n / 10 for n in range(30)]).read_bytes()
    broken = bytearray(whole)
    middle = whole.index(b"mdat") + 800
    broken[middle : middle + 300] = bytes(300)
    path = clip([0], name="broken.mp4")
    path.write_bytes(broken)
    assert 1 <= len(list(read_video(path))) <= 30
    path.write_bytes(whole[: len(whole) // 2])  # without its index, which lies at the end
    with pytest.raises(DataError, match=r"broken\.mp4: not a readable video"):
        list(read_video(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.mp4", b"no video", "not a readable video"),
        ("empty.mov", b"", "not a readable video"),
        ("missing.mkv", None, "no such file"),
    ],
)
def test_what_is_no_video(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        next(read_video(tmp_path / name))


def test_sound_alone(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(DataError, match="has no video"):
        next(read_video(tmp_path / "a.mp4"))


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").touch()
    for begin in (lambda: next(read_video(tmp_path / "a.mp4")), lambda: next(read_live("camera:0"))):
        with pytest.raises(BackendError, match="av is not installed") as caught:
            begin()
        assert "paqdetr[video]" in caught.value.remedy


def test_passwords_are_not_shown() -> None:
    assert public_address("rtsp://me:secret@10.0.0.1/a@b") == "rtsp://10.0.0.1/a@b"
    with pytest.raises(DataError) as caught:
        next(read_live("rtsp://me:secret@127.0.0.1:9/a"))
    assert "secret" not in str(caught.value) and "127.0.0.1:9/a: no frame arrived" in caught.value.message


class Camera(ThreadingHTTPServer):
    """Sends MJPEG at 30 frames a second; how long each has been under way shows in the place of a red patch.

    Attributes:
        sent: when each frame was sent.
        breaks: the connection ends after so many frames; then it begins anew, as many times as it is asked for.
    """

    def __init__(self, breaks: int = 10**9) -> None:
        self.breaks, self.sent, self.connections = breaks, [], 0
        super().__init__(("127.0.0.1", 0), _Mjpeg)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/live.mjpg"

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.breaks = 0
        self.shutdown()
        self.server_close()


class _Mjpeg(BaseHTTPRequestHandler):
    server: Camera

    def do_GET(self) -> None:
        self.server.connections += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        count = 0
        try:
            while count < self.server.breaks:
                number = len(self.server.sent)
                buffer = io.BytesIO()
                numbered(number).save(buffer, "JPEG", quality=95)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {buffer.tell()}\r\n\r\n"
                self.server.sent.append(time.monotonic())
                self.wfile.write(head.encode() + buffer.getvalue() + b"\r\n")
                count += 1
                time.sleep(1 / 30)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


def numbered(number: int, scale: int = 1) -> Image.Image:
    """The number as bits: sixteen patches of 8 pixels."""
    patches = [(8 * bit, 0, 8 * bit + 8, 8) for bit in range(16) if number >> bit & 1]
    picture = scene((128, 32), *patches, (0, 16, 128, 32))
    return picture.resize((128 * scale, 32 * scale), Image.Resampling.NEAREST)


def number_of(image: Image.Image, scale: int = 1) -> int:
    return sum(1 << bit for bit in range(16) if np.asarray(image)[4 * scale, (8 * bit + 4) * scale, 0] > 128)


@pytest.mark.integration
def test_a_live_source_gives_its_newest_frame() -> None:
    """Of a source of 30 frames a second and a model of 200 ms: in order, each would be six frames further behind."""
    behind, numbers, sent = [], [], 0
    with Camera() as camera:
        model = Patches(delay=0.2)
        for detections in stream(model, camera.url, max_frames=15, batch_size=8):
            assert detections.image is not None and detections.time is not None
            numbers.append(number_of(detections.image))
            behind.append(sent - numbers[-1])
            sent = len(camera.sent)  # when the next frame is asked for
    assert len(numbers) == 15 and numbers == sorted(set(numbers)) and numbers[-1] - numbers[5] > 30
    assert max(behind) < 20  # the way through the network and the decoder, on a machine that is busy
    assert {size for _, size in model.calls} == {8} and {count for count, _ in model.calls} == {1}


@pytest.mark.integration
def test_a_lost_connection_is_made_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(video, "_FIRST_WAIT", 0.05)
    with Camera(breaks=40) as camera:
        frames = read_live(camera.url, patience=0.5)
        times = [next(frames).time for _ in range(60)]
        assert camera.connections >= 2 and times == sorted(times)
        assert "connecting again" in caplog.text
        camera.breaks = 0
        with pytest.raises(DataError, match="the connection was lost"):
            while True:
                next(frames)


class TcpSender(threading.Thread):
    """Sends H.264 in MPEG-TS to whoever connects, as fast as it is read: `frames` in each of `connections`, numbered on."""

    def __init__(self, frames: int, connections: int) -> None:
        super().__init__(daemon=True)
        self._frames, self._connections, self.sent = frames, connections, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        import av

        options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "10", "g": "10"}
        for _ in range(self._connections):
            connection, _ = self._listener.accept()
            with (
                contextlib.suppress(OSError, av.FFmpegError),  # the reader has left
                connection,
                connection.makefile("wb") as file,
                av.open(file, "w", format="mpegts") as container,
            ):
                stream = container.add_stream("libx264", rate=30, options=options)
                stream.width, stream.height, stream.pix_fmt = 640, 160, "yuv420p"
                for _ in range(self._frames):
                    container.mux(stream.encode(av.VideoFrame.from_image(numbered(self.sent, scale=5))))
                    self.sent += 1
                container.mux(stream.encode())
        self._listener.close()


@pytest.mark.integration
def test_a_buffered_source_loses_no_frame(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of a stream over TCP that is read slowly, with few frames in memory, and breaks off twice."""
    monkeypatch.setattr(video, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(video, "_BUFFERED", 4)
    sender, numbers, times = TcpSender(40, 3), [], []
    for detections in stream(Patches(delay=0.01), sender.url, buffer=True, max_frames=120):
        assert detections.image is not None
        numbers.append(number_of(detections.image, scale=5))
        times.append(detections.time)
    steps = np.diff(times)
    assert steps.min() >= 0 and np.delete(steps, [39, 79]) == pytest.approx(1 / 30, abs=1e-3)  # of each connection
    assert numbers == list(range(120)) and caplog.text.count("connecting again") >= 2


@pytest.mark.integration
def test_an_unbuffered_source_drops_frames() -> None:
    sender = TcpSender(10**6, 1)  # until the reader leaves
    frames = list(itertools.islice(stream(Patches(delay=0.1), sender.url), 5))
    assert frames[-1].frame is not None and frames[-1].frame > 10


@pytest.mark.integration
def test_what_a_live_source_gave_is_whole_when_it_is_interrupted(patches: Patches, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with Camera() as camera, pytest.raises(KeyboardInterrupt):
        predict_sources(patches, [camera.url], output=tmp_path / "out", progress=stop)
    assert len(list(read_video(tmp_path / "out" / "live.mp4"))) == 10
    assert (tmp_path / "out" / "predictions.json").read_text().endswith("]\n")


@pytest.fixture
def memory() -> Iterator[Callable[[], float]]:
    process = psutil.Process(os.getpid())
    yield lambda: process.memory_info().rss / 2**20


@pytest.mark.integration
def test_600_rotated_frames_with_uneven_times(
    patches: Patches, tmp_path: Path, clip: Callable[..., Path], memory: Callable[[], float]
) -> None:
    times = np.cumsum(np.random.default_rng(1).uniform(0.01, 0.12, size=600))
    used: dict[int, float] = {}

    def look(done: int, total: int | None) -> None:
        if done in (30, 600):
            used[done] = memory()

    path = clip(times, rotation=90)
    done = predict_sources(patches, [path], output=tmp_path / "out", progress=look, save=("draw", "coco", "jsonl"))
    assert done.images == 600 and used[600] - used[30] < 50
    frames = list(read_video(done.output / "clip.mp4"))
    assert [frame.time for frame in frames] == pytest.approx(list(times - times[0]), abs=1e-3)
    assert {frame.image.size for frame in frames} == {(64, 96)}
    for detections in stream(patches, path, every=50):
        assert detections.image is not None
        assert np.abs(detections.boxes[detections.labels == 7] - [4, 76, 20, 92]).max() <= 1
