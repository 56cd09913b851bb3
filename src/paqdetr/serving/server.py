"""An HTTP server for one model: `POST /v1/detect`, a page to try it in a browser, health, metrics and limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn
from PIL.Image import Image
from python_multipart.multipart import parse_options_header
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from paqdetr._version import __version__
from paqdetr.errors import ConfigError, DataError, UserError
from paqdetr.files import parse_json
from paqdetr.images import fit_jpeg, read_image, read_size
from paqdetr.interrupt import StopRequest
from paqdetr.runtime.predict import Predicts
from paqdetr.runtime.tiles import Tiles
from paqdetr.serving.batcher import Batcher, Closed, QueueFull
from paqdetr.serving.openapi import PARAMETERS, openapi
from paqdetr.structures import ClassTable, Detections
from paqdetr.values import parse_names, parse_nms

_PAGE = Path(__file__).with_name("page.html")
# Upper bounds of the histogram of seconds.
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_MAX_TILES = 256
_DRAIN = 5
# Seconds for the model to finish the call that it makes when nobody waits for it any more.
_LAST_CALL = 1.0
# Seconds in which a connection has to send the head of a request.
_HEAD = 10.0
# What some encoders of base64 break lines with. As a table for str.translate: a list of the parts may be twenty times as large.
_NO_BREAKS = dict.fromkeys(map(ord, " \t\r\n"))
# Of max_mb: what all requests that arrive may hold together, if that is more than so many bytes; and up to where a request that
# is too large is read to its end, since many clients look for an answer only then.
_ARRIVING, _ARRIVING_BYTES, _READ_OUT = 16, 2**28, 8
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    b"img-src blob: data:; media-src blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes.

    Attributes:
        max_batch: images that go through the model together.
        max_wait_ms: that the first of them waits for others.
        queue: images that may wait; further ones are refused with 429.
        max_mb: of a request, in 2**20 bytes. Files of 16 times as many bytes together, or of 256 MB if that is more, are in
            memory at a time.
        max_megapixels: of an image, as its header says before anything is decoded. Images of four times as many pixels
            together are in memory at a time, of up to 12 bytes a pixel while they are decoded.
        timeout: seconds for a request to arrive, and for its answer.

    Raises:
        ConfigError: a value out of its range.
    """

    max_batch: int = 8
    max_wait_ms: float = 5.0
    queue: int = 64
    max_mb: float = 20.0
    max_megapixels: float = 50.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = 0 if name == "max_wait_ms" else 1 if isinstance(value, int) else 0.001
            if not low <= value <= 100_000:
                raise ConfigError(f"{name}: expected a number from {low} to 100000, found {value}", "choose another")


