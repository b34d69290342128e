"""Several data sets in their shares."""

from array import array
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from lisatune.data.loader import Loader, Position
from lisatune.data.mixture import Mixture, interleaved
from lisatune.data.tokenize import Encoded


def documents(source, number):
    return [
        Encoded(array("i", [source, i]), array("i", [source, i]), f"{source}/{i}", None, source) for i in range(number)
    ]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 1)), min_size=1, max_size=4), st.integers(0, 5))
def test_an_epoch_has_the_shares_and_no_document_twice(parts, epoch):
    mixture = Mixture([documents(i, number) for i, (number, _) in enumerate(parts)], [share for _, share in parts])
    chosen = mixture.of_epoch(epoch)
    assert len(set(chosen)) == len(chosen) == sum(mixture.counts())
    total = sum(share for _, share in parts)
    for number, count in enumerate(mixture.counts()):
        wanted = parts[number][1] / total * sum(mixture.counts())
        assert abs(count - wanted) <= 1 + len(parts)  # rounded to whole documents


def test_all_documents_of_the_larger_set_take_their_turn():
    mixture = Mixture([documents(0, 30), documents(1, 5)], [0.5, 0.5])
    seen = [place for epoch in range(6) for place in mixture.of_epoch(epoch) if place[0] == 0]
    assert sorted(seen) == [(0, i) for i in range(30)]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 1)), min_size=1, max_size=4), st.integers(0, 3))
def test_in_order_the_sets_take_turns_and_each_keeps_its_order(parts, epoch):
    sets, shares = [documents(i, number) for i, (number, _) in enumerate(parts)], [share for _, share in parts]
    mixture = Mixture(sets, shares, shuffle=False)
    chosen, counts = mixture.of_epoch(epoch), mixture.counts()
    for number, count in enumerate(counts):
        begin = epoch * count
        own = [document for part, document in chosen if part == number]
        assert own == [place % len(sets[number]) for place in range(begin, begin + count)]
        half = [part for part, _ in chosen[: len(chosen) // 2]].count(number)
        assert abs(half - count * (len(chosen) // 2) / len(chosen)) <= len(sets), "each is spread over the epoch"


def test_a_mixture_goes_on_at_the_very_document():
    def batches(start, number):
        mixture = Mixture([documents(0, 20), documents(1, 10)], [2, 1])
        loader = Loader(mixture, rows_per_step=4, max_length=8, pad_id=0)
        return list(islice(loader.batches(start), number))

    whole = batches(Position(), 20)
    for stop in (3, 9):
        rest = batches(whole[stop - 1][1], 20 - stop)
        assert [batch.places for batch, _ in rest] == [batch.places for batch, _ in whole[stop:]]
    assert whole[0][0].sources[0][1] == 2
    drawn = [source for batch, _ in whole[:16] for source, _ in batch.sources]
    assert drawn.count(0) == 2 * drawn.count(1)


def test_streams_are_drawn_from_in_their_shares():
    drawn = [
        number for number, _ in islice(interleaved([iter(int, 1), iter(int, 1), iter(int, 1)], [0.5, 0.3, 0.2]), 100)
    ]
    assert [drawn.count(i) for i in range(3)] == [50, 30, 20]
