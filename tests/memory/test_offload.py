import copy
from contextlib import contextmanager

import pytest
import torch

from lisatune.memory import offload
from lisatune.memory.ledger import Ledger
from lisatune.memory.offload import Shuttle, host_zeros, side_stream, to_device, to_host

CPU, META = torch.device("cpu"), torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_there_and_back_is_the_same_tensor_elsewhere(dtype):
    tensor = torch.arange(24).reshape(4, 6).to(dtype).T
    host = to_host(tensor)
    back = to_device(host, CPU)
    assert torch.equal(tensor, host)
    assert torch.equal(tensor, back)
    assert tensor.dtype == host.dtype == back.dtype
    assert tensor.stride() == host.stride() == back.stride()
    assert len({tensor.data_ptr(), host.data_ptr(), back.data_ptr()}) == 3


def test_copies_are_outside_of_autograd():
    weight = torch.ones(2, requires_grad=True)
    assert not to_host(weight * 2).requires_grad
    assert not to_device(weight * 2, CPU).requires_grad


def test_pinned_blocks_are_rounded_up_and_kept():
    with Ledger(pinned=True) as ledger:
        host = to_host(torch.empty(100, device="meta"))
        assert ledger.host_bytes == 512
        del host
        other = host_zeros((128,), torch.float32, like=torch.empty(1, device="meta"))
        assert (ledger.host_bytes, ledger.host_peak_bytes) == (512, 512)
    assert other.is_meta


def test_on_meta_host_memory_is_not_the_devices():
    with Ledger(granularity=1) as ledger:
        tensor = torch.empty(100, device="meta")
        host = to_host(tensor)
        state = host_zeros((7,), torch.bfloat16, like=tensor)
        assert (ledger.total_bytes, ledger.host_bytes) == (400, 414)
        back = to_device(host, META)
        assert (ledger.total_bytes, ledger.host_bytes) == (800, 414)
    assert host.is_meta
    assert state.is_meta
    assert back.is_meta


