"""Checkpoints that call their tensors otherwise than save_pretrained does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lillama
from lillama.errors import InputError

OPTIONS: dict[str, Any] = {"reduction": 0.2, "tokens": 300, "seq_len": 32}


def renamed(base: Path, new: Path, names: dict[str, str]) -> Path:
    """A copy of the folder `base` whose tensors have other names: the first part that is a key of
    `names` is exchanged."""
    shutil.copytree(base, new)
    tensors = load_file(base / "model.safetensors")
    for old, part in names.items():
        tensors = {name.replace(old, part, 1): tensor for name, tensor in tensors.items()}
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return new


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_the_prefix_are_read(
    kind, prefix, make_checkpoint, text_file, tmp_path, device
):
    """As the hub's GPT-2 and OPT have them; the result has names with it."""
    base = make_checkpoint(kind)
    bare = renamed(base, tmp_path / "bare", {prefix: ""})
    results = []
    for path in (base, bare):
        plan = lillama.plan(path, 0.2)
        out = tmp_path / f"{path.name}-small"
        report = lillama.compress(path, out, text=text_file, device=str(device), **OPTIONS)
        assert report["bytes_before"] == plan["bytes_before"]
        files = sorted(out.glob("*.safetensors"))
        tensors = {name: t for file in files for name, t in load_file(file).items()}
        memory = plan.pop("peak_memory_bytes")
        results.append((plan, sorted(memory), tensors))
    (plan, phases, wanted), (other_plan, other_phases, found) = results
    assert plan == other_plan and phases == other_phases
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_other_names_are_refused(make_checkpoint, text_file, tmp_path):
    """Here the runtime name of the head, which transformers reads as well."""
    other = renamed(make_checkpoint("gpt_neox"), tmp_path / "other", {"embed_out": "lm_head"})
    with pytest.raises(InputError, match="has no embed_out.weight, .* save_pretrained first"):
        lillama.compress(other, tmp_path / "out", text=text_file, device="cpu", **OPTIONS)
