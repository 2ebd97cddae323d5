"""Train the embedded teachers: a small Mixtral and a small Mamba on the source text of Python's
own library.

    python examples/train_teacher.py mixtral examples/teachers/mixtral --tokens 10000000
    python examples/train_teacher.py mamba examples/teachers/mamba --tokens 8000000

The text is every `.py` file of the running interpreter's standard library (tests left out), so
nothing is downloaded. `stdlib_split()` is the split by file that `make demo` uses too: the
teachers never saw the held-out files. Each run writes the checkpoint (bf16), its tokenizer and
train_log.json next to it.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from lillama.integrations.mamba import fast_mamba

END = "<|endoftext|>"
VOCAB_SIZE = 1024
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_ONE_IN = 12


def stdlib_split() -> tuple[list[Path], list[Path]]:
    """Return (train, held_out) source files, split by a hash of each file's path inside the
    library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] % HELD_OUT_ONE_IN == 0 else train).append(path)
    return train, held_out


def read_all(files: list[Path]) -> list[str]:
    return [text for file in files if (text := file.read_text("utf-8", errors="ignore").strip())]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE pieces; END is bos, eos and pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def build(kind: str) -> MixtralForCausalLM | MambaForCausalLM:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "mixtral":
        config = MixtralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
            router_aux_loss_coef=0.01,
            **special,
        )
        return MixtralForCausalLM(config)
    config = MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        state_size=16,
        num_hidden_layers=4,
        tie_word_embeddings=True,
        **special,
    )
    return MambaForCausalLM(config)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Mean next-token loss in nats over blocks [n, T]."""
    total = 0.0
    for batch in blocks.split(16):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["mixtral", "mamba"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_files, held_out_files = stdlib_split()
    train_text, held_out_text = read_all(train_files), read_all(held_out_files)
    tokenizer = train_tokenizer(train_text)
    train_ids, held_out_ids = encode(tokenizer, train_text), encode(tokenizer, held_out_text)
    held_out = held_out_ids[: len(held_out_ids) // args.seq_len * args.seq_len].view(
        -1, args.seq_len
    )
    held_out = held_out[:: max(1, len(held_out) // 64)][:64]

    model = build(args.kind)
    if args.kind == "mixtral":
        model.config.output_router_logits = True  # adds the load-balancing loss while training
    steps = args.tokens // (args.batch_size * args.seq_len)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    warmup = max(1, steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup
            if s < warmup
            else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
        ),
    )
    log, start, window, counted = [], time.time(), 0.0, 0
    # eval mode: no dropout in either family, and it keeps Mamba off its fused training call
    model.eval()
    for step in range(1, steps + 1):
        begin = torch.randint(0, len(train_ids) - args.seq_len, (args.batch_size,))
        batch = torch.stack([train_ids[b : b + args.seq_len] for b in begin.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.kind == "mixtral"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        window += float(loss.detach())
        counted += 1
        every = max(1, steps // 40)
        if step % every == 0 or step == steps:
            done = step * args.batch_size * args.seq_len
            entry = {
                "step": step,
                "tokens": done,
                "train_loss": round(window / counted, 4),
                "held_out_loss": round(held_out_loss(model, held_out), 4),
                "lr": round(float(schedule.get_last_lr()[0]), 6),
                "seconds": round(time.time() - start),
            }
            window, counted = 0.0, 0
            log.append(entry)
            print(json.dumps(entry), flush=True)

    model.config.output_router_logits = False
    model = model.to(torch.bfloat16)
    final = held_out_loss(model.float(), held_out)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "lr": args.lr,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_files": len(train_files),
        "held_out_files": len(held_out_files),
        "train_tokens_in_corpus": len(train_ids),
        "held_out_loss_bf16": round(final, 4),
        "log": log,
    }
    (args.out / "train_log.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    with fast_mamba():
        main()
