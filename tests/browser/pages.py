"""The status page in a real browser, with a status that the test gives, or of a real server."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from playwright.async_api import Page, async_playwright

from ecavg.cloud_server.showing import page as status_page
from ecavg.cloud_server.showing.feed import Feed
from ecavg.cloud_server.store import Store
from ecavg.common.endpoints import make_app, serve_http
from ecavg.common.metrics import make_registry
from tests.conftest import need

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
WIDE, NARROW = 1280, 390
WAIT_MS = 60_000


def need_browser() -> None:
    need("browser", BROWSER, "chromium")


def axe_script() -> Path:
    """Return the script of axe-core, which looks for what keeps people from using a page."""
    spec = find_spec("axe_playwright_python")
    need("axe-core", spec, "axe-playwright-python")
    return Path(spec.origin).parent / "axe.min.js"


class Given:
    """The page of a server whose status is what the test says."""

    def __init__(self, status: dict[str, Any], page: Page, complaints: list[str]) -> None:
        self.status = status
        self.page = page
        # What the browser has to say: errors of scripts, blocked and missing files.
        self.complaints = complaints

    async def text(self, selector: str) -> str:
        return " ".join((await self.page.locator(selector).inner_text()).split())

    async def rows(self, selector: str) -> list[str]:
        """Return the text of the rows of the tables in this part of the page."""
        texts = await self.page.locator(f"{selector} tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText).join(' '))"
        )
        return [" ".join(text.split()) for text in texts]

    async def until_text(self, selector: str, pattern: str) -> None:
        """Wait until a text of this element matches."""
        await self.page.locator(selector).filter(has_text=re.compile(pattern)).first.wait_for(timeout=WAIT_MS)


@asynccontextmanager
async def a_page(
    *, width: int = WIDE, dark: bool = False, password: str | None = None
) -> AsyncIterator[tuple[Page, list[str]]]:
    """Yield an empty page of a browser, and a list to which all that the browser complains of is added."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = await browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            timezone_id="UTC",
            reduced_motion="reduce",
            http_credentials={"username": "anyone", "password": password} if password else None,
        )
        page = await context.new_page()
        complaints: list[str] = []
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page, complaints
        await browser.close()


@asynccontextmanager
async def serving(
    status: dict[str, Any], store: Store, *, port: int = 0, token: str | None = None
) -> AsyncIterator[int]:
    """Serve the page of this status, and yield the port; histories and reports come from the store."""

    async def read() -> dict[str, Any]:
        return dict(status)

    feed = Feed(read)
    more = status_page.endpoints(store, feed)
    app = make_app(make_registry(), ready=lambda: True, status=read, more=more, token=token)
    server = await serve_http(app, host="127.0.0.1", port=port)
    try:
        yield server.port
    finally:
        feed.close()
        await server.stop()


@asynccontextmanager
async def given(status: dict[str, Any], store: Store, **how: Any) -> AsyncIterator[Given]:
    """Yield the page once it shows the status."""
    async with serving(status, store) as port, a_page(**how) as (page, complaints):
        shown = Given(status, page, complaints)
        await page.goto(f"http://127.0.0.1:{port}/")
        await shown.until_text("#link", "live")
        yield shown
