from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.rotary import Linear, Llama3, Rope, cos_sin_table, read_rope

CPU = torch.device("cpu")
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn_odd": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 100,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
    },
    "yarn_factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2048,
        "attention_factor": 1.3,
    },
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 32 for i in range(32)],
    "long_factor": [1.0 + i for i in range(32)], "original_max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_table_equals_transformers(name: str) -> None:
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(PARAMETERS[name]))
    positions = torch.arange(4096)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rope = read_rope(Config(config.to_dict()), 64, 4096)
    table = cos_sin_table(rope, 4096, CPU)
    expected = torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=1)
    # Frequencies that differ in the last bit are 4096 * 2**-24 apart at the last position.
    torch.testing.assert_close(table, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(table[:8], expected[:8], rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", [1024, 1025])
def test_longrope_takes_its_long_factors_where_contexts_may_exceed_the_original_one(positions: int) -> None:
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(LONG))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
    table = cos_sin_table(read_rope(Config(config.to_dict()), 64, 4096), positions, CPU)
    torch.testing.assert_close(table, torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=1), rtol=0, atol=2e-4)


def test_without_a_rope_nothing_is_turned() -> None:
    assert cos_sin_table(None, 3, CPU).tolist() == [[1, 0]] * 3


def test_a_share_of_each_head_and_a_rope_for_each_type_of_layer() -> None:
    assert read_rope(Config({"partial_rotary_factor": 0.25}), 64, 100, partial=1.0).dim == 16
    kinds = {"full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "sliding_attention": {}}
    full = read_rope(Config({"rope_parameters": kinds}), 64, 100, partial=1.0, layer_type="full_attention")
    assert full == Rope(32, 1e6)


def test_older_configs_say_the_same() -> None:
    scaling = {"type": "linear", "factor": 2}
    assert read_rope(Config({"rope_theta": 5e5, "rope_scaling": scaling}), 64, 100) == Rope(64, 5e5, Linear(2.0))
    assert read_rope(Config({"rope_theta": 1000}), 64, 100) == Rope(64, 1000.0)
    assert read_rope(Config({}), 64, 100) == Rope(64, 10000.0)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read_rope(Config({"rope_scaling": llama3}), 64, 100) == Rope(64, 1e4, Llama3(8.0, 1.0, 4.0, 100))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, "rope type 'ntk' is not supported"),
        (LONG | {"long_factor": [1.0]}, "longrope has 32 and 1 factors for 32 pairs"),
        ({"rope_type": "linear"}, "rope_parameters: factor is missing"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', expected float"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "not understood: mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "not understood: full_attention"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rope(Config({"rope_parameters": parameters}), 64, 100)
