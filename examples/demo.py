"""Compress both embedded teachers by 20% and show what it cost: `make demo`.

Calibrates on the training files of the standard library and measures on its held-out files (see
train_teacher.py), so the text judged was seen neither by the teachers nor by the compression.
"""

import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from train_teacher import read_all, stdlib_split
from transformers.utils import logging as transformers_logging

import lillama
from lillama.integrations.loading import load_tokenizer
from lillama.serve.engine import LocalEngine
from lillama.serve.engine.requests import Finished, SamplingParams

HERE = Path(__file__).parent
OUT = Path("demo-out")
REDUCTION = 0.2
TOKENS = 100_000
SEQ_LEN = 256
HELD_OUT_BYTES = 120_000
NEW_TOKENS, ROUNDS = 128, 7
PROMPT = "def read_file(path):\n"


def write_text(folder: Path) -> tuple[Path, Path]:
    """Calibration and held-out text, from this interpreter's standard library."""
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    files = stdlib_split()
    train.write_text("\n\n".join(read_all(files[0])), "utf-8")
    # whole files from all over the list, until there is enough
    text = "\n\n".join(read_all(files[1][::2] + files[1][1::2]))
    held_out.write_text(text[:HELD_OUT_BYTES], "utf-8")
    return train, held_out


def _answer_seconds(engine: LocalEngine, prompt: list[int]) -> float:
    """Seconds that one client waits for NEW_TOKENS."""
    done = threading.Event()
    started = time.perf_counter()
    engine.submit(
        prompt,
        SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True),
        lambda event: done.set() if isinstance(event, Finished) else None,
    )
    done.wait()
    return time.perf_counter() - started


def served_tokens_per_second(models: tuple[Path, Path]) -> list[float]:
    """Decode speed of each model for one client of `lillama serve`'s engine; medians of ROUNDS,
    the models taking turns, after one round to warm up."""
    engines = [LocalEngine(model, device="cpu") for model in models]
    prompt = load_tokenizer(models[0])(PROMPT)["input_ids"]
    seconds: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        engine.start()
    for _ in range(ROUNDS + 1):
        for engine, found in zip(engines, seconds, strict=True):
            found.append(_answer_seconds(engine, prompt))
    for engine in engines:
        engine.stop()
    return [NEW_TOKENS / statistics.median(found[1:]) for found in seconds]


def demo(kind: str, train: Path, held_out: Path, console: Console) -> dict:
    teacher, out = HERE / "teachers" / kind, OUT / kind
    columns = (
        TextColumn(f"{kind:<8} {{task.description:<18}}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("start", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        report = lillama.compress(
            teacher,
            out,
            reduction=REDUCTION,
            text=train,
            tokens=TOKENS,
            seq_len=SEQ_LEN,
            gauge="plain",  # two products a matrix: at this size the quickest to serve on a CPU
            overwrite=True,
            progress=show,
        )
        seconds = time.perf_counter() - started
        quality = lillama.eval(out, held_out, against=teacher, seq_len=SEQ_LEN, progress=show)
    return {
        "report": report,
        "quality": quality,
        "seconds": seconds,
        "speed": served_tokens_per_second((teacher, out)),
        "sample": lillama.generate(out, PROMPT, max_new_tokens=48),
    }


def main() -> int:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = write_text(Path(folder))
        results = {kind: demo(kind, train, held_out, console) for kind in ("mixtral", "mamba")}
    table = Table(title=f"lillama compress --reduction {REDUCTION}, on this CPU, one client")
    for column in ("", "mixtral before", "mixtral after", "mamba before", "mamba after"):
        table.add_column(column, justify="left" if not column else "right")
    rows: dict[str, list[str]] = {}
    for result in results.values():
        report, quality = result["report"], result["quality"]
        cells = {
            "parameters": (f"{report['params_before']:,}", f"{report['params_after']:,}"),
            "bytes": (f"{report['bytes_before']:,}", f"{report['bytes_after']:,}"),
            "held-out perplexity": (
                f"{quality['base_perplexity']:.3f}",
                f"{quality['perplexity']:.3f}",
            ),
            "tokens/s served": tuple(f"{speed:,.0f}" for speed in result["speed"]),
            "quality retained": ("", f"{quality['retained']:.1%}"),
            "time taken": ("", f"{result['seconds']:.0f} s"),
        }
        for key, pair in cells.items():
            rows.setdefault(key, []).extend(pair)
    for key, values in rows.items():
        table.add_row(key, *values)
    console.print(table)
    for kind, result in results.items():
        console.rule(f"{kind}, compressed, continues the prompt")
        console.print(PROMPT + result["sample"], markup=False, highlight=False)
    console.print(f"\nThe compressed models are in {OUT}/; nothing here was measured on a GPU.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
