"""What `lillama plan` and `lillama.plan` answer."""

from pathlib import Path
from typing import Any

from lillama.checkpoint.remote import find_model
from lillama.compress.plan.disk import peak_disk
from lillama.compress.plan.memory import peak_memory, resident_bytes
from lillama.compress.plan.plan import make_plan
from lillama.config import Gauge, PlanConfig, Preset, Strategy

__all__ = ["plan"]


def plan(
    model: str | Path,
    reduction: float,
    *,
    preset: Preset = "default",
    strategy: Strategy | None = None,
    targets: tuple[str, ...] | None = None,
    gauge: Gauge | None = None,
    **options: Any,
) -> dict:
    """Ranks and savings of a compression, read from headers only. Same as `lillama plan --json`.

    Args:
        model: local checkpoint folder, of which config.json alone is enough, or ORG/NAME[@REVISION]
            of the Hub, of which config.json, tokenizer and the headers of the shards are fetched.
        reduction: share of the whole model's parameters to remove, in (0, 1).
        preset, strategy, targets, gauge: as for `compress`.
        options: budget, and tokens, seq_len, train, activation_memory, which decide the memory it
            will need, as for `compress`.

    Returns:
        `peak_memory_bytes` (host memory by phase and their "peak") and `peak_disk_bytes` (what a
        run keeps on the disk of OUT: `result, gradients, steps, activations`, and all at its
        "peak"), both absent where there are no weights; `params_before, params_after, bytes_before,
        bytes_after, max_reduction, matrices[] {name, shape, rank, break_even_rank, ...}` and more.

    Raises:
        InputError: see `make_plan`.
    """
    config = PlanConfig(
        model=find_model(model, weights=False),
        reduction=reduction,
        preset=preset,
        strategy=strategy,
        targets=targets,
        gauge=gauge,
        **options,
    )
    found = make_plan(config)
    document = found.as_json()
    if found.headers is not None:
        config = config.at_width(found.config.hidden_size)
        memory = peak_memory(found, config, found.headers, resident_bytes())
        rows = document.pop("matrices")
        disk = peak_disk(found, config, found.headers)
        document |= {"peak_memory_bytes": memory, "peak_disk_bytes": disk, "matrices": rows}
    return document
