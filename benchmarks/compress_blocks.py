"""How long a block of a large model takes to compress, on the machine at hand.

    python -m benchmarks.compress_blocks mixtral-8x7b --tokens 500000 2000000 --json FILE
    python -m benchmarks.compress_blocks mamba-2.8b --tokens 500000

Writes a checkpoint of random weights with the real block shapes and a few layers, compresses all of
them (uniform ranks, so that every block has the same work) and prints seconds a block, tokens a
second, peak memory, the share of the machine's ceiling that the FLOPs of the training steps alone
come to, and the seconds that all blocks of the real model would take at this pace. One block is in
memory at a time, so the layers left out would change nothing but the sum; that sum is arithmetic,
not a measurement.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import lillama
from benchmarks.machine import ceilings, describe
from benchmarks.synthetic import SHAPES, TOKENIZER, write_checkpoint
from lillama.compress.plan.plan import Plan, make_plan
from lillama.config import PlanConfig

REAL_LAYERS = {"mixtral-8x7b": 32, "mamba-2.8b": 64, "mixtral-mini": 4}
# as many as 20% of the whole model need
REDUCTION = 0.2


def write_text(file: Path, tokens: int) -> None:
    """Random words that make up at least `tokens` tokens; their meaning does not matter here."""
    vocabulary = sorted(AutoTokenizer.from_pretrained(TOKENIZER).get_vocab())
    words = [word for word in vocabulary if word.isascii() and word.isalpha()]
    draw = random.Random(0)
    # a word is at least one token; the held-out blocks need some more
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(tokens // 500 + 200):
            stream.write(" ".join(draw.choices(words, k=500)) + "\n")


def step_flops_per_token(plan: Plan, index: int) -> float:
    """Of the factorised matrices of one block, for one calibration token: forward and twice that
    backward, for two inputs."""
    ranks = plan.ranks_of_block(index)
    matrices = [m for m in plan.matrices if m.name in ranks]
    return 2 * 3 * sum(plan.flops_per_token(m, ranks[m.name]) for m in matrices)


def measure(name: str, layers: int, tokens: int, device: str, folder: Path) -> dict[str, Any]:
    model, out, text = folder / "model", folder / "out", folder / "text.txt"
    if not model.exists():
        write_checkpoint(name, model, layers)
    write_text(text, tokens)
    options: dict[str, Any] = {"strategy": "uniform", "tokens": tokens, "seq_len": 512}
    report = lillama.compress(
        model, out, reduction=REDUCTION, text=text, device=device, overwrite=True, **options
    )
    plan = make_plan(PlanConfig(model=model, reduction=REDUCTION, **options))
    seconds = [row["seconds"] for row in report["blocks"]]
    # of the last, whose inputs differ, as most blocks' do
    taken, last = seconds[-1], report["blocks"][-1]["index"]
    on = torch.device(report["device"])
    peak = ceilings(on)[f"{'bfloat16' if on.type == 'cuda' else 'float32'}_tflop_per_s"]
    tflop = step_flops_per_token(plan, last) * report["tokens"] / 1e12
    return {
        "tokens": report["tokens"],
        "block_seconds": seconds,
        "search_and_rest_seconds": round(report["seconds"] - sum(seconds), 2),
        "tokens_per_s": round(report["tokens"] / taken, 1),
        "percent_of_ceiling": round(100 * tflop / taken / peak, 2),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "params_removed": report["params_before"] - report["params_after"],
        "implied_seconds_for_all_blocks": round(taken * REAL_LAYERS[name], 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compress_blocks", description=__doc__)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500_000, 2_000_000])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in arguments.tokens:
            given = (arguments.shapes, arguments.layers, tokens, arguments.device, Path(folder))
            rows.append(measure(*given))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        used = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = {"shapes": arguments.shapes, "machine": describe(used), "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
