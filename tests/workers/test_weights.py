import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from aiollm.kernels.ref.quantize import quantize
from aiollm.kernels.weight import Int8Weight, Weights
from aiollm.workers import reading
from aiollm.workers.checkpoint import CheckpointError
from aiollm.workers.families.registry import Description, describe
from aiollm.workers.tp import TensorParallel
from aiollm.workers.weights import dummy, load, outline, stored_bytes

CPU = torch.device("cpu")


def described(folder: Path) -> Description:
    return describe(json.loads((folder / "config.json").read_text()))


def loaded(folder: Path, rank: int = 0, size: int = 1, **overrides: Any) -> Weights:
    description = described(folder)
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "tp": TensorParallel(rank, size)} | overrides
    return load(folder, description.spec, description.names, **options)


def edited(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace tensors of the checkpoint, or drop those that are None."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    return folder


def test_merges_the_tensors_of_the_file(tmp_path: Path) -> None:
    weights = loaded(write_tiny_model(tmp_path, "qwen3", attention_bias=True))
    file = load_file(tmp_path / "model.safetensors")
    at = "model.layers.1.self_attn."
    assert torch.equal(weights["layers.1.qkv"], torch.cat([file[f"{at}{x}_proj.weight"] for x in "qkv"]))
    assert torch.equal(weights["layers.1.qkv_bias"], torch.cat([file[f"{at}{x}_proj.bias"] for x in "qkv"]))
    assert torch.equal(weights["layers.2.k_norm"], file["model.layers.2.self_attn.k_norm.weight"])
    assert torch.equal(weights["head"], file["lm_head.weight"])


def test_the_shards_of_an_index_give_the_same_as_one_file(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole")
    split = write_tiny_model(tmp_path / "split", max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    expected, actual = loaded(whole), loaded(split)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [2, 6])
def test_the_ranks_hold_all_of_the_model_between_them(tmp_path: Path, size: int) -> None:
    write_tiny_model(tmp_path, intermediate_size=84)
    whole = loaded(tmp_path)
    ranks = [loaded(tmp_path, rank, size) for rank in range(size)]
    down = torch.cat([rank["layers.0.down"] for rank in ranks], dim=1)
    assert torch.equal(down, whole["layers.0.down"])
    head = torch.cat([rank["head"] for rank in ranks])
    assert torch.equal(head[:97], whole["head"])
    assert not head[97:].any()
    q, k, _ = whole["layers.0.qkv"].split([48, 16, 16])
    for i, rank in enumerate(ranks):
        own_q, own_k, _ = rank["layers.0.qkv"].split([48 // size, 8, 8])
        assert torch.equal(own_q, q[i * 48 // size : (i + 1) * 48 // size])
        assert torch.equal(own_k, k[:8] if i < size // 2 else k[8:])  # with six ranks each KV head is on three


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=True)
    weights = loaded(tmp_path)
    assert weights["head"].data_ptr() == weights["embedding"].data_ptr()
    second = loaded(tmp_path, rank=1, size=2)
    assert torch.equal(second["head"][:48], weights["embedding"][49:])
    assert not second["head"][48:].any()


def test_converts_to_the_dtype_asked_for(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, dtype=torch.float16)
    file = load_file(tmp_path / "model.safetensors")
    weights = loaded(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["norm"], file["model.norm.weight"].bfloat16())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_number_on_disk_becomes_every_kind_in_memory(
    tmp_path: Path, stored: torch.dtype, held: torch.dtype
) -> None:
    write_tiny_model(tmp_path, dtype=stored)
    file = load_file(tmp_path / "model.safetensors")
    for rank in range(2):
        weights = loaded(tmp_path, rank, 2, dtype=held)
        down = file["model.layers.1.mlp.down_proj.weight"][:, rank * 40 : rank * 40 + 40]
        assert torch.equal(weights["layers.1.down"], down.to(held))


@pytest.mark.parametrize("part_bytes", [1, 1000, 16 << 20])
def test_each_byte_is_read_once_whatever_the_size_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    write_tiny_model(tmp_path, "stablelm", qk_layernorm=True)  # one tensor for each head's norm
    expected = loaded(tmp_path)
    seen: list[tuple[int, int]] = []
    read = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = read(descriptor, buffers, offset)
        seen.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr("aiollm.workers.weights.PART_BYTES", part_bytes)
    weights = loaded(tmp_path)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    size = (tmp_path / "model.safetensors").stat().st_size
    begins, ends = (sorted(column) for column in zip(*seen, strict=True))
    assert begins[1:] == ends[:-1] and ends[-1] == size  # one run without a gap or a second look


def test_an_error_in_one_thread_ends_the_others(tmp_path: Path) -> None:
    def refuse(fraction: float) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        loaded(write_tiny_model(tmp_path), progress=refuse)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1000, reading.PIECE_BYTES])
def test_a_gpu_gets_what_a_cpu_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, size: int, dtype: torch.dtype, piece_bytes: int
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    write_tiny_model(tmp_path, "stablelm", qk_layernorm=True)
    expected = loaded(tmp_path, rank, size, dtype=dtype)
    weights = loaded(tmp_path, rank, size, dtype=dtype, device=torch.device("cuda"))
    assert all(torch.equal(weights[name].cpu(), expected[name]) for name in expected)


def test_progress_rises_to_one(tmp_path: Path) -> None:
    told: list[float] = []
    loaded(write_tiny_model(tmp_path), progress=told.append)
    assert told == sorted(told) and told[-1] == 1 and len(told) > 10


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    edited(write_tiny_model(tmp_path), model__layers__2__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        loaded(tmp_path)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    edited(write_tiny_model(tmp_path), model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    with pytest.raises(CheckpointError, match=r"no place for, model\.layers\.0\.self_attn\.q_norm\.weight"):
        loaded(tmp_path)


def test_tensors_of_another_shape_are_named_with_both_shapes(tmp_path: Path) -> None:
    edited(write_tiny_model(tmp_path), model__norm__weight=torch.ones(49))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[49\] \(expected \[48\]\)"):
        loaded(tmp_path)


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    edited(write_tiny_model(tmp_path), model__norm__weight=torch.ones(48, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"not supported model\.norm\.weight I8"):
        loaded(tmp_path)


def test_known_left_overs_are_passed_over(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=True)
    extra = {"lm_head__weight": torch.zeros(97, 48), "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    weights = loaded(edited(tmp_path, **extra))
    assert weights["head"].any()


@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen3", False), ("qwen3", True), ("cohere", False), ("bloom", True), ("olmo2", False), ("phi3", True)],
)
def test_dummy_has_the_shapes_of_a_checkpoint_and_is_one_model_for_any_number_of_ranks(
    tmp_path: Path, family: str, tied: bool
) -> None:
    write_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    spec = described(tmp_path).spec
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "seed": 3}
    whole = dummy(spec, tp=TensorParallel(), **options)
    real = loaded(tmp_path)
    assert {name: t.shape for name, t in whole.items()} == {name: t.shape for name, t in real.items()}
    halves = [dummy(spec, tp=TensorParallel(rank, 2), **options) for rank in range(2)]
    for name in ("layers.0.down", "layers.2.o"):
        assert torch.equal(torch.cat([half[name] for half in halves], dim=1), whole[name])
    assert torch.equal(torch.cat([half["head"] for half in halves])[:97], whole["head"])
    assert 0.01 < whole["layers.1.qkv"].std() < 0.03 and bool((whole["norm"] == 1).all())


def test_a_shard_of_the_vocabulary_may_be_nothing_but_padding(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, vocab_size=6, num_attention_heads=4, num_key_value_heads=4, head_dim=12)
    assert [loaded(tmp_path, rank, 4)["head"].any().item() for rank in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_hold_what_the_quantizer_makes(tmp_path: Path, tied: bool) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=tied)
    plain, weights = loaded(tmp_path), loaded(tmp_path, quantize=quantize)
    changed = {name for name, weight in weights.items() if isinstance(weight, Int8Weight)}
    assert changed == {"head", *(f"layers.{i}.{name}" for i in range(3) for name in ("qkv", "o", "gate_up", "down"))}
    for name in changed:
        assert torch.equal(weights[name].values, quantize(plain[name]).values)
    assert all(torch.equal(weights[name], plain[name]) for name in plain.keys() - changed)


def test_a_tensor_under_two_names_is_counted_once(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=True)
    weights = loaded(tmp_path)
    assert stored_bytes(weights) == sum(4 * tensor.numel() for name, tensor in weights.items() if name != "head")
    head = loaded(tmp_path, quantize=quantize)["head"]
    assert stored_bytes({"head": head}) == 97 * 48 + 97 * 4


def test_a_checkpoint_of_the_bare_decoder_lacks_the_first_part_of_each_name(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "bloom", tie_word_embeddings=True)
    expected = loaded(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    assert all(torch.equal(loaded(tmp_path)[name], expected[name]) for name in expected)


def test_rows_of_a_normalised_head_have_length_1(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    description = described(tmp_path)
    spec = replace(description.spec, normalized_head=True)
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "tp": TensorParallel()}
    head, plain = load(tmp_path, spec, description.names, **options)["head"], loaded(tmp_path)["head"]
    torch.testing.assert_close(head * plain.norm(dim=1, keepdim=True), plain)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_an_outline_tells_the_bytes_that_each_rank_will_store(tmp_path: Path, size: int, tied: bool) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=tied)
    spec = described(tmp_path).spec
    for rank in range(size):
        tp = TensorParallel(rank, size)
        full, made = stored_bytes(outline(spec, torch.bfloat16, tp)), loaded(tmp_path, rank, size, dtype=torch.bfloat16)
        assert full == stored_bytes(made)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made.values()}
        assert full == sum(storages.values())
        eighth = stored_bytes(outline(spec, torch.float32, tp, eight_bits=True))
        assert eighth == stored_bytes(loaded(tmp_path, rank, size, quantize=quantize))
