"""Whole compressions of a small Mixtral beside the published recipe's loop: tokens a second and
what is kept.

    python -m benchmarks.compress_loop [--tokens N] [--presets fast default] [--json FILE]

It takes the embedded teacher and the standard library's source, as `make demo` does. The published
loop gets the same model, the same calibration tokens and the same reduction,
and the better of two learning rates; its time is that of the loop alone. Ours is that of the whole
run: reading, statistics, ranks, factors, training, judging and writing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import lillama
from benchmarks.published import published_loop
from lillama.data.sequences import calibration_blocks
from lillama.evaluate.perplexity import measure_text, scored_text
from lillama.integrations.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
RATES = (8.6e-5, 1e-3)
PRESETS = ("fast", "default")
HELD_OUT_BYTES = 250_000


def embedded(folder: Path) -> tuple[Path, Path, Path]:
    """Teacher, calibration and held-out text of the demo."""
    sys.path.insert(0, str(ROOT / "examples"))
    from train_teacher import read_all, stdlib_split  # type: ignore[import-not-found]

    train, held_out = folder / "train.txt", folder / "held_out.txt"
    files = stdlib_split()
    train.write_text("\n\n".join(read_all(files[0])), "utf-8")
    held_out.write_text("\n\n".join(read_all(files[1]))[:HELD_OUT_BYTES], "utf-8")
    return ROOT / "examples" / "teachers" / "mixtral", train, held_out


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    teacher, text, held_out = embedded(folder)
    tokenizer = load_tokenizer(teacher)
    seq_len = arguments.seq_len
    unseen = scored_text("blocks", (held_out,), tokenizer, seq_len=seq_len, batch_size=8)
    base = load_model(teacher, torch.device("cpu"), "float32")
    train, _ = calibration_blocks(
        (text,), tokenizer, tokens=arguments.tokens, seq_len=seq_len,
        held_out_blocks=8, seed=0, packing=True,
    )  # fmt: skip
    rows: dict[str, dict[str, float]] = {}

    def note(name: str, tokens: int, seconds: float, model: PreTrainedModel) -> None:
        retained = measure_text(unseen, model, base)["retained"]
        rows[name] = {"tokens_per_s": round(tokens / seconds, 1), "retained": round(retained, 4)}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)

    reduction = arguments.reduction
    for rate in RATES:
        ids = train.input_ids
        model, seconds = published_loop(teacher, ids, reduction=reduction, learning_rate=rate)
        note(f"published loop, rate {rate:g}", ids.numel(), seconds, model)
    for preset in arguments.presets:
        out = folder / preset
        report = lillama.compress(
            teacher, out, reduction=reduction, text=text, preset=preset, tokens=arguments.tokens,
            seq_len=seq_len,
        )  # fmt: skip
        model = load_model(out, torch.device("cpu"), "float32")
        note(f"preset {preset}", report["tokens"], report["seconds"], model)
    fastest = max(row["tokens_per_s"] for name, row in rows.items() if "loop" in name)
    for row in rows.values():
        row["speed"] = round(row["tokens_per_s"] / fastest, 2)
    threads = torch.get_num_threads()
    return {"reduction": reduction, "tokens": train.num_tokens, "threads": threads, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compress_loop", description=__doc__)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(arguments, Path(folder))
    for name, row in found["rows"].items():
        print(f"{name:28s} {row['tokens_per_s']:8.0f} tokens/s "
              f"{row['speed']:5.2f}x   retained {row['retained']:.4f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
