"""Text that a model writes for a run, beside OUT; the same command, run again, finds it there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lillama.compress.session.stop import StopRequest
from lillama.config import CompressConfig, FinetuneConfig, SampleConfig
from lillama.data.sample import sample, sampled_with
from lillama.data.sequences import held_out_blocks
from lillama.errors import InputError
from lillama.models.hub import recorded

__all__ = ["own_text_of", "write_own_text"]

Progress = Callable[[str, int, int], None]


def own_text_of(out: Path, seed: int) -> tuple[Path, int]:
    """The file `finetune` reads, and the seed it is written with: not the run's, since the text
    given may be what the model wrote with that."""
    return out.with_name(out.name + ".own.jsonl"), seed + 1


def write_own_text(
    file: Path,
    model: Path,
    tokens: int,
    seed: int,
    config: CompressConfig | FinetuneConfig,
    stop: StopRequest,
    progress: Progress | None,
) -> None:
    """Text of `model` for `tokens` tokens in sequences of `config.seq_len`, and held-out ones.

    Raises:
        InputError: the file is there and was not written by this command.
    """
    # some more, since blocks are filled from whole texts
    blocks = held_out_blocks(tokens, config.seq_len) + 2
    options = SampleConfig(
        model=model,
        out=file,
        tokens=tokens + blocks * config.seq_len,
        seq_len=config.seq_len,
        seed=seed,
        device=config.device,
    )
    if file.exists():
        if sampled_with(file) != recorded(options):
            raise InputError(f"{file} is not of this command; delete it or choose another OUT")
        return
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}

    def tick(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)
        stop.check()

    sample(given.pop("model"), given.pop("out"), progress=tick, **given)