class Refusal(UserError):
    """A request is not answered as it was meant.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, remedy: str, **headers: str) -> None:
        super().__init__(message, remedy)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True)
class Options:
    """How one request wants its image to be looked at: see `Detector.predict`. None: as the model has it."""

    threshold: float | None = None
    nms: float | None = None
    classes: tuple[int, ...] | None = None
    tiles: int | None = None

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]], classes: ClassTable) -> Options:
        """From the query of an address.

        Raises:
            ConfigError: a name that is unknown or given twice, a value out of its range, or a class that the model has not.
        """
        values: dict[str, Any] = {}
        for name, text in query:
            if name not in PARAMETERS or (name in values and name != "classes"):
                problem = "unknown" if name not in PARAMETERS else "given twice"
                raise ConfigError(f"query parameter {name[:80]!r}: {problem}", f"known are {', '.join(PARAMETERS)}")
            if name == "classes":
                wanted = parse_names(text)
                # A name of digits is the class of that name, if there is one.
                ids = [int(w) if w not in classes.names and re.fullmatch(r"-?\d{1,18}", w) else w for w in wanted]
                if ids:  # an empty field of a form is as none
                    values[name] = values.get(name, ()) + tuple(map(int, classes.find(ids)))
                continue
            if name == "nms":
                values[name] = parse_nms(text, name)
                continue
            schema = PARAMETERS[name]["schema"]
            low, high = schema["minimum"], schema["maximum"]
            try:
                value = int(text) if schema["type"] == "integer" else float(text)
            except ValueError:
                value = float("nan")
            if not low <= value <= high:
                what = "a whole number" if schema["type"] == "integer" else "a number"
                raise ConfigError(f"{name}: expected {what} from {low} to {high}, found {text[:80]!r}", "correct it")
            values[name] = value
        return cls(**values)


class DetectionServer:
    """The application, for `uvicorn` or any other ASGI server as `server.app`.

    Args:
        model: anything with `classes`, `operating_point` and `predict(images, threshold=, nms=, classes=, tiles=, batch_size=)`.
        limits: what is taken.
        keys: one of them has to come with every request for a detection, as `Authorization: Bearer KEY` or `X-API-Key: KEY`;
            none are needed if empty.
    """

    def __init__(self, model: Predicts, *, limits: Limits | None = None, keys: Sequence[str] = ()) -> None:
        self.model, self.limits, self._keys = model, limits or Limits(), tuple(key.encode() for key in keys)
        self.name = str(getattr(model, "name", type(model).__name__))
        self.batcher: Batcher[Options] = Batcher(
            self._predict,
            max_batch=self.limits.max_batch,
            max_wait=self.limits.max_wait_ms / 1000,
            max_queue=self.limits.queue,
            alone=lambda options: options.tiles is not None,
        )
        self._pixels = self._bytes = 0
        self._requests: dict[int, int] = {}
        self._seconds, self._counts = 0.0, [0] * (len(_BOUNDS) + 1)
        routes = [
            Route("/", self._page),
            Route("/v1/detect", self._detect, methods=["POST"]),
            Route("/v1/model", self._model),
            Route("/healthz", self._health),
            Route("/readyz", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        handlers: Mapping[Any, Any] = {UserError: _on_mistake, HTTPException: _on_http, Exception: _on_defect}
        self.app: ASGIApp = self._outermost(Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life))

    def _outermost(self, app: ASGIApp) -> ASGIApp:
        """Counts answers, and gives each its headers."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._requests[message["status"]] = self._requests.get(message["status"], 0) + 1
                    message["headers"] = [*message["headers"], *_HEADERS.items()]
                await send(message)

            await app(scope, receive, noted if scope["type"] == "http" else send)

        return call

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.batcher.close()

    def _predict(self, images: Sequence[Image], options: Options) -> list[Detections]:
        """In the model's thread."""
        how = {name: value for name, value in asdict(options).items() if value is not None}
        return self.model.predict(images, batch_size=self.limits.max_batch, **how)

    # ------------------------------------------------------------------------------------------ detection

    async def _detect(self, request: Request) -> Response:
        try:
            return await self._detection(request)
        except asyncio.CancelledError:  # at the end of the time that a stop leaves
            raise _stopping() from None
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads

    async def _detection(self, request: Request) -> Response:
        started = time.perf_counter()
        self._require_key(request)
        options = Options.of(request.query_params.multi_items(), self.model.classes)
        with ExitStack() as held:
            image = await self._image(request, options, held)
            detections = await self._answer(request, self._submit(image, options))
            drawing = "image/jpeg" in request.headers.get("accept", "")
            response = await asyncio.to_thread(_drawn, detections, image) if drawing else None
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        return response or JSONResponse(
            {
                "model": self.name,
                "image": {"width": image.width, "height": image.height},
                "detections": _rows(detections),
                "ms": round(seconds * 1000, 1),
            }
        )

    def _require_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = (bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
        if not any(hmac.compare_digest(given, key) for key in self._keys):
            raise Refusal(
                401,
                "the request has no valid key",
                "send the header `Authorization: Bearer KEY`",
                WWW_Authenticate="Bearer",
            )

    async def _image(self, request: Request, options: Options, held: ExitStack) -> Image:
        """The image of a request, decoded. Its pixels count until `held` is closed."""
        with self._arriving(request) as arriving:
            try:
                content = await asyncio.wait_for(self._content(arriving), self.limits.timeout)
            except TimeoutError:
                raise Refusal(408, "the request did not arrive in time", "send it faster, or a smaller image") from None
            pixels = await self._require_size(content, options)
            self._pixels += pixels
            held.callback(self._release, pixels)
            return await asyncio.to_thread(read_image, content)

    def _release(self, pixels: int) -> None:
        self._pixels -= pixels

    async def _content(self, request: Request) -> bytes:
        """The image file of a request: its body, a part of a form, or base64 in json."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return _from_json(await request.body())
        if kind != "multipart/form-data":
            return await request.body()
        try:
            async with _as_utf8(request).form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if isinstance(file, UploadFile):
                    _require_alone("file", form)
                    return await file.read()
        except (HTTPException, UnicodeDecodeError) as error:
            raise DataError(f"the form cannot be read: {getattr(error, 'detail', error)}", _FORM) from None
        raise DataError("the form has no file called 'file'", _FORM)

    @contextmanager
    def _arriving(self, request: Request) -> Iterator[Request]:
        """The request, whose body comes piece by piece, up to the limits of one and of all; it counts until the block ends."""
        most, taken = int(self.limits.max_mb * 2**20), 0
        text = request.headers.get("content-length", "")
        declared = int(text[:20]) if text.isdecimal() else None
        close = {} if declared is not None and declared <= _READ_OUT * most else {"Connection": "close"}
        what = f"the request has more than {self.limits.max_mb:g} MB"
        refusal = Refusal(413, what, "send a smaller file", **close)
        if declared is not None and declared > most:
            raise refusal

        async def receive() -> Message:
            nonlocal taken
            message = await request.receive()
            size = len(message.get("body", b""))
            taken += size
            self._bytes += size
            if taken > most:
                raise refusal
            if self._bytes > max(_ARRIVING * most, _ARRIVING_BYTES):
                raise _busy()
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self._bytes -= taken

    async def _require_size(self, content: bytes, options: Options) -> int:
        """Pixels of the image, by its header.

        Raises:
            DataError: it is no image.
            Refusal: it has too many, or too many are in memory.
        """
        width, height = await asyncio.to_thread(read_size, content)
        limit = int(self.limits.max_megapixels * 1e6)
        if width * height > limit:
            raise Refusal(
                413,
                f"the image has {width}x{height} pixels, more than {self.limits.max_megapixels:g} million",
                "make it smaller, or cut it into parts",
            )
        if options.tiles is not None and Tiles(options.tiles).count(height, width) > _MAX_TILES:
            raise ConfigError(
                f"tiles={options.tiles}: more than {_MAX_TILES} of an image of {width}x{height} pixels",
                "take larger tiles",
            )
        if self._pixels + width * height > 4 * limit:
            raise _busy()
        return width * height

    def _submit(self, image: Image, options: Options) -> Future[Detections]:
        try:
            return self.batcher.submit(image, options)
        except QueueFull:
            raise _busy() from None
        except Closed:
            raise _stopping() from None

    async def _answer(self, request: Request, found: Future[Detections]) -> Detections:
        """What the model finds. An image that waits is given up once its caller has gone, or the time is over."""
        answer, gone = asyncio.wrap_future(found), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not gone.done():
                raise Refusal(504, f"no answer within {self.limits.timeout:g} s", "try again, or a smaller image")
        finally:
            answer.cancel()
            gone.cancel()
        if answer.cancelled():
            raise ClientDisconnect
        try:
            return answer.result()
        except DataError:
            raise
        except UserError as error:  # the model's fault, not the caller's
            raise Refusal(500, error.message, error.remedy) from error

    # ------------------------------------------------------------------------------------------ the rest

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    async def _model(self, request: Request) -> Response:
        classes, point = self.model.classes, self.model.operating_point
        return JSONResponse(
            {
                "name": self.name,
                "classes": [{"id": i, "name": name} for i, name in zip(classes.ids, classes.names, strict=True)],
                "threshold": point.least_score(),
                "nms": point.nms,
                "engine": str(getattr(getattr(self.model, "engine", None), "name", "torch")),
                "limits": asdict(self.limits),
                "key": bool(self._keys),
                "version": __version__,
            }
        )

    async def _health(self, request: Request) -> Response:
        since = self.batcher.busy_since
        stuck = since is not None and time.monotonic() - since > self.limits.timeout
        if self.batcher.alive and not stuck:
            return PlainTextResponse("ok")
        reason = (
            f"a call of the model has taken over {self.limits.timeout:g} s" if stuck else "the model's thread ended"
        )
        return PlainTextResponse(reason, status_code=503)

    async def _ready(self, request: Request) -> Response:
        if not self.batcher.alive or self.batcher.waiting >= self.limits.queue:
            return PlainTextResponse("busy", status_code=503)
        return PlainTextResponse("ready")

    async def _metrics(self, request: Request) -> Response:
        rows = ["# TYPE paqdetr_requests_total counter"]
        rows += [f'paqdetr_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._requests.items())]
        rows.append("# TYPE paqdetr_detect_seconds histogram")
        for i, bound in enumerate((*map(str, _BOUNDS), "+Inf")):
            rows.append(f'paqdetr_detect_seconds_bucket{{le="{bound}"}} {sum(self._counts[: i + 1])}')
        rows.append(f"paqdetr_detect_seconds_sum {self._seconds:.6f}")
        rows.append(f"paqdetr_detect_seconds_count {sum(self._counts)}")
        for name, kind, value in (
            ("batches_total", "counter", self.batcher.batches),
            ("images_total", "counter", self.batcher.images),
            ("queue_length", "gauge", self.batcher.waiting),
            ("pixels_in_memory", "gauge", self._pixels),
        ):
            rows += [f"# TYPE paqdetr_{name} {kind}", f"paqdetr_{name} {value}"]
        return PlainTextResponse("\n".join(rows) + "\n", media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(key=bool(self._keys)))


_FORM = "send the image as `file`, such as curl -F file=@photo.jpg"
_JSON = 'send {"image": "BASE64"}, or the file itself as the body'


def _stopping() -> Refusal:
    return Refusal(503, "the server is stopping", "try again", Retry_After="5")


def _busy() -> Refusal:
    return Refusal(429, "the server has as many images as it takes", "try again in a second", Retry_After="1")


async def _gone(request: Request) -> None:
    """Returns when the caller, whose request has arrived, ends the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _require_alone(image: str, names: Iterable[str]) -> None:
    """Raise DataError if something stands beside the image, where nobody reads it."""
    for name in names:
        if name != image:
            raise DataError(
                f"the request has {name[:80]!r} beside {image!r}, where it is not read",
                "give parameters in the address, such as ?threshold=0.3",
            )


def _as_utf8(request: Request) -> Request:
    """A form whose texts are UTF-8 whatever its head says: some of Python's codecs take minutes for a megabyte."""
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    if boundary is None:
        raise DataError(
            "the form cannot be read: its Content-Type has no boundary",
            "let the program that sends it write this header, as curl -F file=@photo.jpg does",
        )
    kind = (b"content-type", b'multipart/form-data; boundary="' + boundary.replace(b'"', b"") + b'"')
    headers = [kind, *(item for item in request.scope["headers"] if item[0] != kind[0])]
    return Request({**request.scope, "headers": headers}, request.receive)


def _from_json(body: bytes) -> bytes:
    if body.count(b"{") + body.count(b"[") > 8:  # which would be a hundred times as large when parsed
        raise DataError("the request's json has more than one text", _JSON)
    try:
        content = parse_json(body.decode("utf-8", errors="replace"), "the request")
    except DataError as error:
        raise DataError(error.message, _JSON) from None
    text = content.get("image") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise DataError("the request's json has no text called 'image'", _JSON)
    _require_alone("image", content)
    try:
        text = re.sub(r"\Adata:[^,]{0,99},", "", text)
        return base64.b64decode(text.translate(_NO_BREAKS), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("the request's 'image' is no base64", _JSON) from None


def _rows(detections: Detections) -> list[dict[str, Any]]:
    """Boxes to a thousandth of a pixel."""
    return [
        {"box": [round(x, 3) for x in box], "score": round(score, 6), "label": name, "id": label}
        for box, score, label, name in detections
    ]


def _drawn(detections: Detections, image: Image) -> Response:
    picture = fit_jpeg(detections.draw(image))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return Response(buffer.getvalue(), media_type="image/jpeg")


async def _on_mistake(request: Request, error: UserError) -> Response:
    status, headers = (error.status, error.headers) if isinstance(error, Refusal) else (400, None)
    return JSONResponse({"error": error.message, "help": error.remedy}, status, headers)


async def _on_http(request: Request, error: HTTPException) -> Response:
    content = {"error": error.detail, "help": "/openapi.json lists what there is"}
    return JSONResponse(content, error.status_code, error.headers)


async def _on_defect(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "internal error", "help": "see the server's log"}, 500)


def listen(host: str, port: int) -> socket.socket:
    """A socket that connections come to.

    Raises:
        ConfigError: the address is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({reason})", "choose another --host or --port"
        ) from None


class _Connection(H11Protocol):
    """Ends a connection that sends no whole head of a request in time, since the number of connections is limited. uvicorn has a
    timer after its first answer alone, which any byte stops."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        self._timer.cancel()
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(_HEAD, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def serve(server: DetectionServer, listener: socket.socket, *, on_start: Callable[[], object] = lambda: None) -> bool:
    """Answer requests until SIGINT, SIGTERM or SIGHUP comes; those that have begun are finished first, within 5 seconds.

    Args:
        listener: of `listen`.
        on_start: called before the first request is taken.

    Returns:
        whether the model is idle. If not, end the process with `os._exit`: engines abort one that Python ends below them.

    Raises:
        UserError: of the model, which predicts once before the first request.
    """
    from PIL import Image

    server.batcher.submit(Image.new("RGB", (64, 64), "gray"), Options()).result()
    program = uvicorn.Server(
        uvicorn.Config(
            server.app,
            http=_Connection,
            log_level="warning",
            timeout_graceful_shutdown=_DRAIN,
            limit_concurrency=server.limits.queue * 4 + 64,
            server_header=False,
        )
    )

    def stop(name: str) -> None:
        program.should_exit = True

    # uvicorn raises the signal once more when it has finished: noted here, it ends nothing.
    with StopRequest(stop), listener:
        listener.listen(2048)
        on_start()
        program.run(sockets=[listener])
        return server.batcher.close(_LAST_CALL)
