"""Compile every shipped tile of every kernel for every target, without a GPU, and judge the result.

    python -m lillama_kernels.compile_gate [--target sm_90] [--kernel distill_loss] [--all]

What is compiled is what the launchers launch: `shipped.calls` run under a driver that notes each
launch and does nothing. Judged: no spilled register and no stack, registers and shared memory
within what a program may have, tensor-core instructions where they are expected. A row that fails
ends the run with exit code 1. Compiling takes 0.2 to 3 s a row; results lie in Triton's own cache.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from lillama_kernels import shipped
from lillama_kernels.dispatch import TARGETS, TRITON_OPS, compiling_for
from lillama_kernels.tiles import SHARED_BYTES

__all__ = ["Launch", "Row", "compile_launch", "launches", "main"]

GPU_TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 89, 90, 100)}
GPU_TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Matrix instructions in the assembly, the best first, which only wide tiles get
MATRIX = {"sm_80": ("mma.sync",), "sm_89": ("mma.sync",), "gfx942": ("v_mfma",)}
MATRIX |= {"sm_90": ("wgmma.mma_async", "mma.sync"), "sm_100": ("tcgen05.mma", "mma.sync")}
REGISTERS_PER_SM = 65_536  # every CUDA target above


class Launch(NamedTuple):
    """One way in which a launcher calls a kernel, as Triton's compiler is told.

    name: "<op> <kernel> <dtype> ...", unique among a target's. module and function: the kernel.
    signature: the type of each argument. constants and attributes: what is known of arguments when
    compiling, by their places. options: num_warps, num_stages, ...
    """

    name: str
    module: str
    function: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


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


class _Driver:
    """A GPU that is not there: enough of a driver for a launch to be prepared. Triton keeps what it
    knows of a kernel by device, so that each target is a device."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPU_TARGETS[self.target]


@contextlib.contextmanager
def _noting(target: str, hook: Any) -> Iterator[None]:
    """Launches for a target go to the hook, which keeps Triton from compiling and launching. The
    driver stays: there may be none to go back to."""
    active: Any = _Driver(target)
    driver.set_active(active)
    knobs.runtime.jit_cache_hook = hook
    try:
        with compiling_for(target):
            yield
    finally:
        knobs.runtime.jit_cache_hook = None


def _name(kernel: Any, signature: dict[str, Any], constants: dict[str, Any]) -> str:
    whole = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
    op = max((op for op in TRITON_OPS if whole.startswith(op)), key=len)
    pointers = (kind for kind in signature.values() if str(kind).startswith("*"))
    dtype = signature.get("x_ptr", next(pointers))
    flags = [n for n, value in constants.items() if value is True]
    sizes = [f"{n}={v}" for n, v in constants.items() if not isinstance(v, bool) and v is not None]
    return " ".join([op, whole.removeprefix(f"{op}_"), dtype[1:], *sizes, *flags])


