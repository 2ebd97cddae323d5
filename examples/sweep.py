"""One model at several reductions, and a plot of what each keeps.

    python examples/sweep.py examples/teachers/mixtral --out sweep-demo

Writes OUT/sweep.json and OUT/sweep.png. Without training (`--preset fast`) a point takes a fraction
of the time; the plot then says where training is worth it. The text is by default the source of
Python's own library, on whose other files the models in this folder were trained.
"""

import argparse
import json
import sys
from pathlib import Path

from compress_llama import standard_library
from matplotlib.figure import Figure

import lillama


def plot(rows: list[dict], file: Path) -> None:
    """Quality retained and bytes, over the share of parameters removed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    removed = [100 * row["reduction"] for row in rows]
    left.plot(removed, [100 * row["retained"] for row in rows], "o-", color="tab:blue")
    left.set_xlabel("parameters removed, %")
    left.set_ylabel("quality retained, %", color="tab:blue")
    right = left.twinx()
    right.plot(removed, [row["bytes"] / 1e6 for row in rows], "s--", color="tab:gray")
    right.set_ylabel("bytes, MB", color="tab:gray")
    figure.savefig(file, dpi=150)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--held-out-bytes", type=int, default=100_000)
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True)
    calibration, held_out = standard_library(8 * options.tokens)
    texts = options.out / "calibration.txt", options.out / "held_out.txt"
    texts[0].write_text(calibration, "utf-8")
    texts[1].write_text(held_out[: options.held_out_bytes], "utf-8")
    rows = []
    for reduction in options.reductions:
        small = options.out / f"small-{reduction:g}"
        report = lillama.compress(
            options.model,
            small,
            reduction=reduction,
            text=texts[0],
            tokens=options.tokens,
            seq_len=options.seq_len,
            preset=options.preset,
        )
        quality = lillama.eval(small, texts[1], against=options.model, seq_len=options.seq_len)
        row = {key: quality[key] for key in ("perplexity", "retained", "kl", "params", "bytes")}
        rows.append({"reduction": report["reduction"], "seconds": report["seconds"], **row})
        print(f"{report['reduction']:.1%} removed: {row['retained']:.1%} retained")
        # a point at a time: what is there can be looked at
        (options.out / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
        plot(rows, options.out / "sweep.png")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
