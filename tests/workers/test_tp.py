import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model
from tp_ranks import CPU, collectives, logits_of, run_rank

from aiollm.kernels.cpu.quantize import exact
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel, possible_sizes


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """work(tp, *arguments) on each of `size` processes -> their results."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(work, r, size, folder, *arguments)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def test_collectives_of_two_ranks(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, collectives):
        assert found["sum"].tolist() == found["half"].tolist() == [3, 3, 3]
        assert found["gathered"].tolist() == [[1, 1, 1, 2, 2, 2]] * 2
        assert found["ids"].tolist() == [7, 8]


def test_a_group_of_one_changes_nothing() -> None:
    tp = TensorParallel.join(0, 1, Path("unused"), CPU)
    x = torch.arange(6.0).view(2, 3)
    assert tp.all_reduce(x) is tp.gather_vocab(x) is tp.broadcast(x) is x
    tp.close()


@pytest.mark.parametrize(
    ("family", "size", "overrides"),
    [
        ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", 2, {"tie_word_embeddings": True}),
        ("qwen2", 4, {"num_attention_heads": 8}),  # four ranks share two KV heads
        ("olmo2", 4, {"num_attention_heads": 8}),  # they norm them together
        ("internlm2", 4, {"num_attention_heads": 8, "attention_bias": True}),  # queries, keys and values in one tensor
        ("stablelm", 2, {"use_parallel_residual": True, "qk_layernorm": True}),  # a norm for each head
        ("gemma2", 2, {}),
        ("phi3", 2, {"tie_word_embeddings": True}),
    ],
)
def test_ranks_compute_what_one_computes(tmp_path: Path, family: str, size: int, overrides: dict[str, Any]) -> None:
    checkpoint = write_tiny_model(tmp_path / "model", family, **overrides)
    expected = logits_of(TensorParallel(), checkpoint, torch.float32)
    found = on_ranks(size, tmp_path, logits_of, checkpoint, torch.float32)
    for logits in found:
        assert torch.equal(logits, found[0])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")
def test_ranks_of_8_bit_weights_agree_and_stay_as_near_to_full_precision_as_one(tmp_path: Path) -> None:
    """Each rank has scales of its own for the columns that it holds, so the last bits are not those of one rank."""
    checkpoint = write_tiny_model(tmp_path / "model")
    full = logits_of(TensorParallel(), checkpoint, torch.float32)
    one = logits_of(TensorParallel(), checkpoint, torch.float32, True)
    found = on_ranks(2, tmp_path, logits_of, checkpoint, torch.float32, True)
    scale = float(full.abs().max())
    error = float((one - full).abs().max())
    assert 1e-3 * scale < error < 0.1 * scale
    for logits in found:
        assert torch.equal(logits, found[0])
        assert float((logits - full).abs().max()) < 2 * error


def spec_of(heads: int, kv_heads: int, intermediate: int) -> DecoderSpec:
    return DecoderSpec(
        layers=1, hidden=8, heads=heads, kv_heads=kv_heads, head_dim=4, intermediate=intermediate, vocab=10,
        max_position=8, norm_eps=1e-6, rope=Rope(4, 1e4), tied_head=False,
    )  # fmt: skip


def test_a_size_that_divides_no_heads_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"--tp 2 cannot share out 9 query heads, 3 KV heads .* possible: 1, 3, 9"):
        Shard(spec_of(9, 3, 18), 0, 2)
    with pytest.raises(ValueError, match=r"16 MLP columns; possible: 1, 2, 4, 8"):
        Shard(spec_of(8, 2, 16), 0, 3)


def test_possible_sizes_of_a_known_model() -> None:
    assert possible_sizes(spec_of(32, 8, 14336)) == [1, 2, 4, 8, 16, 32]


def test_each_rank_has_the_kv_heads_that_its_query_heads_read() -> None:
    spec = spec_of(8, 2, 16)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            shard = Shard(spec, rank, size)
            read = {head // 4 for head in range(shard.first_head, shard.first_head + shard.heads)}
            assert read == set(range(shard.first_kv_head, shard.first_kv_head + shard.kv_heads))
