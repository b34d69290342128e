"""The next batch, made beside the step: the items, their order and their errors are those of a plain loop."""

import threading

import pytest

from lisatune.data.ahead import Ahead


def test_the_next_item_is_made_in_another_thread_and_no_more_than_that():
    made, main = [], threading.get_ident()

    def items():
        for number in range(5):
            made.append((number, threading.get_ident() == main))
            yield number

    with Ahead(items()) as ahead:
        assert ahead.take() == 0
        assert made == [(0, True)]
        ahead.begin()
        ahead.begin()  # twice is once
        assert ahead.take() == 1
        assert made == [(0, True), (1, False)]
        assert ahead.take() == 2
    assert made[-1] == (2, True)


def test_an_error_comes_when_its_item_is_taken():
    def items():
        yield 1
        raise ValueError("a bad row")

    with Ahead(items()) as ahead:
        assert ahead.take() == 1
        ahead.begin()
        with pytest.raises(ValueError, match="a bad row"):
            ahead.take()


def test_its_thread_ends_with_it():
    before = threading.active_count()
    with Ahead(iter(range(3))) as ahead:
        ahead.begin()
    assert threading.active_count() == before
