"""Calibration of a speech model: what its options may be, and its rows."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import GenerationConfig, PretrainedConfig

from lillama.config import CompressConfig
from lillama.data import TokenBlocks
from lillama.errors import InputError
from lillama.hub_text import HubText
from lillama.loading import check_vocabulary, load_tokenizer
from lillama.speech import speech_blocks

__all__ = ["check_speech_options", "heard", "speech_calibration"]


def check_speech_options(options: CompressConfig) -> None:
    """Raises InputError for what is done with models of text only."""
    if not options.text:
        raise InputError(
            "a speech model cannot write its own calibration data; give --text MANIFEST.jsonl with "
            'lines as {"audio": "clip.wav", "text": "its transcript"}'
        )
    for text in options.text:
        if isinstance(text, HubText):
            raise InputError(
                f"--text {text} is a dataset of the Hub; of a speech model clips are read from "
                "files only: give --text MANIFEST.jsonl"
            )
    if options.finetune:
        raise InputError(
            f"preset {options.preset} trains the whole model on text, of a speech model the blocks "
            "alone can be trained; use preset default"
        )
    if dist.is_torchelastic_launched():
        raise InputError(
            "a speech model is compressed by one process; start the command without torchrun"
        )


def heard(blocks: TokenBlocks) -> dict[str, Any]:
    """What the report says of clips; {} where there are none."""
    clips = blocks.clips
    return {} if clips is None else {"clips": clips.shape[0], "audio_seconds": clips.seconds}


def _generation(path: Path) -> Any:
    """generation_config.json; None where there is none."""
    if not (path / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{path}/generation_config.json cannot be read: {first}") from error


def speech_calibration(
    options: CompressConfig, config: PretrainedConfig
) -> tuple[TokenBlocks, TokenBlocks]:
    """Training and held-out rows: tokens with their clips."""
    blocks = speech_blocks(
        [Path(str(text)) for text in options.text],
        options.model,
        config,
        load_tokenizer(options.model, speech=True),
        _generation(options.model),
        tokens=options.tokens,
        most=options.recipe.tokens,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    for part in blocks:
        check_vocabulary(part.input_ids, config.vocab_size)
    return blocks
