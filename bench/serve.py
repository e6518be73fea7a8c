"""The server: fifty clients that stream at the same time against the same requests one after another.

Every request is a chat of its own with a seed of its own, streamed over a socket to a client thread; `ours` is the
tokens per second of all fifty together, `peer` those of one client at a time. Also how long the first page takes in a
browser from nothing to usable (Chromium, if there is one), the models not yet loaded.

    python bench/serve.py RUN [--model sft] [--clients 50] [--tokens 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
from common import prepare


@contextmanager
def serving(run: str) -> Iterator[str]:
    """Serve a run in a process of its own, away from the clients; yield its address."""
    command = [sys.executable, "-u", "-m", "nurture", "serve", run, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = next(line.split()[1].rstrip("/") for line in server.stdout if line.startswith("Studio"))
    while True:  # it listens already, but may not answer yet
        try:
            httpx.get(f"{address}/v1/models", timeout=60)
            break
        except httpx.TransportError:
            time.sleep(0.05)
    yield address
    server.terminate()
    server.wait()


def first_page(address: str) -> float | None:
    """Return seconds from opening the address to a page that takes a question, None without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        page = started.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        start = time.perf_counter()
        page.goto(address)
        page.locator(".welcome").wait_for()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", default="sft")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prepare()
    with serving(args.run) as address:
        page = first_page(address)

        def ask(seed: int) -> int:
            """Stream one answer; return its tokens."""
            body = {
                "model": args.model,
                "messages": [{"role": "user", "content": f"Tell me about the beaver, please. ({seed})"}],
                "max_tokens": args.tokens,
                "ignore_eos": True,
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            lines = []
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=300) as response:
                lines = [line for line in response.iter_lines() if line]
            assert lines[-1] == "data: [DONE]", lines[-1]
            return int(json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"])

        ask(0)
        start = time.perf_counter()
        alone = sum(map(ask, range(max(2, args.clients // 5))))
        alone_rate = alone / (time.perf_counter() - start)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            together = sum(pool.map(ask, range(args.clients)))
        rate = together / (time.perf_counter() - start)
    line = {
        "name": f"serve/{args.clients} clients at once/one at a time",
        "ours": round(rate),
        "peer": round(alone_rate),
        "ratio": round(rate / alone_rate, 2),
    }
    if args.json:
        print(json.dumps(line | {"first_page_seconds": page and round(page, 2)}))
        return
    print(f"{args.clients} clients at once {rate:.0f} tokens/s, one at a time {alone_rate:.0f} tokens/s")
    print("first page: no browser here" if page is None else f"first page usable after {page:.2f} s")


if __name__ == "__main__":
    main()
