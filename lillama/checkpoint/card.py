"""The files beside the weights: config.json, recipe.json and the model card."""

import hashlib
import html
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lillama.checkpoint.format import FORMAT_VERSION, QUANT_METHOD, TensorHeader, sentinel
from lillama.compress.plan.plan import Plan
from lillama.config import CompressConfig
from lillama.data.datasets import recorded_texts
from lillama.data.sequences import TokenBlocks
from lillama.models.hub import hub_model, recorded
from lillama.version import __version__

__all__ = ["card_metadata", "card_text", "config_json", "model_card", "recipe_json"]


def recipe_json(
    options: CompressConfig,
    plan: Plan,
    headers: Mapping[str, TensorHeader],
    device: torch.device,
    blocks: tuple[TokenBlocks, TokenBlocks],
) -> dict[str, Any]:
    """Everything needed to run it again, and what it ran on. `blocks`: training, held-out."""
    listing = sorted((n, h.dtype, h.shape, h.file.name) for n, h in headers.items())
    config = json.loads((options.model / "config.json").read_text("utf-8"))
    digest = hashlib.sha256(json.dumps([config, listing], sort_keys=True).encode())
    for file in sorted({header.file for header in headers.values()}):
        digest.update(_sample(file))
    return {
        "command": "compress",
        # shards of another format are nothing to go on from
        "format_version": FORMAT_VERSION,
        "options": recorded(options),
        "strategy": plan.strategy,
        "gauge": plan.gauge,
        "model_sha256": digest.hexdigest(),
        "data_sha256": {"train": blocks[0].sha256, "held_out": blocks[1].sha256},
        **recorded_texts(options.text),
        "versions": {
            "lillama": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device.type,
    }


def _sample(file: Path) -> bytes:
    """64 KiB at 64 evenly spaced places of a file, all of a small one: other weights show in any of
    them, and reading 90 GB for a checksum would take minutes."""
    size, places, length = file.stat().st_size, 64, 1 << 16
    with file.open("rb") as stream:
        if size <= places * length:
            return stream.read()
        parts = []
        for place in range(places):
            stream.seek(place * (size - length) // (places - 1))
            parts.append(stream.read(length))
    return b"".join(parts)


def _hub_id(model: Path) -> str | None:
    """The base's id on the Hub: told by a folder of the Hub's cache, else the folder's name, which
    is one only if it was named so; None where it cannot be one."""
    if (found := hub_model(model)) is not None:
        return found.hub_id
    name = model.name
    valid = re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", name, re.ASCII)
    return name if valid and "--" not in name and ".." not in name else None


def card_text(name: str) -> str:
    """The name of a folder as a word of Markdown on one line."""
    return html.escape(" ".join(name.split()))


def card_metadata(base: Path, *tags: str, hub_id: str | None = None) -> str:
    """The YAML block that begins a model card, in the Hub's fields; `hub_id` where it is known.

    Source: huggingface.co/docs/hub/model-cards. The license is the base model's, which is not
    known here.
    """
    hub_id = hub_id or _hub_id(base)
    # JSON is YAML, and a name such as 1e5 or no stays a string
    lines = [] if hub_id is None else [f"base_model: {json.dumps(hub_id)}"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def model_card(options: CompressConfig, report: dict[str, Any]) -> str:
    found = hub_model(options.model)
    base = card_text(options.model.name if found is None else found.hub_id)
    return f"""{card_metadata(options.model, "lillama", "low-rank")}
# {base}, {report["reduction"]:.1%} smaller

Compressed with lillama {__version__}: weight matrices replaced by low-rank factors, trained block
by block to reproduce the original's activations ({options.preset} preset,
{report["tokens"]} calibration tokens).

| | before | after |
|---|---|---|
| parameters | {report["params_before"]:,} | {report["params_after"]:,} |
| bytes | {report["bytes_before"]:,} | {report["bytes_after"]:,} |

```python
import lillama  # registers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

`recipe.json` says how it was made, `report.json` what each block lost. Quality was not measured
here: run `lillama eval` against the base model on text that neither has seen.
"""


def config_json(options: CompressConfig, plan: Plan) -> dict[str, Any]:
    """The base model's config.json, plus what is needed to build and trace the compressed one."""
    values = json.loads((options.model / "config.json").read_text("utf-8"))
    if options.dtype != "auto":
        values.pop("torch_dtype", None)
        values["dtype"] = options.dtype
    found = hub_model(options.model)
    values["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "ranks": plan.ranks,
        "gauge": plan.gauge,
        "sentinel": sentinel(plan.family, plan.ranks)[0],
        "reduction": plan.reduction,
        "base_model": str(options.model) if found is None else found.hub_id,
        "base_revision": None if found is None else found.commit,
        "recipe": options.preset,
        "tokens": options.num_tokens,
        "producer": {"name": "lillama", "version": __version__},
    }
    return values
