"""Waits until the stack of docker-compose.yml has proved itself; prints the proof, exits 1 without it."""

import json
import os
import sys
import time
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

TIMEOUT_SECONDS = 180
TARGETS = {"cloud-server:8080", "edge-1:9100", "edge-2:9100"}
open_url = build_opener(ProxyHandler({})).open  # the stack is on this machine


def fetch(url: str):
    request = Request(url, headers={"Authorization": f"Bearer {os.environ['ECAVG_SCRAPE_TOKEN']}"})
    with open_url(request, timeout=5) as reply:
        return json.load(reply)


def proof() -> dict | None:
    """Return a published round that both agents have reported on, with all targets up; None if not yet."""
    status = fetch("http://127.0.0.1:8080/api/status")
    published = [item for item in status.get("rounds", []) if item["outcome"] == "published"]
    agents = {item["agent_id"]: item["accuracy_after"] for item in status.get("agents", [])}
    active = fetch("http://127.0.0.1:9090/api/v1/targets?state=active")["data"]["activeTargets"]
    up = {item["labels"]["instance"] for item in active if item["health"] == "up"}
    query = "http://127.0.0.1:9090/api/v1/query?query=ecavg_server_rounds_total{outcome=%22published%22}"
    scraped = [float(item["value"][1]) for item in fetch(query)["data"]["result"]]
    reported = len(agents) == 2 and None not in agents.values()
    if not (published and reported and up == TARGETS and scraped and scraped[0] >= 1):
        return None
    return {"round": published[-1], "agents": agents, "targets_up": sorted(up), "rounds_scraped": scraped[0]}


def main() -> int:
    give_up_at = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < give_up_at:
        try:
            if found := proof():
                print(json.dumps(found, indent=2))
                return 0
        except (URLError, OSError, ValueError, KeyError) as error:
            print(f"not yet: {error}", file=sys.stderr)
        time.sleep(1)
    return 1


sys.exit(main())
