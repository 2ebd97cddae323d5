"""Manifests into rows: the decoder's tokens with their padding, and the clips."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from lillama.errors import InputError
from lillama.speech import read_manifest, speech_blocks
from tests.tiny_whisper import POSITIONS, whisper_config, write_manifest, write_wav


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature extractor, and 14 clips."""
    path = tmp_path_factory.mktemp("speech")
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(path)
    write_manifest(path, 14)
    return path


@pytest.fixture
def whisper_tokenizer(tokenizer) -> WhisperTokenizer:
    """Whisper's own, of the tests' 300 pieces and its special tokens."""
    own = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in own["merges"]]
    found = WhisperTokenizer(vocab=own["vocab"], merges=merges)
    tasks = ["<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    languages = [f"<|{code}|>" for code in LANGUAGES]
    start = ["<|startoftranscript|>"]
    found.add_special_tokens({"additional_special_tokens": [*start, *languages, *tasks]})
    return found


def blocks_of(folder: Path, tokenizer: Any, manifest: Path | None = None, **options: Any):
    values = {"generation": None, "tokens": None, "most": 10**6, "seq_len": 512, **options}
    generation = values.pop("generation")
    manifests = [manifest or folder / "manifest.jsonl"]
    config = values.pop("config", whisper_config())
    return speech_blocks(manifests, folder, config, tokenizer, generation, **values)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_rows_are_start_tokens_and_transcript_padded(folder, tokenizer):
    found: dict[str, list[int]] = {}
    for part in blocks_of(folder, tokenizer):
        assert part.clips is not None and part.mask is not None
        assert part.clips.shape == (len(part.input_ids), POSITIONS)
        for file, ids, mask in zip(part.clips.files, part.input_ids, part.mask, strict=True):
            assert bool((ids[~mask] == 0).all()) and not bool((mask[1:] & ~mask[:-1]).any())
            found[file.name] = ids[mask].tolist()
    want = {row["audio"]: [1, *tokenizer(row["text"])["input_ids"]] for row in rows_of(folder)}
    assert found == want  # 1: decoder_start_token_id


def test_all_clips_are_used_unless_tokens_are_told(folder, tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="lillama"):
        train, held_out = blocks_of(folder, tokenizer)
    assert (train.shape[0], held_out.shape[0]) == (6, 8)
    assert "all 14 clips are used, 8 of them held out" in caplog.text
    train, held_out = blocks_of(folder, tokenizer, tokens=3 * POSITIONS - 1)
    assert (train.shape[0], held_out.shape[0]) == (3, 8)
    train, _ = blocks_of(folder, tokenizer, most=2 * POSITIONS)
    assert train.shape[0] == 2
    with pytest.raises(InputError, match=r"have 14 clips, needed are 7 to train and 8 held out"):
        blocks_of(folder, tokenizer, tokens=7 * POSITIONS)


def test_the_seed_draws_and_the_digest_sees_tokens_and_sound(folder, tokenizer, tmp_path):
    def digest(part: Any) -> str:
        return part.sha256

    first = [digest(part) for part in blocks_of(folder, tokenizer)]
    assert first == [digest(part) for part in blocks_of(folder, tokenizer)]
    assert first != [digest(part) for part in blocks_of(folder, tokenizer, seed=1)]
    other = write_manifest(tmp_path, 14)
    assert first == [digest(part) for part in blocks_of(folder, tokenizer, other)]
    for row in rows_of(folder):
        write_wav(tmp_path / row["audio"], np.ones(100) / 2)
    assert first != [digest(part) for part in blocks_of(folder, tokenizer, other)]


def test_long_transcripts_are_cut(folder, tokenizer):
    train, held_out = blocks_of(folder, tokenizer, seq_len=4)
    assert train.shape[1] == held_out.shape[1] == 4
    train, _ = blocks_of(folder, tokenizer, config=whisper_config(max_target_positions=5))
    assert train.shape[1] == 5


def manifest(tmp_path: Path, *rows: object) -> Path:
    write_wav(tmp_path / "a.wav", np.ones(1000) / 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_columns_of_datasets_are_read(tmp_path):
    path = manifest(
        tmp_path,
        {"audio": "a.wav", "text": "one"},
        {"audio": {"path": "a.wav", "bytes": None}, "sentence": "two"},
        {"file_name": "a.wav", "transcription": "three", "language": "en"},
        {"audio": "a.wav", "text": " "},
        "",
    )
    found = list(read_manifest(path))
    assert [row.text for row in found] == ["one", "two", "three"]
    assert {row.audio for row in found} == {tmp_path / "a.wav"}
    assert found[2].language == "en" and found[2].where == f"{path}:3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no json", "rows.jsonl:1 is not JSON .* a speech model wants lines as"),
        ([1], "rows.jsonl:1 is a JSON list; a speech model wants lines as"),
        ({"text": "a"}, "rows.jsonl:1 has no key 'audio', its keys: 'text'; a speech model"),
        ({"audio": "a.wav"}, "has no key 'text', its keys: 'audio'"),
        ({"audio": 3, "text": "a"}, "'audio' must be a string, got int"),
        ({"audio": "a.wav", "text": "a", "language": 3}, "'language' must be a string, got 3"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        list(read_manifest(manifest(tmp_path, row)))


def test_a_clip_that_is_too_long_is_named(folder, tokenizer, tmp_path):
    rows = [{"audio": "a.wav", "text": "x"}] * 9
    path = manifest(tmp_path, *rows)
    write_wav(tmp_path / "a.wav", np.ones(16_001) / 2)
    with pytest.raises(InputError, match=r"rows.jsonl:\d: .*a.wav lasts 1.0 s, the model hears 1"):
        blocks_of(folder, tokenizer, path)


def test_clips_that_are_mostly_silence_are_warned_of(folder, tokenizer, tmp_path, caplog):
    blocks_of(folder, tokenizer)
    assert "silence" not in caplog.text
    blocks_of(folder, tokenizer, manifest(tmp_path, *[{"audio": "a.wav", "text": "x"}] * 9))
    assert "clips fill 6% of the 1 s that the model hears, the rest is silence" in caplog.text


def test_an_extractor_of_another_model_is_refused(folder, tokenizer):
    config = whisper_config(num_mel_bins=128)
    with pytest.raises(InputError, match="makes 100 frames of 80 numbers, the model wants 100 of"):
        blocks_of(folder, tokenizer, config=config)


def test_whispers_start_tokens_say_language_and_task(whisper_tokenizer, folder, tmp_path):
    rows = [{"audio": "a.wav", "text": "the cat", "language": "de"}] * 9
    path = manifest(tmp_path, *rows)
    several = GenerationConfig(is_multilingual=True)
    train, _ = blocks_of(folder, whisper_tokenizer, path, generation=several)
    tokens = whisper_tokenizer.convert_ids_to_tokens(train.input_ids[0].tolist())
    head = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokens[:4] == head and whisper_tokenizer.decode(train.input_ids[0, 4:]) == "the cat"

    def refused(message: str, generation: Any, **row: Any) -> None:
        path = manifest(tmp_path, *[{"audio": "a.wav", "text": "x", **row}] * 9)
        with pytest.raises(InputError, match=message):
            blocks_of(folder, whisper_tokenizer, path, generation=generation)

    refused("Unsupported language: xx", several, language="xx")
    refused("'language' is for models that know several", None, language="en")


def test_a_model_of_one_language_has_a_shorter_start(whisper_tokenizer, folder, tmp_path):
    fresh = whisper_tokenizer
    path = manifest(tmp_path, *[{"audio": "a.wav", "text": "the cat"}] * 9)
    train, _ = blocks_of(folder, fresh, path)
    tokens = fresh.convert_ids_to_tokens(train.input_ids[0].tolist())
    assert tokens[:2] == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert fresh.decode(train.input_ids[0, 2:]) == "the cat"
    with pytest.raises(InputError, match="has no key 'language', and the model knows several"):
        several = GenerationConfig(is_multilingual=True)
        blocks_of(folder, fresh, path, generation=several)


def test_another_tokenizer_knows_no_languages(tokenizer, folder, tmp_path):
    path = manifest(tmp_path, *[{"audio": "a.wav", "text": "x", "language": "en"}] * 9)
    with pytest.raises(InputError, match="'language' is for models that know several"):
        blocks_of(folder, tokenizer, path)
    with pytest.raises(InputError, match="says is_multilingual, but .* knows no languages"):
        blocks_of(folder, tokenizer, path, generation=GenerationConfig(is_multilingual=True))


def test_a_manifest_twice_is_refused(folder, tokenizer):
    path = folder / "manifest.jsonl"
    config, options = whisper_config(), {"tokens": None, "most": 10**6, "seq_len": 9}
    with pytest.raises(InputError, match="a manifest is given twice"):
        speech_blocks([path, path], folder, config, tokenizer, None, **options)
