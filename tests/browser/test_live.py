"""The page while the server comes and goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ecavg.cloud_server.store import Store
from ecavg.common.endpoints import serve_http
from tests.browser.pages import Given, a_page, serving
from tests.unit.states import run_rounds
from tests.unit.test_standing import Viewed

TOKEN = "correct horse battery"


async def status_of(store: Store, state_dir: Path) -> dict[str, Any]:
    run_rounds(store, state_dir, 2)
    return await Viewed(store, state_dir).status.read()


async def test_page_behind_a_token_asks_for_it_once_and_then_is_live(store: Store, tmp_path: Path) -> None:
    status = await status_of(store, tmp_path)
    async with serving(status, store, token=TOKEN) as port, a_page(password=TOKEN) as (tab, complaints):
        await tab.goto(f"http://127.0.0.1:{port}/")
        page = Given(status, tab, complaints)
        await page.until_text("#link", "live")
        await tab.locator("#plot-score canvas").wait_for()
        await tab.locator("#rounds").get_by_role("link", name="Round 2").click()
        await page.until_text("#report", "Report of round 2")
        assert [line for line in complaints if "401" not in line] == []


async def test_page_of_a_run_that_is_over_says_that_the_server_has_stopped(
    store: Store, tmp_path: Path
) -> None:
    status = await status_of(store, tmp_path) | {"run_over": True}
    async with a_page() as (tab, complaints):
        page = Given(status, tab, complaints)
        async with serving(status, store) as port:
            await tab.goto(f"http://127.0.0.1:{port}/")
            await page.until_text("#headline", "The run is over")
        await page.until_text("#link", "the server has stopped")


async def test_page_tries_again_where_something_else_answers_in_place_of_the_server(
    store: Store, tmp_path: Path
) -> None:
    status = await status_of(store, tmp_path)
    async with a_page() as (tab, complaints):
        page = Given(status, tab, complaints)
        async with serving(status, store) as port:
            await tab.goto(f"http://127.0.0.1:{port}/")
            await page.until_text("#link", "live")
        await page.until_text("#link", "connection lost, trying again")
        async with answering_503(port) as asked:
            async with asyncio.timeout(20):
                await asked.wait()
        status["round"] = 7
        # Agents that are no longer there are not shown any more.
        status["agents"] = [status["agents"][0] | {"agent_id": "another"}]
        async with serving(status, store, port=port):
            await page.until_text("#link", "live")
            await page.until_text("#headline", "Round 7")
            assert [row.split()[0] for row in (await page.rows("#agents"))[1:]] == ["another"]


@asynccontextmanager
async def answering_503(port: int) -> AsyncIterator[asyncio.Event]:
    """Answer 503 as a proxy does without its server; yield an event that is set once events are asked for."""
    asked = asyncio.Event()

    async def answer(request: Request) -> Response:
        if request.url.path == "/api/events":
            asked.set()
        return PlainTextResponse("the server is away", 503)

    server = await serve_http(Starlette(routes=[Route("/{path:path}", answer)]), host="127.0.0.1", port=port)
    yield asked
    await server.stop()
