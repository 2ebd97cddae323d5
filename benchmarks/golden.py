"""One hash for each model and preset: whether a change left what `compress` writes bit for bit.

    python -m benchmarks.golden > before.txt     # on the commit before, then on the one after
    diff before.txt after.txt

The hash is of the tensors' names, dtypes, shapes and bytes. It is compared on one machine only:
another processor or another torch rounds otherwise.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lillama

TEACHERS = Path(__file__).parents[1] / "examples" / "teachers"
TEXTS = ("argparse.py", "inspect.py", "typing.py", "datetime.py", "tarfile.py", "socket.py")
PRESETS = ("fast", "default", "whitened", "paper")


def tensors_hash(folder: Path) -> str:
    """The first 16 hex digits of the SHA-256 of all tensors in a checkpoint folder."""
    found = hashlib.sha256()
    where = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            where |= {name: file for name in shard.keys()}  # noqa: SIM118
    for name in sorted(where):
        with safe_open(where[name], "pt") as shard:
            tensor = shard.get_tensor(name).contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def make_llama(folder: Path) -> Path:
    """A random Llama of two layers with the embedded Mixtral's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHERS / "mixtral")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text = folder / "text.txt"
        library = Path(argparse.__file__).parent
        text.write_text("\n\n".join((library / name).read_text("utf-8") for name in TEXTS), "utf-8")
        models = {
            "llama": make_llama(folder / "llama"),
            "mamba": TEACHERS / "mamba",
            "mixtral": TEACHERS / "mixtral",
        }
        for kind, model in models.items():
            for preset in PRESETS:
                out = folder / f"{kind}-{preset}"
                lillama.compress(
                    model, out, reduction=0.2, text=text, preset=preset, tokens=options.tokens,
                    seq_len=128, device="cpu",
                )  # fmt: skip
                print(kind, preset, tensors_hash(out), flush=True)


if __name__ == "__main__":
    main()
