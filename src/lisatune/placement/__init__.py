"""Where the weights of a model are: whole on the device, partly in host memory, or in shards on several processes.

It is decided once, by ``choose_placement``, and asked of the object that this returns.
"""

from __future__ import annotations

from lisatune.placement.base import OnDevice
from lisatune.placement.copies import Copies, CopiesInHost
from lisatune.placement.in_host import InHost
from lisatune.placement.sharded import Sharded
from lisatune.processes.collectives import num_ranks


def choose_placement(
    *,
    offload_frozen: bool,
    shard_size: int,
    alone: bool = False,
    frozen_bits: int | None = None,
    sums_in_float32: bool = True,
) -> OnDevice:
    """The placement for the processes that there are.

    Args:
        offload_frozen: Keep frozen decoder layers in host memory. Needs whole weights.
        shard_size: Processes that share each weight, if there are several. With 1 each has all weights whole.
        alone: Somebody else joins the processes.
        frozen_bits: Bits of frozen matrices while training, with the exact ones in host memory. Needs whole weights.
        sums_in_float32: Sum gradients in float32; else in their own type.
    """
    several, in_host = num_ranks() > 1 and not alone, offload_frozen or frozen_bits is not None
    if several and shard_size > 1:
        return Sharded(shard_size, sums_in_float32=sums_in_float32)
    if several:
        copies = CopiesInHost(frozen_bits, stream=offload_frozen) if in_host else Copies()
        copies.sums_in_float32 = sums_in_float32
        return copies
    return InHost(frozen_bits, stream=offload_frozen) if in_host else OnDevice()
