"""How fast two models answer, and in how much memory, beside each other in one process.

What is timed is transformers' `generate` with our modules inside: one prompt (prefill), then token
by token (decode). A server or vLLM has other figures. Rounds of the two models take turns, so that
a machine that slows down slows both.
"""

import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lillama.errors import InputError
from lillama.evaluate.perplexity import Progress

__all__ = ["measure_speed"]

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 32, 5
_CLEAR_PEAK = Path("/proc/self/clear_refs")


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _answer(model: Any, prompt: Tensor, new_tokens: int) -> float:
    """Seconds that `new_tokens` behind the prompt take."""
    _settle(model.device)
    start = time.perf_counter()
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    _settle(model.device)
    return time.perf_counter() - start


def _status_bytes(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def _weights_bytes(model: PreTrainedModel) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _peak_bytes(model: PreTrainedModel, prompt: Tensor) -> int | None:
    """The weights, and the most that an answer takes on top. None on a CPU where the system does
    not say (it does on Linux)."""
    device = model.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _answer(model, prompt, NEW_TOKENS)
        return _weights_bytes(model) + torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    # memory that was freed and not given back would hide what the answer takes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS:")
    _answer(model, prompt, NEW_TOKENS)
    return _weights_bytes(model) + max(0, _status_bytes("VmHWM:") - before)


def _rates(name: str, rates: list[float]) -> dict[str, float]:
    """Median and range of tokens a second."""
    return {
        f"{name}_tokens_per_s": statistics.median(rates),
        f"{name}_tokens_per_s_min": min(rates),
        f"{name}_tokens_per_s_max": max(rates),
    }


def measure_speed(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    token_ids: Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prefill and decode of one sequence, five rounds after a warm-up, the models taking turns.

    Args:
        token_ids: [tokens], int64: the prompt is its beginning, at most 512 tokens.

    Returns:
        `device, dtype, prompt_tokens, new_tokens, rounds, prefill_tokens_per_s,
        decode_tokens_per_s` (medians; `..._min` and `..._max`), `weights_bytes` (in memory, not on
        disk), `peak_memory_bytes` (with the weights; None where it is not known); with a base the
        same of it under `base_...`.

    Raises:
        InputError: the text or the model's positions are too short.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    length = min(PROMPT_TOKENS, len(token_ids), limit - NEW_TOKENS - 1)
    if length < 1:
        raise InputError(f"--speed needs more than {NEW_TOKENS + 1} positions, MODEL has {limit}")
    prompt = token_ids[:length].view(1, -1).to(model.device)
    models = {"": model} if base is None else {"": model, "base_": base}
    peaks: dict[str, int | None] = {}
    for prefix, one in models.items():
        _answer(one, prompt, NEW_TOKENS)
        peaks[prefix] = _peak_bytes(one, prompt)
    prefill: dict[str, list[float]] = {prefix: [] for prefix in models}
    decode: dict[str, list[float]] = {prefix: [] for prefix in models}
    for done in range(ROUNDS):
        for prefix, one in models.items():
            first = _answer(one, prompt, 1)
            whole = _answer(one, prompt, 1 + NEW_TOKENS)
            prefill[prefix].append(length / first)
            decode[prefix].append(NEW_TOKENS / max(whole - first, 1e-9))
        if progress is not None:
            progress("speed", done + 1, ROUNDS)
    report: dict[str, Any] = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": length,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
    }
    for prefix, one in models.items():
        figures = {
            **_rates("prefill", prefill[prefix]),
            **_rates("decode", decode[prefix]),
            "weights_bytes": _weights_bytes(one),
            "peak_memory_bytes": peaks[prefix],
        }
        report |= {f"{prefix}{name}": value for name, value in figures.items()}
    return report
