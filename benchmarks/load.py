"""Streaming load on a running server: latencies, errors by kind and the server's memory.

    python -m benchmarks.load http://127.0.0.1:8000 --clients 200 --seconds 60
    python -m benchmarks.load http://127.0.0.1:8000 --rate 20 --seconds 60

--clients: so many at a time, each asks again as soon as it has its answer (after a 429, when the
server says). --rate: a new request every 1/rate seconds, however many are unanswered; that shows
what a queue does when a server is too slow, which waiting clients hide. The last line of stdout is
JSON. Traffic goes to the given address only, and ends after the given time and one answer more.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import math
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SETTINGS = ("clients", "rate", "max_tokens", "timeout_s")
RSS = b"process_resident_memory_bytes "


@dataclass
class Load:
    """What happened. Seconds; times of answers that were complete."""

    host: str
    port: int
    path: str
    body: dict[str, Any]
    timeout_s: float
    key: str | None
    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    tokens: int = 0
    sent: int = 0
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest rank: p99 of 50 values is the largest."""
    ordered = sorted(values)
    if not ordered:
        return None
    ranks = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 95, 99)}
    return {**ranks, "max": ordered[-1]}


async def exchange(
    load: Load, method: str, path: str, body: dict[str, Any] | None
) -> AsyncIterator[tuple[int, dict[str, str], bytes]]:
    """(status, headers, a line of the body), on a connection of its own."""
    reader, writer = await asyncio.open_connection(load.host, load.port, limit=2**24)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", f"Host: {load.host}:{load.port}", "Connection: close"]
        if load.key:
            head.append(f"Authorization: Bearer {load.key}")
        if data:
            head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        # chunks are framed by lines too; a line that is no event is left to the caller to ignore
        yield status, headers, b""
        while line := await reader.readline():
            yield status, headers, line.strip()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(load: Load) -> float:
    """One request; -> seconds to wait before the next, as the server asks."""
    load.sent += 1
    begin_s = time.perf_counter()
    first_s: float | None = None
    usage, done = None, False
    try:
        async with asyncio.timeout(load.timeout_s):
            async for status, headers, line in exchange(load, "POST", load.path, load.body):
                if status != 200:
                    load.errors[str(status)] += 1
                    return float(headers.get("retry-after", 0))
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]":
                    done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    load.errors[f"stream: {event['error']['code']}"] += 1
                    return 0.0
                usage = event.get("usage") or usage
                if first_s is None:
                    first_s = time.perf_counter()
    except TimeoutError:
        load.errors["timeout"] += 1
        return 0.0
    except (OSError, ValueError, IndexError) as error:
        load.errors[type(error).__name__] += 1
        return 1.0  # a server that is gone is not asked in a tight loop
    if not done or first_s is None or usage is None:
        load.errors["incomplete"] += 1
        return 0.0
    end_s = time.perf_counter()
    tokens = usage["completion_tokens"]
    load.tokens += tokens
    load.first_token_s.append(first_s - begin_s)
    load.total_s.append(end_s - begin_s)
    if tokens > 1:
        load.between_tokens_s.append((end_s - first_s) / (tokens - 1))
    return 0.0


async def client(load: Load, end_s: float) -> None:
    while (left_s := end_s - time.perf_counter()) > 0:
        await asyncio.sleep(min(await ask(load), left_s))


async def watch_memory(load: Load, begin_s: float, times: float = math.inf) -> None:
    while times > 0:
        with contextlib.suppress(OSError):
            async for _, _, line in exchange(load, "GET", "/metrics", None):
                if line.startswith(RSS):
                    found = int(float(line[len(RSS) :]))
                    load.rss_bytes.append((round(time.perf_counter() - begin_s, 1), found))
        times -= 1
        await asyncio.sleep(5 if times > 0 else 0)


async def run(load: Load, clients: int | None, rate: float | None, seconds: float) -> float:
    """-> seconds until the last answer."""
    begin_s = time.perf_counter()
    memory = asyncio.create_task(watch_memory(load, begin_s))
    end_s = begin_s + seconds
    tasks = [asyncio.create_task(client(load, end_s)) for _ in range(clients or 0)]
    rate = rate or 0.0
    for i in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, begin_s + i / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(load)))
    await asyncio.gather(*tasks)
    elapsed_s = time.perf_counter() - begin_s
    memory.cancel()
    await watch_memory(load, begin_s, times=1)
    return elapsed_s


def report(load: Load, elapsed_s: float) -> dict[str, Any]:
    answered = len(load.total_s)
    sizes = [size for _, size in load.rss_bytes]
    return {
        "seconds": round(elapsed_s, 2),
        "sent": load.sent,
        "answered": answered,
        "errors": dict(load.errors),
        "requests_per_s": round(answered / elapsed_s, 2),
        "tokens_per_s": round(load.tokens / elapsed_s, 1),
        "first_token_s": percentiles(load.first_token_s),
        "between_tokens_s": percentiles(load.between_tokens_s),
        "total_s": percentiles(load.total_s),
        "rss_bytes_start": sizes[0] if sizes else None,
        "rss_bytes_end": sizes[-1] if sizes else None,
        "rss_bytes": load.rss_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Streaming load on a running server.")
    parser.add_argument("url", help="of the server, e.g. http://127.0.0.1:8000")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--clients", type=int, help="at a time")
    how.add_argument("--rate", type=float, help="new requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt", default="the old dogs ran past some green hills and")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of each request")
    parser.add_argument("--api-key", help="if the server asks for one")
    options = parser.parse_args()
    address = urllib.parse.urlsplit(options.url)
    body = {"prompt": options.prompt, "max_tokens": options.max_tokens, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    host, port = address.hostname or "", address.port or 80
    load = Load(host, port, "/v1/completions", body, options.timeout_s, options.api_key)
    elapsed_s = asyncio.run(run(load, options.clients, options.rate, options.seconds))
    settings = {name: getattr(options, name) for name in SETTINGS}
    print(json.dumps({**settings, **report(load, elapsed_s)}))


if __name__ == "__main__":
    main()
