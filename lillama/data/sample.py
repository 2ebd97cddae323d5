"""Text that a model writes by itself, to calibrate on: no text of one's own is needed, and none is
nearer to what the model knows (data-free distillation, e.g. LLM-QAT, Liu et al., arXiv 2305.17888).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lillama.checkpoint.folder import disk_errors, whole_file
from lillama.checkpoint.remote import find_model
from lillama.config import SampleConfig
from lillama.errors import InputError, RunError
from lillama.integrations.loading import check_vocabulary, choose_device, load_model, load_tokenizer
from lillama.integrations.mamba import fast_mamba
from lillama.models.hub import recorded

__all__ = ["sample", "sampled_with"]

Progress = Callable[[str, int, int], None]


def sample(
    model: str | Path, out: str | Path, *, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """Write text drawn from the model to a jsonl file for `--text`. Same as `lillama sample`.

    Every sequence starts from the tokenizer's first token (bos, else eos) alone and runs on over
    ends of text, as the model saw text while it was trained; each text becomes a row. The whole
    model must fit into memory.

    Args:
        model: checkpoint folder, or ORG/NAME[@REVISION] of the Hub.
        out: jsonl file to create; it appears when all is done.
        progress: called as progress(stage, done, total), in tokens.
        options: the other fields of `lillama.config.SampleConfig`: tokens, seq_len, temperature,
            batch_size, seed, device.

    Returns:
        `rows, tokens, bytes`. tokens counts them as the tokenizer reads the file.

    Raises:
        InputError: a model, file or option that cannot be used. RunError: the file cannot be
        written.
    """
    config = SampleConfig(model=find_model(model), out=Path(out), **options)
    rows = done = 0
    with whole_file(config.out, "sample") as part:
        tokenizer = load_tokenizer(config.model)
        device = choose_device(config.device)
        with disk_errors(config.out), part.open("w", encoding="utf-8") as file:
            for text in _texts(config, tokenizer, device):
                made: dict[str, Any] = {"text": text}
                if rows == 0:
                    made["sampled"] = recorded(config)
                file.write(json.dumps(made) + "\n")
                rows += 1
                done += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                if progress is not None:
                    progress("sample", min(done, config.tokens), config.tokens)
                if done >= config.tokens:
                    break
    return {"rows": rows, "tokens": done, "bytes": config.out.stat().st_size}


def sampled_with(file: Path) -> dict[str, Any] | None:
    """The options that made a file of `sample`; None for any other."""
    try:
        with file.open(encoding="utf-8") as stream:
            return json.loads(stream.readline())["sampled"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _texts(
    config: SampleConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Iterator[str]:
    """Without end; none empty."""
    model: Any = load_model(config.model, device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        raise InputError(f"--seq-len must be at most {limit} for this model, got {config.seq_len}")
    end: Any = tokenizer.eos_token_id
    start: Any = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InputError(f"the tokenizer of {config.model} has neither bos nor eos to start from")
    prompt = torch.full((config.batch_size, 1), start, device=device)
    check_vocabulary(prompt, model.config.vocab_size)
    # an end of text is a token as any other
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        max_new_tokens=config.seq_len - 1,
        use_cache=True,
        pad_token_id=start,
    )
    devices = [device] if device.type == "cuda" else []
    # PyTorch's CPU generator takes 32 bits of a seed
    seeds = torch.Generator().manual_seed(config.seed)
    while True:
        with fast_mamba(), torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**32, (), generator=seeds)))
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt))
        documents = [part for ids in output[:, 1:].tolist() for part in _split(ids, end)]
        texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in documents]
        # the last character may be cut in half
        texts = [kept for text in texts if (kept := text.rstrip("\ufffd"))]
        if not texts:
            raise RunError(
                f"{config.model} wrote {config.batch_size} sequences without any text; give "
                "calibration text with --text"
            )
        yield from texts


def _split(ids: list[int], end: int | None) -> Iterator[list[int]]:
    """The texts of a sequence, without the ends between them."""
    start = 0
    for place, token in enumerate([*ids, end]):
        if token == end and (end is not None or place == len(ids)):
            if place > start:
                yield ids[start:place]
            start = place + 1
