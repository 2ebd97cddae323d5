"""Text from a checkpoint, dense or compressed: transformers' generate with our modules inside."""

from pathlib import Path
from typing import Any

import torch

from lillama.checkpoint.remote import find_model
from lillama.config import GenerateConfig
from lillama.errors import InputError
from lillama.integrations.loading import check_vocabulary, choose_device, load_model, load_tokenizer
from lillama.integrations.mamba import fast_mamba

__all__ = ["generate"]


def generate(model: str | Path, prompt: str, **options: Any) -> str:
    """Return the continuation of `prompt`, without it. Same as `lillama generate`.

    Args:
        model: local checkpoint folder, or ORG/NAME[@REVISION] of the Hub.
        prompt: text, not empty.
        options: the other fields of `lillama.config.GenerateConfig`: max_new_tokens, temperature
            (0 is greedy), seed, device.

    Raises:
        InputError: a model or prompt that cannot be used.
    """
    config = GenerateConfig(model=find_model(model), prompt=prompt, **options)
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.model)
    loaded = load_model(config.model, device)
    inputs = tokenizer(config.prompt, return_tensors="pt").to(device)
    length = inputs["input_ids"].shape[1]
    check_vocabulary(inputs["input_ids"], loaded.config.vocab_size)
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and length + config.max_new_tokens > limit:
        raise InputError(
            f"prompt ({length} tokens) and --max-new-tokens ({config.max_new_tokens}) exceed the "
            f"model's {limit} positions; shorten one of them"
        )
    drawn = config.temperature > 0
    sampling: dict[str, Any] = {"temperature": config.temperature} if drawn else {}
    pad = tokenizer.pad_token_id
    devices = [device] if device.type == "cuda" else []
    generator: Any = loaded
    with fast_mamba(), torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        output = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=config.max_new_tokens,
            do_sample=drawn,
            # a generation_config.json may turn it off, and every token then costs the whole text
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            **sampling,
        )
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True))
