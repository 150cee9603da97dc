import pytest

from aiollm.workers.families.registry import describe
from aiollm.workers.model.parameters import parameters
from aiollm.workers.shapes import SHAPES

MILLIONS = {
    "qwen3-8b": 8191, "qwen3-0.6b": 596, "llama-3.1-8b": 8030, "mistral-7b": 7248, "gemma-2-9b": 9242, "phi-4": 14660,
    "qwen2.5-7b": 7616, "command-r7b": 8028,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_read_to_its_last_key_and_has_the_published_number_of_parameters(name: str) -> None:
    spec, _, unread = describe(SHAPES[name])
    numbers = 0
    for parameter in parameters(spec, 0, 1):
        size = 1
        for length in parameter.shape:
            size *= length
        numbers += size
    assert not unread
    assert round(numbers / 1e6) == MILLIONS[name]
