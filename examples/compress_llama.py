"""Compress a Llama and look at both: a small random one made here, or one of your own.

    python examples/compress_llama.py --out llama-demo
    python examples/compress_llama.py --out llama-demo --model MODEL --text FILE --reduction 0.3

A random model has nothing to lose, so its figures say that everything works and no more; with a
trained one they say what 30% cost. The text is by default the source of Python's own library.
"""

import argparse
import sys
from pathlib import Path

import torch
from train_teacher import read_all, stdlib_split, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import lillama


def standard_library(num_bytes: int) -> tuple[str, str]:
    """Text to calibrate with, and other text to judge by."""
    train, held_out = stdlib_split()
    parts = []
    for files in (train, held_out):
        parts.append("\n\n".join(read_all(files[:400]))[:num_bytes])
    return parts[0], parts[1]


def random_llama(folder: Path, text: str, hidden_size: int, num_layers: int) -> Path:
    """A Llama of that size with random weights and a tokenizer of 1,024 pieces of `text`."""
    tokenizer = train_tokenizer([text])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--model", type=Path, help="a Llama; left out: a random one is made")
    parser.add_argument("--text", type=Path, help="calibration text; left out: Python's library")
    parser.add_argument("--reduction", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=256, help="of the random model")
    parser.add_argument("--num-layers", type=int, default=4, help="of the random model")
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True)
    calibration, held_out = standard_library(8 * options.tokens)
    texts = options.out / "calibration.txt", options.out / "held_out.txt"
    for file, text in zip(texts, (calibration, held_out), strict=True):
        file.write_text(text, "utf-8")
    model = options.model or random_llama(
        options.out / "base", calibration[:200_000], options.hidden_size, options.num_layers
    )
    small = options.out / "small"
    lillama.compress(
        model,
        small,
        reduction=options.reduction,
        text=options.text or texts[0],
        tokens=options.tokens,
        seq_len=options.seq_len,
    )
    quality = lillama.eval(small, texts[1], against=model, seq_len=options.seq_len)
    print(f"{small}: {quality['params']:,} parameters in {quality['bytes']:,} bytes")
    print(
        f"perplexity {quality['perplexity']:.2f}, of the base {quality['base_perplexity']:.2f}; "
        f"{quality['top1_agreement']:.1%} of tokens with the same first guess"
    )
    return quality


if __name__ == "__main__":
    main(sys.argv[1:])
