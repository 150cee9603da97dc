import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aiollm.kernels import autotune, device, tuned
from aiollm.kernels.autotune import REFUSALS, Config, Job, Outcome, Task, contest, report
from aiollm.kernels.workload import SHAPES, Case

CANDIDATES = [{"num_warps": w} for w in (1, 2, 4, 8, 16, 32)]


def run(us: dict[int, float], candidates: Sequence[Config] = CANDIDATES) -> tuple[Outcome, list[tuple[int, int]]]:
    """A contest with these times by number of warps, where one without a time is wrong; and what was timed how long."""
    log = []

    def check(config: Config) -> None:
        assert config["num_warps"] in us, f"{config['num_warps']} is wrong\nby far"

    def timed(config: Config, replays: int) -> float:
        log.append((config["num_warps"], replays))
        return us[config["num_warps"]]

    return contest(candidates, check, timed), log


def test_the_fastest_candidate_wins() -> None:
    outcome, _ = run({1: 9, 2: 5, 4: 3, 8: 4, 16: 8, 32: 9})
    assert (outcome.best, outcome.us) == ({"num_warps": 4}, 3)


def test_the_default_stays_where_the_gain_is_noise() -> None:
    assert run({1: 100, 2: 98.5}, CANDIDATES[:2])[0].best == {"num_warps": 1}
    assert run({1: 100, 2: 97.5}, CANDIDATES[:2])[0].best == {"num_warps": 2}


def test_a_wrong_candidate_is_never_timed_against_the_others() -> None:
    outcome, _ = run({1: 9, 2: 5, 8: 4})
    assert outcome.best == {"num_warps": 8}
    assert [config["num_warps"] for config, _ in outcome.refused] == [4, 16, 32]


def test_only_finalists_are_timed_again() -> None:
    _, log = run({1: 9, 2: 5, 4: 3, 8: 4, 16: 8, 32: 10})
    assert log[:6] == [(w, 5) for w in (1, 2, 4, 8, 16, 32)]
    assert sorted(log[6:]) == [(w, 20) for w in (1, 2, 4, 8, 16) for _ in range(autotune.ROUNDS)]
    assert {w for w, _ in log[6:11]} == {1, 2, 4, 8, 16}, "in turn"


def test_an_error_with_the_default_is_no_refusal() -> None:
    with pytest.raises(AssertionError, match="1 is wrong"):
        run({2: 5})


def test_a_lost_device_ends_the_contest() -> None:
    def check(config: Config) -> None:
        if config["num_warps"] == 2:
            raise torch.AcceleratorError("an illegal memory access")

    assert isinstance(torch.AcceleratorError(""), REFUSALS)
    with pytest.raises(torch.AcceleratorError):
        contest(CANDIDATES, check, lambda config, replays: 1.0)


def test_the_report_says_what_was_gained_and_why_others_were_refused() -> None:
    job = Job("norm", {"rows": 1}, [Case("norm", "1 rows", lambda device: (), 8_000_000)], CANDIDATES)
    text = report(job, run({1: 9, 2: 5, 8: 4})[0], every=True)
    assert text.splitlines()[-1] == (
        "norm rows=1: 4.00 us (default 9.00 us), 2.00 TB/s, num_warps=8; 1 cases, 3 right, 3 refused"
    )
    assert "refused  num_warps=4: AssertionError: 4 is wrong" in text


def run_without_interpreter(code: str, **environment: str) -> str:
    names = os.environ.keys() - {"TRITON_INTERPRET"}
    environment = {name: os.environ[name] for name in names} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jobs_are_found_by_what_the_cases_look_up_and_missing_ones_by_what_is_stored(tmp_path: Path) -> None:
    code = """
from aiollm.kernels import autotune, device, tuned
from aiollm.kernels.workload import SHAPES, candidates
task = autotune.Task(SHAPES["smollm2-135m"], ("norm",), missing=False)
jobs = autotune.jobs(task, device.A100)
for job in jobs:
    assert job.kernel == "norm" and len(job.candidates) >= len(candidates("norm")), job
assert len({str(job.key) for job in jobs}) == len(jobs) > 1
assert all(job.cases for job in jobs)
entry = tuned.Entry(jobs[0].key, jobs[0].candidates[1], 1.0)
tuned.save(tuned.user_folder(), "norm", "nvidia-a100-sxm4-80gb", {"gpu": "A100"}, [entry])
assert [job.key for job in autotune.jobs(task._replace(missing=True), device.A100)] == [job.key for job in jobs[1:]]
assert [job.key for job in autotune.jobs(task._replace(missing=True), device.H100)] == [job.key for job in jobs]
assert autotune.jobs(task, device.A100)[0].candidates == jobs[0].candidates, "what is stored plays no part"
"""
    run_without_interpreter(code, AIOLLM_CACHE_DIR=str(tmp_path))


def test_a_share_of_the_candidates_is_compiled_for_the_card_that_is_asked_for(tmp_path: Path) -> None:
    shape = SHAPES["smollm2-135m"]._asdict() | {"dtype": "bfloat16"}
    share = json.dumps([shape, ["embedding"], False, device.A100, 0, 1])
    code = f"import sys; from aiollm.kernels import autotune; sys.exit(autotune.main(['--share', '''{share}''']))"
    run_without_interpreter(code, TRITON_CACHE_DIR=str(tmp_path))
    compiled = [json.loads(file.read_text()) for file in tmp_path.glob("*/_embedding.json")]
    assert len({(entry["num_warps"], entry["hash"]) for entry in compiled}) > 1
    assert {entry["target"]["arch"] for entry in compiled} == {80}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    command = [sys.executable, "-m", "aiollm", "tune", "--ops", "norm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "aiollm tune: tuning needs a CUDA device, and none is visible\n")


@pytest.mark.parametrize("level", ["0", "3"])
def test_a_worker_tunes_nothing_at_levels_0_and_3(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.LEVEL, level)
    autotune.at_start(SHAPES["smollm2-135m"], lambda what, part: pytest.fail(what))


@pytest.mark.gpu
def test_what_a_worker_tunes_at_its_start_is_found_by_lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    task = Task(SHAPES["smollm2-135m"], ("embedding",), missing=True)
    found = list(autotune.tune(task, 4, lambda what, part: None))
    assert found
    for job, outcome in found:
        autotune.keep(job, outcome, tuned.user_folder())
        assert tuned.lookup(job.kernel, job.key, job.candidates[0]) == outcome.best
    assert list(autotune.tune(task, 4, lambda what, part: None)) == []
