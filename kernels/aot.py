"""Compile the Triton kernels for GPUs that are not there, and show what each costs: python -m aiollm.kernels.aot

The operations' own host functions run over their cases (workload.py) without launching anything (ahead.py). What a
kernel may cost stands in a file of limits.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs

from aiollm.kernels import device, tuned
from aiollm.kernels.ahead import META, launches
from aiollm.kernels.workload import SHAPES, Case, cases

TENSOR_MEMORY = 512  # columns that a block may have from sm_100 on
SLACK = {"registers": 8, "stack": 0, "shared": 1024}  # how far a cost may grow unsaid: other specialisations differ so


class Compiled(NamedTuple):
    """One kernel as compiled for one target; registers and stack are those of a thread, sizes are in bytes."""

    kernel: str  # module.function
    target: str  # sm_90
    label: str  # the first case that launched it
    options: str  # what tells it from the kernel's other specialisations
    warps: int
    registers: int
    stack: int  # spilled registers and arrays that found no register
    shared: int
    cubin: int


class Failed(NamedTuple):
    """A case that a target got no kernel for."""

    op: str
    target: str
    label: str
    error: str


def compile_cases(chosen: Iterable[Case], target: str) -> Iterator[Compiled | Failed]:
    """Each kernel that the cases launch, once for each specialisation."""
    with launches(device.STAND_INS[target]) as compiled:
        for case in chosen:
            before = set(compiled)
            try:
                case.run(case.make(META))
            except Exception as error:  # noqa: BLE001  any kernel may fail to compile; the others are still of interest
                yield Failed(case.op, target, case.label, _innermost(error))
            for digest in [d for d in compiled if d not in before]:
                kernel, result = compiled[digest]
                columns = getattr(result.metadata, "tmem_size", None) or 0
                if columns > TENSOR_MEMORY:
                    yield Failed(case.op, target, case.label, f"{columns} columns of tensor memory")
                registers, stack = _resources(result.asm["cubin"])
                yield Compiled(
                    f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}",
                    target,
                    f"{case.op} {case.label}",
                    _options(kernel, result),
                    result.metadata.num_warps,
                    registers,
                    stack,
                    result.metadata.shared,
                    len(result.asm["cubin"]),
                )


def _innermost(error: BaseException) -> str:
    """Triton wraps an error once for each kernel that calls another; it says what is wrong in the first of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _options(kernel: Any, result: Any) -> str:
    """The values known at compile time, and stages and warps."""
    values = {kernel.arg_names[path[0]]: value for path, value in result.src.constants.items() if len(path) == 1}
    values |= {"num_warps": result.metadata.num_warps, "num_stages": result.metadata.num_stages}
    return " ".join(f"{name}={value}" for name, value in values.items())


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])


def compile_everywhere(
    chosen: Sequence[str], shapes: Sequence[str], targets: Sequence[str], jobs: int
) -> Iterator[Compiled | Failed]:
    """Compile for every target, each in a process of its own: `chosen` names modules or operations, none means all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_one(target: str) -> list[Compiled | Failed]:
        arguments = ["--targets", target, "--shapes", *shapes, "--lines"]
        command = [sys.executable, "-m", "aiollm.kernels.aot", *chosen, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling for {target} ended with status {done.returncode}: {done.stderr[-2000:]}")
        records = [json.loads(line) for line in done.stdout.splitlines()]
        return [Failed(**record) if "error" in record else Compiled(**record) for record in records]

    with tempfile.TemporaryDirectory() as nothing, ThreadPoolExecutor(jobs) as pool:
        environment["AIOLLM_CACHE_DIR"] = nothing  # what this user has tuned is nobody else's limit
        for results in pool.map(compile_one, targets):
            yield from results


def table(results: Iterable[Compiled]) -> str:
    """The dearest specialisation of each kernel for each target; the rest in a word."""
    rows: list[tuple[str, ...]] = [
        ("kernel", "target", "variants", "warps", "registers", "stack", "shared", "cubin", "of the dearest")
    ]
    for group in _groups(results):
        worst = max(group, key=lambda result: (result.stack, result.registers, result.shared))
        numbers = (len(group), worst.warps, worst.registers, worst.stack, worst.shared, worst.cubin)
        rows.append((worst.kernel, worst.target, *map(str, numbers), f"{worst.label}: {worst.options}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows
    )


def _groups(results: Iterable[Compiled]) -> list[list[Compiled]]:
    """The specialisations of each kernel for each target."""
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for result in results:
        groups.setdefault((result.kernel, result.target), []).append(result)
    return [groups[place] for place in sorted(groups)]


def measured(results: Iterable[Compiled]) -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> target -> the largest registers, stack and shared memory of its specialisations."""
    most: dict[str, dict[str, dict[str, int]]] = {}
    for group in _groups(results):
        costs = {name: max(getattr(result, name) for result in group) for name in SLACK}
        most.setdefault(group[0].kernel, {})[group[0].target] = costs
    return most


