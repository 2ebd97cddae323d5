"""Every shipped tile compiles for every GPU within its limits, and the gate sees one that does not.

The gate runs in a process of its own: here Triton is bound to its interpreter.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from lillama_kernels import compile_gate
from lillama_kernels.dispatch import TARGETS, TRITON_OPS

from tests.ops.precision import full


def python(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def gate(*arguments: str) -> tuple[list[list[str]], str]:
    """The words of each row that it prints, and its last line."""
    result = python(["-m", "lillama_kernels.compile_gate", "--all", *arguments])
    assert result.returncode == 0, result.stdout + result.stderr
    _, *rows, last = result.stdout.splitlines()
    return [row.split() for row in rows], last


@full
def test_every_shipped_tile_passes():
    """For one GPU of each kind of instructions, and without fp16, which has bf16's tiles:
    `make compile-gate` compiles everything."""
    targets = {"sm_90", "sm_100", "gfx942"}
    assert targets < set(TARGETS)
    rows, _ = gate("--quick", *(f"--target={target}" for target in sorted(targets)))
    assert {row[0] for row in rows} == targets and {row[-1] for row in rows} == {"ok"}
    for op in TRITON_OPS:
        for dtype in ("fp32", "bf16"):
            assert {row[0] for row in rows if row[1] == op and dtype in row} == targets, op


# The gate for one tile of every kernel; what is launched, compared with the tables; and a product's
# tile, made wrong in several ways. In one process: each start takes seconds.
NOTED = """
import json, torch
from lillama_kernels import compile_gate, tiles
from lillama_kernels.dispatch import DTYPES, TARGETS

assert compile_gate.main(["--all", "--target=sm_90", "--one-each"]) == 0

def found(launch, constants):
    return all(f"{name}={size}" in launch.name.split() for name, size in constants.items())

missing = []
for target in TARGETS:
    launches = compile_gate.launches(target)
    assert len({launch.name for launch in launches}) == len(launches)
    tables = [(name, tile) for dtype in DTYPES for rows in (16, 32, 64) for aligned in (True, False)
              for name, tile in zip(("first", "second"),
                                    tiles.decode_tiles(target, dtype, rows, aligned))]
    tables += [("matmul", tiles.matmul_tile(target, dtype, *how)) for dtype in DTYPES
               for how in ((True, False), (True, True), (False, False))]
    tables += [("fwd", tiles.loss_tile(16 << i)) for i in range(12)]
    bf16 = torch.bfloat16
    for block_m in (16, 32, 64, 128):
        tables += [(kernel, tiles.experts_tile(target, bf16, kernel, block_m, dense))
                   for kernel in ("first", "gated", "second", "gated_grad")
                   for dense in (False, True) if not (dense and kernel == "first")]
    tables += [("forward", tiles.scan_tile(target)), ("backward", tiles.scan_tile(target))]
    for kernel, tile in tables:
        options = tile.options
        if not any(launch.name.split()[1] == kernel and found(launch, tile.blocks)
                   and launch.options == options for launch in launches):
            missing.append((target, kernel, dict(tile.blocks), options))
launch = next(x for x in compile_gate.launches("sm_90")
              if x.name.startswith("low_rank_linear matmul fp16 BLOCK_M=128"))
place = {name: (i,) for i, name in enumerate(launch.signature)}
changes = {
    "nothing": launch,
    "spills": launch._replace(options=launch.options | {"num_warps": 4}),
    "shared": launch._replace(options=launch.options | {"num_stages": 8}),
    "compile": launch._replace(constants=launch.constants | {place["BLOCK_K"]: 48}),
}
rows = {name: compile_gate.compile_launch(changed, "sm_90") for name, changed in changes.items()}
compile_gate.MATRIX["sm_90"] = ("an instruction that there is not",)
rows["matrix"] = compile_gate.compile_launch(launch, "sm_90")
print(json.dumps([missing, {name: row.problems for name, row in rows.items()}]))
"""


@pytest.fixture(scope="module")
def noted():
    result = python(["-c", NOTED])
    assert result.returncode == 0, result.stderr
    _, *table, found = result.stdout.splitlines()
    return table, *json.loads(found)


def test_a_tile_of_every_kernel_passes(noted):
    *table, last = noted[0]
    rows = [line.split() for line in table]
    assert {row[0] for row in rows} == {"sm_90"} and {row[-1] for row in rows} == {"ok"}
    kernels = [tuple(row[1:3]) for row in rows]
    assert {op for op, _ in kernels} == TRITON_OPS
    assert len(kernels) == len(set(kernels)) == 22
    assert " 22 compiled in " in last and last.endswith(" 0 failed")


def test_every_tile_of_the_tables_is_launched(noted):
    assert noted[1] == []


def test_the_gate_sees(noted):
    problems = dict(noted[2])
    assert problems.pop("nothing") == []
    for change, found in (
        ("spills", "spills"),
        ("shared", "bytes shared, at most 232448"),
        ("matrix", "no an instruction that there is not"),
        ("compile", "does not compile"),
    ):
        assert any(found in problem for problem in problems.pop(change)), change
    assert not problems


@full
def test_the_table_has_one_line_a_kernel():
    result = python(["-m", "lillama_kernels.compile_gate", "--target=sm_90", "--kernel=combine"])
    header, line, last = result.stdout.splitlines()
    assert header.split()[:3] == ["target", "kernel", "tiles"]
    assert line.startswith("sm_90   low_rank_experts combine") and line.endswith("ok")
    assert last.endswith(" 0 failed")


@full
def test_an_unknown_kernel_is_an_error():
    result = python(["-m", "lillama_kernels.compile_gate", "--kernel", "nothing-like-it"])
    assert result.returncode == 2
    assert result.stdout == "compile_gate: no kernel's name contains 'nothing-like-it'\n"


def test_the_interpreter_compiles_nothing(device, capsys):
    if device.type == "cuda":
        pytest.skip("the interpreter is off with --device=cuda")
    assert compile_gate.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().out
