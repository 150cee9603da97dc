"""Every family beside transformers, and how fast its checkpoints load: make families

Errors are the largest difference of logits, as a share of the largest logit, over prompts computed whole, in chunks,
and token by token, in fp32, on tiny random checkpoints of every variant of the family that the tests have. Loading is
that of a checkpoint of 90 to 170 MB in bf16, from the page cache into bf16. `python tools/models.py` writes the figures
into the README.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from sessions import MODELS, PROMPTS, Session, logits_of_transformers
from tiny_model import expected_score, write_reward_model, write_tiny_model

from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops
from aiollm.workers.families.registry import FAMILIES, describe
from aiollm.workers.tp import TensorParallel
from aiollm.workers.weights import load

LARGE = {"hidden_size": 768, "intermediate_size": 4096, "vocab_size": 32000}  # six heads of 128, three layers
OTHER = {"gpt_bigcode": {"intermediate_size"}, "bloom": {"intermediate_size"}}  # sizes that follow from others
REWARDS = {"internlm2_reward": "internlm2", "qwen2_reward": "qwen2"}


def errors(folder: Path, ops: Ops) -> dict[str, float]:
    """By the way that prompts are computed."""
    expected = logits_of_transformers(folder)
    whole = Session(folder, ops).step({0: 61})[0]
    chunked = Session(folder, ops)
    chunks = torch.cat([chunked.step({0: min(7, 61 - begin)})[0] for begin in range(0, 61, 7)])
    single = Session(folder, ops)
    steps = torch.cat([single.step({2: 1})[2] for _ in PROMPTS[2]])
    return {
        "whole": _error(whole, expected[0]),
        "chunked": _error(chunks, expected[0]),
        "step by step": _error(steps, expected[2]),
    }


def reward_error(folder: Path, ops: Ops) -> dict[str, float]:
    score = Session(folder, ops).step({0: 61})[0][-1, 0]
    expected = expected_score(folder, PROMPTS[0].tolist())
    return {"whole": abs(float(score) - expected) / abs(expected)}


def loading(folder: Path, device: torch.device) -> dict[str, float]:
    """The best of many loads: they are short, and what else runs on the machine is not meant."""
    spec, names, _ = describe(json.loads((folder / "config.json").read_text()))
    size = (folder / "model.safetensors").stat().st_size
    found = []
    for _ in range(20):
        began = time.perf_counter()
        load(folder, spec, names, dtype=torch.bfloat16, device=device, tp=TensorParallel())
        found.append(time.perf_counter() - began)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        tensors = len(file.keys())
    return {"megabytes": round(size / 1e6), "tensors": tensors, "seconds": round(min(found), 3)}


def module(folder: Path) -> str:
    """The family's file."""
    values = json.loads((folder / "config.json").read_text())
    return FAMILIES[values["architectures"][0]].rpartition(".")[2]


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    tables = {"reference": reference_ops(), "cpu": cpu_ops()} if device.type == "cpu" else {"triton": triton_ops()}
    families: dict[str, dict[str, Any]] = {}
    for name, case in [*MODELS.items(), *((name, {}) for name in REWARDS)]:
        reward = REWARDS.get(name)
        with tempfile.TemporaryDirectory() as place:
            folder = write_reward_model(Path(place), reward) if reward else write_tiny_model(Path(place), **case)
            measure: Callable[[Path, Ops], dict[str, float]] = reward_error if reward else errors
            found = {table: measure(folder, ops) for table, ops in tables.items()}
            own = families.setdefault(module(folder), {"variants": {}})
        own["variants"][name] = {
            table: {way: float(f"{error:.2g}") for way, error in ways.items()} for table, ways in found.items()
        }
        own["error"] = max(own.get("error", 0.0), *(error for ways in found.values() for error in ways.values()))
        if "loading" not in own:
            with tempfile.TemporaryDirectory() as place:
                own["loading"] = loading(_large(Path(place), reward, case), device)
        print(f"{name:24} {max(error for ways in found.values() for error in ways.values()):.1e}", flush=True)
    for own in families.values():
        own["error"] = float(f"{own['error']:.1g}")
    if options.save:
        on = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
        about = {
            "date": time.strftime("%Y-%m-%d"), "device": on, "cores": os.cpu_count(), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        }  # fmt: skip
        text = json.dumps({**about, "families": dict(sorted(families.items()))}, indent=2)
        options.save.write_text(text + "\n")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _large(folder: Path, reward: str | None, case: dict[str, Any]) -> Path:
    """A checkpoint of the same family that takes a while to load."""
    family = reward or case["family"]
    sizes = {key: value for key, value in LARGE.items() if key not in OTHER.get(family, ())}
    if reward:
        return write_reward_model(folder, reward, dtype=torch.bfloat16, **sizes)
    return write_tiny_model(folder, dtype=torch.bfloat16, **{**case, **sizes})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
