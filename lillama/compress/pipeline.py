"""Model in, smaller model out: what `lillama compress` and `lillama.compress` call."""

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lillama.checkpoint.card import config_json, model_card, recipe_json
from lillama.checkpoint.folder import differences, recover
from lillama.checkpoint.format import read_config, sentinel
from lillama.checkpoint.remote import fetch_weights, find_model
from lillama.compress.measure.search import measured_curves, search_ranks
from lillama.compress.plan.memory import peak_memory, peak_memory_bytes, resident_bytes
from lillama.compress.plan.plan import make_plan
from lillama.compress.run import Run
from lillama.compress.session.events import Events
from lillama.compress.session.output import (
    check_disk,
    check_disk_again,
    claimed,
    how_to_go_on,
    open_writer,
)
from lillama.compress.session.own_text import own_text_of, write_own_text
from lillama.compress.session.processes import Processes
from lillama.compress.session.session import Progress, Session
from lillama.compress.session.stop import StopRequest
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.train.finetune import finetune_blocks
from lillama.config import CompressConfig, FinetuneConfig
from lillama.data.datasets import find_texts
from lillama.data.sequences import TokenBlocks, calibration_blocks, held_out_blocks
from lillama.errors import InputError, LillamaError
from lillama.integrations.loading import check_vocabulary, choose_device, load_tokenizer
from lillama.integrations.mamba import fast_mamba
from lillama.models.detection import family_for

__all__ = ["Progress", "compress"]

logger = logging.getLogger(__name__)

COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def _calibration(session: Session) -> tuple[TokenBlocks, TokenBlocks]:
    """Training and held-out tokens, of what the model wrote where it did."""
    options, plan, own_text = session.config, session.plan, session.own_text
    tokenizer = load_tokenizer(options.model)
    limit = getattr(plan.config, "max_position_embeddings", None)
    if limit is not None and options.seq_len > limit:
        raise InputError(f"--seq-len must be at most {limit} for this model, got {options.seq_len}")
    blocks = calibration_blocks(
        options.text if own_text is None else (own_text,),
        tokenizer,
        tokens=options.num_tokens,
        seq_len=options.seq_len,
        held_out_blocks=held_out_blocks(options.num_tokens, options.seq_len),
        seed=options.seed,
        packing=options.packing,
    )
    for part in blocks:
        check_vocabulary(part.input_ids, plan.config.vocab_size)
    return blocks


def _at_width(config: CompressConfig, hidden_size: int) -> CompressConfig:
    found = config.at_width(hidden_size)
    if config.tokens not in (None, found.tokens):
        logger.warning(
            "preset %s takes %d of %d calibration tokens: more change little at hidden_size %d",
            config.preset, found.num_tokens, config.num_tokens, hidden_size,
        )  # fmt: skip
    return found


def _sizes(session: Session) -> dict[str, Any]:
    """The report's first part."""
    plan = session.plan
    _, sentinel_shape = sentinel(plan.family, plan.ranks)
    written = sum(header.num_bytes for header in session.writer.headers.values())
    return {
        "params_before": plan.params_before,
        "params_after": plan.params_after,
        "active_params_before": plan.active_params_before,
        "active_params_after": plan.active_params_after,
        "reduction": plan.reduction,
        "target_reduction": session.config.reduction,
        "target_weights_reduction": plan.target_weights_reduction,
        "bytes_before": plan.bytes_before,
        "bytes_after": written - torch.zeros(sentinel_shape).nbytes,
    }


