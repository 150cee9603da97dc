import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.ops import cpu_ops
from aiollm.wire.messages import Loading, WorkerSettings
from aiollm.workers.load import device_of, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The model's folder, to be spoiled."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def settings(folder: Path, **others: object) -> WorkerSettings:
    values: dict[str, Any] = {"rows": 4, "slots": 200, "threads": 1, "data_type": "fp32"}
    return WorkerSettings(folder=str(folder), **values | others)


def nobody(message: Loading) -> None:
    """Hears nothing."""


def test_ready_says_what_was_loaded(folder: Path) -> None:
    heard: list[Loading] = []
    runner, ready = load(settings(folder, slots=1000), heard.append)
    assert (ready.slots, ready.max_length, ready.vocabulary) == (1000, 512, 97)
    assert (ready.architecture, ready.data_type, ready.unread) == ("LlamaForCausalLM", "fp32", [])
    budget = dict(ready.budget)
    parameters = load_file(folder / "model.safetensors")
    assert budget["weights"] == sum(tensor.nbytes for tensor in parameters.values())
    assert budget["KV cache"] == sum(k.nbytes + v.nbytes for k, v in runner.kv) == 1001 * 2 * 3 * 2 * 8 * 4
    phases = [message.phase for message in heard if message.fraction == 0]
    assert phases == [name for name, _ in ready.seconds]
    assert phases[0] == "reading the configuration" and "loading weights" in phases


