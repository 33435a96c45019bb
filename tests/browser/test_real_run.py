"""The page beside a real run: three agents, one of them behind a slow link, and a restart in between."""

import asyncio
import filecmp
import re
from pathlib import Path

from tests.browser.pages import Given, a_page
from tests.faults.proxy import Flow, Proxy
from tests.integration.test_round import QUICK
from tests.integration.test_watching import seen
from tests.processes import Cluster, Command, until

# The browser reports that it could not connect, which is what the test is about.
NO_SERVER = re.compile(r"net::ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|CONNECTION_RESET)")
# Bytes a second. Weights of 2.5 MB travel in ten pieces, so they are on their way for most of a minute.
SLOW = 50_000
LARGE = ("--set", "run.hidden_units=8192", "--set", 'run.candidates=["average"]')
SETTINGS = ("--min-agents", 3, "--rounds", 0, *QUICK, *LARGE)


async def started(cluster: Cluster) -> Command:
    return await asyncio.to_thread(cluster.server, *SETTINGS)


async def until_round(number: int, cluster: Cluster, server: Command) -> None:
    report = cluster.state_dir / f"rounds/{number:04d}/report.json"
    await asyncio.to_thread(until, report.exists, server)


async def until_joined(count: int, cluster: Cluster, server: Command) -> None:
    """Wait for the agents one by one, so that their places on the page are known."""
    await asyncio.to_thread(seen, cluster, server, lambda status: len(status["agents"]) == count)


async def open_round(page: Given) -> int:
    """Return the number of the round that is open, once the page shows one."""
    await page.until_text("#headline h1", r"Round \d+: collecting")
    return int(re.findall(r"\d+", await page.text("#headline h1"))[0])


async def test_page_names_the_slow_agent_draws_the_history_and_survives_a_restart(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = await started(cluster)
    async with Proxy(cluster.port) as proxy, a_page() as (tab, complaints):
        page = Given({}, tab, complaints)
        through = ("--server", f"127.0.0.1:{proxy.port}")
        for number, way in ((1, ()), (2, ()), (3, through)):
            await asyncio.to_thread(cluster.agent, f"edge-{number}", "--partition", f"{number}/3", *way)
            await until_joined(number, cluster, server)
        await until_round(2, cluster, server)
        proxy.up = Flow(bytes_per_second=SLOW)
        await tab.goto(f"http://127.0.0.1:{cluster.http_port}/")

        # An upload that was under way before is fast.
        slowly = r"^edge-3 #3uploading \d\.\d of 2\.5 MB at \d+\.\d kB/s"
        await page.until_text("#agents tbody tr:first-child", slowly)
        await page.until_text("#waiting", "Waiting for 1 of 3: edge-3 uploads")
        for plot in ("score", "loss", "seconds", "bytes"):
            await tab.locator(f"#plot-{plot} canvas").wait_for()
        await tab.locator("#plot-score .u-over").hover()
        await page.until_text("#plot-score .u-legend", r"published\s*\d+\.\d %")
        held_up = await open_round(page)
        assert complaints == []

        server.kill()
        await page.until_text("#link", "connection lost, trying again")
        server = await started(cluster)
        await page.until_text("#link", "live")
        proxy.up = Flow()
        await page.until_text("#rounds tbody tr", rf"^Round {held_up}✓ published")
        assert [line for line in complaints if not NO_SERVER.search(line)] == []

        await tab.locator("#rounds").get_by_role("link", name=f"Round {held_up}", exact=True).click()
        await page.until_text("#report", "Report of round")
        async with tab.expect_download() as download:
            await tab.get_by_role("link", name="Download the model").click()
        published = cluster.state_dir / f"rounds/{held_up:04d}/model.safetensors"
        assert await asyncio.to_thread(filecmp.cmp, await (await download.value).path(), published, False)
