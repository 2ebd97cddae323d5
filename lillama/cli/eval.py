"""`lillama eval`: its options and the call."""

from pathlib import Path
from typing import Annotated

import typer

from lillama.cli.options import (
    BatchSize,
    DeviceOption,
    DtypeOption,
    Json,
    Model,
    Revision,
    at_revision,
    defaults,
)
from lillama.cli.output import print_json, print_rows, progress_bar
from lillama.config import EvalConfig

__all__ = ["evaluate"]

_DEFAULTS = defaults(EvalConfig)

Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="UTF-8 text or jsonl file, or a dataset of the Hub as for compress; repeat for more.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None, typer.Option(help="The base model, to compare with.", show_default=False)
]
MetricOption = Annotated[
    str,
    typer.Option(
        help="blocks: all the text in blocks; rows: WikiText-2 as in GPTQ's tables; words: "
        "WikiText-2 as lm-evaluation-harness scores it."
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens a block; when left out 512, for rows 2048, for words the model's context.",
        show_default=False,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated tasks of lm-evaluation-harness, e.g. arc_easy,piqa.",
        show_default=False,
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option(help="Folder with task YAML files of your own, or one.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(help="Rows of each task at most; all when left out.")]
Generations = Annotated[
    int, typer.Option(help="Places of the text to continue, to see whether the model still writes.")
]
Speed = Annotated[
    bool, typer.Option("--speed", help="Tokens a second of prefill and decode, and peak memory.")
]


def evaluate(
    model: Model,
    text: Texts = None,
    revision: Revision = None,
    against: Against = None,
    metric: MetricOption = _DEFAULTS["metric"],
    seq_len: SeqLen = _DEFAULTS["seq_len"],
    tasks: Tasks = None,
    task_path: TaskPath = _DEFAULTS["task_path"],
    limit: Limit = _DEFAULTS["limit"],
    generations: Generations = _DEFAULTS["generations"],
    speed: Speed = _DEFAULTS["speed"],
    batch_size: BatchSize = _DEFAULTS["batch_size"],
    dtype: DtypeOption = _DEFAULTS["dtype"],
    device: DeviceOption = _DEFAULTS["device"],
    as_json: Json = False,
) -> None:
    """Perplexity on held-out text, tasks, what it writes, how fast; with --against of both."""
    from lillama.evaluate import evaluate as run

    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    with progress_bar() as progress:
        report = run(
            at_revision(model, revision),
            tuple(text or ()),
            against=against,
            progress=progress,
            metric=metric,
            seq_len=seq_len,
            tasks=tuple(name for name in names if name),
            task_path=task_path,
            limit=limit,
            generations=generations,
            speed=speed,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print_json(report)
    else:
        print_rows(str(model), report)
