"""The Triton kernels of pivot_low_rank_linear against indices in fp64: both ways, every gradient.

On the CPU they run in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import pytest
import torch
from lillama_kernels import dispatch, kernels_impl, pivot_low_rank_linear
from lillama_kernels.testing import (
    check_op,
    check_values,
    pivot_low_rank_linear_inputs,
    values_and_grads,
)
from lillama_kernels.tiles import decode_split, decode_tiles
from torch import Tensor
from torch._functorch import config as functorch_config

from lillama.modules.low_rank_linear import PivotLowRankLinear
from lillama.serve.models.runner import projection
from tests.ops.precision import each_dtype, each_half, full, some

# K, N, R: C empty, C of one row, no multiple of a tile, multiples of 8 that are none of 16
SIZES = [(24, 9, 8), (40, 24, 24), (257, 63, 8)]
MORE = [(1, 1, 1), (63, 257, 100), (72, 56, 24)]
# what opcheck does beside is in the tests of torch.compile
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
each_size = some("size", SIZES, MORE, lambda s: "K{}-N{}-R{}".format(*s))


def made(rows, size, dtype, device, seed=0):
    """The op and its oracle as functions of the floating tensors, and these."""
    inputs, order = pivot_low_rank_linear_inputs(rows, *size, dtype=dtype, device=device, seed=seed)

    def op(x: Tensor, A: Tensor, C: Tensor, bias: Tensor | None = None) -> Tensor:
        return pivot_low_rank_linear(x, A, C, order, bias, impl="triton")

    def oracle(x: Tensor, A: Tensor, C: Tensor, bias: Tensor | None = None) -> Tensor:
        z = torch.einsum("...k,rk->...r", x, A)
        rest = torch.einsum("...r,nr->...n", z, C)
        columns = [*z.unbind(-1), *rest.unbind(-1)]
        y = torch.stack([columns[int(place)] for place in order], -1)
        return y if bias is None else y + bias

    return op, oracle, inputs


# Training: both products and every gradient
@each_dtype
@each_size
@some("rows", [20], [63], lambda m: f"M{m}")
def test_pivot_triton_gradients(rows, size, dtype, device):
    check_op(*made([rows], size, dtype, device))


@each_half
@pytest.mark.parametrize("size", [(25, 41, 7), (24, 56, 16)], ids=["odd", "aligned"])
def test_pivot_triton_in_16_bits(size, dtype, device):
    op, oracle, inputs = made([20], size, dtype, device)
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


def test_pivot_triton_gradients_of_one_row(device):
    check_op(*made([1], (63, 257, 100), torch.float32, device))


@pytest.mark.parametrize(
    ("rows", "size", "dtype"),
    [
        pytest.param(80, (36, 76, 34), torch.float32, id="odd-fp32"),
        pytest.param(140, (136, 400, 72), torch.float16, id="aligned-fp16", marks=full),
        pytest.param(140, (136, 400, 72), torch.bfloat16, id="aligned-bf16", marks=full),
    ],
)
def test_pivot_triton_several_tiles(rows, size, dtype, device):
    """More than one tile in every direction of every product, so that the tiles' order counts."""
    check_op(*made([rows], size, dtype, device))


@each_dtype
@some("rows", [3], [70], lambda m: f"M{m}")
@pytest.mark.parametrize("size", [(100, 48, 7), (64, 48, 8)], ids=["odd", "aligned"])
def test_pivot_triton_noncontiguous_and_without_bias(rows, size, dtype, device):
    op, oracle, inputs = made([rows], size, dtype, device)
    check_op(op, oracle, inputs, noncontiguous=True)
    transposed = {name: inputs[name].T.contiguous().T for name in ("x", "A", "C")}
    check_values(op, oracle, inputs | transposed)
    del inputs["bias"]
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


@pytest.mark.parametrize("rows", [(), (3, 5), (2, 1, 40)], ids=["vector", "3d", "4d"])
def test_pivot_triton_leading_dimensions(rows, device):
    check_op(*made(rows, (24, 16, 8), torch.float32, device))
    check_values(*made(rows, (24, 16, 8), torch.float32, device))


def test_pivot_triton_zero_rows(device):
    op, oracle, inputs = made([2, 0], (24, 16, 8), torch.float32, device)
    assert op(**inputs).shape == (2, 0, 16)
    # the factors' gradients are sums over no rows: zero, not uninitialised
    check_op(op, oracle, inputs)


