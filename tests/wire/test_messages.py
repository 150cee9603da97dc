from typing import get_args

import msgspec
import numpy as np
import pytest

from aiollm.wire import messages
from aiollm.wire.columns import Runs, ints, pack, pack_floats
from aiollm.wire.messages import (
    Admit,
    Alive,
    Failed,
    Fatal,
    FromWorker,
    Header,
    Loading,
    Profile,
    Profiled,
    PromptLogprobs,
    Ready,
    Result,
    Setup,
    Stop,
    ToWorker,
    Update,
    WorkerSettings,
)
from aiollm.wire.sampling import SamplingParams

HEADER = Header(2, 7, 9, 5, 1200, 30, pack([3]))
SAMPLING = SamplingParams(
    max_tokens=5, temperature=0.5, logit_bias={7: -100.0, 50000: 1.5}, seed=2**63 - 1, stop_ids=(2, 3), top_logprobs=4
)

TO_WORKER = [
    Setup(3, WorkerSettings(folder="a folder/ä", rank=1, ranks=2, slots=1 << 40)),
    Update(number=1),
    Update(
        number=2**40,
        retire=pack([4]),
        admit=[Admit(1, 2**33, 10, 12, 20, SAMPLING)],
        slots=Runs(pack([1]), pack([0]), pack([3]), pack([7, 8, 9])),
        tokens=Runs(pack([1]), pack([0]), pack([1]), pack([42])),
        chunk_rows=pack([1]),
        chunk_starts=pack([0]),
        chunk_counts=pack([3]),
    ),
    Profile(20, True),
    Stop(),
]
FROM_WORKER = [
    Loading("loading weights", 0.5),
    Ready(
        slots=100, max_length=50, vocabulary=97, architecture="LlamaForCausalLM", data_type="fp32",
        budget=[("weights", 1 << 40)], seconds=[("loading weights", 1.5)], unread=["odd_key"],
    ),
    Result(header=HEADER),
    Result(
        header=HEADER, rows=pack([1]), generations=pack([2]), tokens=pack([-1]), logprobs=pack_floats([-0.5]),
        hints=b"\1", top=1, top_ids=pack([4]), top_logprobs=pack_floats([-0.25]),
        prompts=[PromptLogprobs(1, 2, 1, pack_floats([-1.0]), pack([2]), pack([3]), pack_floats([-0.5]))],
    ),
    Failed(
        header=HEADER, rows=pack([1]), generations=pack([2]), starts=pack([0]), counts=pack([3]),
        error="RuntimeError: no",
    ),
    Alive(),
    Profiled(b"\x1f\x8b", "no"),
    Fatal("MemoryError: no"),
]  # fmt: skip


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_messages_to_the_worker_round_trip(message: ToWorker) -> None:
    assert messages.to_worker_decoder.decode(messages.encoder.encode(message)) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
def test_messages_from_the_worker_round_trip(message: FromWorker) -> None:
    assert messages.from_worker_decoder.decode(messages.encoder.encode(message)) == message


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in TO_WORKER} == set(get_args(ToWorker))
    assert {type(message) for message in FROM_WORKER} == set(get_args(FromWorker))


def test_neither_side_takes_the_other_sides_messages() -> None:
    for message in FROM_WORKER:
        with pytest.raises(msgspec.ValidationError, match="Invalid value"):
            messages.to_worker_decoder.decode(messages.encoder.encode(message))
    for message in TO_WORKER:
        with pytest.raises(msgspec.ValidationError, match="Invalid value"):
            messages.from_worker_decoder.decode(messages.encoder.encode(message))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        messages.encoder.encode(["update", 1]),
        messages.encoder.encode({"type": "update"}),
        messages.encoder.encode({"type": "update", "number": "1"}),
        messages.encoder.encode({"type": "update", "number": 1, "retire": [1]}),
        messages.encoder.encode({"number": 1}),
        messages.encoder.encode(Update(number=1))[:-1],
    ],
    ids=["nothing", "reserved", "array", "no number", "text number", "list for a column", "no tag", "cut off"],
)
def test_malformed_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        messages.to_worker_decoder.decode(body)


def test_a_decoded_message_keeps_its_columns_when_the_arena_reuses_their_place() -> None:
    """What `applied` frees was copied when it was decoded."""
    memory = bytearray(messages.encoder.encode(Update(number=1, retire=pack(range(1000)))))
    update = messages.to_worker_decoder.decode(memoryview(memory))
    memory[:] = bytes(len(memory))
    assert isinstance(update, Update)
    assert np.array_equal(ints(update.retire), np.arange(1000))


def test_defaults_are_not_shared_between_messages() -> None:
    Update(number=1).admit.append(Admit(1, 1, 1, 1, 2, SAMPLING))
    assert Update(number=2).admit == []
