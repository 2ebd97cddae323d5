"""Seeded inputs for every op, and the one tolerance rule that tests and benchmarks share.

The rule: error(actual, fp64 truth) <= 2 * (error(baseline, fp64 truth) + eps * max|truth|), where
error is the largest absolute difference and the baseline is a plain implementation run in the same
dtype as actual. Inputs are drawn on the CPU in fp32 and then rounded, so every dtype and device
sees the same numbers. Letters as in reference.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lillama_kernels.reference import ExpertFactors, ProjectionFactors

__all__ = [
    "assert_close_to_truth",
    "causal_conv1d_inputs",
    "check_op",
    "check_values",
    "distill_loss_inputs",
    "expert_factors",
    "low_rank_experts_inputs",
    "low_rank_linear_inputs",
    "pivot_low_rank_linear_inputs",
    "poison_empty",
    "selective_scan_inputs",
    "ssd_scan_inputs",
    "values_and_grads",
]

# Largest error allowed to an fp64 result, as a share of max|truth|: no implementation in fp64 has a
# reason to be worse, whatever the order of its sums.
FP64_TOLERANCE = 1e-10

# Tensors by name. Any, so that f(**inputs) type-checks when f has other parameters too.
Results = dict[str, Any]


# The rule
def assert_close_to_truth(
    actual: Tensor, truth_fp64: Tensor, baseline: Tensor, name: str = "result"
) -> None:
    """Apply the tolerance rule of this module to one tensor.

    Args:
        actual: what is judged; any floating dtype.
        truth_fp64: the same quantity computed in fp64 from the same (rounded) inputs.
        baseline: a plain implementation in the dtype of actual.
        name: how the message calls actual.

    Raises:
        AssertionError: actual is too far, not finite, or of another shape or dtype than asked.
    """
    if not actual.shape == baseline.shape == truth_fp64.shape:
        wanted = f"{list(truth_fp64.shape)} (baseline {list(baseline.shape)})"
        raise AssertionError(f"{name}: shape {list(actual.shape)}, wanted {wanted}")
    if actual.dtype != baseline.dtype or truth_fp64.dtype != torch.float64:
        wanted = f"{baseline.dtype} as in the baseline; truth has {truth_fp64.dtype}"
        raise AssertionError(f"{name}: dtype {actual.dtype}, wanted {wanted}")
    for role, tensor in (("actual", actual), ("truth", truth_fp64), ("baseline", baseline)):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise AssertionError(f"{name}: {bad} of {tensor.numel()} {role} values are NaN or inf")
    if actual.numel() == 0:
        return
    error, baseline_error = (
        float((tensor.double() - truth_fp64).abs().max()) for tensor in (actual, baseline)
    )
    scale, eps = float(truth_fp64.abs().max()), torch.finfo(actual.dtype).eps
    allowed = 2 * (baseline_error + eps * scale)
    if actual.dtype == torch.float64:
        allowed = FP64_TOLERANCE * scale
    if not error <= allowed:
        raise AssertionError(
            f"{name} ({actual.dtype}, {list(actual.shape)}): error {error:.3e} > allowed "
            f"{allowed:.3e}; baseline error {baseline_error:.3e}, max|truth| {scale:.3e}"
        )


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Inside the block uninitialised memory is NaN (largest integer), so reading it shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # a module whose one attribute is a property that type checkers do not see
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _outputs(function: Callable[..., Tensor | Sequence[Tensor]], leaves: Results) -> list[Tensor]:
    outputs = function(**leaves)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def values_and_grads(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    grad_outputs: Sequence[Tensor],
) -> Results:
    """Run function(**inputs) and its backward twice.

    Returns:
        "output 0", "output 1", ... and "grad <input>" for every input; zeros where no gradient
        arrives.

    Raises:
        AssertionError: the two backward passes differ in a bit, or an input was written to.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = _outputs(function, leaves)
    args = (outputs, list(leaves.values()), list(grad_outputs))
    first = torch.autograd.grad(*args, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(*args, allow_unused=True)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, one, two in zip(leaves, first, second, strict=True):
        one, two = (torch.zeros_like(leaves[name]) if g is None else g for g in (one, two))
        if not torch.equal(one.nan_to_num(), two.nan_to_num()):
            raise AssertionError(f"grad {name}: the second backward differs from the first")
        if not torch.equal(leaves[name].detach(), before[name]):
            raise AssertionError(f"{name}: the op wrote to its input")
        results[f"grad {name}"] = one
    return results


def check_values(
    op: Callable[..., Tensor | Sequence[Tensor]],
    oracle: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
) -> None:
    """Hold op's outputs without gradients to the tolerance rule, and to the same bits twice.

    An op may take another way without gradients than `check_op` sees.

    Raises:
        AssertionError: see `assert_close_to_truth`, or two runs differ in a bit.
    """
    with torch.no_grad():
        with poison_empty():
            first, second = _outputs(op, dict(inputs)), _outputs(op, dict(inputs))
        truth = _outputs(oracle, {name: tensor.double() for name, tensor in inputs.items()})
        baseline = _outputs(oracle, dict(inputs))
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        assert_close_to_truth(one, truth[i], baseline[i], f"output {i}")
        if not torch.equal(one, other):
            raise AssertionError(f"output {i}: two runs on the same inputs differ")


def check_op(
    op: Callable[..., Tensor | Sequence[Tensor]],
    oracle: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    *,
    noncontiguous: bool = False,
    seed: int = 1,
) -> None:
    """Hold op to the tolerance rule: every output, every gradient, a random grad_output.

    Args:
        op, oracle: functions of the inputs by name. The truth is the oracle in fp64, the baseline
            the oracle in the inputs' dtype.
        inputs: floating tensors; all get gradients.
        noncontiguous: give op inputs and grad_outputs whose last stride is 2.
        seed: of grad_output.

    Raises:
        AssertionError: see `assert_close_to_truth` and `values_and_grads`.
    """
    with torch.no_grad():
        shapes = [(t.shape, t.dtype, t.device) for t in _outputs(oracle, dict(inputs))]
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype, device in shapes
    ]
    given = {n: _strided(t) for n, t in inputs.items()} if noncontiguous else inputs
    with poison_empty():
        actual = values_and_grads(op, given, list(map(_strided, grads)) if noncontiguous else grads)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    truth = values_and_grads(oracle, double, [g.double() for g in grads])
    baseline = values_and_grads(oracle, inputs, grads)
    if actual.keys() != truth.keys():
        raise AssertionError(f"results {sorted(actual)}, wanted {sorted(truth)}")
    for name, tensor in actual.items():
        assert_close_to_truth(tensor, truth[name], baseline[name], name)


