import pytest

from aiollm.workers.model.config import Config, ConfigError


def test_takes_values_of_their_type() -> None:
    config = Config({"layers": 3, "theta": 10000, "tied": True, "none": None})
    assert config.take(int, "layers") == 3
    theta = config.take(float, "theta")
    assert theta == 10000 and type(theta) is float
    assert config.take(bool, "tied") is True
    assert config.take(int, "none", 7) == config.take(int, "absent", 7) == 7


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (int, "absent", "config.json: absent is missing"),
        (int, "none", "config.json: none is missing"),
        (int, "tied", "tied is True, expected int"),
        (bool, "layers", "layers is 3, expected bool"),
        (int, "name", "name is 'x', expected int"),
        (float, "tied", "tied is True, expected float"),
    ],
)
def test_refuses_missing_values_and_wrong_types(kind: type, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config({"layers": 3, "tied": True, "none": None, "name": "x"}).take(kind, key)


def test_require_passes_allowed_and_absent_values_only() -> None:
    config = Config({"act": "gelu", "window": None, "scheme": {"bits": 4}})
    config.require("act", "silu", "gelu")
    config.require("window", 4)
    config.require("absent", 1)
    with pytest.raises(ConfigError, match="act is 'gelu', supported: 'silu'"):
        config.require("act", "silu")
    with pytest.raises(ConfigError, match=r"scheme is \{'bits': 4\}, supported: absent"):
        config.require("scheme")


def test_unread_lists_what_nobody_looked_at() -> None:
    config = Config({"read": 1, "checked": 2, "odd": 3, "none": None, "torch_dtype": "float16", "also_odd": []})
    config.take(int, "read")
    config.require("checked", 2)
    assert config.unread() == ["also_odd", "odd"]


def test_a_section_has_defaults_and_reports_what_nobody_looked_at() -> None:
    config = Config({"text": {"layers": 3, "width": None, "odd": 1}})
    text = config.section("text", {"layers": 5, "width": 7})
    assert text is not None and text is config.section("text")
    assert (text.take(int, "layers"), text.take(int, "width")) == (3, 7)
    assert config.unread() == ["text.odd"]
    assert config.section("absent", {"layers": 5}) is None
