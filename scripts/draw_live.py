"""Draw docs/live.png, docs/live-phone.png and docs/top.svg: the live page and the terminal view of a server at work.

The shipped model is served on this machine, clients complete Python files that share their beginnings, and the pictures
are taken while they do. Run from the root of the repository, with Chromium at hand::

    python scripts/draw_live.py
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import random
import re
import textwrap
import threading
import time
import tokenize
from pathlib import Path

import httpx
from browser import Browser, is_installed

from pagedkv.cli.top_data import ServerSource
from pagedkv.cli.top_screen import TopApp
from pagedkv.engine import LLM, AsyncEngine
from pagedkv.models import shipped_model_path
from pagedkv.server import ServerConfig
from pagedkv.server.run import listen, make_server

PICTURES = (("live.png", 1280, None, 1.0, False), ("live-phone.png", 390, 1500, 1.5, True))
"""File, width and height in CSS pixels (None: all of the page), pixels per CSS pixel, by night."""
BEGINNINGS = [inspect.getsource(module)[:1400] for module in (json, textwrap, tokenize)]
BODIES = inspect.getsource(tokenize) + inspect.getsource(textwrap) + inspect.getsource(inspect)
BLOCKS, CLIENTS, WARM_UP = 1000, 18, 30


class Traffic:
    """Clients that complete texts, one after the other, each with one of a few long beginnings."""

    def __init__(self, url: str, clients: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(random.Random(i),)) for i in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            start = rng.randrange(1400, len(BODIES) - 3000)
            text = rng.choice(BEGINNINGS) + BODIES[start : start + rng.randrange(100, 2400)]
            body = {"prompt": text, "max_tokens": rng.randrange(60, 240), "temperature": 0.8, "ignore_eos": True}
            httpx.post(f"{self._url}/v1/completions", json=body, timeout=300).raise_for_status()
            self._stop.wait(rng.expovariate(2.0))


def draw_page(url: str, folder: Path) -> None:
    """Take the pictures of the page."""
    for name, width, height, scale, is_dark in PICTURES:
        with Browser(width, is_dark=is_dark) as window:
            window.visit(f"{url}/")
            time.sleep(WARM_UP)
            picture = window.screenshot(height, scale)
        (folder / name).write_bytes(picture)
        print(f"{folder / name}: {len(picture):,} bytes")


async def draw_top(url: str, folder: Path) -> None:
    """Export the picture of the terminal view."""
    app = TopApp(ServerSource(url), 0.5)
    async with app.run_test(size=(124, 40)) as pilot:
        await pilot.pause(WARM_UP)
        picture = app.export_screenshot(title="pagedkv top")
    # The picture stands alone: no font is fetched, any monospaced one will do.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S).replace(url, "http://127.0.0.1:8000")
    (folder / "top.svg").write_text(picture)
    print(f"{folder / 'top.svg'}: {len(picture):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("docs"), help="folder of the pictures")
    options = parser.parse_args()
    if not is_installed():
        raise SystemExit("no pictures: chromium and chromedriver are not installed")
    engine = AsyncEngine(LLM(shipped_model_path(), num_blocks=BLOCKS, max_num_seqs=14))
    config = ServerConfig(model_name="pysmall", port=0, drain_timeout=5)
    ready = threading.Event()
    with listen(config) as listener:
        server = make_server(engine, config, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        ready.wait()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with Traffic(url, CLIENTS):
                draw_page(url, options.pictures)
                asyncio.run(draw_top(url, options.pictures))
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