def launches(target: str) -> list[Launch]:
    """Every different launch of `shipped.calls` on a target, in their order."""
    found: dict[str, Launch] = {}
    names: dict[str, int] = {}

    def hook(key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key = f"{fn.name} {key}"
        if key not in found:
            places = list(compile["signature"])
            given = {places[p[0]]: v for p, v in compile["constants"].items() if len(p) == 1}
            name = _name(fn.jit_function, compile["signature"], given)
            names[name] = names.get(name, 0) + 1
            found[key] = Launch(
                name if names[name] == 1 else f"{name} #{names[name]}",
                fn.module,
                fn.name,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {n: compile[n] for n in ("num_warps", "num_stages", "enable_fp_fusion")},
            )
        return True

    with _noting(target, hook):
        for call in shipped.calls():
            call()
    return list(found.values())


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory (where spills go)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, and those spilled plus bytes of scratch. Scalar registers spill
    into lanes of vector registers, not into memory: the ranks of 64 experts do."""
    wanted = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    found = {key: re.search(rf"\.{key}:\s*(\d+)", assembly) for key in wanted}
    registers, *spills = (int(match[1]) for match in found.values() if match)
    if len(spills) < 2:
        raise RuntimeError(f"the assembly says not all of {', '.join(wanted)}")
    return registers, sum(spills)


def _wanted(ttir: str, target: str) -> tuple[str, ...]:
    """The matrix instructions of which one is expected: any in 16 bits, the target's own best where
    all products have 64 rows or more."""
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)>", ttir)
    if not products or any(dtype == "f32" for _, dtype in products):
        return ()
    wide = all(int(rows) >= 64 for rows, _ in products)
    return MATRIX[target][:1] if wide else MATRIX[target]


def compile_launch(launch: Launch, target: str) -> Row:
    """Compile one launch for one target and judge it."""
    start = time.perf_counter()
    gpu = GPU_TARGETS[target]
    kernel = getattr(importlib.import_module(launch.module), launch.function)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=gpu, options=launch.options)
    except Exception as error:  # a compiler's failure is a finding, whatever its type
        seconds = time.perf_counter() - start
        last_line = (str(error).splitlines() or [""])[-1]
        problem = f"does not compile: {type(error).__name__}: {last_line}"
        return Row(target, launch.name, 0, 0, 0, "", seconds, (problem,))
    cuda = gpu.backend == "cuda"
    assembly = compiled.asm["ptx" if cuda else "amdgcn"]
    registers, spills = _cuda_usage(compiled.asm["cubin"]) if cuda else _hip_usage(assembly)
    shared = int(getattr(compiled.metadata, "shared"))  # noqa: B009
    found = next((name for name in MATRIX[target] if name in assembly), "")
    wanted = _wanted(compiled.asm["ttir"], target)
    threads = launch.options["num_warps"] * gpu.warp_size
    limit = min(255, REGISTERS_PER_SM // threads) if cuda else 512
    judged = (
        (not spills, f"spills {spills}"),
        (registers <= limit, f"{registers} registers, at most {limit} for {threads} threads"),
        (shared <= SHARED_BYTES[target], f"{shared} bytes shared, at most {SHARED_BYTES[target]}"),
        (not wanted or found in wanted, f"no {' or '.join(wanted)}"),
    )
    problems = tuple(problem for right, problem in judged if not right)
    seconds = time.perf_counter() - start
    return Row(target, launch.name, registers, spills, shared, found, seconds, problems)


def _kernel_of(name: str) -> str:
    return " ".join(name.split()[:2])


def _chosen(target: str, part: str, quick: bool, one_each: bool) -> list[Launch]:
    """The launches whose names contain part; quick: bf16 alone where fp16 is the same; one_each:
    the first bf16 launch of each kernel, or its first."""
    found = [launch for launch in launches(target) if part in launch.name]
    names = {launch.name for launch in found}
    if quick:
        found = [x for x in found if x.name.replace(" fp16", " bf16") not in names - {x.name}]
    if one_each:
        found.sort(key=lambda launch: " bf16" not in launch.name)
        found = list({_kernel_of(launch.name): launch for launch in reversed(found)}.values())
    return found


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
    parser.add_argument("--quick", action="store_true", help="no fp16 where bf16 has that tile")
    parser.add_argument("--one-each", action="store_true", help="one tile of each kernel only")
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        print("compile_gate: unset TRITON_INTERPRET; the interpreter compiles nothing")
        return 2
    jobs = [
        (launch, target)
        for target in arguments.target or TARGETS
        for launch in _chosen(target, arguments.kernel, arguments.quick, arguments.one_each)
    ]
    if not jobs:
        print(f"compile_gate: no kernel's name contains {arguments.kernel!r}")
        return 2
    columns = f"{'kernel':52} tiles regs spills  shared {'matrix':24} seconds"
    print(f"{'target':7} {columns}")
    failed, start = 0, time.perf_counter()
    groups: dict[tuple[str, str], list[Row]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(compile_launch, *zip(*jobs, strict=True)):
            failed += bool(row.problems)
            groups.setdefault((row.target, _kernel_of(row.name)), []).append(row)
            if arguments.all:
                print(_line(row.name, [row]), flush=True)
    for (_, name), rows in () if arguments.all else groups.items():
        print(_line(name, rows))
    seconds = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(jobs)} compiled in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
