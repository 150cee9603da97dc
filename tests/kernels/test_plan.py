from aiollm.kernels.cases import SEQUENCES, make_batch
from aiollm.kernels.cpu import plan as cpu
from aiollm.kernels.ref.plan import plan as reference


def test_the_reference_plans_nothing() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    assert reference(batch, 2) is batch


def test_one_token_sequences_are_laid_out_together_and_longer_ones_alone() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    prefills, decodes = cpu.plan(batch, 3).plan
    assert [(begin, end, len(slots)) for begin, end, slots in prefills] == [(1, 34, 33), (35, 42, 71), (43, 45, 2)]
    assert sorted(token for group in decodes for token in group.tokens.tolist()) == [0, 34, 42]


def test_each_kv_head_of_a_decode_finds_its_keys() -> None:
    batch = make_batch([(6, 1), (9, 1)])
    ((tokens, places, hidden),) = cpu.plan(batch, 2).plan.decodes
    assert tokens.tolist() == [0, 1]
    of_row, padded = places.view(2, 2, 10), hidden.view(2, 2, 10)
    for i, length in enumerate((7, 10)):
        slots = batch.slot_table[batch.rows[i], :length]
        for head in range(2):
            assert of_row[i, head, :length].tolist() == (2 * slots + head).tolist()
            assert padded[i, head].isneginf().tolist() == [at >= length for at in range(10)]
    assert set(of_row[0, 1, 7:].tolist()) == {int(of_row[0, 1, 0])}  # padding reads what the row owns


def test_short_sequences_are_not_padded_to_a_long_one() -> None:
    groups = list(cpu._groups([(n, 0, 0) for n in (1000, 10, 501, 9, 600, 4)], room=1700))
    assert [[length for length, _, _ in group] for group in groups] == [[1000], [501, 600], [9, 10], [4]]
