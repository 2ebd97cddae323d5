"""Clips of speech in, log-mel features out: PCM wav files by the standard library, features by the
checkpoint's own extractor.

The one thing to know: nothing is resampled. A clip of another rate than the model's is refused, as
what it would sound like depends on the resampler. Letters: n clips, S positions of the encoder.
"""

import hashlib
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor

from lillama.errors import InputError

__all__ = ["AudioClips", "load_extractor", "read_wav", "wav_seconds"]

# bytes of a sample: what numpy reads it as, and the largest number
_SAMPLES = {1: ("u1", 2**7), 2: ("<i2", 2**15), 4: ("<i4", 2**31)}


def _open(path: Path, rate: int) -> wave.Wave_read:
    convert = f"convert it: ffmpeg -i FILE -ac 1 -ar {rate} -c:a pcm_s16le NEW.wav"
    try:
        found = wave.open(str(path), "rb")  # noqa: SIM115 the caller closes it
    except OSError as error:
        raise InputError(f"audio file {path}: {error.strerror}; check the path") from error
    except (wave.Error, EOFError) as error:
        why = str(error) or "it ends too early"
        raise InputError(f"audio file {path} is no PCM wav file ({why}); {convert}") from error
    problem = None
    if found.getframerate() != rate:
        problem = f"has {found.getframerate()} samples a second, the model hears {rate}"
    elif found.getsampwidth() not in _SAMPLES:
        problem = f"has samples of {8 * found.getsampwidth()} bits; 8, 16 and 32 are read"
    elif found.getnframes() == 0:
        problem = "holds no sound"
    if problem is not None:
        found.close()
        raise InputError(f"audio file {path} {problem}; {convert}")
    return found


def wav_seconds(path: Path, rate: int) -> float:
    """The length that the header tells; raises InputError as `read_wav`."""
    with _open(path, rate) as file:
        return file.getnframes() / rate


def read_wav(path: Path, rate: int) -> np.ndarray:
    """Samples [length] of a PCM wav file, fp32 in [-1, 1]; several channels become their mean.

    Raises:
        InputError: no such file, no PCM wav file of 8, 16 or 32 bits, another rate than `rate`
            samples a second, no sound, or a file that is cut short.
    """
    with _open(path, rate) as file:
        channels, count = file.getnchannels(), file.getnframes()
        kind, largest = _SAMPLES[file.getsampwidth()]
        raw = file.readframes(count)
    values = np.frombuffer(raw[: len(raw) - len(raw) % np.dtype(kind).itemsize], kind)
    if len(values) != count * channels:
        raise InputError(f"audio file {path} is cut short; make it again")
    samples = values.astype(np.float32) / largest
    if kind == "u1":  # 8 bits are without a sign
        samples -= 1
    return samples.reshape(-1, channels).mean(axis=1)


def load_extractor(path: Path) -> Any:
    """What makes features for the checkpoint in this folder.

    Raises:
        InputError: the folder has none.
    """
    try:
        return AutoFeatureExtractor.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"{path} holds no feature extractor that can be read (preprocessor_config.json): "
            f"{first}"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class AudioClips:
    """What an encoder hears, read when it is asked for; `length` S: positions that the encoder
    makes of every clip, however short."""

    files: tuple[Path, ...]
    extractor: Any
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, S)"""
        return len(self.files), self.length

    @property
    def mask(self) -> Tensor | None:
        """None: silence behind a clip counts, the model was trained to hear it."""
        return None

    @property
    def seconds(self) -> float:
        """Of sound, without the silence."""
        rate = self.extractor.sampling_rate
        return round(sum(wav_seconds(file, rate) for file in self.files), 2)

    @property
    def sha256(self) -> str:
        """Hex digest of the samples; the same on every machine."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for file in self.files:
            digest.update(read_wav(file, self.extractor.sampling_rate).astype("<f4").tobytes())
        return digest.hexdigest()

    def features(self, rows: Sequence[int]) -> Tensor:
        """Log-mel features [b, mel bins, frames] fp32 of the clips with these numbers."""
        rate = self.extractor.sampling_rate
        samples = [read_wav(self.files[row], rate) for row in rows]
        found = self.extractor(samples, sampling_rate=rate, return_tensors="pt")
        return found["input_features"].to(torch.float32)
