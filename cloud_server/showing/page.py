"""The endpoints of the status page: files, events, history, and the rounds' reports and models."""

import asyncio
import re
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from ecavg.cloud_server.showing.feed import Feed
from ecavg.cloud_server.showing.history import History
from ecavg.cloud_server.store import Store
from ecavg.common.endpoints import Endpoint
from ecavg.common.strict_json import to_json

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_FRESH = {**_HEADERS, "Cache-Control": "no-store"}
_REST = "rest.safetensors"
_ROUND = re.compile("[0-9]{1,9}")
# Source: W3C Content Security Policy Level 3. The page is made of files that the server itself serves.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def endpoints(store: Store, feed: Feed) -> dict[str, Endpoint]:
    """Return the endpoints of the page, by path."""
    history = History(store)

    async def events(_: Request) -> Response:
        # A proxy before the server passes each event on at once.
        headers = {**_FRESH, "X-Accel-Buffering": "no"}
        return StreamingResponse(feed.events(), media_type="text/event-stream", headers=headers)

    async def past(request: Request) -> Response:
        try:
            first, last = (_number(request.query_params.get(name)) for name in ("first", "last"))
        except ValueError:
            return PlainTextResponse("first and last are numbers of rounds\n", 400)
        return _json(await asyncio.to_thread(history.read, first, last))

    async def loss(request: Request) -> Response:
        points = await asyncio.to_thread(history.losses, _round_of(request))
        return _json({"points": points})

    async def report(request: Request) -> Response:
        return await _file(store, _round_of(request), "report.json")

    async def model(request: Request) -> Response:
        return await _file(store, _round_of(request), "model.safetensors")

    async def rest(request: Request) -> Response:
        return await _file(store, _round_of(request), _REST)

    return {
        **_files(),
        "/api/events": events,
        "/api/history": past,
        "/api/rounds/{number}/loss": loss,
        "/api/rounds/{number}/report.json": report,
        "/api/rounds/{number}/model.safetensors": model,
        "/api/rounds/{number}/rest.safetensors": rest,
    }


def _files() -> dict[str, Endpoint]:
    """Return an endpoint for each file of the page, by path."""
    folder = resources.files("ecavg.cloud_server").joinpath("web")
    files = {f"/{file.name}": file for file in folder.iterdir() if file.is_file()}
    files |= {f"/uplot/{file.name}": file for file in folder.joinpath("uplot").iterdir()}
    pages = {path: _content(file) for path, file in files.items() if _suffix(file) in _MEDIA_TYPES}
    return pages | {"/": pages["/index.html"]}


def _suffix(file: Traversable) -> str:
    return "." + file.name.rpartition(".")[2]


def _content(file: Traversable) -> Endpoint:
    """Return an endpoint that answers with a file of the page."""
    content, media_type = file.read_bytes(), _MEDIA_TYPES[_suffix(file)]
    headers = {**_HEADERS, "Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}

    async def answer(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return answer


async def _file(store: Store, number: int, name: str) -> Response:
    """Return an answer that sends a file of a round, piece by piece."""
    path = store.state_dir.round(number) / name
    try:
        status = await asyncio.to_thread(path.stat)
    except FileNotFoundError:
        return await asyncio.to_thread(_missing, store, number, name)
    filename = f"round-{number:04d}-{name}"
    return FileResponse(path, stat_result=status, filename=filename, headers=_FRESH)


def _missing(store: Store, number: int, name: str) -> Response:
    """Return the answer for a file of a round that is not there."""
    row = store.round(number)
    if row and row.retired:
        text = (
            f"the model of round {number} was removed: only those of the last `keep_rounds` rounds are kept"
        )
        return PlainTextResponse(f"{text}\n", 410, _FRESH)
    why = "it is not over, or has failed" if row else "there is no such round"
    if row and row.published_digest and name == _REST:
        why = "all of its model travels"
    return PlainTextResponse(f"round {number} has no such file: {why}\n", 404, _FRESH)


def _json(value: Mapping[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json", headers=_FRESH)


def _round_of(request: Request) -> int:
    """Return the number of the round in the request's path; answer 404 if there can be no such round."""
    text = request.path_params["number"]
    if not _ROUND.fullmatch(text):
        raise HTTPException(404, "there is no such round")
    return int(text)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
