from hypothesis import given
from hypothesis import strategies as st

from lisatune.data.packing import pack


def best_fit(lengths, max_length):
    """The same, by looking at every row for every document."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(free, row) for row, free in enumerate(room) if free >= lengths[i]]
        if fits:
            row = min(fits)[1]
        else:
            row = len(rows)
            rows.append([])
            room.append(max_length)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@given(st.integers(1, 50).flatmap(lambda m: st.tuples(st.just(m), st.lists(st.integers(1, m), max_size=60))))
def test_every_document_once_and_nothing_too_long(case):
    max_length, lengths = case
    rows = pack(lengths, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= max_length for row in rows)
    assert rows == best_fit(lengths, max_length)