def test_host_zeros():
    zeros = host_zeros((2, 3), torch.bfloat16, like=torch.ones(5))
    assert torch.equal(zeros, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert zeros.dtype == torch.bfloat16


def test_only_cuda_has_a_side_stream():
    assert side_stream(CPU) is None
    assert side_stream(META) is None


def test_on_the_cpu_nothing_is_copied_early_or_held(monkeypatch):
    copied = []
    monkeypatch.setattr(offload, "to_device", lambda t, d: copied.append(t) or to_device(t, d))
    shuttle = Shuttle(CPU)
    tensor = torch.ones(3)
    host = shuttle.send(tensor)
    shuttle.prefetch([host])
    assert not copied
    assert shuttle._leaving is None
    assert torch.equal(shuttle.fetch([host])[0], tensor)
    assert len(copied) == 1


def test_on_meta_one_set_is_on_its_way_each_way():
    """Bytes as on CUDA: what was sent last, what is prefetched, what was fetched."""
    with Ledger(granularity=1) as ledger:
        shuttle = Shuttle(META)
        hosts = [shuttle.send(torch.empty(100, device="meta")) for _ in range(3)]
        assert (ledger.total_bytes, ledger.host_bytes) == (400, 1200)
        copies = shuttle.fetch([hosts[2]])
        assert ledger.total_bytes == 400
        ledger.reset_peak()
        for host in (hosts[1], hosts[0]):
            shuttle.prefetch([host])
            assert ledger.total_bytes == ledger.peak_bytes == 800
        coming = shuttle._coming[0]
        del copies
        assert shuttle.fetch([hosts[0]])[0] is coming


def test_what_was_written_to_since_is_fetched_anew():
    shuttle = Shuttle(META)
    host = torch.empty(3, device="meta")
    for write in (False, True):
        shuttle.prefetch([host])
        coming = shuttle._coming[0]
        if write:
            host.zero_()
        assert (shuttle.fetch([host])[0] is coming) == (not write)


def test_what_failed_to_come_is_fetched_anew(monkeypatch):
    shuttle, host = Shuttle(META), torch.empty(3, device="meta")

    def fail(tensor, device):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(offload, "to_device", fail)
        with pytest.raises(torch.OutOfMemoryError):
            shuttle.prefetch([host])
    assert len(shuttle.fetch([host])) == 1


def test_what_is_sent_does_not_keep_the_graph():
    shuttle = Shuttle(META)
    shuttle.send(torch.empty(3, device="meta", requires_grad=True) * 2)
    assert shuttle._leaving is not None
    assert shuttle._leaving.grad_fn is None


def test_a_copy_begins_with_nothing_on_its_way():
    shuttle = Shuttle(META)
    shuttle.prefetch([torch.empty(3, device="meta")])
    other = copy.deepcopy(shuttle)
    assert other.device == META
    assert other._coming == []


class FakeStream:
    """Stands for a CUDA stream and writes down what is asked of it, and where tensors are made."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event {sum(line.endswith('records') for line in self.log)}"


def test_order_between_the_streams(monkeypatch):
    """With streams that only write down: a copy comes after a wait for compute, and compute waits before it goes on."""
    log = []
    side, compute = FakeStream("side", log), FakeStream("compute", log)
    now = [compute]

    @contextmanager
    def entered(stream):
        now.append(stream)
        log.append(f"{stream.name} copies")
        yield
        now.pop()

    monkeypatch.setattr(offload, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(offload, "to_host", lambda t: empty_like(t))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, device: log.append(f"{now[-1].name} allocates") or empty_like(t))
    copied = ["side waits for compute", "side copies", "side records"]
    shuttle = Shuttle(META)
    a = shuttle.send(torch.empty(1, device="meta"))
    assert log == copied
    log.clear()
    b = shuttle.send(torch.empty(1, device="meta"))
    # before the memory of the first tensor is given back, compute is told to wait for its copy
    assert log == ["compute waits for event 1", *copied]
    log.clear()
    shuttle.prefetch([a])
    assert log == ["compute allocates", *copied]
    log.clear()
    shuttle.prefetch([b])
    # nobody asked for the first, but its memory is not given back before it has been written to
    assert log == ["compute waits for event 1", "compute allocates", *copied]
    log.clear()
    shuttle.fetch([b])
    assert log[-1] == "compute waits for event 1"
    assert "compute allocates" not in log
    log.clear()
    shuttle.fetch([a])
    assert log == ["compute allocates", *copied, "compute waits for event 1"]
    log.clear()
    shuttle.prefetch([a])
    log.clear()
    del shuttle
    assert log == ["compute waits for event 1"]


@needs_cuda
def test_cuda_host_memory_is_pinned_and_the_values_arrive():
    tensor = torch.randn(1000, 1000, device="cuda")
    host = to_host(tensor)
    back = to_device(host, tensor.device)
    assert host.is_pinned()
    assert host_zeros((2,), torch.float32, like=tensor).is_pinned()
    assert torch.equal(tensor, back)
    torch.cuda.synchronize()
    assert torch.equal(tensor.cpu(), host)


@needs_cuda
def test_cuda_shuttle_brings_the_right_values_while_memory_is_reused():
    """Long matrix products keep the compute stream behind, so that a missing wait would show as wrong values."""
    device = torch.device("cuda", torch.cuda.current_device())
    shuttle, slow = Shuttle(device), torch.randn(4096, 4096, device=device)
    hosts, expected = [], []
    for number in range(20):
        (slow @ slow).sum()
        tensor = torch.full((1 << 20,), float(number), device=device)
        hosts.append(shuttle.send(tensor))
        expected.append(float(number))
        del tensor
        torch.full((1 << 20,), -1.0, device=device)  # takes the memory just given back
    seen = []
    for number in reversed(range(20)):
        (copy_,) = shuttle.fetch([hosts[number]])
        if number:
            shuttle.prefetch([hosts[number - 1]])
        (slow @ slow).sum()
        seen.append(torch.stack([copy_.min(), copy_.max()]))
        del copy_
    assert torch.stack(seen).cpu().tolist() == [[e, e] for e in reversed(expected)]
