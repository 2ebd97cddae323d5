"""The Triton kernels of low_rank_linear against einsum in fp64: every launcher, every gradient.

On the CPU they run in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lillama_kernels import dispatch, kernels_impl, low_rank_linear
from lillama_kernels.testing import (
    check_op,
    check_values,
    low_rank_linear_inputs,
    values_and_grads,
)
from lillama_kernels.tiles import decode_split, decode_tiles
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from tests.ops.precision import each_dtype, each_half, full, some

# K, N, R of every parity and of multiples of 8 that are none of 16
SIZES = [(1, 1, 1), (257, 63, 8), (72, 56, 24)]
MORE = [(100, 48, 7), (63, 257, 100), (100, 1, 63)]
# what opcheck does beside is in the tests of torch.compile
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
each_size = some("size", SIZES, MORE, lambda s: "K{}-N{}-R{}".format(*s))
odd_and_aligned = pytest.mark.parametrize(
    "size", [(100, 48, 7), (64, 48, 8)], ids=["odd", "aligned"]
)


def oracle(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    z = torch.einsum("...k,rk->...r", x, A)
    y = torch.einsum("...r,nr->...n", z, B)
    return y if bias is None else y + bias


def op(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    return low_rank_linear(x, A, B, bias, impl="triton")


def inputs_of(rows, size, dtype, device, seed=0) -> dict[str, Tensor]:
    return low_rank_linear_inputs(rows, *size, dtype=dtype, device=device, seed=seed)


# Training: both products and every gradient
@each_dtype
@each_size
@some("rows", [20], [1, 63], lambda m: f"M{m}")
def test_low_rank_linear_triton_gradients(rows, size, dtype, device):
    check_op(op, oracle, inputs_of([rows], size, dtype, device))


@each_half
@odd_and_aligned
def test_low_rank_linear_triton_in_16_bits(size, dtype, device):
    inputs = inputs_of([20], size, dtype, device)
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


@full
@each_dtype
@pytest.mark.parametrize("size", [(100, 1, 63), (72, 56, 24)], ids=str)
def test_low_rank_linear_triton_gradients_of_many_rows(size, dtype, device):
    check_op(op, oracle, inputs_of([257], size, dtype, device))


@each_dtype
@some("size", [(36, 40, 34)], [(90, 100, 70), (272, 264, 136)])
def test_low_rank_linear_triton_several_tiles(size, dtype, device):
    """More than one tile in every direction of every product, so that the tiles' order counts."""
    check_op(op, oracle, inputs_of([80 if size[0] == 36 else 140], size, dtype, device))


@each_dtype
def test_low_rank_linear_triton_without_bias(dtype, device):
    inputs = inputs_of([63], (100, 48, 7), dtype, device)
    del inputs["bias"]
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


@each_dtype
@odd_and_aligned
def test_low_rank_linear_triton_noncontiguous(size, dtype, device):
    check_op(op, oracle, inputs_of([20], size, dtype, device), noncontiguous=True)


@pytest.mark.parametrize("rows", [(), (3, 5), (2, 1, 40)], ids=["vector", "3d", "4d"])
def test_low_rank_linear_triton_leading_dimensions(rows, device):
    inputs = inputs_of(rows, (24, 16, 8), torch.float32, device)
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


def test_low_rank_linear_triton_zero_rows(device):
    inputs = inputs_of([0], (24, 16, 8), torch.float32, device)
    assert op(**inputs).shape == (0, 16)
    check_op(op, oracle, inputs)


@pytest.mark.parametrize("needed", ["x", "A", "B", "bias"])
def test_low_rank_linear_triton_computes_needed_gradients_only(needed, device, monkeypatch):
    inputs = inputs_of([70], (24, 16, 8), torch.float32, device)
    inputs[needed].requires_grad_()
    y = op(**inputs)
    grads = []
    backward = torch.ops.lillama.low_rank_linears_backward

    def spy(*args):
        grads.extend(backward(*args))
        return grads

    monkeypatch.setattr(torch.ops.lillama, "low_rank_linears_backward", spy)
    y.sum().backward()
    assert {n: t.grad is not None for n, t in inputs.items()} == {n: n == needed for n in inputs}
    computed = dict(zip(("x", "A", "B"), (g.numel() > 0 for g in grads), strict=True))
    assert computed == {n: n == needed for n in computed}


# Decode: 1 to 64 rows without gradients
@each_dtype
@each_size
@some("rows", [1, 17, 64], [3, 16, 32, 33, 63], lambda m: f"M{m}")
def test_low_rank_linear_triton_decode(rows, size, dtype, device):
    check_values(op, oracle, inputs_of([rows], size, dtype, device))


@some("dtype", [torch.bfloat16], [torch.float16])
@some("rows", [3], [1, 20, 64], lambda m: f"M{m}")
@some("case", [(1032, 2), (4100, 4)], [(512, 1)])
def test_low_rank_linear_triton_decode_splits_k(rows, case, dtype, device):
    in_features, split = case
    # of the interpreter's tiles and the H200's; other cards may split otherwise
    if rows <= 16:
        first, _ = decode_tiles("sm_90", dtype, rows)
        assert decode_split("sm_90", dtype, 24, in_features, first) == split
    check_values(op, oracle, inputs_of([rows], (in_features, 200, 24), dtype, device))


@each_dtype
def test_low_rank_linear_triton_decode_many_ranks(dtype, device):
    check_values(op, oracle, inputs_of([5], (64, 72, 1000), dtype, device))