def _strided(tensor: Tensor) -> Tensor:
    """The same values at every second place of a larger tensor whose other places are NaN."""
    wide = tensor.new_full((*tensor.shape, 2), float("nan"))
    wide[..., 0] = tensor
    return wide[..., 0]


# Inputs
class _Draw:
    """Normal numbers of a seed, and how tensors are given away; where: dtype, device and seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def placed(self, tensors: Results) -> Results:
        return {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}


def low_rank_linear_inputs(
    rows: Sequence[int], in_features: int, out_features: int, rank: int, **where: Any
) -> Results:
    """x [*rows, K], A [R, K], B [N, R], bias [N]; y of order 1."""
    normal = _Draw(**where)
    tensors = {
        "x": normal(*rows, in_features),
        "A": normal(rank, in_features) * in_features**-0.5,
        "B": normal(out_features, rank) * rank**-0.5,
        "bias": normal(out_features),
    }
    return normal.placed(tensors)


def pivot_low_rank_linear_inputs(
    rows: Sequence[int], in_features: int, out_features: int, rank: int, **where: Any
) -> tuple[Results, Tensor]:
    """x [*rows, K], A [R, K], C [N - R, R], bias [N], and order [N] int32."""
    found = low_rank_linear_inputs(rows, in_features, out_features, rank, **where)
    found["C"] = found.pop("B")[rank:]
    generator = torch.Generator().manual_seed(where.get("seed", 0) + 1)
    order = torch.randperm(out_features, generator=generator)
    return found, order.to(where["device"], torch.int32)


def low_rank_experts_inputs(
    num_rows: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    ranks: Mapping[str, Sequence[int]],
    **where: Any,
) -> tuple[Results, Tensor]:
    """Floating tensors (hidden, topk_weight and the factors "gate_A" ... "down_W") and topk_index.

    ranks: for "gate", "up" and "down" the E ranks, 0 for a dense expert. Each token has top_k
    different experts, weights that sum to 1. Factors are padded with zeros to the largest rank.
    """
    normal, num_experts = _Draw(**where), len(ranks["gate"])
    weight, index = normal(num_rows, num_experts).softmax(-1).topk(top_k)
    tensors = {
        "hidden": normal(num_rows, hidden_size),
        "topk_weight": weight / weight.sum(-1, keepdim=True),
    }
    sizes = {"gate": (hidden_size, intermediate_size), "down": (intermediate_size, hidden_size)}
    for name in ("gate", "up", "down"):
        (k, n), each = sizes.get(name, sizes["gate"]), ranks[name]
        if max(each) > 0:
            A, B = normal(num_experts, max(each), k), normal(num_experts, n, max(each))
            for expert, rank in enumerate(each):
                A[expert, rank:], B[expert, :, rank:] = 0.0, 0.0
                B[expert] *= max(rank, 1) ** -0.5
            tensors[f"{name}_A"], tensors[f"{name}_B"] = A * k**-0.5, B
        if 0 in each:
            tensors[f"{name}_W"] = normal(list(each).count(0), n, k) * k**-0.5
    return normal.placed(tensors), index.to(where["device"])


def expert_factors(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, Sequence[int]]
) -> ExpertFactors:
    """The factors among `low_rank_experts_inputs`' tensors as the op takes them."""
    projections = (
        ProjectionFactors(
            tuple(ranks[name]), *(tensors.get(f"{name}_{letter}") for letter in ("A", "B", "W"))
        )
        for name in ("gate", "up", "down")
    )
    return ExpertFactors(*projections)


