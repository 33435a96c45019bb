"""`make screenshots`: the status page of a real run of three agents, into docs/img/.

The pictures are taken after ROUNDS rounds, while the server waits for the upload of the third agent.
"""

import asyncio
import io
import re
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser.pages import NARROW, WIDE, a_page
from tests.processes import ROOT, Cluster, cluster_in, until

FOLDER = ROOT / "docs/img"
ROUNDS = 8
MAX_BYTES = 150_000
WAIT_SECONDS = 300.0
# Bytes a second: the weights are on their way for longer than the pictures take.
SLOW = 30_000
# Little training in each round, so that there is something to see over the rounds.
SETTINGS = (
    "--min-agents", 3, "--rounds", 0, "--set", "run.pretrain.epochs=2", "--set", "run.fine_tune.epochs=2",
    "--set", "run.pretrain.learning_rate=0.01", "--set", "run.fine_tune.learning_rate=0.01",
    "--set", "run.hidden_units=4096",
)  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, cluster_in(Path(folder)) as cluster:
        run_rounds(cluster)
        asyncio.run(take_pictures(f"http://127.0.0.1:{cluster.http_port}/"))


def run_rounds(cluster: Cluster) -> None:
    """Run ROUNDS rounds; then the third agent gets a slow link, and the next round waits for it."""
    server = cluster.server(*SETTINGS)
    agents = [cluster.agent(f"edge-{number}", "--partition", f"{number}/3") for number in (1, 2, 3)]
    until((cluster.state_dir / f"rounds/{ROUNDS:04d}/report.json").exists, server, WAIT_SECONDS)
    agents[-1].terminate()
    cluster.agent("edge-3", "--partition", "3/3", "--max-upload-rate", SLOW)


async def take_pictures(address: str) -> None:
    for dark in (False, True):
        for width in (WIDE, NARROW):
            await take_picture(address, width, dark)


async def take_picture(address: str, width: int, dark: bool) -> None:
    name = f"status-page{'-narrow' if width == NARROW else ''}{'-dark' if dark else ''}.png"
    async with a_page(width=width, dark=dark) as (page, complaints):
        await page.goto(address)
        await page.locator("#plot-loss canvas").wait_for()
        await page.get_by_text(re.compile("edge-3 uploads, .* left")).wait_for()
        # The pointer is on a plot, which then shows the values of a round.
        await page.locator("#plot-score .u-over").hover()
        card = await page.locator("#history-card").bounding_box()
        scrolled = await page.evaluate("scrollY")
        height = scrolled + card["y"] + card["height"] + 16
        clip = {"x": 0, "y": 0, "width": width, "height": height}
        picture = await page.screenshot(full_page=True, clip=clip)
    assert not complaints, complaints
    # A page has few colours.
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(64).save(FOLDER / name, optimize=True)
    size = (FOLDER / name).stat().st_size
    assert size < MAX_BYTES, f"{name} has {size} bytes"
    print(f"docs/img/{name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
