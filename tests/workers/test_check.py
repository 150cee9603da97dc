"""What could not be served is told from config.json and the device, without weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aiollm.hub.errors import HubError
from aiollm.hub.served import check_served

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 99,
    "max_position_embeddings": 128,
}  # fmt: skip


def write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def test_a_model_that_can_be_served_passes_in_silence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiollm.workers.check", str(write(tmp_path, json.dumps(LLAMA)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_served(tmp_path, "cpu", 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"architectures": ["FooForCausalLM"]}), "names FooForCausalLM, supported: .*, LlamaForCausalLM, "),
        (json.dumps(LLAMA | {"quantization_config": {"bits": 4}}), "quantization_config is {'bits': 4}, supported"),
        ("{", "a worker could not serve it: Expecting"),
        ("[]", "config.json holds no object"),
    ],
)
def test_what_is_in_the_way_is_the_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(HubError, match=words):
        check_served(write(tmp_path, text), "cpu", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"a worker could not serve it: .*CUDA.*--device cpu serves on the CPU"):
        check_served(write(tmp_path, json.dumps(LLAMA)), "cuda", 1)


def test_a_process_that_fails_otherwise_is_told_by_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HubError, match="it ended with status 1"):
        check_served(tmp_path, "cpu", 1)
