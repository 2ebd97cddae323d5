"""Counted work: against what PyTorch counts, and what changes it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lillama.checkpoint import read_headers
from lillama.compress.plan import Plan, make_plan
from lillama.compress.work import Work, count_work, decoded_numbers
from lillama.config import PlanConfig

TOKENS = {"tokens": 320, "seq_len": 32}


def made(path, **options: Any) -> tuple[Plan, PlanConfig, dict]:
    config = PlanConfig(model=path, **{"reduction": 0.2, **TOKENS, **options})
    return make_plan(config), config, read_headers(path)


def test_teacher_counts_what_a_forward_pass_computes(make_checkpoint):
    """One block of a Llama."""
    path = make_checkpoint("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    plan, config, headers = made(path, preset="fast")
    plan = replace(plan, ranks={})
    assert count_work(plan, config, headers)["teacher"] == Work()
    # with ranks the teacher pass also gathers moments: taken off
    plan = replace(plan, ranks={m.name: 8 for m in plan.matrices if m.block == 0})
    squares = sum(2 * min(m.N, m.K) ** 2 for m in plan.matrices if m.block == 0) * 320
    rows = 10 + 8  # held-out blocks
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ids = torch.ones(rows, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    head = 2 * 300 * 64 * ids.numel()
    found = count_work(plan, config, headers)["teacher"].products - squares
    assert found == pytest.approx(counter.get_total_flops() - head, rel=0.05)


def test_experts_count_with_the_tokens_they_see(make_checkpoint):
    two, four = (make_checkpoint("mixtral", num_experts_per_tok=count) for count in (2, 4))
    found = [count_work(*made(path))["teacher"].products for path in (two, four)]
    assert 1.3 * found[0] < found[1] < 2 * found[0]


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_phases_and_what_they_grow_with(kind, request):
    path = request.getfixturevalue(kind)
    fast = count_work(*made(path, preset="fast", tokens=32_000))
    default = count_work(*made(path, tokens=32_000))
    assert set(fast) == {"sensitivity", "teacher", "factorise", "judge"}
    assert set(default) == {"sensitivity", "teacher", "factorise", "train"}
    assert default["train"].products > 10 * fast["judge"].products
    assert default["factorise"] == fast["factorise"] and fast["factorise"].eigen > 0
    twice = count_work(*made(path, tokens=64_000))
    assert twice["train"].products > 1.5 * default["train"].products
    assert twice["factorise"] == default["factorise"]
    # the sample of the sensitivity ends at 65,536 tokens
    large, larger = (count_work(*made(path, tokens=n))["sensitivity"] for n in (10**5, 10**6))
    assert large == larger


def test_decoding_reads_all_but_idle_experts_and_embeddings(mixtral):
    plan, _, headers = made(mixtral, targets=("w1", "w2", "w3"))
    dense, compressed = decoded_numbers(plan, headers)
    sizes = {name: torch.Size(header.shape).numel() for name, header in headers.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embeddings = sizes["model.embed_tokens.weight"]
    # 2 of 4 experts, one row of the embeddings
    assert dense == sum(sizes.values()) - experts / 2 - embeddings + 32
    saved = sum(m.params_saved(plan.ranks[m.name]) for m in plan.matrices if m.name in plan.ranks)
    assert dense - compressed == saved / 2


def test_decoding_reads_a_tied_head_once(make_checkpoint):
    tied = decoded_numbers(*(made(make_checkpoint("mamba", tie_word_embeddings=True))[::2]))
    apart = decoded_numbers(*(made(make_checkpoint("mamba", tie_word_embeddings=False))[::2]))
    assert apart[0] - tied[0] == 32  # one row of the embeddings


def test_decoding_reads_one_row_of_factorised_embeddings(make_checkpoint):
    path = make_checkpoint("mamba", tie_word_embeddings=False)
    plan, _, headers = made(path)
    dense, _ = decoded_numbers(plan, headers)
    embedding = next(m for m in plan.matrices if m.block < 0)
    only = replace(plan, ranks={embedding.name: 8})
    # 32 numbers of the row against 8 of its factor and all (32 - 8) x 8 of C
    assert plan.gauge == "pivot"
    assert dense - decoded_numbers(only, headers)[1] == 32 - 8 - 8 * 24
    plan, _, headers = made(path, gauge="plain")
    only = replace(plan, ranks={embedding.name: 8})
    # or all 8 x 32 of the other
    assert dense - decoded_numbers(only, headers)[1] == 32 - 8 - 8 * 32
