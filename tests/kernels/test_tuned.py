import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiollm.kernels import device, tuned
from aiollm.kernels.tuned import Entry, distance, lookup, read, save

GPU = device.name(device.current())
FACTS = {"gpu": "a card", "triton": "3.6.0", "date": "2026-11-22"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stored, in folders of this test; level 0."""
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(tuned.LEVEL, raising=False)
    tuned.forget()


def write(*entries: tuple[dict[str, int | str], int], root: Path | None = None, kernel: str = "norm") -> Path:
    """Store entries of (key, number of warps)."""
    return save(
        root or tuned.user_folder(), kernel, GPU, FACTS, [Entry(key, {"num_warps": w}, 1.5) for key, w in entries]
    )


def warps(key: dict[str, int | str], kernel: str = "norm") -> int:
    return lookup(kernel, key, {"num_warps": 4})["num_warps"]


def test_the_default_is_taken_where_nothing_is_stored() -> None:
    assert lookup("norm", {"rows": 1}, {"num_warps": 4}) == {"num_warps": 4}


def test_the_nearest_size_wins_by_its_ratio() -> None:
    write(({"rows": 10}, 1), ({"rows": 1000}, 16))
    assert [warps({"rows": rows}) for rows in (0, 10, 90, 120, 10_000)] == [1, 1, 1, 16, 16]


def test_a_string_must_be_equal() -> None:
    write(({"rows": 8, "dtype": "bf16"}, 1))
    assert warps({"rows": 8, "dtype": "bf16"}) == 1
    assert warps({"rows": 8, "dtype": "fp16"}) == 4


def test_a_key_of_other_parts_is_no_key() -> None:
    write(({"rows": 8}, 1))
    assert warps({"rows": 8, "columns": 8}) == 4
    assert warps({"tokens": 8}) == 4


def test_parameters_of_another_version_of_the_kernel_do_not_count() -> None:
    write(({"rows": 8}, 1))
    assert lookup("norm", {"rows": 8}, {"num_warps": 4, "BLOCK": 64}) == {"num_warps": 4, "BLOCK": 64}


def test_the_users_results_go_before_the_packages_ones() -> None:
    write(({"rows": 8}, 2), ({"rows": 512}, 8), root=tuned.SHIPPED)
    write(({"rows": 8}, 1))
    assert [warps({"rows": 8}), warps({"rows": 512})] == [1, 8]


def test_the_packages_results_for_the_newest_other_triton_count_where_this_one_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version, count in (("3.9", 8), ("3.10", 16)):
        monkeypatch.setattr(tuned, "TRITON", version)
        write(({"rows": 8, "dtype": "bf16"}, count), root=tuned.SHIPPED)
    monkeypatch.setattr(tuned, "TRITON", "3.11")
    assert warps({"rows": 8, "dtype": "bf16"}) == 16
    assert warps({"rows": 8, "dtype": "fp16"}) == 4
    write(({"rows": 8, "dtype": "bf16"}, 2), root=tuned.SHIPPED)
    assert warps({"rows": 8, "dtype": "bf16"}) == 2


def test_what_the_user_found_for_another_card_or_another_triton_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    write(({"rows": 8}, 1))
    with monkeypatch.context() as other:
        other.setattr(device, "name", lambda _: "another-card")
        tuned.forget()
        assert warps({"rows": 8}) == 4
    monkeypatch.setattr(tuned, "TRITON", "0.1")
    tuned.forget()
    assert warps({"rows": 8}) == 4


def test_level_3_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    write(({"rows": 8}, 1))
    monkeypatch.setenv(tuned.LEVEL, "3")
    assert warps({"rows": 8}) == 4


@pytest.mark.parametrize("text", ["4", "-1", "on", ""])
def test_another_level_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.LEVEL, text)
    with pytest.raises(ValueError, match=r"AIOLLM_TRITON_AUTOTUNE_LEVEL is 0, 1, 2 or 3"):
        warps({"rows": 8})


def test_storing_replaces_equal_keys_and_keeps_the_others() -> None:
    write(({"rows": 8}, 1), ({"rows": 64}, 2))
    file = write(({"rows": 64}, 8))
    assert [entry.config for entry in read(file)] == [{"num_warps": 8}, {"num_warps": 1}]
    assert json.loads(file.read_text())["gpu"] == "a card"


def test_what_could_not_be_read_is_not_stored() -> None:
    write(({"rows": 8}, 1))
    with pytest.raises(ValueError, match=r"norm: an entry\.key"):
        write(({"rows": True}, 1))
    assert warps({"rows": 8}) == 1


def test_what_was_stored_is_seen_by_the_next_lookup() -> None:
    assert warps({"rows": 8}) == 4
    write(({"rows": 8}, 1))
    assert warps({"rows": 8}) == 1


def test_nothing_is_lost_when_several_store_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda rows: write(({"rows": rows}, 1)), range(40)))
    (file,) = tuned.user_folder().glob("*/*.json")
    assert sorted(entry.key["rows"] for entry in read(file)) == list(range(40))


def test_a_trial_forces_parameters_and_tells_the_lookups() -> None:
    with tuned.trial({"norm": {"num_warps": 16}}) as asked:
        assert warps({"rows": 8}) == 16
        assert warps({"rows": 8}, "gated") == 4
        assert asked == {("norm", ("rows", 8)): {"num_warps": 16}, ("gated", ("rows", 8)): {"num_warps": 4}}
    assert warps({"rows": 8}) == 4


def test_nothing_stored_counts_in_a_trial() -> None:
    write(({"rows": 8}, 1))
    with tuned.trial({}):
        assert warps({"rows": 8}) == 4
    assert warps({"rows": 8}) == 1


def test_distance_counts_doublings_and_is_symmetric() -> None:
    assert distance({"rows": 1, "columns": 7}, {"rows": 3, "columns": 1}) == pytest.approx(3)
    assert distance({"rows": 0}, {"rows": 7}) == distance({"rows": 7}, {"rows": 0}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "entries is no list"),
        ('{"entries": {}}', "entries is no list"),
        ('{"entries": [{"key": {}}]}', r"entries\[0\] holds other fields"),
        ('{"entries": [{"key": {"rows": 1.5}, "config": {"w": 1}, "us": 1}]}', r"entries\[0\]\.key"),
        ('{"entries": [{"key": {"rows": -1}, "config": {"w": 1}, "us": 1}]}', r"entries\[0\]\.key"),
        ('{"entries": [{"key": {}, "config": {"w": "4"}, "us": 1}]}', r"entries\[0\]\.config"),
        ('{"entries": [{"key": {}, "config": {}, "us": 1}]}', r"entries\[0\]\.config"),
        ('{"entries": [{"key": {}, "config": {"w": 4}, "us": 0}]}', r"entries\[0\]\.us"),
    ],
)
def test_a_malformed_file_is_refused_by_name(content: str, message: str) -> None:
    file = write(({"rows": 8}, 1))
    file.write_text(content)
    tuned.forget()
    with pytest.raises(ValueError, match=message) as error:
        warps({"rows": 8})
    assert str(file) in str(error.value)


def test_what_the_package_ships_is_well_formed() -> None:
    for file in (Path(tuned.__file__).parent / "tuned").glob("*/*"):
        assert file.suffix == ".json"
        assert read(file)


@pytest.mark.timing
def test_a_repeated_lookup_takes_less_than_a_microsecond() -> None:
    def one() -> float:
        start = time.perf_counter()
        for _ in range(10_000):
            lookup("norm", {"rows": 8, "columns": 4096, "dtype": "bf16"}, {"num_warps": 4})
        return (time.perf_counter() - start) / 10_000

    assert min(one() for _ in range(5)) < 1e-6
