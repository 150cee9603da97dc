from pathlib import Path

import bench_load
import torch

from aiollm.workers.shapes import QWEN3

TINY = QWEN3 | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 300,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_checkpoint_is_made_and_its_loading_measured(tmp_path: Path) -> None:
    bench_load.SHARD_BYTES, before = 50_000, bench_load.SHARD_BYTES
    try:
        bench_load.write_checkpoint(tmp_path, TINY, "bf16")
    finally:
        bench_load.SHARD_BYTES = before
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = bench_load.measure(tmp_path, torch.device("cpu"), torch.float32, repeat=1)
    figures = {(name, unit): value for name, value, unit in found}
    assert figures["load", "s"] > 0 and figures["load / plain reads", "x"] > 0 and figures["dummy weights", "s"] > 0
