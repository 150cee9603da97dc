"""The soak in short, on the front end over a stand-in worker: whatever a server holds is flat afterwards."""

import pytest
import soak


@pytest.mark.long
def test_a_short_soak_is_flat() -> None:
    """Too short for memory to have found its level: that has more room here."""
    found = soak.soak(soak.stand_in(sockets=20, streams=20, load=12, step=0.02, abusers=6))
    assert [failure for failure in found["failures"] if not failure.startswith(("server_mb", "/health"))] == []
    assert found["after"]["server_mb"] - found["before"]["server_mb"] < 200
    assert found["kills"] > 0 and found["health"]["asked"] > 20


def test_what_is_not_given_back_and_what_grows_fail() -> None:
    rest = {"server_mb": 100.0, "workers_mb": 0.0, "descriptors": 20.0, "threads": 5.0, "tasks": 4.0}
    rest |= {"running": 0.0, "waiting": 0.0, "slots_used": 0.0}
    flat = [rest] * 9
    assert soak.uneven(rest, rest, flat) == []
    assert soak.uneven(rest, rest | {"descriptors": 21.0}, flat) == ["descriptors: 20 before, 21 afterwards"]
    assert soak.uneven(rest, rest | {"server_mb": 151.0}, flat) == ["server_mb: 100 before, 151 afterwards"]
    assert soak.uneven(rest, rest | {"running": 1.0}, flat) == ["running: 1 afterwards"]
    growing = [rest | {"server_mb": 100.0 + 40 * at} for at in range(9)]
    assert soak.uneven(rest, rest, growing) == ["server_mb under load: 260 in the middle, 380 at the end"]


def test_an_outcome_that_nobody_expected_and_one_that_is_missing_fail() -> None:
    good = {"stream: whole": 5, "conversation: whole": 5, "floods: 200 or 503": 1}
    assert soak.unexpected(good, kills=1) == []
    assert soak.unexpected(good | {"unexpected stream: status 500": 2}, kills=1) == [
        "2 times unexpected stream: status 500"
    ]
    assert soak.unexpected({}, kills=0) == [
        "no stream came whole",
        "no conversation came whole",
        "no worker was killed",
    ]


def test_the_lag_of_the_loop_is_read_from_its_histogram() -> None:
    name = 'aiollm_event_loop_lag_seconds_bucket{le="%s"}'
    figure = {name % "0.001": 90.0, name % "0.01": 99.0, name % "+Inf": 100.0, "other": 1.0}
    counts = soak.buckets(figure)
    assert (soak.quantile(counts, 0.5), soak.quantile(counts, 0.99)) == (0.001, 0.01)
    assert soak.quantile(counts, 0.999) == 0.01, "it was later than any bound: JSON has no infinity"
    assert soak.quantile({}, 0.99) == 0.0
