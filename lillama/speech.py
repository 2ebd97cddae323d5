"""Manifests of clips and transcripts in, calibration rows for a speech model out.

A manifest is a jsonl file whose rows have the columns of `datasets`' audio data: `audio` (a wav
file, relative to the manifest) and `text`. A row of what is made of them is one clip and the tokens
that the decoder is fed while it learns to write the transcript: its start tokens, then the text.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama.audio import AudioClips, load_extractor, wav_seconds
from lillama.data import TokenBlocks, padded
from lillama.errors import InputError

__all__ = ["Utterance", "read_manifest", "speech_blocks"]

logger = logging.getLogger(__name__)

# what `datasets` calls the columns: of an Audio feature, in the metadata of its AudioFolder
AUDIO_KEYS = ("audio", "file_name")
TEXT_KEYS = ("text", "transcription", "sentence")
FEWEST_HELD_OUT = 8
# share of what the model hears; below it a warning tells
FEWEST_SOUND = 0.5


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row (where: FILE:LINE)."""

    where: str
    audio: Path
    text: str
    language: str | None = None


def read_manifest(path: Path | str) -> Iterator[Utterance]:
    """Rows of a manifest; those without text are left out.

    Raises:
        InputError: a file that cannot be read, or a row that cannot be used.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"manifest {path}: {why}; check the path") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line, path, f"{path}:{number}")
            if row.text.strip():
                yield row


def _row(line: str, manifest: Path, where: str) -> Utterance:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row = None
        why = f"is not JSON ({error})"
    else:
        why = f"is a JSON {type(row).__name__}"
    if not isinstance(row, dict):
        wanted = '{"audio": "clip.wav", "text": "its transcript"}'
        raise InputError(f"{where} {why}; a speech model wants lines as {wanted}")
    audio, text = (_column(row, keys, where) for keys in (AUDIO_KEYS, TEXT_KEYS))
    language = row.get("language")
    if language is not None and not isinstance(language, str):
        raise InputError(f"{where}: 'language' must be a string, got {language!r}")
    return Utterance(where, manifest.parent / audio, text, language)


def _column(row: dict[str, Any], keys: Sequence[str], where: str) -> str:
    key = next((key for key in keys if key in row), None)
    if key is None:
        found = ", ".join(map(repr, row)) or "none"
        raise InputError(
            f"{where} has no key {keys[0]!r}, its keys: {found}; a speech model is calibrated on "
            "rows with 'audio', the path of a wav file, and 'text', its transcript"
        )
    value = row[key]
    if key == "audio" and isinstance(value, dict):  # as `datasets` writes an Audio feature
        value = value.get("path")
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    return value


def _start_tokens(tokenizer: Any, config: Any, generation: Any) -> Callable[[Utterance], list[int]]:
    """The tokens before the transcript of a row, as the model was trained: Whisper's say start,
    language, task and that there are no timestamps; any other tokenizer's, the start alone."""
    several, own = bool(getattr(generation, "is_multilingual", False)), None
    told = hasattr(tokenizer, "set_prefix_tokens")
    if told:
        own = tokenizer.language
    elif several:
        raise InputError(
            f"generation_config.json says is_multilingual, but {type(tokenizer).__name__} knows no "
            "languages; copy the files of the model's own tokenizer"
        )
    found: dict[str | None, list[int]] = {}

    def of(row: Utterance) -> list[int]:
        language = row.language or own
        if several and language is None:
            raise InputError(
                f"{row.where} has no key 'language', and the model knows several; add it, as in "
                '"language": "en"'
            )
        if row.language is not None and not several:
            raise InputError(
                f"{row.where}: 'language' is for models that know several, and this one's "
                "generation_config.json does not say is_multilingual; leave it out"
            )
        if language not in found:
            found[language] = _start_of(tokenizer, language, several, row.where) if told else start
        return found[language]

    start = [config.decoder_start_token_id]
    return of


