"""Training on two hosts that are two network namespaces of this machine, over links of several kinds; Linux, needs root.

python benchmarks/hosts.py --model MODEL --data DATA [--steps 6]

Each namespace has its own address and one end of a link, which this process makes slow, far and lossy. torchrun runs in each, one
process a host. Bytes are those of all packets, headers and start included, divided by steps and hosts; seconds are the median of
the steps after the first. Two last rows: the link loses everything for 10 seconds in mid-run; the second host's processes are killed
(-9) in mid-run and started anew after 5 seconds, and its bytes are those of all attempts.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import queue
import random
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from results import markdown, write_page

HOSTS = {"lisatune0": "10.77.0.1", "lisatune1": "10.77.0.2"}
LINKS = {  # delay in seconds, bits a second, share lost
    "0.1 ms, 1 Gbit/s": (1e-4, 1e9, 0.0),
    "20 ms, 200 Mbit/s, 1% of packets lost": (0.02, 2e8, 0.01),
}
HEAD = ("link", "run", "a step, s", "the longest, s", "MB a step and host", "last loss")
SILENT, KILLED = "nothing for 10 s", "the second host killed and back after 5 s"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
MTU = 60_000  # large, for this process takes some 50 us a packet
RUNS = {
    "full": "method=full",
    "LISA": "num_active=1 interval_steps=2",
    "LISA, sharded": "num_active=1 interval_steps=2 dp_shard_size=2",
}


def sh(command: str) -> None:
    """Run a command of the system."""
    subprocess.run(command.split(), check=True)


def remove() -> None:
    """Take namespaces away, of an earlier run too."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)


class Link:
    """A cable between two namespaces: a tun device in each, and this process between them, packet by packet.

    Not `tc netem`, which many small kernels lack: what it would do is done here.

    Args:
        delay: Seconds that a packet takes.
        rate: Bits a second in each direction.
        loss: Chance of a packet to be lost.
    """

    def __init__(self, delay: float, rate: float, loss: float) -> None:
        self.delay, self.rate, self.loss = delay, rate, loss
        self.up, self.bytes = True, 0
        self.ends = [self._device(host, address) for host, address in HOSTS.items()]
        for here, there in (self.ends, self.ends[::-1]):
            waiting: queue.Queue = queue.Queue(10_000)
            threading.Thread(target=self._take, args=(here, waiting), daemon=True).start()
            threading.Thread(target=self._give, args=(there, waiting), daemon=True).start()

    def _device(self, host: str, address: str) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", b"link0", IFF_TUN | IFF_NO_PI))
        sh(f"ip link set link0 netns {host}")
        for words in (f"addr add {address}/24 dev link0", f"link set link0 mtu {MTU} up", "link set lo up"):
            sh(f"ip -n {host} {words}")
        return end

    def _take(self, end: int, waiting: queue.Queue) -> None:
        free = 0.0  # when the cable is
        chances = random.Random(0)
        while True:
            try:
                packet = os.read(end, MTU + 100)
            except OSError:  # the namespace is gone
                return
            self.bytes += len(packet)
            free = max(free, time.monotonic()) + 8 * len(packet) / self.rate
            if self.up and chances.random() >= self.loss:
                waiting.put((free + self.delay, packet))

    def _give(self, end: int, waiting: queue.Queue) -> None:
        while True:
            due, packet = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            os.write(end, packet)


@contextmanager
def two_hosts(link: tuple[float, float, float]) -> Iterator[Link]:
    """Two namespaces with a link between them."""
    remove()
    try:
        for host in HOSTS:
            sh(f"ip netns add {host}")
        yield Link(*link)
    finally:
        remove()


class Torchrun:
    """A host's torchrun, one process under it."""

    def __init__(self, host: str, output: Path, settings: str) -> None:
        self.host = host
        first = str(host == "lisatune0").lower()  # torchrun knows its own host by name, and a namespace has none
        self.command = (
            f"ip netns exec {host} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 3 "
            f"--rdzv-backend c10d --rdzv-endpoint {HOSTS['lisatune0']}:29500 --rdzv-id {output.name} "
            f"--rdzv-conf is_host={first} --local-addr {HOSTS[host]} -m lisatune train --resume {settings}"
        )
        self.log = output.with_name(f"{output.name}-{host}.log")
        self.environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "link0",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else torchrun keeps the address of a host that is gone
        }
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command.split(), stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def kill(self) -> None:
        """Everything that runs in it at once, as a host does that loses its power."""
        found = subprocess.run(["ip", "netns", "pids", self.host], stdout=subprocess.PIPE, text=True, check=True)
        for process in found.stdout.split():
            os.kill(int(process), signal.SIGKILL)
        self.process.wait()


def after_two_steps(output: Path, event: Callable[[], None]) -> None:
    """Let ``event`` happen as soon as two steps are done."""
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.05)
    event()


def train(options: argparse.Namespace, link: Link, output: Path, words: str, trouble: str) -> dict[str, float]:
    """One run on both hosts; its median step, its bytes of a step, its last loss."""
    before = link.bytes
    settings = (
        f"model={options.model} data={options.data} output={output} max_steps={options.steps} max_length=128 seed=0 "
        f"per_device_train_batch_size=2 learning_rate=1e-4 save_steps={1 if trouble == KILLED else 1000} {words}"
    )
    hosts = [Torchrun(host, output, settings) for host in HOSTS]

    def event() -> None:
        if trouble == SILENT:
            link.up = False
            time.sleep(10)
            link.up = True
        else:
            hosts[1].kill()
            time.sleep(5)
            hosts[1].start()

    if trouble:
        threading.Thread(target=after_two_steps, args=(output, event), daemon=True).start()
    try:
        ends = time.monotonic() + options.minutes * 60
        while any(host.process.poll() is None for host in hosts):
            assert time.monotonic() < ends, f"{output}: not ended"
            time.sleep(0.5)
        assert [host.process.returncode for host in hosts] == [0, 0], output
    finally:
        for host in hosts:
            host.process.terminate()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {
        "seconds": statistics.median(steps[1:]),
        "longest": max(steps[1:]),
        "bytes": (link.bytes - before) / options.steps / 2,
        "loss": rows[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lisatune-hosts-"))
    rows = []
    cases = [(link, run, "") for link in LINKS for run in RUNS]
    cases += [("0.1 ms, 1 Gbit/s", "LISA", trouble) for trouble in (SILENT, KILLED)]
    for link, run, trouble in cases:
        with two_hosts(LINKS[link]) as cable:
            found = train(options, cable, folder / f"{len(rows)}", RUNS[run], trouble)
        name = ", ".join(filter(None, (link, trouble)))
        seconds = [f"{found[key]:.2f}" for key in ("seconds", "longest")]
        rows.append([name, run, *seconds, f"{found['bytes'] / 1e6:.1f}", f"{found['loss']:.5f}"])
        print(*rows[-1], sep=" | ", flush=True)
        write_page("hosts", markdown(HEAD, rows), __doc__ or "")


if __name__ == "__main__":
    main()
