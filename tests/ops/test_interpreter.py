"""What tests/interpreter.py changes in Triton's interpreter: bf16, scans, and the strict check."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests import interpreter


@pytest.fixture(autouse=True)
def _interpreted(device):
    if device.type == "cuda":
        pytest.skip("the interpreter is off with --device=cuda")


@triton.jit
def _after(decay, value, next_decay, next_value):
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def _convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(c_ptr + at, acc)


@triton.jit
def _add_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + x)


@triton.jit
def _scan_kernel(a_ptr, b_ptr, h_ptr, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    _, h = tl.associative_scan((tl.load(a_ptr + at), tl.load(b_ptr + at)), 1, _after, REVERSE)
    tl.store(h_ptr + at, h)


@triton.jit
def _write_kernel(x_ptr, y_ptr, first, READ: tl.constexpr, N: tl.constexpr):
    """y of a program's N places from `first` times the program on."""
    offs = tl.program_id(0) * first + tl.arange(0, N)
    if READ:
        tl.store(y_ptr + offs, tl.load(y_ptr + (offs + N) % (2 * N)))
    else:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs % N))


def run(kernel, *arguments, grid: int = 1, **options) -> None:
    kernel[(grid,)](*arguments, **options)


def test_bf16_is_rounded_to_the_nearest_even():
    # halfway between two, above and below it, the largest, beyond it, tiny, not finite
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F7FFF, 0x7F7FFFFF, 0x00000001,
            0x80400000, 0x7F800000, 0xFF800000]  # fmt: skip
    special = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    x = torch.cat([special, torch.randn(54, generator=torch.Generator().manual_seed(0))])
    y = torch.empty(64, dtype=torch.bfloat16)
    run(_convert_kernel, x, y, N=64)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    back = torch.empty(64)
    run(_convert_kernel, y, back, N=64)
    assert torch.equal(back, y.float())
    x[3] = float("nan")
    run(_convert_kernel, x, y, N=64)
    assert y[3].isnan()


def test_products_of_bf16_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    c = torch.empty(32, 32)
    run(_dot_kernel, a, b, c, N=32)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_arithmetic_on_bf16_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="arithmetic on bf16"):
        run(_add_kernel, x, torch.empty_like(x), N=16)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_a_loop(reverse):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(16, 16, generator=generator) for _ in range(2))
    found, wanted = torch.empty(16, 16), torch.empty(16, 16)
    run(_scan_kernel, a, b, found, N=16, REVERSE=reverse)
    state = torch.zeros(16)
    for t in reversed(range(16)) if reverse else range(16):
        state = a[:, t] * state + b[:, t]
        wanted[:, t] = state
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture
def strict(monkeypatch):
    for owner, name in (
        (interpreter.Builder, "create_masked_load"),
        (interpreter.Builder, "create_masked_store"),
        (interpreter.Executor, "__call__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what it is set to is undone
    interpreter.sanitize()


def test_the_strict_check_passes_what_is_right(strict):
    x, y = torch.arange(16.0), torch.zeros(32)
    run(_write_kernel, x, y, 16, grid=2, READ=False, N=16)
    assert torch.equal(y, x.repeat(2))


@pytest.mark.parametrize(
    ("size", "first", "read", "message"),
    [
        (31, 16, False, "store of 1 elements outside of every argument"),
        (32, 8, False, "two programs write one element"),
        (32, 16, True, "a program reads what another one writes"),
    ],
    ids=["beyond", "twice", "race"],
)
def test_the_strict_check_sees(size, first, read, message, strict):
    x, y = torch.zeros(16), torch.zeros(64)[:size]
    with pytest.raises((AssertionError, InterpreterError), match=message):
        run(_write_kernel, x, y, first, grid=2, READ=read, N=16)