@pytest.mark.parametrize(
    ("asked", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_and_cache_have_the_type_that_was_asked_for(folder: Path, asked: str, dtype: torch.dtype) -> None:
    runner, ready = load(settings(folder, data_type=asked), nobody)
    assert {tensor.dtype for pair in runner.kv for tensor in pair} == {dtype}
    assert ready.data_type == asked


@pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("asked", ["int8", "auto"])
def test_8_bit_weights_take_a_quarter_of_the_memory(folder: Path, asked: str) -> None:
    full = dict(load(settings(folder), nobody)[1].budget)["weights"]
    runner, ready = load(settings(folder, data_type=asked), nobody)
    assert ready.data_type == "int8"
    parameters = load_file(folder / "model.safetensors")
    linear = [tensor for name, tensor in parameters.items() if tensor.ndim == 2 and "embed_tokens" not in name]
    saved = sum(3 * tensor.numel() - 4 * len(tensor) for tensor in linear)  # three bytes a number, less the scales
    assert full - dict(ready.budget)["weights"] == saved
    assert {tensor.dtype for pair in runner.kv for tensor in pair} == {torch.float32}


def test_a_cpu_that_cannot_compute_with_8_bits_takes_full_weights_or_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiollm.workers.load.exact", lambda: False)
    assert load(settings(folder, data_type="auto"), nobody)[1].data_type == "fp32"
    with pytest.raises(ValueError, match="for CPUs with AVX-512 VNNI, and this is another"):
        load(settings(folder, data_type="int8"), nobody)


def test_8_bit_weights_are_refused_on_a_gpu(folder: Path) -> None:
    with pytest.raises(ValueError, match="for CPUs with AVX-512 VNNI, and this is cuda"):
        load(settings(folder, data_type="int8", device="cuda"), nobody)


def test_dummy_weights_need_no_checkpoint(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    _, ready = load(settings(copy, load_format="dummy"), nobody)
    assert ready.vocabulary == 97


@pytest.mark.parametrize(
    ("asked", "slots", "found"), [(0, 1000, 512), (100, 1000, 100), (9999, 1000, 512), (0, 300, 301), (400, 300, 301)]
)
def test_the_longest_sequence_fits_the_model_the_pool_and_the_wish(
    folder: Path, asked: int, slots: int, found: int
) -> None:
    runner, ready = load(settings(folder, max_length=asked, slots=slots), nobody)
    assert ready.max_length == found
    assert runner.state.slot_table.shape == (5, found)


def test_without_a_number_of_slots_the_free_memory_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.workers.kv.available_memory", lambda: 1 << 20)
    _, ready = load(settings(folder, slots=0, mem_fraction=0.5), nobody)
    assert ready.slots == (1 << 19) // (2 * 3 * 2 * 8 * 4)


@pytest.mark.parametrize("asked", [10_000, 3_000_000_000])
def test_a_number_of_slots_that_does_not_fit_is_refused_with_the_one_that_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    monkeypatch.setattr("aiollm.workers.load._check", lambda *_: None)
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda swap=False: 1 << 20)
    advised, fits = (share // (2 * 3 * 2 * 8 * 4) for share in (1 << 19, 1 << 20))
    with pytest.raises(MemoryError, match=rf"--max_total_token_num {asked} does not fit: {advised} would"):
        load(settings(folder, slots=asked, mem_fraction=0.5), nobody)
    assert load(settings(folder, slots=fits, mem_fraction=0.5), nobody)[1].slots == fits


def test_a_number_of_slots_that_cannot_fit_beside_the_weights_is_refused_before_they_are_read(
    folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be swapped out until then counts as free."""
    _, ready = load(settings(folder, slots=3000), nobody)
    taken, per_token = sum(dict(ready.budget)[part] for part in ("weights", "row tables")), 2 * 3 * 2 * 8 * 4
    free = taken + 2000 * per_token
    (copy / "model.safetensors").write_bytes(b"nobody may look at this")
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda swap: free if swap else 0)
    text = r"^--max_total_token_num 2001 does not fit beside weights of [\d.]+ MiB \(fp32\): at most about 1000 would$"
    with pytest.raises(MemoryError, match=text):
        load(settings(copy, slots=2001, mem_fraction=0.5), nobody)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(settings(copy, slots=2000, mem_fraction=0.5), nobody)


def test_tables_of_too_many_rows_are_refused(folder: Path) -> None:
    with pytest.raises(
        MemoryError, match=r"row tables of [\d.]+ GiB and .* do not fit: .*lower --running_max_req_size"
    ):
        load(settings(folder, rows=1_000_000_000), nobody)


def test_a_token_counts_once_for_each_group_of_layers(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gemma3", num_hidden_layers=6, sliding_window_pattern=3)
    runner, ready = load(settings(tmp_path, slots=50), nobody)
    assert (ready.slots, ready.window, ready.windowed) == (50, 11, 2)
    assert ready.max_length == 151, "of the others' slots, a long request takes but the last ones"
    assert runner.state.windows.tables.shape == (2, 5, 2064), "11 seen, 2,048 of a chunk, 2 of credit"
    assert len({pool.data_ptr() for pool, _ in runner.kv}) == 2 and runner.kv[0][0].shape[0] == 151
    _, again = load(settings(tmp_path, slots=ready.slots, max_length=ready.max_length), nobody)
    assert again.windowed == ready.windowed, "as a worker that starts again is asked"
    assert dict(ready.budget)["KV cache"] == 151 * 2 * 2 * 2 * 12 * 4


def test_weights_that_do_not_fit_are_refused_before_any_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "model.safetensors").write_bytes(b"nobody may look at this")
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda swap: 100_000)
    with pytest.raises(MemoryError, match=r"weights of 0\.\d MiB \(fp32\), .* do not fit: .* has 0\.1 MiB free"):
        load(settings(copy), nobody)


@pytest.mark.parametrize(
    ("slots", "free", "said"),
    [
        (0, 1_000_000, r"the GPU has 0\.95 GiB free, of which --mem_fraction 0\.5 leaves 0\.0 MiB; raise .* to 0\.65$"),
        (
            0,
            200_000,
            r"a KV cache of at least 0\.25 GiB do not fit: the GPU has 0\.19 GiB free, of which .*; free memory$",
        ),
        (200, 100, r"the GPU has 0\.1 MiB free; free memory$"),
        (5_000_000, 1_000_000, r"--max_total_token_num 5000000 does not fit beside .* at most about 39\d{5} would"),
    ],
)
def test_a_gpu_s_free_memory_is_looked_at_before_anything_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, slots: int, free: int, said: str
) -> None:
    """Of a KV cache that takes what is left, mem_fraction counts."""
    (copy / "model.safetensors").write_bytes(b"nobody may look at this")
    monkeypatch.setattr("aiollm.workers.load._ops", lambda device: cpu_ops())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 10, 2 << 30))
    with pytest.raises(MemoryError, match=said):
        load(settings(copy, device="cuda", slots=slots, mem_fraction=0.5, data_type="bf16"), nobody)


def test_a_worker_that_starts_again_is_not_refused_for_what_others_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda swap=False: 0)
    assert load(settings(folder, slots=1000, again=True), nobody)[1].slots == 1000


@pytest.mark.parametrize("step", ["weights.load", "Decoder", "_warm_up"])
def test_memory_that_runs_out_while_loading_is_a_sentence_with_flags(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    phase = {"weights.load": "loading weights", "Decoder": "preparing the model", "_warm_up": "warming up"}[step]
    monkeypatch.setattr(f"aiollm.workers.load.{step}", full)
    with pytest.raises(MemoryError, match=rf"ran out of memory while {phase}: .*--"):
        load(settings(folder), nobody)


def test_other_errors_of_torch_stay_what_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("aiollm.workers.load.weights.load", broken)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        load(settings(folder), nobody)


def test_the_threads_are_those_that_were_asked_for(folder: Path) -> None:
    load(settings(folder, threads=1), nobody)
    assert torch.get_num_threads() == 1


def test_an_unknown_architecture_names_the_known_ones(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    with pytest.raises(ValueError, match=r"architectures names OddForCausalLM, supported: .*LlamaForCausalLM"):
        load(settings(copy), nobody)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is no JSON: "),
        ("\x00\xff", r"config\.json is no JSON"),
        ("[1]", r"config\.json holds no JSON object"),
    ],
)
def test_a_broken_configuration_is_named(copy: Path, text: str, message: str) -> None:
    (copy / "config.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=message):
        load(settings(copy), nobody)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(settings(tmp_path), nobody)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(settings(copy), nobody)


def test_warming_up_leaves_no_trace_in_the_rows(folder: Path) -> None:
    runner, _ = load(settings(folder), nobody)
    assert not runner.state.slot_table[:4].any() and not runner.state.tokens[:4].any()


def test_each_rank_has_a_gpu_of_its_own(folder: Path) -> None:
    assert [str(device_of(settings(folder, device="cuda", rank=rank))) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert str(device_of(settings(folder, device="cuda:3", rank=1))) == "cuda:3"
    assert str(device_of(settings(folder, device="cpu", rank=1))) == "cpu"