@pytest.mark.parametrize("needed", ["x", "A", "C", "bias"])
def test_pivot_triton_computes_needed_gradients_only(needed, device, monkeypatch):
    op, _, inputs = made([70], (24, 16, 8), torch.float32, device)
    inputs[needed].requires_grad_()
    y = op(**inputs)
    grads = []
    backward = torch.ops.lillama.pivot_low_rank_linear_backward

    def spy(*args):
        grads.extend(backward(*args))
        return grads

    monkeypatch.setattr(torch.ops.lillama, "pivot_low_rank_linear_backward", spy)
    y.sum().backward()
    assert {n: t.grad is not None for n, t in inputs.items()} == {n: n == needed for n in inputs}
    computed = dict(zip(("x", "A", "C"), (g.numel() > 0 for g in grads), strict=True))
    assert computed == {n: n == needed for n in computed}


# Decode: 1 to 64 rows without gradients
@each_dtype
@each_size
@pytest.mark.parametrize("rows", [1, 33], ids=lambda m: f"M{m}")
def test_pivot_triton_decode(rows, size, dtype, device):
    check_values(*made([rows], size, dtype, device))


@some("dtype", [torch.bfloat16], [torch.float16])
@some("case", [(1032, 2), (4100, 4)], [(512, 1)])
def test_pivot_triton_decode_splits_k(case, dtype, device):
    in_features, split = case
    # of the interpreter's tiles and the H200's; other cards may split otherwise
    first, _ = decode_tiles("sm_90", dtype, 3)
    assert decode_split("sm_90", dtype, 24, in_features, first) == split
    check_values(*made([3], (in_features, 100, 24), dtype, device))


@each_dtype
def test_pivot_triton_decode_many_ranks(dtype, device):
    check_values(*made([5], (64, 340, 300), dtype, device))


# numpy, which multiplies in the interpreter, says of 0 times infinity
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pivot_triton_decode_adds_no_other_column_to_a_pivot(device):
    """An infinite z does not reach the outputs of other pivots, where zeros stand in C's place."""
    _, _, inputs = made([3], (24, 24, 8), torch.float32, device)
    inputs["x"][:] = 1.0
    inputs["A"][0] = float("inf")
    order = torch.arange(24, dtype=torch.int32, device=device)
    with torch.no_grad():
        y = pivot_low_rank_linear(inputs["x"], inputs["A"], inputs["C"], order, impl="triton")
    assert y[:, 0].isinf().all() and y[:, 1:8].isfinite().all()


@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_pivot_triton_pivots_are_the_inner_products_bit_for_bit(rows, device):
    _, _, inputs = made([rows], (24, 40, 8), torch.float32, device)
    order = torch.arange(40, device=device).flip(0)  # int64
    with torch.no_grad():
        x, A, C = (inputs[name] for name in ("x", "A", "C"))
        y = pivot_low_rank_linear(x, A, C, order, impl="triton")
        z = pivot_low_rank_linear(x, A, C[:0], order[-8:], impl="triton")
    assert torch.equal(y[:, -8:], z)


def test_pivot_triton_offsets_beyond_int32(device):
    """Rows 2^30 elements apart; memory that nobody touches costs nothing on the CPU."""
    far = 2**30
    inputs, order = pivot_low_rank_linear_inputs([3], 16, 11, 8, dtype=torch.float16, device=device)
    x = torch.empty(2 * far + 16, dtype=torch.float16, device=device).as_strided((3, 16), (far, 1))
    C = torch.empty(2 * far + 8, dtype=torch.float16, device=device).as_strided((3, 8), (far, 1))
    spread = {"x": x.copy_(inputs["x"]), "A": inputs["A"], "C": C.copy_(inputs["C"])}
    near = {name: tensor.clone() for name, tensor in spread.items()}
    dy = torch.ones(3, 11, dtype=torch.float16, device=device)
    found = []
    for given in (spread, near):
        tensors = given["x"], given["A"], given["C"]
        with torch.no_grad():
            decoded = pivot_low_rank_linear(*tensors, order, impl="triton")
        y, z = torch.ops.lillama.pivot_low_rank_linear(*tensors, order, None, True)
        grads = torch.ops.lillama.pivot_low_rank_linear_backward(
            dy, *tensors, order, z, True, True, True
        )
        found.append([decoded, y, z, *grads])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# How it is called: compiled, under autocast, on a graph, by the layer
@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_pivot_triton_opcheck(rows, device):
    inputs, order = pivot_low_rank_linear_inputs(
        [rows], 24, 16, 8, dtype=torch.float32, device=device
    )
    for save_z in (True, False):
        x, A, C, bias = (
            inputs[name].clone().requires_grad_(save_z) for name in ("x", "A", "C", "bias")
        )
        for given in (bias, None):
            op = torch.ops.lillama.pivot_low_rank_linear.default
            torch.library.opcheck(op, (x, A, C, order, given, save_z), test_utils=CHECKS)
    x, A, C = (inputs[name] for name in ("x", "A", "C"))
    z, dy = x @ A.T, torch.randn(rows, 16, device=device)
    for needs in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(
            torch.ops.lillama.pivot_low_rank_linear_backward.default,
            (dy, x, A, C, order, z, *needs),
            test_utils=CHECKS,
        )


