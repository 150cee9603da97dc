"""Find launch parameters on the GPU that is here, and store them for tuned.py: python -m aiollm.kernels.autotune

The cases of the operations (workload.py) say by their lookups which kernels they launch, and for which keys. Every
member of such a kernel's CANDIDATES is compiled, in parallel processes; must agree with the reference; and is timed.
`aiollm tune` is this module's command line; `at_start` is for a worker, before it serves.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from triton.errors import TritonError

from aiollm.kernels import ahead, device, measure, tuned, workload
from aiollm.kernels.tuned import Config, Entry
from aiollm.kernels.workload import Case, Shape

Progress = Callable[[str, float], None]
"""Told what happens in a few words, and the finished part from 0 to 1."""

FINALISTS = 4  # the fastest of a first, short timing are timed again, longer
ROUNDS = 3  # of the finalists, in turn; one kernel of 3 us differed by 0.5 us from one graph to the next on an H100
REFUSALS = (AssertionError, RuntimeError, TritonError, ValueError)  # what a candidate that is none may raise
NOISE = 0.02  # a gain below 2 % is not told from chance: the default then stays


class Task(NamedTuple):
    """What to tune."""

    shape: Shape
    chosen: tuple[str, ...]  # modules or operations; none means all
    missing: bool  # only keys for which nothing is stored


class Job(NamedTuple):
    """One kernel, for one key."""

    kernel: str
    key: dict[str, int | str]
    cases: list[Case]  # all that look this key up
    candidates: list[Config]  # the kernel's default stands first


class Outcome(NamedTuple):
    """What a contest between candidates gave."""

    best: Config
    us: float  # of the best; where there are several cases, a time is the geometric mean of theirs
    times: list[tuple[float, Config]]  # microseconds of all that are right; the first candidate's stand first
    refused: list[tuple[Config, str]]  # what did not compile, fit or compute right, and why


def at_start(shape: Shape, progress: Progress) -> None:
    """Tune what $AIOLLM_TRITON_AUTOTUNE_LEVEL asks a starting worker to tune; at levels 0 and 3 that is nothing.

    Call it on the worker's device before the KV pool takes the memory, and before graphs are captured: they keep the
    parameters that they were captured with. Processes that come at once take turns, so that at level 1 the first one
    tunes for all. Errors: as `tune`.
    """
    if tuned.level() not in (1, 2):
        return
    with tuned.locked("tuning"):
        tuned.forget()
        for job, outcome in tune(Task(shape, (), tuned.level() == 1), os.cpu_count() or 1, progress):
            keep(job, outcome, tuned.user_folder())


def tune(task: Task, processes: int, progress: Progress) -> Iterator[tuple[Job, Outcome]]:
    """Time the candidates of each of the task's jobs on the current device, one result after the other.

    Errors: AssertionError where a kernel is wrong with its default; RuntimeError without a GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device, and none is visible")
    here = device.current()
    work = jobs(task, device.facts(here))
    if work:
        progress(f"compiling {sum(len(job.candidates) for job in work)} candidates", 0.0)
        _compile_in_parallel(task, device.facts(here), processes)
    for i, job in enumerate(work):
        progress(f"tuning {job.kernel} {_text(job.key)}", i / len(work))
        yield job, _measured(job, here)


def jobs(task: Task, facts: device.Device) -> list[Job]:
    """What there is to tune for a device, which need not be here: the lookups of the cases tell.

    A kernel whose module has cases is tuned on those alone: in others it is a small part of the time.
    """
    found: dict[str, Job] = {}
    modules = workload.modules()
    for module, case in workload.located(task.shape, task.chosen):
        with ahead.launches(facts, compiling=False), tuned.trial({}) as asked:
            case.run(case.make(ahead.META))
            lookups = dict(asked)
        for (kernel, *parts), default in lookups.items():
            key = dict(parts)
            others = [config for config in workload.candidates(kernel) if config != default]
            with device.standing_in(facts):
                known = any(entry.key == key for entry in tuned.stored(kernel, device.name(ahead.META)))
            if others and not (task.missing and known) and (kernel == module or kernel not in modules):
                job = found.setdefault(f"{kernel} {_text(key)}", Job(kernel, key, [], [default, *others]))
                job.cases.append(case)
    return list(found.values())


def contest(
    candidates: Sequence[Config], check: Callable[[Config], None], timed: Callable[[Config, int], float]
) -> Outcome:
    """Time all candidates shortly and the fastest again, longer; the first stays unless another is clearly faster.

    `check(config)` raises for one that is wrong or does not run; `timed(config, replays)` gives microseconds. Errors:
    what the first candidate, the default, raises; torch.AcceleratorError, as this process has then lost the device.
    """
    times: dict[int, float] = {}
    refused = []
    for i, config in enumerate(candidates):
        try:
            check(config)
            times[i] = timed(config, 5)
        except REFUSALS as error:
            if i == 0 or isinstance(error, torch.AcceleratorError):
                raise
            refused.append((config, f"{type(error).__name__}: {error}"))
    finalists = {0, *sorted(times, key=times.__getitem__)[:FINALISTS]}
    rounds = [{i: timed(candidates[i], 20) for i in finalists} for _ in range(ROUNDS)]
    times |= {i: statistics.median(us[i] for us in rounds) for i in finalists}
    best = min(finalists, key=times.__getitem__)
    if times[best] > times[0] * (1 - NOISE):
        best = 0
    return Outcome(candidates[best], times[best], [(us, candidates[i]) for i, us in sorted(times.items())], refused)