def distill_loss_inputs(
    rows: Sequence[int], hidden_size: int, **where: Any
) -> tuple[Results, Tensor]:
    """student and teacher [*rows, H], the student near the teacher, and a mask [*rows] that
    counts about two tokens in three and always the first."""
    normal = _Draw(**where)
    teacher = normal(*rows, hidden_size)
    student = teacher + 0.5 * normal(*rows, hidden_size)
    mask = torch.rand(tuple(rows), generator=normal.generator) < 0.67
    mask.view(-1)[:1] = True
    tensors = {"student": student, "teacher": teacher}
    return normal.placed(tensors), mask.to(where["device"])


def selective_scan_inputs(
    batch: int, channels: int, state_size: int, steps: int, **where: Any
) -> Results:
    """Every tensor of the scan; A and D near Mamba's initial values (-1 ... -S and 1), delta for
    softplus with steps of about 0.05 to 0.7."""
    normal = _Draw(**where)
    tensors = {
        "x": normal(batch, channels, steps),
        "delta": normal(batch, channels, steps),
        "A": -torch.arange(1.0, state_size + 1).expand(channels, -1)
        * torch.exp(0.1 * normal(channels, state_size)),
        "B": normal(batch, state_size, steps),
        "C": normal(batch, state_size, steps),
        "D": 1.0 + 0.1 * normal(channels),
        "z": normal(batch, channels, steps),
        "delta_bias": -1.5 + 0.5 * normal(channels),
        "initial_state": normal(batch, channels, state_size),
    }
    return normal.placed(tensors)


def ssd_scan_inputs(
    batch: int, steps: int, heads: int, width: int, groups: int, state_size: int, **where: Any
) -> Results:
    """Every tensor of Mamba-2's scan; A from -1 to -nh and D near 1 as in a new model, dt for
    softplus with steps of about 0.02 to 0.7."""
    normal = _Draw(**where)
    tensors = {
        "x": normal(batch, steps, heads, width),
        "dt": normal(batch, steps, heads),
        "A": -torch.arange(1.0, heads + 1),
        "B": normal(batch, steps, groups, state_size),
        "C": normal(batch, steps, groups, state_size) * state_size**-0.5,
        "D": 1.0 + 0.1 * normal(heads),
        "dt_bias": -2.0 + 0.5 * normal(heads),
        "initial_state": normal(batch, heads, width, state_size),
    }
    return normal.placed(tensors)


def causal_conv1d_inputs(
    batch: int, channels: int, steps: int, width: int, **where: Any
) -> Results:
    """x [B, D, T], weight [D, W], bias [D], initial_state [B, D, W-1]."""
    normal = _Draw(**where)
    tensors = {
        "x": normal(batch, channels, steps),
        "weight": normal(channels, width) * width**-0.5,
        "bias": normal(channels),
        "initial_state": normal(batch, channels, width - 1),
    }
    return normal.placed(tensors)