# torch 2.13's tracer instantiates autograd functions and so warns about itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@full
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pivot_triton_compiles_into_one_graph(dynamic, device):
    torch.compiler.reset()
    op, _, inputs = made([90], (24, 16, 8), torch.float32, device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (70, 90):
        given = inputs | {"x": inputs["x"][:rows]}
        grads = [torch.randn(rows, 16, device=device)]
        # or a compiled backward cannot run twice
        with functorch_config.patch(donated_buffer=False):
            expected, found = (values_and_grads(f, given, grads) for f in (op, compiled))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        given = inputs | {"x": inputs["x"][:5]}
        assert torch.equal(compiled(**given), op(**given))


@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_pivot_triton_autocast(rows, device):
    op, _, inputs = made([rows], (24, 16, 8), torch.float32, device)
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


@pytest.mark.parametrize("rows", [5, 70], ids=["decode", "many"])
def test_pivot_triton_captured_on_a_graph(rows, device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: CUDA graphs")
    op, _, inputs = made([rows], (256, 512, 64), torch.bfloat16, device)
    with torch.no_grad():
        expected = op(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(**inputs)
        y.fill_(float("nan"))
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", [3, 70], ids=["decode", "many"])
def test_pivot_layer_and_engine_run_triton(rows, device):
    inputs, order = pivot_low_rank_linear_inputs(
        [rows], 24, 16, 8, dtype=torch.float32, device=device
    )
    layer = PivotLowRankLinear(24, 16, 8, bias=True, device=device)
    layer.load_state_dict(
        {"lr_A": inputs["A"], "lr_C": inputs["C"], "bias": inputs["bias"], "lr_order": order}
    )
    with kernels_impl("triton", ops=["pivot_low_rank_linear"]):
        trained = layer(inputs["x"])
        with torch.no_grad():
            served = layer(inputs["x"])
            # what the engine runs anywhere but on a CPU
            engine = projection(layer, torch.device("cuda"))(inputs["x"])
    want = torch.nn.functional.linear(inputs["x"], layer.weight, layer.bias)
    torch.testing.assert_close(trained, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(engine, served)


# What "auto" takes, and where it cannot run
@pytest.mark.parametrize(
    ("rows", "size", "dtype", "trains", "runs_triton"),
    [
        (64, (24, 16, 8), torch.float16, False, True),
        (65, (24, 16, 8), torch.float16, False, False),
        (3, (24, 16, 8), torch.float16, True, False),
        (3, (20, 16, 8), torch.float16, False, False),
        (3, (24, 17, 8), torch.float16, False, False),
        (3, (24, 24, 24), torch.float32, False, True),
        (3, (24, 16, 8), torch.float64, False, False),
    ],
    ids=["64 rows", "65 rows", "training", "K 20", "N 17", "C empty", "fp64"],
)
def test_pivot_auto_on_a_gpu(rows, size, dtype, trains, runs_triton, device, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(
        dispatch,
        "resolve_impl",
        lambda op, impl, x, auto, dtype: asked.append((op, auto)) or "reference",
    )
    inputs, order = pivot_low_rank_linear_inputs([rows], *size, dtype=dtype, device="cpu")
    x, A, C = (inputs[name].requires_grad_(trains) for name in ("x", "A", "C"))
    pivot_low_rank_linear(x, A, C, order)
    assert asked == [("pivot_low_rank_linear", "triton" if runs_triton else "reference")]


def test_pivot_triton_refuses_fp64_and_unknown_gpus(device, monkeypatch):
    op, _, inputs = made([3], (24, 16, 8), torch.float64, device)
    with pytest.raises(TypeError, match="take float32, float16, bfloat16; got float64"):
        op(**inputs)
    monkeypatch.setattr(dispatch, "_target", lambda *_: None)
    with pytest.raises(NotImplementedError, match="no Triton tiles for the GPU"):
        op(**{name: tensor.float() for name, tensor in inputs.items()})


def test_pivot_triton_refuses_a_cpu_without_interpreter(monkeypatch):
    op, _, inputs = made([3], (24, 16, 8), torch.float32, "cpu")
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(NotImplementedError, match="pivot_low_rank_linear: impl='triton' needs"):
        op(**inputs)
