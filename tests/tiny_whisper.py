"""A tiny random Whisper, its files, and a manifest of clips: sines and noise with words."""

import json
import wave
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.conftest import WORDS

RATE = 16_000
# positions of the encoder for clips of up to 1 s
POSITIONS = 50


def whisper_config(**changes: object) -> WhisperConfig:
    values = {
        "vocab_size": 300,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 80,
        "max_source_positions": POSITIONS,
        "max_target_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return WhisperConfig(**{**values, **changes})


def whisper_model(seed: int = 0, **changes: object) -> WhisperForConditionalGeneration:
    """Random weights, scaled up so that every matrix matters, and biases."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(whisper_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("layers" in name or "embed_tokens" in name):
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            if parameter.ndim == 3:
                parameter.normal_(std=(parameter.shape[1] * 3) ** -0.5)
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_whisper(path: Path, tokenizer: PreTrainedTokenizerBase, **changes: object) -> Path:
    """A checkpoint folder in fp32 with tokenizer and feature extractor."""
    model = whisper_model(**changes)
    model.config.dtype = torch.float32
    model.generation_config.decoder_start_token_id = 1
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(path)
    return path


def write_wav(
    path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2
) -> Path:
    """Samples in [-1, 1] ([length] or [length, channels]) as PCM."""
    kind = {1: "u1", 2: "<i2", 4: "<i4"}[width]
    values = np.round(np.clip(samples, -1, 1) * (2 ** (8 * width - 1) - 1)) + (128 * (width == 1))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.astype(kind).tobytes())
    return path


def write_manifest(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` clips of 0.3 to 1 s, each two sines in noise, with transcripts of 2 to 8 words."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        time = np.arange(int(random.uniform(0.3, 1.0) * RATE)) / RATE
        low, high = random.uniform(100, 600), random.uniform(600, 4000)
        sound = 0.3 * np.sin(2 * np.pi * low * time) + 0.2 * np.sin(2 * np.pi * high * time)
        sound += 0.05 * random.standard_normal(len(time))
        write_wav(folder / f"{number}.wav", sound)
        words = random.choice(WORDS, int(random.integers(2, 9)))
        rows.append({"audio": f"{number}.wav", "text": " ".join(words)})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return manifest
