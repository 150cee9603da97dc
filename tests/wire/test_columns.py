import numpy as np
import pytest

from aiollm.wire.columns import Runs, floats, ints, pack, pack_floats


@pytest.mark.parametrize("values", [[], [0], [-1, 2**31 - 1, -(2**31)], range(1000)])
def test_integers_round_trip_at_four_bytes_a_value(values: list[int]) -> None:
    packed = pack(values)
    assert len(packed) == 4 * len(values)
    assert ints(packed).tolist() == ints(memoryview(packed)).tolist() == list(values)


def test_arrays_of_other_widths_become_int32() -> None:
    assert ints(pack(np.arange(3, dtype=np.int64))).tolist() == [0, 1, 2]
    assert ints(pack(np.array([True, False]))).tolist() == [1, 0]
    assert ints(pack(np.arange(6)[::2])).tolist() == [0, 2, 4]


def test_numbers_round_trip_as_float32() -> None:
    values = [0.0, -1.5, float("-inf"), 1e-3]
    assert floats(pack_floats(values)).tolist() == np.asarray(values, np.float32).tolist()
    assert np.isnan(floats(pack_floats([float("nan")]))).all()


def test_runs_are_empty_until_they_name_a_row() -> None:
    assert not Runs()
    assert Runs(rows=pack([0]), starts=pack([0]), counts=pack([0]))
