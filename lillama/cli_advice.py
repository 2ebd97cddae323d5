"""`lillama plan --advise` as a page of 80 columns; --json has all of it."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_advice", "sparkline"]

WIDTH = 80
MATRICES = 16  # spectra on the page
# eight heights of a block, and what a terminal without them gets
BLOCKS = "".join(chr(0x2581 + height) for height in range(8))
ASCII = "_.-:=+*#"
SPECTRA = (
    "kept, at half the weight's size: share of its squared norm; random: what of a random matrix "
    "of that size and norm would be kept"
)
FORECAST = (
    "lost: nats a token over the base model, with its error bar (? no run of ours lost as much or "
    "as little); kept: base perplexity / perplexity; GiB: of host memory; decode: how many times "
    "fewer bytes of weights a token reads"
)


def sparkline(values: list[float], width: int, ramp: str) -> str:
    """Heights of evenly spaced values over the largest."""
    if not values or values[0] <= 0:
        return ramp[0] * min(width, max(1, len(values)))
    count = min(width, len(values))
    places = [round(i * (len(values) - 1) / max(1, count - 1)) for i in range(count)]
    top = len(ramp) - 1
    return "".join(ramp[round(top * values[place] / values[0])] for place in places)


def _ramp() -> str:
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return BLOCKS


def _short(name: str) -> str:
    """ "layers.3.mlp.experts.5.w1" -> "3 ... 5.w1", "layers.3.mixer.in_proj" -> "3 in_proj"."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    where = f"{numbers[0]} " if numbers else ""
    expert = f"expert {numbers[1]} " if len(numbers) > 1 else ""
    return f"{where}{expert}{parts[-1]}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _spectra(document: dict[str, Any]) -> Table:
    rows = document["spectra"]
    table = Table(title=f"singular values, {len(rows)} of {document['matrices_total']} matrices")
    for column in ("matrix", "shape", "largest to smallest", "kept", "random", ""):
        table.add_column(column, justify="right" if column in ("kept", "random") else "left")
    step = max(1, -(-len(rows) // MATRICES))
    ramp = _ramp()
    for row in rows[::step]:
        flag = "near-random" if row["near_random"] else ""
        flag = flag if row["break_even_rank"] else "too small"
        table.add_row(
            _short(row["name"]),
            "x".join(map(str, row["shape"])),
            sparkline(row["singular_values"], 19, ramp),
            f"{row['energy']:.0%}",
            f"{row['random_energy']:.0%}",
            flag,
        )
    return table


def _loss(row: dict[str, Any]) -> list[str]:
    if "excess" not in row:
        return ["needs --text", ""]
    mark = "?" if row["extrapolated"] else ""
    bar = f"{row['excess']:.3f} ({row['excess_low']:.3f}-{row['excess_high']:.3f}){mark}"
    return [bar, f"{row['retained']:.1%}"]


def _forecast(document: dict[str, Any]) -> Table:
    table = Table(title="forecast")
    for column in ("less", "preset", "lost", "kept", "time", "GiB", "decode"):
        table.add_column(column, justify="left" if column in ("preset", "lost") else "right")
    for step in document["forecast"]:
        less = f"{step['reduction']:.0%}"
        if not step["reachable"]:
            table.add_row(less, "", "out of reach", "", "", "", "")
            continue
        for preset, row in step["presets"].items():
            table.add_row(
                less,
                preset,
                *_loss(row),
                _duration(row["seconds"]),
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{step['decoding']['speed_up_bound']:.2f}x",
            )
            less = ""
    return table


def print_advice(model: str, document: dict[str, Any]) -> None:
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    device = document["device"]
    console.print(_spectra(document))
    console.print(SPECTRA, markup=False)
    console.print(_forecast(document))
    console.print(FORECAST, markup=False)
    lines = [
        f"{document['params_before']:,} parameters, at most {document['max_reduction']:.0%} fewer; "
        f"{device['device']}: {device['product_flops_per_s'] / 1e9:,.0f} GFLOP/s, "
        f"{device['read_bytes_per_s'] / 1e9:,.1f} GB/s",
        *(f"note: {warning}" for warning in [*document["warnings"], *document["caveats"]]),
        f"advice: {document['recommendation']['why']}",
    ]
    for line in lines:
        console.print(line, markup=False)
    # not wrapped: to be copied
    command = f"  {document['recommendation']['command']}"
    console.print(command, markup=False, soft_wrap=True)