def compress(
    model: str | Path,
    out: str | Path,
    *,
    reduction: float,
    text: str | Path | list[str | Path] | tuple[str | Path, ...] = (),
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compress the checkpoint folder `model` into the new folder `out`. Same as `lillama compress`.

    Args:
        model: local checkpoint folder (safetensors), or ORG/NAME[@REVISION] of the Hub.
        out: folder to create, when the run finishes; until then finished work is kept beside it in
            `<out>.unfinished`, and the same call goes on from there.
        reduction: share of the whole model's parameters to remove, in (0, 1).
        text: calibration file or files (text, or jsonl with "text", "messages" or "conversations"),
            or datasets of the Hub (`lillama.data.datasets`). Without, the model writes its own
            (`lillama.data.sample`), to `<out>.sample.jsonl`; it is removed at the end. Preset best
            takes text given for its last stage and writes its own for the rest.
        progress: called as progress(stage, done, total), in tokens run through a block.
        options: the other fields of `lillama.config.CompressConfig` with its defaults: tokens,
            seq_len, preset, strategy, loss, targets, gauge, packing, train, seed, dtype,
            device, activation_memory, checkpoint_seconds, events, overwrite.

    Returns:
        The report, as in report.json but for `rank_losses` (under torchrun with the number of this
        process):
        `params_before, params_after, reduction, target_reduction, tokens, seconds,
        peak_memory_bytes, blocks[]` and more.

    Raises:
        InputError: arguments or data that cannot be used; nothing was written.
        RunError: the run failed (NaN, full disk, Ctrl-C); the message says what is kept.
    """
    config = CompressConfig(
        model=find_model(model, weights=False),
        out=Path(out),
        reduction=reduction,
        text=find_texts(text),
        **options,
    )
    model_config = read_config(config.model)
    family_for(model_config)  # refused before its weights are downloaded
    config = _at_width(config, model_config.hidden_size)
    inside = config.out.resolve().is_relative_to(config.model.resolve())
    if inside or config.model.resolve().is_relative_to(config.out.resolve()):
        raise InputError(f"OUT must lie outside MODEL, got {config.out}")
    processes = Processes()
    try:
        _check_processes(config, processes.world_size)
        with claimed(config, processes) as folder, fast_mamba(), StopRequest() as stop:
            fetch_weights(config.model)
            plan, events = make_plan(config, needs_weights=True), Events(config.events)
            session = Session(config, plan, processes, stop, events, progress, folder)
            session.own_text = _own_text(session)
            report = _compress_whole(session) if config.finetune else _compress(session)
    finally:
        processes.close()
    if processes.is_first:
        if session.own_text is not None:  # finetune removes what it read
            session.own_text.unlink(missing_ok=True)
        events("finished", **{key: value for key, value in report.items() if key != "blocks"})
    return report if processes.world_size == 1 else {**report, "process": processes.process}


def _check_processes(config: CompressConfig, world_size: int) -> None:
    if world_size == 1:
        return
    if config.finetune:
        raise InputError(
            f"preset {config.preset} trains the whole model in one process, got {world_size}; use "
            "preset default under torchrun, then lillama finetune"
        )
    if not config.text:
        raise InputError(
            "several processes need calibration text; give --text FILE (lillama sample writes one)"
        )


def _own_text(session: Session) -> Path | None:
    """Return what the model wrote to calibrate on, where the text given is not for that. It is
    written once: a run of the same command finds it."""
    config = session.config
    if config.text and not (config.finetune and config.recipe.finetune_own_text):
        return None
    if config.text:  # what `finetune` would write, too, once the text given is known to be usable
        _calibration(session)
        file, seed = own_text_of(config.out, config.seed)
    else:
        file, seed = config.out.with_name(config.out.name + ".sample.jsonl"), config.seed
    if not file.exists():  # before the text is written; what a run left is counted where it goes on
        check_disk(session, choose_device(config.device))
    tokens, stop, progress = config.num_tokens, session.stop, session.progress
    write_own_text(file, config.model, tokens, seed, config, stop, progress)
    return file


def _compress_whole(session: Session) -> dict[str, Any]:
    """The blocks first, to `OUT.blocks`, then the whole model. Where OUT.blocks is there, the same
    command was killed while it trained the whole, and goes on from there."""
    config, own_text, folder = session.config, session.own_text, session.folder
    assert folder is not None
    blocks = config.out.with_name(config.out.name + ".blocks")
    recover(blocks)
    in_blocks = dataclasses.replace(config, out=blocks, overwrite=False)
    report = _compress(dataclasses.replace(session, config=in_blocks, folder=None))
    started = time.monotonic()
    given = (own_text,) if own_text is not None and not config.text else config.text
    end = FinetuneConfig(
        model=blocks,
        out=config.out,
        base=config.model,
        text=given,
        tokens=config.num_tokens,
        seq_len=config.seq_len,
        packing=config.packing,
        own_tokens=config.num_tokens if config.recipe.finetune_own_text else 0,
        epochs=config.recipe.finetune_epochs,
        seed=config.seed,
        device=config.device,
        overwrite=config.overwrite,
    )
    try:
        found = finetune_blocks(end, folder, session.stop, session.progress)
    except LillamaError as error:
        session.events("failed", error=str(error))
        raise type(error)(
            f"{error}; the blocks are finished in {blocks}: the same command goes on from there"
        ) from error
    shutil.rmtree(blocks)
    report["seconds"] = round(report["seconds"] + time.monotonic() - started, 2)
    report["peak_memory_bytes"] = peak_memory_bytes(choose_device(config.device))
    return report | {"finetune": found}


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a finished run of this very command.

    Raises:
        InputError: the folder holds something else.
    """
    try:
        recorded = json.loads((out / "recipe.json").read_text("utf-8"))
        report = json.loads((out / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{out} is in the way and is no finished run; move it away") from None
    report.pop("rank_losses", None)
    if changed := differences(recorded, json.loads(json.dumps(recipe))):
        raise InputError(
            f"{out} is of another command ({'; '.join(changed)}); run that one again, delete the "
            "folder or choose another OUT"
        )
    return report


def _compress(session: Session) -> dict[str, Any]:
    """Everything between the checks and the report, which the first process also writes."""
    started = time.monotonic()
    config, processes = session.config, session.processes
    device = choose_device(processes.device(config.device))
    session.sequences = _calibration(session)
    plan = session.plan
    session.teacher = TeacherBlocks(config.model, plan.config, plan.family, device, torch.float32)
    session.teacher.check_names(matrix.name for matrix in plan.matrices)
    recipe = recipe_json(config, plan, session.teacher.headers, device, session.sequences)
    if config.finetune and config.out.is_dir():
        return _finished(config.out, recipe)
    held = resident_bytes()
    processes.agree("the run", recipe)
    with open_writer(session, recipe) as session.writer:
        try:
            increase = search_ranks(session)
            check_disk_again(session)
            predicted = peak_memory(session.plan, config, session.teacher.headers, held)["peak"]
            run = Run(session)
            rows = run.run()
        except LillamaError as error:
            session.events("failed", error=str(error))
            raise type(error)(f"{error}{how_to_go_on(session.writer)}") from error
        report = {
            **_sizes(session),
            "tokens": session.sequences[0].num_tokens,
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": peak_memory_bytes(device),
            "predicted_host_memory_bytes": predicted,
            "predicted_loss_increase": increase,
            "device": str(device),
            "world_size": processes.world_size,
            "blocks": rows,
            **({} if (head := run.head_report()) is None else {"head": head}),
        }
        if processes.is_first:
            _finish(session, report)
        processes.barrier()
    return report


def _finish(session: Session, report: dict[str, Any]) -> None:
    config, curves = session.config, measured_curves(session.writer)
    copies = [file for name in COPIED_FILES if (file := config.model / name).is_file()]
    session.writer.finish(
        config_json(config, session.plan),
        report=report if curves is None else {**report, "rank_losses": curves},
        model_card=model_card(config, report),
        copies=copies,
    )
