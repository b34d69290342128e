"""Leaving the group of processes."""

import weakref

import torch.distributed as dist

from lisatune.processes import group


class Holder:
    """Holds itself, so only a search for garbage frees it."""

    def __init__(self):
        self.me = self


def test_what_was_left_over_is_freed_while_the_group_is_still_held(monkeypatch):
    """Else a process could wait for ever at its end: DistributedDataParallel frees the group with Python's lock in its hands."""
    monkeypatch.setattr(group, "num_started", lambda: 2)
    monkeypatch.setattr(group, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(group.dist, "init_process_group", lambda *args, **kwargs: None)
    left, found = [], []
    monkeypatch.setattr(group.dist, "destroy_process_group", lambda: found.append(left[0]()))
    with group.joined():
        left.append(weakref.ref(Holder()))
        assert left[0]() is not None
    assert found == [None]