def complaints(results: Sequence[Compiled | Failed], limits: dict[str, Any]) -> Iterator[str]:
    """What is wrong, one sentence each: failures, stacks that no reason is given for, too much shared memory, growth.

    `limits` is the file's content: "triton" maps a minor version to what `measured` gave with it, and "stack" a kernel
    to the reason for which its threads may have a stack. With a Triton that the file does not know, only failures and
    shared memory are told: each version spills elsewhere.
    """
    failures: dict[str, list[str]] = {}
    for failed in (result for result in results if isinstance(result, Failed)):
        failures.setdefault(failed.error, []).append(f"{failed.op} {failed.label} for {failed.target}")
    for error, places in failures.items():
        yield f"{places[0]} does not compile, nor do {len(places) - 1} other cases: {error}"
    held = limits["triton"].get(tuned.TRITON)
    compiled = [result for result in results if isinstance(result, Compiled)]
    for group in _groups(compiled):
        largest, deepest = max(group, key=lambda r: r.shared), max(group, key=lambda r: r.stack)
        room = device.STAND_INS[largest.target].shared_memory
        if largest.shared > room:
            yield f"{_place(largest)} wants {largest.shared} bytes of shared memory, a block has {room}"
        if held is not None and deepest.stack and deepest.kernel not in limits["stack"]:
            yield f"{_place(deepest)} keeps {deepest.stack} bytes of each thread in memory"
    for kernel, targets in measured(compiled).items():
        for target, costs in targets.items():
            for name, limit in (held or {}).get(kernel, {}).get(target, {}).items():
                if costs[name] > limit + SLACK[name]:
                    yield f"{kernel} for {target} takes {costs[name]} {name}, up from {limit}"


def dumped(limits: dict[str, Any]) -> str:
    """JSON with one line for each kernel."""
    versions = []
    for version, kernels in sorted(limits["triton"].items()):
        lines = [
            f"   {json.dumps(kernel)}: {json.dumps(kernels[kernel], sort_keys=True)}" for kernel in sorted(kernels)
        ]
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    reasons = json.dumps(limits["stack"], indent=2, sort_keys=True).replace("\n", "\n ")
    return f'{{\n "stack": {reasons},\n "triton": {{\n' + ",\n".join(versions) + "\n }\n}\n"


def _place(result: Compiled) -> str:
    return f"{result.kernel} for {result.target} ({result.label}: {result.options})"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m aiollm.kernels.aot", description=__doc__)
    parser.add_argument("chosen", nargs="*", help="modules or operations; without them all")
    parser.add_argument("--targets", nargs="+", choices=list(device.STAND_INS), default=list(device.STAND_INS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen3-8b"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limits", type=Path, help="file of limits to check against")
    parser.add_argument("--write", action="store_true", help="write what was measured into the file of limits")
    parser.add_argument("--lines", action="store_true", help="compile for one target here, print one JSON line each")
    options = parser.parse_args(argv)
    if options.write and not options.limits:
        parser.error("--write needs --limits FILE")
    try:
        all_cases = [case for shape in options.shapes for case in cases(SHAPES[shape], options.chosen)]
    except ValueError as error:
        parser.error(str(error))
    if options.lines:
        for result in compile_cases(all_cases, *options.targets):
            print(json.dumps(result._asdict()), flush=True)
        return 0
    results = list(compile_everywhere(options.chosen, options.shapes, options.targets, options.jobs))
    compiled = [result for result in results if isinstance(result, Compiled)]
    print(f"Triton {triton.__version__}\n{table(compiled)}")
    limits = json.loads(options.limits.read_bytes()) if options.limits else {"stack": {}, "triton": {tuned.TRITON: {}}}
    if options.write:
        kept = limits["triton"].get(tuned.TRITON, {}) if options.chosen else {}
        limits["triton"][tuned.TRITON] = kept | measured(compiled)
        options.limits.write_text(dumped(limits), encoding="utf-8")
    found = list(complaints(results, limits)) if results else ["nothing was launched"]
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