def test_low_rank_linear_triton_decode_slices_of_padded_factors(device):
    """Factors as the experts store them: rows of a larger tensor, columns cut off."""
    inputs = inputs_of([5], (64, 48, 32), torch.float32, device)
    inputs |= {"A": inputs["A"][:24], "B": inputs["B"][:, :24]}
    check_values(op, oracle, inputs)
    transposed = {"A": inputs["A"].T.contiguous().T, "B": inputs["B"].T.contiguous().T}
    check_values(op, oracle, inputs | transposed)
    check_op(op, oracle, inputs | transposed)


def test_low_rank_linear_triton_offsets_beyond_int32(device):
    """Rows 2^30 elements apart; memory that nobody touches costs nothing on the CPU."""
    far = 2**30
    inputs = inputs_of([3], (16, 3, 8), torch.float16, device)
    x = torch.empty(2 * far + 16, dtype=torch.float16, device=device).as_strided((3, 16), (far, 1))
    B = torch.empty(2 * far + 8, dtype=torch.float16, device=device).as_strided((3, 8), (far, 1))
    inputs |= {"x": x.copy_(inputs["x"]), "B": B.copy_(inputs["B"])}
    del inputs["bias"]
    near = {name: tensor.clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        assert torch.equal(op(**inputs), op(**near))
    grad = torch.ones(3, 3, dtype=torch.float16, device=device)
    far_grads, near_grads = (
        torch.ops.lillama.low_rank_linears_backward(
            [grad], t["x"], [t["A"]], [t["B"]], t["x"] @ t["A"].T, True, True, [True]
        )
        for t in (inputs, near)
    )
    for one, other in zip(far_grads, near_grads, strict=True):
        assert torch.equal(one, other)


# Sizes from 8: of a handful of numbers none may be near max|truth|, by which rounding is judged.
@full
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rows=st.integers(1, 80),
    size=st.tuples(st.integers(8, 90), st.integers(8, 90), st.integers(8, 40)),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_low_rank_linear_triton_any_shape(rows, size, half, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if half else torch.float32
    inputs = inputs_of([rows], size, dtype, device, seed)
    check_values(op, oracle, inputs)
    check_op(op, oracle, inputs, seed=seed)


# How it is called: compiled, checkpointed, under autocast, on a graph
@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_low_rank_linear_triton_opcheck(rows, device):
    x, A, B, bias = inputs_of([rows], (24, 16, 8), torch.float32, device).values()
    op = torch.ops.lillama.low_rank_linears.default
    for save_z in (True, False):
        tensors = [t.clone().requires_grad_(save_z) for t in (x, A, B, bias)]
        given = tensors[0], [tensors[1]] * 2, [tensors[2]] * 2, [tensors[3]], [False, True], save_z
        torch.library.opcheck(op, given, test_utils=CHECKS)
    op = torch.ops.lillama.low_rank_linears_backward.default
    z, dy = x @ A.T, torch.randn(rows, 16, device=device)
    for needs in ((True, True, [True]), (True, False, [False]), (False, False, [False])):
        given = [dy], x, [A], [B], z, *needs
        torch.library.opcheck(op, given, test_utils=CHECKS)


# torch 2.13's tracer instantiates autograd functions and so warns about itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@some("dynamic", [True], [False], lambda d: "dynamic" if d else "static")
def test_low_rank_linear_triton_compiles_into_one_graph(dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (70, 90):
        inputs = inputs_of([rows], (24, 16, 8), torch.float32, device)
        grads = [torch.randn(rows, 16, device=device)]
        # or a compiled backward cannot run twice
        with functorch_config.patch(donated_buffer=False):
            expected, found = (values_and_grads(f, inputs, grads) for f in (op, compiled))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        inputs = inputs_of([5], (24, 16, 8), torch.float32, device)
        assert torch.equal(compiled(**inputs), op(**inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_low_rank_linear_triton_checkpointed(reentrant, device):
    inputs = inputs_of([70], (24, 16, 8), torch.float32, device)

    def run(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        y = checkpoint(op, x, A, B, bias, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        return y

    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    dy = torch.randn(70, 16, device=device)
    expected = torch.autograd.grad(op(**leaves), list(leaves.values()), dy)
    run(**leaves).backward(dy)
    for leaf, grad in zip(leaves.values(), expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_low_rank_linear_triton_autocast(rows, device):
    inputs = inputs_of([rows], (24, 16, 8), torch.float32, device)
    with torch.autocast(device.type, torch.float16):
        y = op(**inputs)
    assert y.dtype == torch.float16
    assert torch.equal(y, op(**{name: tensor.half() for name, tensor in inputs.items()}))
    # gradients arrive in the parameters' own dtype
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(device.type, torch.float16):
        y = op(**leaves)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves.values())


def test_low_rank_linear_triton_captured_on_a_graph(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: CUDA graphs")
    inputs = inputs_of([5], (256, 512, 64), torch.bfloat16, device)
    with torch.no_grad():
        expected = op(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(**inputs)
        y.fill_(float("nan"))
        graph.replay()
    assert torch.equal(y, expected)


# Where it cannot run
def test_low_rank_linear_triton_refuses_fp64(device):
    inputs = inputs_of([3], (24, 16, 8), torch.float64, device)
    with pytest.raises(TypeError, match="take float32, float16, bfloat16; got float64"):
        op(**inputs)


def test_low_rank_linear_triton_refuses_a_cpu_without_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    x, w = torch.ones(1, 8), torch.ones(8, 8)
    with pytest.raises(NotImplementedError, match="needs tensors on a CUDA device, got cpu"):
        op(x, w, w)


def test_low_rank_linear_triton_refuses_without_the_package(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    x, w = torch.ones(1, 8), torch.ones(8, 8)
    with pytest.raises(NotImplementedError, match="the package triton, which is not installed"):
        op(x, w, w)
    with kernels_impl("auto"):
        assert low_rank_linear(x, w, w).tolist() == [[64.0] * 8]
