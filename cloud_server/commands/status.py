"""The command `cloud-server status`, which shows at the terminal what the status page shows.

It reads the JSON of the status page, so it also works from another machine, and changes nothing.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from ecavg.cloud_server.commands.status_view import show, shown_live
from ecavg.cloud_server.config import DEFAULT_PRESET, ENV_PREFIX, ServerConfig
from ecavg.common import cli
from ecavg.common.addresses import http_url, is_loopback
from ecavg.common.errors import RunError, UsageError, one_line
from ecavg.common.files import read_text
from ecavg.common.layers import load

# The status is asked for so often; a server that is watched stays for two seconds after the end of its run.
POLL_SECONDS = 0.5
# The server answers at once, or its machine is too busy to ask.
ANSWER_SECONDS = 10.0
# A server that is started again is back in this time.
RETURN_SECONDS = 60.0
# These parts of the status change with the time alone.
_CLOCKS = ("phases", "waiting")
# The status of 10,000 agents takes a tenth of this.
MAX_ANSWER_BYTES = 64 * 2**20


class Page(NamedTuple):
    """The status page of a server: where it is, and the token that it asks for, if any."""

    url: str
    token: str


def main(argv: Sequence[str]) -> int:
    """Show the status once or, with --watch, until the run is over; return 0.

    Raises:
        UsageError: there is no such URL, or the server asks for another token.
        RunError: the server does not answer, or stdout cannot be written.
    """
    arguments = _parser().parse_args(argv)
    page = _find_page(arguments)
    documents = _watch(page) if arguments.watch else iter([_read(page)])
    if arguments.json:
        for document in documents:
            cli.print_result(document)
    elif arguments.watch:
        shown_live(json.loads(document) for document in documents)
    else:
        show(json.loads(next(documents)))
    return 0


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="cloud-server status",
        description="Show the run as the status page does: its round, phase and progress, and every agent.",
    )
    parser.add_argument("--watch", action="store_true", help="refresh until the run is over")
    parser.add_argument("--json", action="store_true", help="the JSON of the status page, as it is")
    parser.add_argument(
        "--server-url", metavar="URL", help="of the status page (default: by http_host and http_port)"
    )
    # A value of these flags replaces the configured one, so there is no default.
    for flag, what in (
        ("--http-token-file", "file with the page's token"),
        ("--http-port", "the server's"),
        ("--state-dir", "the server's"),
    ):
        parser.add_argument(
            flag, metavar=flag.rsplit("-", 1)[1].upper(), default=argparse.SUPPRESS, help=what
        )
    parser.add_argument("--config", metavar="FILE", help="the server's")
    return parser


def _find_page(arguments: argparse.Namespace) -> Page:
    """Return the page that the flags and the server's configuration name.

    The token in the state directory is that of this machine's server, so it goes to no other URL.

    Raises:
        UsageError: they name none.
    """
    names = ("http_token_file", "http_port", "state_dir")
    flags = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    config = load(
        ServerConfig, env_prefix=ENV_PREFIX, preset=DEFAULT_PRESET, config_file=arguments.config, flags=flags
    )
    if arguments.server_url:
        return Page(_checked(arguments.server_url), _token_in(config.http_token_file))
    if not config.http_port:
        raise UsageError("the server chose its http_port itself: give --server-url, as its ready line has it")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http_host, config.http_host)  # noqa: S104
    path = config.http_token_path
    return Page(http_url(host, config.http_port), _token_in(path if path.exists() else None))


def _checked(url: str) -> str:
    """Return a URL that HTTP can ask for; raise UsageError if it is none."""
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or not url.isprintable() or " " in url:
        raise UsageError("--server-url is not the URL of a status page: write http://HOST:PORT")
    return url


def _token_in(file: Path | None) -> str:
    """Return the token in a file; "" without a file."""
    return read_text(file, "token file").strip() if file else ""


def _watch(page: Page) -> Iterator[str]:
    """Yield the status whenever it has changed, until the run is over.

    A server that is started again is waited for.

    Raises:
        RunError: the server has gone, and has not come back.
    """
    document = _read(page)
    heard_at = time.monotonic()
    yield document
    while not _is_over(document):
        time.sleep(POLL_SECONDS)
        try:
            latest = _read(page)
        except RunError:
            if time.monotonic() - heard_at > RETURN_SECONDS:
                raise
            continue
        heard_at = time.monotonic()
        if _without_clocks(latest) != _without_clocks(document):
            document = latest
            yield document


def _without_clocks(document: str) -> dict[str, Any]:
    """Return the status without what changes with the time alone: durations, paces and times left."""
    known = {key: value for key, value in json.loads(document).items() if key not in _CLOCKS}
    agents = known.get("agents") or []
    return known | {
        "agents": [{**agent, "progress": _without_pace(agent.get("progress"))} for agent in agents]
    }


def _without_pace(progress: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (progress or {}).items() if key not in ("rate", "seconds_left")}


def _is_over(document: str) -> bool:
    return bool(json.loads(document).get("run_over"))


def _read(page: Page) -> str:
    """Return the JSON of the page.

    Raises:
        UsageError: the server asks for a token, or for another one, or is none of ours.
        RunError: the server does not answer.
    """
    request = Request(page.url.rstrip("/") + "/api/status")  # noqa: S310
    if page.token:
        # Sent like this, the token does not follow a redirection to another server.
        request.add_unredirected_header("Authorization", f"Bearer {page.token}")
    host = urlsplit(page.url).hostname or ""
    opener = build_opener(ProxyHandler({})) if is_loopback(host) else build_opener()
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as reply:
            text: str = reply.read(MAX_ANSWER_BYTES).decode()
    except HTTPError as error:
        raise _refusal(page, error) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        text = one_line(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)
        raise RunError(
            f"no server answers at {page.url} ({text}): start it, or give the right --server-url"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_a_page(page) from error
    return _checked_document(page, text)


def _refusal(page: Page, error: HTTPError) -> UsageError | RunError:
    """Return the error for an answer that is not the status."""
    if error.code == 401:
        what = "another token" if page.token else "a token"
        return UsageError(
            f"the status page {page.url} asks for {what}: name the file that has it with --http-token-file"
        )
    if error.code >= 500:
        return RunError(f"the server at {page.url} answers {error.code} {one_line(error.reason)}")
    return _not_a_page(page)


def _checked_document(page: Page, text: str) -> str:
    """Return the text if it is a status."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, Mapping) or not isinstance(document.get("phase"), str):
        raise _not_a_page(page)
    return text


def _not_a_page(page: Page) -> UsageError:
    return UsageError(f"{page.url} is no status page of a cloud-server: give the right --server-url")
