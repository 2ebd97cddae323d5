"""Every shipped tile compiles for every GPU within its limits, and the gate sees one that does not.

The gate runs in a process of its own: here Triton is bound to its interpreter.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from lillama_kernels.dispatch import TARGETS, TRITON_OPS


def python(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_shipped_tile_passes():
    """For one GPU of each kind of instructions, and without fp16, which has bf16's tiles:
    everything takes five minutes more, and .ci/run runs that too (make compile-gate)."""
    targets = {"sm_90", "sm_100", "gfx942"}
    assert targets < set(TARGETS)
    chosen = [f"--target={target}" for target in sorted(targets)]
    result = python(["-m", "lillama_kernels.compile_gate", "--all", "--quick", *chosen])
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:-1]]
    assert {row[0] for row in rows} == targets and {row[-1] for row in rows} == {"ok"}
    ops = {row[1] for row in rows}
    assert ops == set(TRITON_OPS)
    for op in ops:
        for dtype in ("fp32", "bf16"):
            assert {row[0] for row in rows if row[1] == op and dtype in row} == targets, op


# One product's tile, made wrong in the way that the last line says
WRONG = """
import sys
from lillama_kernels import compile_gate
from lillama_kernels.low_rank_linear_launch import variants

good = next(v for v in variants("sm_90") if v.name == "low_rank_linear matmul xw fp16")
changes = {
    "nothing": good,
    "spills": good._replace(options=good.options | {"num_warps": 4}),
    "shared": good._replace(options=good.options | {"num_stages": 8}),
    "matrix": good._replace(constants=good.constants | {"BLOCK_M": 32}),
    "argument": good._replace(constants=good.constants | {"BLOCK_X": 1}),
    "compile": good._replace(constants=good.constants | {"BLOCK_K": 48}),
}
row = compile_gate.compile_variant(changes[sys.argv[1]], "sm_90")
print(row.problems)
"""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("nothing", "()"),
        ("spills", "spills"),
        ("shared", "bytes shared, at most 232448"),
        ("matrix", "no wgmma.mma_async"),
        ("compile", "does not compile"),
    ],
)
def test_the_gate_sees(change, problem):
    result = python(["-c", WRONG, change])
    assert result.returncode == 0, result.stderr
    assert problem in result.stdout, result.stdout


def test_the_gate_refuses_an_argument_that_the_kernel_does_not_take():
    result = python(["-c", WRONG, "argument"])
    assert result.returncode == 1 and "BLOCK_X" in result.stderr


def test_the_table_has_one_line_a_kernel_and_names_failures():
    result = python(["-m", "lillama_kernels.compile_gate", "--target=sm_90", "--kernel=places"])
    header, line, last = result.stdout.splitlines()
    assert header.split()[:3] == ["target", "kernel", "tiles"]
    assert line.startswith("sm_90   pivot_low_rank_linear places") and line.endswith("ok")
    assert last.endswith(" 0 failed")


def test_an_unknown_kernel_is_an_error():
    result = python(["-m", "lillama_kernels.compile_gate", "--kernel", "nothing-like-it"])
    assert result.returncode == 2
    assert result.stdout == "compile_gate: no kernel's name contains 'nothing-like-it'\n"


def test_the_interpreter_compiles_nothing():
    result = subprocess.run(
        [sys.executable, "-m", "lillama_kernels.compile_gate"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 2 and "unset TRITON_INTERPRET" in result.stdout
