"""What must not be served is refused in one line that names it."""

import pytest
from torch import Tensor

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"
LINEAR = "backbone.layers.1.mixer.in_proj"


def no_expert_factor(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{EXPERT}.lr_B"]


def no_expert_marks(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{EXPERT}.lr_pivots"]


def wrong_expert_marks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.lr_pivots"][5] ^= 1


def expert_of_another_rank(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.lr_A"] = tensors[f"{EXPERT}.lr_A"][:-1].clone()


def no_linear_factor(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LINEAR}.lr_B"]


def too_many_rows(tensors: dict[str, Tensor]) -> None:
    """More than wanted could be cut down to what one process holds."""
    tensors[f"{LINEAR}.lr_B"] = tensors[f"{LINEAR}.lr_B"].repeat(2, 1)


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.lr_C"][3, 2] = float("nan")


def wrong_marks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.lr_pivots"][5] ^= 1


def no_marks(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LINEAR}.lr_pivots"]


@pytest.mark.parametrize(
    ("kind", "gauge", "edit", "message"),
    [
        ("mixtral", "plain", no_expert_factor, "the checkpoint lacks lr_B of model.layers.1."),
        ("mixtral", "plain", expert_of_another_rank, "it does not fit its config.json"),
        ("mixtral", "pivot", no_expert_marks, "the checkpoint lacks lr_C or lr_pivots of model.l"),
        ("mixtral", "pivot", wrong_expert_marks, "experts.3 (down) lr_pivots must be 1 for"),
        ("mamba", "plain", no_linear_factor, f"the checkpoint lacks {LINEAR}.lr_B, or"),
        ("mamba", "plain", too_many_rows, f"{LINEAR}.lr_B is [1024, 45], wanted [512, 45]"),
        ("mamba", "pivot", not_a_number, f"the checkpoint lacks {LINEAR}.lr_C, or holds NaN"),
        ("mamba", "pivot", wrong_marks, f"the checkpoint lacks {LINEAR}.lr_pivots, or"),
        ("mamba", "pivot", no_marks, f"the checkpoint lacks {LINEAR}.lr_pivots, or"),
    ],
)
def test_vllm_refuses_a_damaged_checkpoint(kind, gauge, edit, message, make_served, run_vllm):
    served, _ = make_served(kind, gauge, edit)
    found, output = run_vllm(served)
    assert found is None
    assert message in output, output[-6000:]


def test_vllm_without_the_plugin_says_what_it_does_not_know(make_served, run_vllm):
    served, _ = make_served("llama")
    found, output = run_vllm(served, environment={"VLLM_PLUGINS": ""})
    assert found is None
    assert "Unknown quantization method: lillama" in output, output[-6000:]