def keep(job: Job, outcome: Outcome, root: Path) -> None:
    """Store the best parameters below `root`."""
    entry = Entry(job.key, outcome.best, round(outcome.us, 2))
    here = device.current()
    tuned.save(root, job.kernel, device.name(here), measure.facts(here), [entry])


def compile_share(task: Task, facts: device.Device, index: int, processes: int) -> None:
    """Compile every `processes`-th candidate of the task, from `index` on, into Triton's cache.

    One process compiles a kernel's candidate for all keys: they often ask for the very same binary.
    """
    cases: dict[str, list[tuple[str, Config, Case]]] = {}
    for job in jobs(task, facts):
        for config in job.candidates:
            group = cases.setdefault(f"{job.kernel} {_text(config)}", [])
            group += [(job.kernel, config, case) for case in job.cases]
    for group in list(cases.values())[index::processes]:
        for kernel, config, case in group:
            with ahead.launches(facts), tuned.trial({kernel: config}), contextlib.suppress(*REFUSALS):
                case.run(case.make(ahead.META))  # one that does not compile is reported where it is timed


def _compile_in_parallel(task: Task, facts: device.Device, processes: int) -> None:
    shape = task.shape._asdict() | {"dtype": str(task.shape.dtype).removeprefix("torch.")}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

    def run(index: int) -> None:
        share = json.dumps([shape, task.chosen, task.missing, facts, index, processes])
        command = [sys.executable, "-m", "aiollm.kernels.autotune", "--share", share]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling candidates ended with status {done.returncode}: {done.stderr[-2000:]}")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, range(processes)))


def _parse_share(text: str) -> tuple[Task, device.Device, int, int]:
    shape, chosen, missing, (name, capability, *rest), index, processes = json.loads(text)
    task = Task(Shape(**shape | {"dtype": getattr(torch, shape["dtype"])}), tuple(chosen), missing)
    return task, device.Device(name, tuple(capability), *rest), index, processes


def _measured(job: Job, here: torch.device) -> Outcome:
    prepared = [(case, measure.expectation(case, here), measure.argument_sets(case, here)) for case in job.cases]

    def check(config: Config) -> None:
        with tuned.trial({job.kernel: config}):
            for case, expected, _ in prepared:
                measure.check(case, here, expected)

    def timed(config: Config, replays: int) -> float:
        with tuned.trial({job.kernel: config}):
            return statistics.geometric_mean(
                measure.microseconds(case, here, replays, sets) for case, _, sets in prepared
            )

    return contest(job.candidates, check, timed)


def report(job: Job, outcome: Outcome, every: bool) -> str:
    """The outcome in a line; with `every` one line for each candidate before it."""
    lines = []
    if every:
        ordered = sorted(outcome.times, key=lambda timed: timed[0])
        lines += [f"    {us:10.2f} us  {_text(config)}" for us, config in ordered]
        lines += [f"    {'refused':>13}  {_text(config)}: {why.splitlines()[0]}" for config, why in outcome.refused]
    us, plain = outcome.us, outcome.times[0][0]
    gain = "the default" if outcome.best == job.candidates[0] else f"default {plain:.2f} us"
    rate = statistics.geometric_mean(case.bytes for case in job.cases) / us / 1e6
    counts = f"{len(job.cases)} cases, {len(outcome.times)} right, {len(outcome.refused)} refused"
    lines.append(
        f"{job.kernel} {_text(job.key)}: {us:.2f} us ({gain}), {rate:.2f} TB/s, {_text(outcome.best)}; {counts}"
    )
    return "\n".join(lines)


def _text(values: Mapping[str, int | str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="aiollm tune",
        description="Measure which launch parameters of the kernels are fastest on this GPU, and keep them.",
    )
    parser.add_argument(
        "--model", default="qwen3-8b", metavar="FOLDER", help="model to tune for, or a known shape (qwen3-8b)"
    )
    parser.add_argument("--ops", nargs="+", default=(), metavar="OP", help="modules or operations; without it all")
    parser.add_argument("--missing", action="store_true", help="only what nothing is stored for")
    parser.add_argument("--every", action="store_true", help="show the time of every candidate")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="store below FOLDER, not in the user's cache")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (one for each core)"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)  # for the processes that compile
    options = parser.parse_args(argv)
    if options.share:
        compile_share(*_parse_share(options.share))
        return 0
    try:
        task = Task(workload.shape(options.model), tuple(options.ops), options.missing)
        root = options.write or tuned.user_folder()
        for job, outcome in tune(task, options.jobs, _print_progress):
            print(report(job, outcome, options.every), flush=True)
            keep(job, outcome, root)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print(f"aiollm tune: {error}", file=sys.stderr)
        return 1
    print(f"stored in {root}")
    return 0


def _print_progress(what: str, part: float) -> None:
    print(f"[{part:4.0%}] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