def _start_of(tokenizer: Any, language: str | None, several: bool, where: str) -> list[int]:
    try:
        if several:
            tokenizer.set_prefix_tokens(language, task="transcribe", predict_timestamps=False)
        return list(tokenizer.prefix_tokens)
    except (ValueError, KeyError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error


def _extractor(path: Path, config: Any) -> Any:
    found = load_extractor(path)
    frames, wanted = found.nb_max_frames, 2 * config.max_source_positions
    if (frames, found.feature_size) != (wanted, config.num_mel_bins):
        raise InputError(
            f"the feature extractor of {path} makes {frames} frames of {found.feature_size} "
            f"numbers, the model wants {wanted} of {config.num_mel_bins}; they do not belong "
            "together"
        )
    return found


def _check_lengths(rows: Sequence[Utterance], extractor: Any) -> None:
    rate = extractor.sampling_rate
    longest, total = extractor.n_samples / rate, 0.0
    for row in rows:
        seconds = wav_seconds(row.audio, rate)
        total += seconds
        if seconds > longest:
            raise InputError(
                f"{row.where}: {row.audio} lasts {seconds:.1f} s, the model hears {longest:g} s; "
                "cut it, and its transcript"
            )
    share = total / (longest * len(rows))
    if share < FEWEST_SOUND:
        logger.warning(
            "clips fill %.0f%% of the %g s that the model hears, the rest is silence that counts "
            "as much; join neighbours, and their transcripts, to nearly %g s",
            100 * share, longest, longest,
        )  # fmt: skip


def _chosen(rows: list[Utterance], tokens: int | None, most: int, length: int) -> tuple[int, int]:
    """How many rows are trained on and held out: so many positions of the encoder as tokens are
    asked for, all that are there where none are."""
    wanted = -(-(most if tokens is None else tokens) // length)
    held_out = min(32, max(FEWEST_HELD_OUT, wanted // 40))
    if tokens is None and len(rows) < wanted + held_out:
        held_out = min(32, max(FEWEST_HELD_OUT, len(rows) // 40))
        wanted = max(1, len(rows) - held_out)
        logger.info("all %d clips are used, %d of them held out", len(rows), held_out)
    if len(rows) < wanted + held_out:
        raise InputError(
            f"the manifests have {len(rows)} clips, needed are {wanted} to train and {held_out} "
            f"held out ({length} --tokens a clip); lower --tokens or add clips"
        )
    return wanted, held_out


def speech_blocks(
    manifests: Sequence[Path],
    model: Path,
    config: Any,
    tokenizer: Any,
    generation: Any,
    *,
    tokens: int | None,
    most: int,
    seq_len: int,
    seed: int = 0,
) -> tuple[TokenBlocks, TokenBlocks]:
    """Draw (training, held-out) rows, seeded: what the decoder is fed, with its clips.

    Args:
        model: checkpoint folder, for its feature extractor. generation: its generation config.
        tokens: positions of the encoder to train on (1500 for Whisper's 30 s, however short a clip
            is); None: all clips but those held out, at most `most` positions of them.
        seq_len: tokens of a transcript with its start tokens; what is longer is cut, shorter
            padded to the longest.

    Raises:
        InputError: an unusable manifest, clip or extractor, a language that the model does not
            know, or too few clips.
    """
    extractor = _extractor(model, config)
    if len({Path(path).resolve() for path in manifests}) < len(manifests):
        names = ", ".join(map(str, manifests))
        raise InputError(f"a manifest is given twice: {names}; give it once")
    rows = [row for path in manifests for row in read_manifest(path)]
    random.Random(seed).shuffle(rows)
    length = config.max_source_positions
    train, held_out = _chosen(rows, tokens, most, length)
    rows = rows[: train + held_out]
    _check_lengths(rows, extractor)
    start = _start_tokens(tokenizer, config, generation)
    texts = tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
    longest = min(seq_len, config.max_target_positions)
    ids = [(start(row) + text)[:longest] for row, text in zip(rows, texts, strict=True)]
    blocks = padded(ids, max(map(len, ids)), config.pad_token_id or 0)
    clips = AudioClips(tuple(row.audio for row in rows), extractor, length)
    return tuple(  # pyright: ignore[reportReturnType]
        _part(blocks, clips, slice(*ends)) for ends in ((0, train), (train, train + held_out))
    )


def _part(blocks: TokenBlocks, clips: AudioClips, rows: slice) -> TokenBlocks:
    mask = None if blocks.mask is None else blocks.mask[rows]
    return TokenBlocks(
        blocks.input_ids[rows], mask, dataclasses.replace(clips, files=clips.files[rows])
    )
