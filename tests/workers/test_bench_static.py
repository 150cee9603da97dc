import pytest
import torch

from aiollm.kernels.ops import reference_ops
from aiollm.workers.bench_static import DRAWING, Bench, Workload, main, parse, parse_mixed
from aiollm.workers.families.registry import describe
from aiollm.workers.shapes import QWEN3

TINY = QWEN3 | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500, "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}  # fmt: skip


def bench(**changes: object) -> Bench:
    torch.manual_seed(0)
    return Bench(describe(TINY | changes)[0], torch.float32, torch.device("cpu"), reference_ops())


@pytest.mark.parametrize(
    "load", [Workload(3, 20, 1), Workload(2, 0, 17), Workload(3, 20, 1, 9)], ids=lambda load: load.label
)
@pytest.mark.parametrize("drawing", DRAWING)
@pytest.mark.parametrize("scattered", [False, True])
def test_a_step_draws_a_token_for_every_row(load: Workload, drawing: str, scattered: bool) -> None:
    step, _ = bench().step(load, drawing, scattered)
    tokens = step()
    assert drawing != "all" or not (tokens % 2).any(), "masked"
    assert tokens.shape == (load.sequences,) and bool((tokens >= 0).all()) and bool((tokens < 500).all())


@pytest.mark.parametrize("tied", [False, True])
def test_every_operation_of_a_step_is_noted_under_its_layer(tied: bool) -> None:
    _, calls = bench(tie_word_embeddings=tied).step(Workload(2, 9, 1), "plain", True)
    kinds = [call.kind for call in calls]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "inputs": 1, "plan": 1, "embedding": 1, "qkv": 3, "rotary_store": 3, "attention": 3, "o": 3, "gate_up": 3,
        "down": 3, "head": 1, "sample": 1, "store": 1,
    }  # fmt: skip
    for call in calls:
        call.work()


def test_costs_are_those_of_the_sizes() -> None:
    here = bench()
    size = 4
    assert here.cost("gate_up", Workload(5, 9, 1)) == (3 * size * (64 * 192 + 5 * (64 + 192)), 3 * 2 * 5 * 64 * 192)
    assert here.cost("head", Workload(2, 0, 7)) == (size * (64 * 500 + 2 * 564), 2 * 2 * 64 * 500)
    assert here.cost("attention", Workload(2, 9, 1)) == (3 * size * (2 * 9 * 64 + 2 * 2 * 64), 3 * 4 * 2 * 9 * 64)
    assert here.cost("attention", Workload(2, 0, 7))[1] == 3 * 4 * 2 * 28 * 64
    assert here.cost("store", Workload(2, 9, 1)) == (0, 0)
    mixed = Workload(2, 9, 1, 7)
    assert here.cost("down", mixed) == here.cost("down", Workload(9, 9, 1))
    assert here.cost("head", mixed) == here.cost("head", Workload(3, 9, 1))
    assert here.cost("attention", mixed)[1] == 3 * 4 * (2 * 9 + 28) * 64


def test_layers_with_a_window_are_a_kind_of_their_own_that_costs_what_they_see() -> None:
    here = bench(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    _, calls = here.step(Workload(2, 9, 1), "plain", True)
    kinds = [call.kind for call in calls]
    assert (kinds.count("attention"), kinds.count("windowed")) == (1, 2)
    assert here.cost("attention", Workload(2, 9, 1)) == (4 * (2 * 9 * 64 + 2 * 2 * 64), 4 * 2 * 9 * 64)
    assert here.cost("windowed", Workload(2, 9, 1)) == (2 * 4 * (2 * 4 * 64 + 2 * 2 * 64), 2 * 4 * 2 * 4 * 64)
    assert here.cost("windowed", Workload(2, 9, 1, 7))[1] == 2 * 4 * (2 * 4 + 1 + 2 + 3 + 4 * 4) * 64
    assert here.cost("windowed", Workload(2, 0, 7)) == (
        2 * 4 * (2 * 7 * 64 + 2 * 14 * 64), 2 * 4 * 2 * (1 + 2 + 3 + 4 * 4) * 64
    )  # fmt: skip


def test_workloads_are_read_from_text() -> None:
    assert parse("256x320", False) == Workload(256, 320, 1)
    assert parse("2x4096", True) == Workload(2, 0, 4096)
    assert parse_mixed("96x1024+2048") == Workload(96, 1024, 1, 2048)
    for wrong in ("256", "0x5", "ax5", "5x", "-1x5"):
        with pytest.raises(ValueError, match="ROWSxTOKENS"):
            parse(wrong, False)
    for wrong in ("96x1024", "96x1024+", "96x1024+1", "96+2048"):
        with pytest.raises(ValueError, match="ROWSxTOKENS"):
            parse_mixed(wrong)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main([])
    assert "a CUDA device is needed" in capsys.readouterr().err
