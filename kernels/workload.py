"""The calls that matter of each operation, at the sizes of a real model: what aot, autotune and bench work on.

Every module with Triton kernels has a function `cases(shape)`, which yields them.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from aiollm.kernels.ops import Ops, reference_ops, triton_ops
from aiollm.kernels.tolerance import assert_close


class Shape(NamedTuple):
    """The sizes of a decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49152),
}


def shape(text: str) -> Shape:
    """The shape of a name in SHAPES, or that of the model in a folder. Errors: ValueError."""
    if text in SHAPES:
        return SHAPES[text]
    file = Path(text) / "config.json"
    if not file.is_file():
        raise ValueError(f"{text} is neither a folder with a config.json nor one of {', '.join(SHAPES)}")
    config: dict[str, Any] = json.loads(file.read_bytes())
    half = config.get("dtype", config.get("torch_dtype")) == "float16"
    try:
        heads = config["num_attention_heads"]
        return Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            dtype=torch.float16 if half else torch.bfloat16,
        )
    except KeyError as error:
        raise ValueError(f"{file} has no {error}") from error


class Case(NamedTuple):
    """One call of an operation.

    `make(device)` gives fresh positional arguments, all on `device`, with random content from torch's generator of that
    device. The device may be "meta", where tensors of any size cost nothing and hold nothing. `bytes` and `flops` are
    the least that any implementation must move and compute. `expected` gives what the reference gives for the same
    arguments, where the reference itself needs too much memory. `close` compares a tensor with the reference's; where
    `agree` is given, it compares the results as a whole: arguments, result, the reference's result.
    """

    op: str  # a field of Ops
    label: str
    make: Callable[[torch.device], tuple[Any, ...]]
    bytes: int
    flops: int = 0
    expected: Callable[..., Any] | None = None
    close: Callable[[torch.Tensor, torch.Tensor], None] = assert_close
    agree: Callable[[tuple[Any, ...], Any, Any], None] | None = None

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """Call the Triton operation."""
        return getattr(triton_ops(), self.op)(*arguments)

    def reference(self, arguments: tuple[Any, ...]) -> Any:
        """What must come out."""
        return (self.expected or getattr(reference_ops(), self.op))(*arguments)


def modules() -> dict[str, ModuleType]:
    """The modules with Triton kernels, by name: those of this folder that define `cases`."""
    folder = Path(__file__).parent
    names = sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.ispkg)
    found = {name: importlib.import_module(f"aiollm.kernels.{name}") for name in names if name != "workload"}
    return {name: module for name, module in found.items() if _defines_cases(module)}


def cases(shape: Shape, chosen: Sequence[str] = ()) -> Iterator[Case]:
    """The cases of the modules or operations that are named in `chosen`, or of all. Errors: ValueError names them."""
    return (case for _, case in located(shape, chosen))


def located(shape: Shape, chosen: Sequence[str] = ()) -> Iterator[tuple[str, Case]]:
    """As `cases`, each with the name of its module."""
    found = modules()
    unknown = set(chosen) - set(found) - set(Ops._fields)
    if unknown:
        raise ValueError(f"no module or operation is called {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    for name, module in found.items():
        for case in module.cases(shape):
            if not chosen or name in chosen or case.op in chosen:
                yield name, case


def candidates(kernel: str) -> list[dict[str, int]]:
    """The CANDIDATES of the module that a kernel's lookups name."""
    listed: list[dict[str, int]] = importlib.import_module(f"aiollm.kernels.{kernel}").CANDIDATES
    return listed


def _defines_cases(module: ModuleType) -> bool:
    return getattr(getattr(module, "cases", None), "__module__", "") == module.__name__
