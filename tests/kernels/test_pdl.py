import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiollm.kernels import device, pdl

KERNELS = Path(pdl.__file__).parent


def kernels_with_pdl() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The Triton kernels that have a parameter PDL, apart from pdl.py's own functions and from Gluon's partitions."""
    for path in sorted(KERNELS.glob("*.py")):
        if path.name != "pdl.py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and "PDL: tl.constexpr" in map(ast.unparse, node.args.args):
                    yield f"{path.stem}.{node.name}", node


def test_every_kernel_waits_once_whatever_its_program_does_and_writes_nothing_before() -> None:
    found = list(kernels_with_pdl())
    assert found
    for name, function in found:
        if name == "decode_attention._decode":  # rule 4
            continue
        at = [i for i, statement in enumerate(function.body) if ast.unparse(statement) == "wait(PDL)"]
        assert len(at) == 1, f"{name} has {len(at)} waits that no condition guards"
        before = "\n".join(ast.unparse(statement) for statement in function.body[: at[0]])
        assert "tl.store" not in before and "tl.atomic" not in before, f"{name} writes before it waits"
        assert "return" not in before, f"{name} may end without having waited"


def test_decode_attention_waits_first_or_beside_prompts_last_and_in_one_program() -> None:
    (decode,) = [function for name, function in kernels_with_pdl() if name == "decode_attention._decode"]
    waits = [i for i, statement in enumerate(decode.body) if "wait(PDL)" in ast.unparse(statement)]
    first, last = (ast.unparse(decode.body[i]) for i in waits)
    assert (waits[1], first) == (len(decode.body) - 1, "if not BESIDE:\n    wait(PDL)")
    assert last == "if BESIDE and (block == 0) & (worker == 0):\n    wait(PDL)"
    assert "return" not in ast.unparse(decode), "no program ends before the last statement"


def test_prefill_beside_it_is_launched_when_all_before_has_ended_and_triggers_first() -> None:
    tree = ast.parse((KERNELS / "prefill_hopper.py").read_text(encoding="utf-8"))
    (launch,) = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and "_attend[" in ast.unparse(call.func)]
    assert "pdl" not in ast.unparse(launch)
    (attend,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_attend"]
    (shared,) = [node for node in attend.body if isinstance(node, ast.If)]
    assert ast.unparse(shared.test) == "share is not None"
    assert ast.unparse(shared.body[0]) == "gdc_launch_dependents()"
    assert attend.body.index(shared) == 1, "nothing but the number of programs comes before"


@pytest.mark.parametrize(("name", "uses"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True)])
def test_it_is_used_from_sm_90_on(name: str, uses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdl, "_INTERPRETED", False)
    with device.standing_in(device.STAND_INS[name]):
        assert pdl.pdl(torch.device("meta")) == {"PDL": uses, "launch_pdl": uses}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_do_without() -> None:
    assert pdl.pdl(torch.device("cpu")) == {"PDL": False, "launch_pdl": False}
