"""What `lillama plan` prints: one row a kind of matrix, nothing cut at 80 columns."""

import json
import sys

import pytest
from transformers import LlamaConfig, MixtralConfig

from lillama.cli import main

LLAMA = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
MIXTRAL = MixtralConfig(architectures=["MixtralForCausalLM"])


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (LLAMA, {"mlp.gate_proj": "0-29", "self_attn.k_proj": "0-29"}),
        (MIXTRAL, {"experts.*.w1": "0-31", "embed_tokens": ""}),
    ],
    ids=["llama", "mixtral"],
)
def test_plan_prints_a_row_a_kind(config, kinds, tmp_path, monkeypatch, capsys):
    config.save_pretrained(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lillama", "plan", str(tmp_path), "--reduction", "0.2"])
        sys.argv += more
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    matrices = json.loads(run("--json").splitlines()[-1])["matrices"]
    shown = run()
    assert "\u2026" not in shown
    rows = [line.split("\u2502") for line in shown.splitlines() if line.count("\u2502") == 8]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    assert len(cells) == len(rows) < 12
    assert sum(int(row[1]) for row in cells.values()) == len(matrices)
    assert {kind: cells[kind][0] for kind in kinds} == kinds
    ranks = [m["rank"] for m in matrices if m["name"].endswith(next(iter(kinds)).split(".")[-1])]
    low, high = min(ranks), max(ranks)
    assert cells[next(iter(kinds))][3] == (f"{low}" if low == high else f"{low}-{high}")
