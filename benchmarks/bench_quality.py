"""What each recipe keeps: a table of method x reduction x teacher x seed, on text that neither the
teacher nor the compression has seen.

    python -m benchmarks.bench_quality --teacher DIR --text FILE --held-out FILE... --out FILE.jsonl

One line of JSON is added to --out for every finished cell; cells that are there are not run again,
so the command can be stopped and repeated. With --models the models are kept, and rows that only
round a model's numbers take the one that is there. At the end (with --table at once) the table is
printed. All cells of a file must have been made with the same tokens and texts: a line that was not
is an error.

`excess` is what a model's mean loss is over its teacher's, in nats a token: 0 keeps everything;
bits per byte is that mean loss by the bytes that a token of the text has.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import lillama
from benchmarks.quality_table import COLUMNS, read_cells, rows, table
from benchmarks.quantized import round_checkpoint
from lillama.config import PRESETS, Recipe
from lillama.data.sequences import evaluation_blocks
from lillama.evaluate.evaluate import stored_size
from lillama.evaluate.perplexity import ScoredText, measure_text
from lillama.integrations.loading import load_model, load_tokenizer
from lillama.integrations.mamba import fast_mamba

DEFAULT, FAST, PAPER = PRESETS["default"], PRESETS["fast"], PRESETS["paper"]
PAPER_BEST = dataclasses.replace(PAPER, learning_rate=1e-3)
# None: the teacher as it is
METHODS: dict[str, Recipe | None] = {
    "dense": None,
    "dense, int8": None,
    "dense, int4": None,
    "svd": dataclasses.replace(PAPER, strategy="uniform", train=False),
    "whitened svd": dataclasses.replace(PRESETS["whitened"], train=False),
    "paper": PAPER,
    "paper, rate 1e-3": PAPER_BEST,
    "paper, rate 1e-3, own text": PAPER_BEST,
    "whitened": PRESETS["whitened"],
    "fast, plain gauge, blocks only": dataclasses.replace(FAST, gauge="plain", vocabulary=False),
    "fast, plain gauge": dataclasses.replace(FAST, gauge="plain"),
    "fast, own text": FAST,
    "fast": FAST,
    "default, uniform ranks": dataclasses.replace(DEFAULT, strategy="uniform"),
    "default, plain gauge": dataclasses.replace(DEFAULT, gauge="plain"),
    "default, blocks only": dataclasses.replace(DEFAULT, vocabulary=False),
    "default, head untrained": dataclasses.replace(DEFAULT, train_head=False),
    "default, l1_cosine": dataclasses.replace(DEFAULT, form="l1_cosine"),
    "default, own text": DEFAULT,
    "default": DEFAULT,
    "default, int8": DEFAULT,
    "default, int4": DEFAULT,
    "best, own text": PRESETS["best"],
    "best": PRESETS["best"],
}
# those that get no --text: the teacher writes it
OWN_TEXT = {name for name in METHODS if name.endswith("own text")}
BITS = {"dense, int8": 8, "dense, int4": 4, "default, int8": 8, "default, int4": 4}
# evenly spaced over each held-out text
BLOCKS = 200


def held_out(path: Path, file: Path, seq_len: int) -> ScoredText:
    """BLOCKS rows of the text, and how many bytes its tokens have."""
    text = evaluation_blocks((file,), load_tokenizer(path), seq_len=seq_len)
    rows = torch.linspace(0, len(text.input_ids) - 1, min(BLOCKS, len(text.input_ids))).long()
    ids = text.input_ids[rows]
    batches = [(part, part[:, 1:]) for part in ids.split(8)]
    return ScoredText(batches, ids.flatten(), text.num_tokens, text.num_bytes)


def measure(model: PreTrainedModel, base: PreTrainedModel, text: ScoredText) -> dict[str, float]:
    """Mean loss over that of `base` and KL(base || model), nats a token, and bits per byte."""
    with fast_mamba():
        found = measure_text(text, model, base)
    excess = -math.log(found["retained"]) + 0.0  # not -0.0
    values = {"excess": excess, "kl": found["kl"], "bits_per_byte": found["bits_per_byte"]}
    return {key: round(value, 5) for key, value in values.items()}


def compress(
    arguments: argparse.Namespace, cell: dict[str, Any], folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a cell and what `found` in run_cell takes from its report."""
    recipe, out = METHODS[cell["method"]], folder / "out"
    if recipe is None:
        params, num_bytes = stored_size(arguments.teacher)
        size = {"params_after": params, "bytes_after": num_bytes, "reduction": 0.0}
        return arguments.teacher, {**size, "seconds": 0.0, "predicted_loss_increase": None}
    if arguments.models is not None:
        base = cell["method"].removesuffix(", int8").removesuffix(", int4").replace(",", "")
        # a model made of other text or more tokens has another name
        made_of = hashlib.sha256(json.dumps(conditions(arguments)).encode()).hexdigest()[:8]
        name = f"{cell['teacher']}-{base}-{cell['reduction']}-{cell['seed']}-{made_of}"
        out = arguments.models / name.replace(" ", "-")
        if (made := out / "report.json").is_file():
            return out, json.loads(made.read_text("utf-8"))
        arguments.models.mkdir(parents=True, exist_ok=True)
    text = () if cell["method"] in OWN_TEXT else arguments.text
    PRESETS["cell"] = recipe
    started = time.monotonic()
    try:
        report = lillama.compress(
            arguments.teacher, out, reduction=cell["reduction"], text=text, seed=cell["seed"],
            preset="cell", tokens=arguments.tokens, seq_len=arguments.seq_len,  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        del PRESETS["cell"]
    report["seconds"] = round(time.monotonic() - started, 2)
    return out, report


def run_cell(arguments: argparse.Namespace, cell: dict[str, Any]) -> dict[str, Any]:
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        out, report = compress(arguments, cell, Path(folder))
        if cell["method"] in BITS:
            source, out = out, Path(folder) / "rounded"
            report["bytes_after"] = round_checkpoint(source, out, BITS[cell["method"]])
        base, model = load_model(arguments.teacher, cpu), load_model(out, cpu)
        texts = {
            file.name: measure(model, base, held_out(arguments.teacher, file, arguments.seq_len))
            for file in arguments.held_out
        }
    kept = ("params_after", "bytes_after", "reduction", "seconds", "predicted_loss_increase")
    found = {key: report[key] for key in kept}
    found["measured_reduction"] = found.pop("reduction")
    return {**cell, **found, "texts": texts}


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a file share."""
    names = [arguments.text, *arguments.held_out]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in names]
    return {"tokens": arguments.tokens, "seq_len": arguments.seq_len, "texts_sha256": digests,
            "blocks": BLOCKS}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.bench_quality", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", type=Path, help="keep the compressed models here")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    shared = conditions(arguments)
    cells = read_cells(arguments.out)
    for cell in cells:
        if cell["conditions"] != shared:
            parser.error(f"{arguments.out} holds cells of other tokens or texts; use another --out")
    done = {(c["teacher"], c["method"], c["reduction"], c["seed"]) for c in cells}
    wanted = [
        # a dense model is the same at every reduction
        (arguments.teacher.name, method, 0.0 if METHODS[method] is None else reduction, seed)
        for seed in arguments.seeds
        for reduction in arguments.reductions
        for method in arguments.methods
    ]
    for key in [] if arguments.table else dict.fromkeys(wanted):
        if key in done:
            continue
        cell = dict(zip(("teacher", "method", "reduction", "seed"), key, strict=True))
        try:
            found = {**run_cell(arguments, cell), "conditions": shared}
        except lillama.InputError as error:  # a reduction that a strategy cannot reach
            print(f"{cell}: {error}", file=sys.stderr, flush=True)
            continue
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        cells.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
    print(table(COLUMNS, [list(row.values()) for row in rows(cells, list(METHODS))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
