from array import array
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from lisatune.data.loader import Loader, collate
from lisatune.data.packing import pack_in_order
from lisatune.data.tokenize import IGNORED, Encoded
from lisatune.layers import find_layers
from lisatune.loss import batch_loss
from lisatune.placement.base import OnDevice
from lisatune.run.build import Run
from tiny import make_llama


def document(*ids, learned_from=0):
    return Encoded(array("i", ids), array("i", [IGNORED if i < learned_from else t for i, t in enumerate(ids)]))


DOCUMENTS = [document(*range(10 * n, 10 * n + 3 + n % 4), learned_from=1) for n in range(1, 12)]


def loader(documents=DOCUMENTS, **options):
    return Loader(documents, **({"rows_per_step": 2, "max_length": 8, "pad_id": 0} | options))


def test_labels_are_shifted_and_never_cross_documents():
    batch = collate([[document(5, 6, 7), document(8, 9)], [document(4, 3)]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, IGNORED, 9, IGNORED], [3, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 0, 1]
    assert (batch.num_tokens, batch.num_labelled) == (7, 4)


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(packing):
    ids = lambda epoch: [t for b in loader(packing=packing).epoch(epoch) for t in b.input_ids[b.is_token].tolist()]  # noqa: E731
    expected = sorted(t for d in DOCUMENTS for t in d.ids)
    assert sorted(ids(0)) == sorted(ids(1)) == expected
    assert ids(0) == ids(0) != ids(1)
    assert loader(packing=packing).num_steps() == len(list(loader(packing=packing).epoch(0)))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_without_shuffling_every_epoch_has_the_order_of_the_data(packing, stream):
    """From any position on, packed rows too."""
    documents = InWindows() if stream else DOCUMENTS
    some = loader(documents, packing=packing, shuffle=False, pack=pack_in_order)
    whole = list(islice(some.batches(), 25))
    tokens = [
        t for b, _ in whole for row, real in zip(b.input_ids, b.is_token, strict=True) for t in row[real].tolist()
    ]
    order = [t for d in DOCUMENTS for t in d.ids]
    assert len(tokens) > 2 * len(order)
    assert tokens == (order * 9)[: len(tokens)]
    for stop in range(1, 12):
        rest = islice(some.batches(whole[stop - 1][1]), 5)
        assert [b.input_ids.tolist() for b, _ in rest] == [b.input_ids.tolist() for b, _ in whole[stop : stop + 5]]


MANY = [document(*range(1, 2 + n * 37 % 19)) for n in range(230)]


def grouped(**options):
    return loader(MANY, rows_per_step=2, max_length=32, group_by_length=True, **options)


def test_rows_of_like_length_share_a_batch():
    """Each row once in an epoch, in an order of its own; what a plain loop over the shuffled order makes of it."""
    rows = lambda batches: [t[real].tolist() for b in batches for t, real in zip(b.input_ids, b.is_token, strict=True)]  # noqa: E731
    expected = sorted(list(d.ids) for d in MANY)
    assert sorted(rows(grouped().epoch(0))) == sorted(rows(grouped().epoch(1))) == expected
    assert rows(grouped().epoch(0)) != rows(grouped().epoch(1))
    places = lambda some: sum(b.input_ids.numel() for b in some.epoch(0))  # noqa: E731
    tokens = sum(len(d) for d in MANY)
    assert places(grouped()) - tokens < 0.2 * (places(loader(MANY, max_length=32)) - tokens)
    order = rows(loader(MANY, max_length=32).epoch(0))
    for first in (0, 100, 200):  # windows of 50 batches of 2
        ours, window = rows(grouped().epoch(0))[first : first + 100], order[first : first + 100]
        by_length = sorted(window, key=len, reverse=True)
        pairs = [by_length[i : i + 2] for i in range(0, len(by_length), 2)]
        assert sorted(pairs) == sorted(ours[i : i + 2] for i in range(0, len(ours), 2))
        assert [ours[i : i + 2] for i in range(0, len(ours), 2)] != pairs, "the batches are shuffled"


def test_grouped_rows_go_on_from_any_position():
    whole = list(islice(grouped(seed=3).batches(), 260))
    for stop in (1, 49, 50, 51, 99, 114, 115, 116, 200):
        rest = islice(grouped(seed=3).batches(whole[stop - 1][1]), 60)
        assert [b.input_ids.tolist() for b, _ in rest] == [b.input_ids.tolist() for b, _ in whole[stop : stop + 60]]


def test_endless_and_seeded():
    first = [b.input_ids.tolist() for b, _ in islice(loader(seed=1).batches(), 20)]
    assert first == [b.input_ids.tolist() for b, _ in islice(loader(seed=1).batches(), 20)]
    assert first != [b.input_ids.tolist() for b, _ in islice(loader(seed=2).batches(), 20)]
    with pytest.raises(ValueError, match="no token to learn"):
        next(loader([]).batches())


class InWindows:
    """A stream of which every window but the last holds three documents."""

    def windows(self, first):
        for start in range(first, len(DOCUMENTS), 3):
            yield start, list(DOCUMENTS[start : start + 3])


def test_a_stream_is_read_anew_each_epoch():
    tokens = [sum(b.num_tokens for b in loader(InWindows()).epoch(e)) for e in (0, 1)]
    assert tokens == [sum(map(len, DOCUMENTS))] * 2


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("documents", [DOCUMENTS, InWindows()], ids=["in memory", "stream"])
def test_going_on_from_any_position_gives_what_would_have_followed(documents, packing, monkeypatch):
    """Over three epochs, the windows' ends and the epochs' among them, as are batches that span two windows."""
    monkeypatch.setattr("lisatune.data.loader.WINDOW", 3)
    straight = list(islice(loader(documents, packing=packing).batches(), 18))
    assert {position.epoch for _, position in straight} >= {0, 1, 2}
    for done, (_, position) in enumerate(straight[:-1], start=1):
        rest = list(islice(loader(documents, packing=packing).batches(position), 18 - done))
        for (batch, at), (expected, expected_at) in zip(rest, straight[done:], strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert batch.places == expected.places
            assert at == expected_at


@pytest.mark.parametrize("layout", ["packed", "micro-batches"])
def test_loss_and_gradients_do_not_depend_on_how_documents_are_laid_out(layout):
    """To rounding: other shapes, other order of sums; 1e-6 of a loss near 5, 1e-5 of gradients near 0.1."""
    documents = [
        document(*torch.randint(3, 128, (n,)).tolist(), learned_from=k) for n, k in [(5, 0), (9, 4), (3, 1), (7, 6)]
    ]

    def loss_and_gradients(batches, num_labelled):
        model = make_llama()
        layers = find_layers(model)
        total = sum(batch_loss(layers, b, num_labelled, linear_head=True) for b in batches)
        total.backward()
        return total.item(), [p.grad for p in model.parameters()]

    alone = [collate([[d]], 0) for d in documents]
    count = sum(b.num_labelled for b in alone)
    if layout == "packed":
        other = [collate([documents[:2], documents[2:]], 0)]
    else:
        whole = collate([[d] for d in documents], 0)
        other = list(whole.split(3))
        assert [len(b.input_ids) for b in other] == [3, 1]
    assert sum(b.num_labelled for b in other) == count
    loss, gradients = loss_and_gradients(alone, count)
    other_loss, other_gradients = loss_and_gradients(other, count)
    assert abs(loss - other_loss) < 1e-6
    for a, b in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_batch_with_nothing_labelled_has_loss_zero_and_zero_gradients():
    model = make_llama()
    batch = collate([[document(5, 6, 7, learned_from=9)]], 0)
    for linear_head in (True, False):
        model.zero_grad()
        loss = batch_loss(find_layers(model), batch, 0, linear_head=linear_head)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_weights_go_with_their_labels():
    plain = Encoded(array("i", [1, 2, 3]), array("i", [-100, 2, 3]))
    weighted = Encoded(array("i", [4, 5, 6]), array("i", [-100, 5, 6]), "", array("f", [0.0, 0.5, 0.25]))
    assert collate([[plain]], 0).weights is None
    batch = collate([[plain, weighted], [plain]], 0)
    assert batch.weights.tolist() == [[1, 1, 1, 0.5, 0.25, 1], [1, 1, 1, 1, 1, 1]]
    assert batch.share(1, 2).weights.tolist() == [[1] * 6]
    assert [micro.weights.shape for micro in batch.split(1)] == [(1, 5), (1, 2)]


def test_what_is_computed_and_what_of_it_is_padding_is_counted_on_all_processes(monkeypatch):
    """By ``Run``, before a step: places of the micro-batches of each process, without columns that only other rows need."""
    batch = collate([[document(*range(1, n + 1), learned_from=1)] for n in (3, 7, 2, 5, 4)], pad_id=0)
    run = Run(
        config=SimpleNamespace(per_device_train_batch_size=2), tokenizer=None, data=None, plan=None, meter=None,
        learner=SimpleNamespace(placement=OnDevice(), layers=SimpleNamespace(model=make_llama())),
        device=torch.device("cpu"), scorer=None,
    )  # fmt: skip
    ready = run._ready(batch)  # the last token of a row is no input: 2 x 6, 2 x 4, 1 x 3 places
    assert (ready.computed, ready.padding) == (23, (6 - 3) + (4 - 2))
    assert [micro.input_ids.shape for micro in ready.micro_batches] == [(2, 6), (2, 4), (1, 3)]
    monkeypatch.setattr("lisatune.run.build.num_ranks", lambda: 2)
    ready = run._ready(batch)  # rows 0, 2, 4: 2 x 2, 1 x 3; rows 1, 3 and one of padding: 2 x 6, 1 x 1
    assert (ready.computed, ready.padding) == (20, (2 - 2) + (6 - 5) + 1)
