import pytest
import torch

from lisatune.memory.ledger import HOST, Ledger, off_device


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_storage_is_booked_once_and_struck_off_with_its_last_tensor(device):
    with Ledger(granularity=1, device_type=device) as ledger:
        whole = torch.zeros(100, device=device)
        view = whole[:10].view(2, 5)
        assert ledger.total_bytes == 400
        del whole
        assert ledger.total_bytes == 400
        del view
        assert ledger.total_bytes == 0
    assert ledger.peak_bytes == 400


def test_labels_and_the_moment_of_the_peak():
    with Ledger(granularity=1) as ledger:
        weight = torch.zeros(10, device="meta", requires_grad=True)
        ledger.book(weight, "weights")
        ledger.label = "activations"
        kept = weight.exp()
        ledger.label = "loss"
        kept.sum().backward()
    assert ledger.peak["weights"] == 40
    assert ledger.peak["activations"] == 40
    assert ledger.peak_label == "backward"
    assert ledger.peak_bytes == sum(ledger.peak.values())


def test_cuda_rounds_up_to_512():
    with Ledger() as ledger:
        held = [torch.zeros(size, dtype=torch.uint8, device="meta") for size in (1, 512, 513)]
    assert ledger.total_bytes == 512 + 512 + 1024
    assert len(held) == 3


def test_what_is_made_off_the_device_is_counted_apart_and_stays_apart():
    with Ledger(granularity=1) as ledger:
        with off_device():
            host = torch.zeros(10, device="meta")
        ledger.book(host, "state")
        device = torch.zeros(5, device="meta")
    assert (ledger.host_bytes, ledger.total_bytes, ledger.peak_bytes) == (40, 20, 20)
    assert HOST not in {name for name, size in ledger.peak.items() if size and name != HOST}
    assert device.shape == (5,)
    del host
    assert ledger.host_bytes == 0


def test_peak_can_be_measured_anew():
    with Ledger(granularity=1) as ledger:
        torch.zeros(1000, device="meta").sum()
        ledger.reset_peak()
        torch.zeros(10, device="meta")
    assert ledger.peak_bytes == 40
