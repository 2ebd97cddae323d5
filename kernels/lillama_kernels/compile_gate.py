"""Compile every shipped tile of every kernel for every target, without a GPU, and judge the result.

    python -m lillama_kernels.compile_gate [--target sm_90] [--kernel distill_loss] [--all]

A kernel file lists what it ships with `variants(target)`; the launchers take their tiles from the
same tables. Judged: no spilled register and no stack, registers and shared memory within what a
program may have, tensor-core instructions where they are expected. A row that fails ends the run
with exit code 1. Compiling takes 0.2 to 3 s a row; results lie in Triton's own cache.
"""

import argparse
import concurrent.futures
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lillama_kernels.launch import SHARED_BYTES, TARGETS

__all__ = ["Row", "Variant", "compile_variant", "main"]

# Modules with a function variants(target) -> list[Variant]
KERNEL_MODULES = (
    "low_rank_linear_launch",
    "pivot_low_rank_linear_launch",
    "low_rank_experts_variants",
    "distill_loss_triton",
    "selective_scan_launch",
    "causal_conv1d_triton",
    "mamba_mixer_step_triton",
)

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Matrix instructions in the assembly: the plain ones, and those that only wide tiles get
MATRIX = {
    "sm_80": ("mma.sync",),
    "sm_89": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
REGISTERS_PER_SM = 65_536  # every CUDA target above
MAX_REGISTERS = {"cuda": 255, "hip": 512}


class Variant(NamedTuple):
    """One compilation of a kernel.

    name: "<op> <kernel> ...", unique within the module. kernel: the jitted function. signature:
    type of each run-time argument: "*bf16", "i32", "fp32", or a tuple of them; ":16" at the end
    says that the pointer or number is a multiple of 16. constants: value of each compile-time
    argument. options: num_warps, num_stages, ... matrix: "none"; "any" tensor-core instruction; or
    "wide", the target's own best (wgmma, tcgen05).
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    matrix: str


class Row(NamedTuple):
    """What one compilation gave; problems is empty when it passed."""

    target: str
    name: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: str
    seconds: float
    problems: tuple[str, ...]


def _typed(kinds: Any, path: tuple[int, ...]) -> tuple[Any, dict[tuple[int, ...], Any]]:
    """Split "*bf16:16" into its type and its attribute, through tuples."""
    if isinstance(kinds, tuple):
        parts = [_typed(kind, (*path, i)) for i, kind in enumerate(kinds)]
        attributes = {key: value for _, attrs in parts for key, value in attrs.items()}
        return tuple(kind for kind, _ in parts), attributes
    kind, _, divisor = kinds.partition(":")
    return kind, {path: [["tt.divisibility", int(divisor)]]} if divisor else {}


def _source(variant: Variant) -> ASTSource:
    names = list(variant.kernel.arg_names)
    given = [*variant.signature, *variant.constants]
    if sorted(names) != sorted(given):
        raise ValueError(f"{variant.name}: the kernel takes {names}, the variant gives {given}")
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name], attrs = _typed(variant.signature[name], (i,))
        attributes |= attrs
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    return ASTSource(variant.kernel, signature, constants, attributes)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory (where spills go)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, and spilled registers plus bytes of scratch."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no .{key} in the assembly")
        return int(found.group(1))

    spilled = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return number("vgpr_count"), sum(map(number, spilled))


def compile_variant(variant: Variant, target: str) -> Row:
    """Compile one variant for one target and judge it."""
    start = time.perf_counter()
    gpu = GPU_TARGETS[target]
    source = _source(variant)
    try:
        compiled = triton.compile(source, target=gpu, options=variant.options)
    except Exception as error:  # a compiler's failure is a finding, whatever its type
        seconds = time.perf_counter() - start
        last_line = (str(error).splitlines() or [""])[-1]
        problem = f"does not compile: {type(error).__name__}: {last_line}"
        return Row(target, variant.name, 0, 0, 0, "", seconds, (problem,))
    if gpu.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spills = _cuda_usage(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spills = _hip_usage(assembly)
    metadata: Any = compiled.metadata
    found = next((name for name in MATRIX[target] if name in assembly), "")
    problems = []
    if spills:
        problems.append(f"spills {spills}")
    threads = metadata.num_warps * gpu.warp_size
    limit = MAX_REGISTERS[gpu.backend]
    if gpu.backend == "cuda":
        limit = min(limit, REGISTERS_PER_SM // threads)
    if registers > limit:
        problems.append(f"{registers} registers a thread, at most {limit} for {threads} threads")
    if metadata.shared > SHARED_BYTES[target]:
        problems.append(f"{metadata.shared} bytes shared, at most {SHARED_BYTES[target]}")
    wanted = {"none": (), "any": MATRIX[target], "wide": MATRIX[target][:1]}[variant.matrix]
    if wanted and found not in wanted:
        problems.append(f"no {' or '.join(wanted)}")
    return Row(
        target,
        variant.name,
        registers,
        spills,
        metadata.shared,
        found,
        time.perf_counter() - start,
        tuple(problems),
    )


@functools.cache
def _shipped(module: str, target: str) -> tuple[Variant, ...]:
    """The variants of a kernel module; in a worker process, so nothing is pickled but names."""
    rows = tuple(importlib.import_module(f"lillama_kernels.{module}").variants(target))
    names = [row.name for row in rows]
    if not rows or len(set(names)) != len(names):
        raise ValueError(f"{module} must list at least one variant for {target}, names unique")
    return rows


def _has_twin(variant: Variant, others: tuple[Variant, ...]) -> bool:
    """Whether another variant is this one of fp16 with bf16 in its place."""
    twin = variant.name.replace(" fp16", " bf16")
    return twin != variant.name and any(
        (other.name, other.constants, other.options) == (twin, variant.constants, variant.options)
        for other in others
    )


def _judge(module: str, target: str, index: int) -> Row:
    return compile_variant(_shipped(module, target)[index], target)


def _line(name: str, rows: list[Row]) -> str:
    """The largest figures of some rows of one target, and what is wrong with them."""
    problems = [f"{row.name}: {problem}" for row in rows for problem in row.problems]
    matrix = "/".join(sorted({row.matrix for row in rows} - {""})) or "-"
    return (
        f"{rows[0].target:7} {name:52} {len(rows):5} {max(row.registers for row in rows):4} "
        f"{max(row.spills for row in rows):6} {max(row.shared_bytes for row in rows):7} "
        f"{matrix:24} {sum(row.seconds for row in rows):7.1f}  "
        + ("FAILED: " + "; ".join(problems) if problems else "ok")
    )


def main(argv: list[str] | None = None) -> int:
    """Print one line a kernel and target, or one a compilation, and return the exit code."""
    parser = argparse.ArgumentParser(prog="compile_gate", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all when left out")
    parser.add_argument("--kernel", default="", help="only names that contain this")
    parser.add_argument("--all", action="store_true", help="one line for each tile and dtype")
    parser.add_argument(
        "--quick", action="store_true", help="bf16 only where fp16 has the same tile"
    )
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        print("compile_gate: unset TRITON_INTERPRET; the interpreter compiles nothing")
        return 2
    jobs = [
        (module, target, index)
        for target in arguments.target or TARGETS
        for module in KERNEL_MODULES
        for index, variant in enumerate(_shipped(module, target))
        if arguments.kernel in variant.name
        and not (arguments.quick and _has_twin(variant, _shipped(module, target)))
    ]
    if not jobs:
        print(f"compile_gate: no kernel's name contains {arguments.kernel!r}")
        return 2
    print(
        f"{'target':7} {'kernel':52} tiles {'regs':>4} spills {'shared':>7} {'matrix':24} seconds"
    )
    failed = 0
    start = time.perf_counter()
    groups: dict[tuple[str, str], list[Row]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(_judge, *zip(*jobs, strict=True)):
            failed += bool(row.problems)
            groups.setdefault((row.target, " ".join(row.name.split()[:2])), []).append(row)
            if arguments.all:
                print(_line(row.name, [row]), flush=True)
    if not arguments.all:
        for (_, name), rows in groups.items():
            print(_line(name, rows))
    seconds = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(jobs)} compiled in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
