"""Wav files into samples, and what is refused."""

import wave

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from lillama.audio import AudioClips, load_extractor, read_wav, wav_seconds
from lillama.errors import InputError
from tests.tiny_whisper import POSITIONS, RATE, write_wav

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_read_wav_gives_back_what_was_written(width, tmp_path):
    found = read_wav(write_wav(tmp_path / "a.wav", TONE, width=width), RATE)
    assert found.dtype == np.float32 and found.shape == TONE.shape
    assert np.abs(found - TONE).max() < 2 / 2 ** (8 * width - 1) + 1e-6
    assert wav_seconds(tmp_path / "a.wav", RATE) == 0.5


def test_read_wav_takes_the_mean_of_two_channels(tmp_path):
    both = np.stack([TONE, -TONE / 2], axis=1)
    found = read_wav(write_wav(tmp_path / "a.wav", both, channels=2), RATE)
    np.testing.assert_allclose(found, TONE / 4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_wav(p, TONE, rate=44_100), "has 44100 samples a second, the model hears"),
        (lambda p: write_wav(p, TONE[:0]), "holds no sound; convert it: ffmpeg"),
        (
            lambda p: p.write_bytes(b"ID3 no wav at all"),
            r"no PCM wav file \(file does not start",
        ),
        (lambda p: p.write_bytes(b""), r"is no PCM wav file \(it ends too early\)"),
        (lambda p: None, "No such file or directory; check the path"),
    ],
)
def test_read_wav_refuses_in_one_line(make, message, tmp_path):
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        read_wav(path, RATE)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_read_wav_refuses_24_bits_and_a_file_that_is_cut(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 3, RATE, 0, "NONE", ""))
        file.writeframes(b"\0" * 300)
    with pytest.raises(InputError, match="samples of 24 bits; 8, 16 and 32 are read"):
        read_wav(path, RATE)
    whole = write_wav(path, TONE).read_bytes()
    path.write_bytes(whole[:-101])
    with pytest.raises(InputError, match="is cut short"):
        read_wav(path, RATE)


def test_features_are_those_of_the_extractor(tmp_path):
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
    extractor = load_extractor(tmp_path)
    files = [write_wav(tmp_path / f"{i}.wav", TONE * scale) for i, scale in enumerate((1, 0.3))]
    clips = AudioClips(tuple(files), extractor, POSITIONS)
    assert clips.shape == (2, POSITIONS) and clips.mask is None and clips.seconds == 1.0
    found = clips.features([1])
    want = WhisperFeatureExtractor(chunk_length=1)(
        read_wav(files[1], RATE), sampling_rate=RATE, return_tensors="pt"
    )["input_features"]
    assert found.shape == (1, 80, 2 * POSITIONS) and torch.equal(found, want)


def test_the_digest_is_of_the_samples(tmp_path):
    extractor = WhisperFeatureExtractor(chunk_length=1)

    def digest(*sounds: np.ndarray) -> str:
        files = [write_wav(tmp_path / f"{i}.wav", sound) for i, sound in enumerate(sounds)]
        return AudioClips(tuple(files), extractor, POSITIONS).sha256

    assert digest(TONE, -TONE) == digest(TONE, -TONE)
    assert len({digest(TONE, -TONE), digest(-TONE, TONE), digest(TONE), digest(TONE / 2)}) == 4


def test_a_folder_without_an_extractor_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no feature extractor that can be read"):
        load_extractor(tmp_path)
