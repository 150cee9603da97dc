import json
from pathlib import Path

import pytest
import torch

from aiollm.kernels.ops import Ops, reference_ops, triton_ops
from aiollm.kernels.workload import SHAPES, Case, Shape, candidates, cases, modules, shape

SMALL = Shape(64, 2, 4, 2, 16, 128, 1000)


def test_every_triton_operation_has_a_case() -> None:
    ours = {op for op in Ops._fields if getattr(triton_ops(), op) is not getattr(reference_ops(), op)}
    assert ours
    assert ours - {"plan"} <= {case.op for case in cases(SMALL)}  # a plan is laid out within the cases of attention


@pytest.mark.parametrize("name", modules())
def test_a_modules_cases_are_its_own_and_say_what_they_move(name: str) -> None:
    found = list(modules()[name].cases(SMALL))
    assert found
    assert len({(case.op, case.label) for case in found}) == len(found)
    for case in found:
        assert case.op in Ops._fields
        assert case.bytes > 0
        assert case.flops >= 0


@pytest.mark.parametrize("name", modules())
def test_candidates_name_the_same_parameters(name: str) -> None:
    if hasattr(modules()[name], "CANDIDATES"):
        listed = candidates(name)
        assert listed
        assert len({frozenset(config) for config in listed}) == 1
        assert len({tuple(config.items()) for config in listed}) == len(listed)


def test_cases_are_chosen_by_module_or_operation() -> None:
    some = next(cases(SMALL))
    assert some.op in {case.op for case in cases(SMALL, [some.op])}
    with pytest.raises(ValueError, match="no module or operation is called norn"):
        list(cases(SMALL, ["norn"]))


def test_a_shape_is_read_from_a_models_folder(tmp_path: Path) -> None:
    config = {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape(str(tmp_path)) == SHAPES["qwen3-0.6b"]
    del config["head_dim"], config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert shape(str(tmp_path)) == SHAPES["qwen3-0.6b"]._replace(head_dim=64, kv_heads=16, dtype=torch.float16)
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json has no 'vocab_size'"):
        shape(str(tmp_path))


def test_another_shape_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"neither a folder with a config\.json nor one of qwen3-8b"):
        shape("qwen4")


def test_a_case_has_its_operations_reference_unless_it_brings_one() -> None:
    table = torch.eye(3)
    case = Case("embedding", "", lambda device: (torch.tensor([2], device=device), table), 1)
    assert torch.equal(case.reference(case.make(torch.device("cpu"))), table[2:])
    assert case._replace(expected=lambda ids, table: ids).reference((1, 2)) == 1
