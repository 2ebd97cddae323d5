"""Tasks of lm-evaluation-harness (the extra lillama[eval]) on a model and its base.

The harness finds the task, makes the prompts and judges; here are only the two calls and the
comparison. Its own tasks come from the Hugging Face hub at their first use, which is the one thing
in lillama that downloads; tasks of one's own (a YAML file that names a local jsonl) need no
network.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lillama.errors import InputError, RunError

__all__ = ["check_harness", "run_tasks"]

# what the extra installs, as it is imported
EXTRA = ("lm_eval", "accelerate")


def check_harness() -> None:
    """Raises InputError where the extra is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--tasks needs lm-evaluation-harness, not installed: {', '.join(missing)}; "
            "pip install 'lillama[eval]'"
        )


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """The harness seeds every generator and draws bars: both end with the call, and without a
    terminal there are no bars."""
    state, numpy_state = random.getstate(), np.random.get_state()
    sink = None if sys.stderr.isatty() else io.StringIO()
    # the harness also tells of its own seeds and that the model came ready-made
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stderr(sink) if sink is not None else contextlib.nullcontext(),
            # a result on stdout is one JSON document
            contextlib.redirect_stdout(sys.stderr if sink is None else sink),
        ):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        logger.setLevel(level)


def _manager(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names to run."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.exists():
        raise InputError(f"--task-path {include_path} does not exist; give a folder or a .yaml")
    folder = include_path
    if include_path is not None and include_path.is_file():
        folder = include_path.parent
    try:
        manager = TaskManager(include_path=None if folder is None else str(folder))
    except Exception as error:  # a YAML file may hold anything
        raise InputError(f"--task-path {include_path}: {_line(error)}") from error
    names = manager.match_tasks(list(tasks))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, "
            "--task-path FOLDER adds your own"
        )
    return manager, names


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _run(
    model: PreTrainedModel, tokenizer: Any, tasks: list[str], manager: Any, batch: int, limit: Any
) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    # its decorators hide both signatures from a type checker
    wrapper: Any = huggingface.HFLM
    evaluate: Any = evaluator.simple_evaluate
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch,
        limit=limit,
        log_samples=False,
    )
    if found is None:
        raise RunError("lm-evaluation-harness gave no results: only rank 0 of several has them")
    return found


def _number(value: Any) -> float | None:
    """None for what the harness has no number for, such as an error of a single figure."""
    return float(value) if isinstance(value, int | float) else None


def _metrics(results: dict[str, Any]) -> dict[str, Any]:
    """{"acc,none": 0.5, "acc_stderr,none": "N/A"} -> {"acc": 0.5, "acc_stderr": None}; other
    filters than `none` stay in the name."""
    return {
        key.removesuffix(",none"): _number(value) for key, value in results.items() if "," in key
    }


def _compared(name: str, ours: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The base's figures, and what share of them the model recovers where higher is better."""
    mine, theirs = _metrics(ours["results"][name]), _metrics(base["results"][name])
    better = ours.get("higher_is_better", {}).get(name, {})
    report = {f"base_{key}": value for key, value in theirs.items()}
    for key, value in mine.items():
        if "_stderr" in key or not better.get(key.partition(",")[0]):
            continue
        other = theirs.get(key)
        if value is not None and other:
            report[f"{key}_recovery_percent"] = 100 * value / other
    return report


def run_tasks(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """Run tasks on one or both models.

    Args:
        tasks: names or patterns (`mmlu_*`), each as its YAML says (nearly all are zero-shot).
        include_path: a folder with YAML files of further tasks, or one of these files.
        limit: rows of each task at most; None: all.

    Returns:
        `lm_eval`, the harness's version, and `tasks`: {task: {metric, metric_stderr, ..., version,
        rows; with a base base_metric, base_metric_stderr, metric_recovery_percent}}.

    Raises:
        InputError: no such task, or its data is not there.
    """
    manager, names = _manager(tasks, include_path)
    with _as_before():
        try:
            ours = _run(model, tokenizer, names, manager, batch_size, limit)
            theirs = (
                None if base is None else _run(base, tokenizer, names, manager, batch_size, limit)
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"lm-evaluation-harness cannot run {', '.join(names)}: {_line(error)}"
            ) from error
    report: dict[str, Any] = {}
    for name, results in ours["results"].items():
        report[name] = {
            **_metrics(results),
            "version": ours.get("versions", {}).get(name),
            "rows": ours.get("n-samples", {}).get(name, {}).get("effective"),
            **({} if theirs is None else _compared(name, ours, theirs)),
        }
    return {"lm_eval": importlib.metadata.version("lm-eval"), "tasks": report}
