"""Whole compressions of a small Mixtral beside the published recipe's loop: tokens a second and
what is kept.

    python -m benchmarks.compress_loop [--teacher DIR --text FILE --held-out FILE] [--json FILE]

Without arguments it takes the embedded teacher and the standard library's source, as `make demo`
does. The published loop gets the same model, the same calibration tokens and the same reduction,
and the better of two learning rates; its time is that of the loop alone. Ours is that of the whole
run: reading, statistics, ranks, factors, training, judging and writing. Rounds are interleaved.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import lillama
from benchmarks.published import published_loop
from lillama.data.sequences import calibration_blocks, evaluation_blocks
from lillama.integrations.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
RATES = (8.6e-5, 1e-3)
PRESETS = ("fast", "default")
HELD_OUT_BYTES = 250_000


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    total, count = 0.0, 0
    for ids in blocks.split(8):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


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
    given = arguments.teacher, arguments.text, arguments.held_out
    teacher, text, held_out = given if all(given) else embedded(folder)
    tokenizer = load_tokenizer(teacher)
    blocks = evaluation_blocks((held_out,), tokenizer, seq_len=arguments.seq_len).input_ids
    base = perplexity(load_model(teacher, torch.device("cpu"), "float32"), blocks)
    train, _ = calibration_blocks(
        (text,), tokenizer, tokens=arguments.tokens, seq_len=arguments.seq_len,
        held_out_blocks=8, seed=0, packing=True,
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}

    def note(name: str, tokens: int, seconds: float, model: PreTrainedModel) -> None:
        row = rows.setdefault(name, {"tokens_per_s": []})
        row["tokens_per_s"].append(round(tokens / seconds, 1))
        row["retained"] = round(base / perplexity(model, blocks), 4)
        print(f"{name}: {row}", file=sys.stderr, flush=True)

    for _ in range(arguments.rounds):
        for rate in RATES:
            run = published_loop(
                teacher, train.input_ids, reduction=arguments.reduction, learning_rate=rate
            )
            note(f"published loop, rate {rate:g}", run.tokens, run.seconds, run.model)
        for preset in arguments.presets:
            out = folder / preset
            report = lillama.compress(
                teacher, out, reduction=arguments.reduction, text=text, preset=preset,
                tokens=arguments.tokens, seq_len=arguments.seq_len, overwrite=True,
            )  # fmt: skip
            model = load_model(out, torch.device("cpu"), "float32")
            note(f"preset {preset}", report["tokens"], report["seconds"], model)
    fastest = max(statistics.median(rows[name]["tokens_per_s"]) for name in rows if "loop" in name)
    for row in rows.values():
        row["speed"] = round(statistics.median(row["tokens_per_s"]) / fastest, 2)
    return {
        "teacher": teacher.name,
        "reduction": arguments.reduction,
        "tokens": train.num_tokens,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compress_loop", description=__doc__)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if any(given := (arguments.teacher, arguments.text, arguments.held_out)) and not all(given):
        parser.error("--teacher, --text and --held-out go together")
    with tempfile.TemporaryDirectory() as folder:
        found = compare(arguments, Path(folder))
    for name, row in found["rows"].items():
        print(f"{name:28s} {statistics.median(row['tokens_per_s']):8.0f} tokens/s "
              f"{row['speed']:5.2f}x   retained {row['retained']:.4f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
