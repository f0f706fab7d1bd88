"""What training costs on n devices: closed forms for traffic, time, memory, files and dollars.

Symbols: P parameters, n devices, B bytes a second that a device can send, T seconds of a step's arithmetic. Bytes are
sent and received at once, so that each counts once. Nothing here measures anything: what a form is worth is measured by
ranks.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4
"""Bytes of a weight, a gradient, a moment, an average: all are kept in float32."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once, and keeps for that beside the gradients (bucket_cap_mb, 25 MiB)."""
FORWARD, BACKWARD = 1 / 3, 2 / 3
"""Shares of a step's arithmetic: the gradients of inputs and of weights cost as much each as the forward pass."""


@dataclass(frozen=True)
class Network:
    """What is trained, and what a step of it takes.

    Attributes:
        parameters: trained weights, P.
        largest: weights of the largest part that FSDP2 gathers at once; 0: it is not for this network.
        parts: how many there are.
        flops: of a training step, for each image.
        activations: bytes that the forward pass leaves for the backward pass, for each image.
        copies: bytes that it leaves whatever the number of images: the weights as autocast has converted them.
        averages: how many moving averages of the weights are kept.
    """

    name: str
    parameters: int
    largest: int
    parts: int
    flops: float
    activations: float
    copies: float
    averages: int = 1


@dataclass(frozen=True)
class Cluster:
    """Machines of equal devices.

    Attributes:
        per_node: devices of a machine.
        inside: bytes/s that a device sends to others in its machine.
        between: bytes/s that a machine sends to others, over all of its network cards.
        latency: seconds from one device to the next.
        flops: that a device computes in a second.
        memory: bytes of a device.
        price: dollars an hour of a device.
        overlap: the share of the backward pass (of either pass, FSDP2) in which devices can compute and send at once.
        writer: bytes/s of one process that writes a file.
        storage: bytes/s of all processes together.
    """

    per_node: int
    inside: float
    between: float
    latency: float
    flops: float
    memory: float
    price: float
    overlap: float
    writer: float
    storage: float

    def bandwidth(self, devices: int) -> float:
        """Bytes/s of each device in a ring through all of them: that of the narrowest link.

        Several rings share a machine's cards, so that together they have the whole of `between`; each device's data
        crosses every link of the ring once (Patarasuk and Yuan 2009, section 3).
        """
        return self.inside if devices <= self.per_node else min(self.inside, self.between)


def steps_of_latency(devices: int) -> int:
    """Messages that follow one another in an all-reduce of little data: up and down a binary tree.

    Sanders, Speck and Träff 2009; NCCL has it since 2.4. A ring would need 2 (n - 1), as many with two devices.
    """
    return 2 * math.ceil(math.log2(devices))


def all_reduce(size: float, devices: int, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds of a sum over the devices: 2 (n - 1) / n size / B (Patarasuk and Yuan 2009, theorem 1 and section 3)."""
    return 2 * one_way(size, devices) / bandwidth + steps_of_latency(devices) * latency


def gather(size: float, devices: int, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds of an all-gather, or of a reduce-scatter, each of them half of the all-reduce: (n - 1) / n size / B."""
    return one_way(size, devices) / bandwidth + steps_of_latency(devices) / 2 * latency


def one_way(size: float, devices: int) -> float:
    """Bytes that a device sends while all devices get the parts of `size` bytes that they lack."""
    return (devices - 1) / devices * size


def ddp_traffic(parameters: int, devices: int) -> float:
    """Bytes that a device sends in a step: an all-reduce of the gradients."""
    return 2 * one_way(FLOAT * parameters, devices)


def fsdp_traffic(parameters: int, devices: int, compute: int) -> float:
    """The same under FSDP2: two all-gathers in `compute` bytes a weight, and a reduce-scatter of the gradients.

    In float32 3/2 of that of DDP (Rajbhandari et al. 2020, "ZeRO", section 7.2.2); in bf16 as much as that of DDP.
    """
    return one_way((2 * compute + FLOAT) * parameters, devices)


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step of one device: its arithmetic, and what it waits for the others beyond that."""

    arithmetic: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.waiting


def ddp_step(arithmetic: float, network: Network, devices: int, cluster: Cluster, micro_batches: int = 1) -> Step:
    """Buckets are sent while the backward pass goes on (Li et al. 2020, "PyTorch Distributed", section 3.2.3).

    That of the last micro-batch. The last bucket has nothing to go with.
    """
    if devices == 1:
        return Step(arithmetic, 0.0)
    size, bandwidth = FLOAT * network.parameters, cluster.bandwidth(devices)
    buckets = math.ceil(size / BUCKET)
    sending = all_reduce(size, devices, bandwidth, buckets * cluster.latency)
    hidden = cluster.overlap * BACKWARD * arithmetic / micro_batches
    return Step(arithmetic, max(sending - hidden, sending / buckets))


def fsdp_step(
    arithmetic: float, network: Network, devices: int, cluster: Cluster, compute: int, micro_batches: int = 1
) -> Step:
    """The next part is gathered while one is computed, in each micro-batch; the first has nothing to go with.

    Gradients are reduced in the last micro-batch.
    """
    if devices == 1:
        return Step(arithmetic, 0.0)
    bandwidth, latency = cluster.bandwidth(devices), network.parts * cluster.latency
    gathering = gather(compute * network.parameters, devices, bandwidth, latency)
    reducing = gather(FLOAT * network.parameters, devices, bandwidth, latency)
    each = cluster.overlap * arithmetic / micro_batches
    first = gathering / network.parts
    forward = micro_batches * max(gathering - each * FORWARD, first)
    backward = (micro_batches - 1) * max(gathering - each * BACKWARD, 0.0)
    return Step(arithmetic, forward + backward + max(gathering + reducing - each * BACKWARD, reducing / network.parts))


def images_to_hide(network: Network, devices: int, cluster: Cluster) -> float:
    """Images a device, in one micro-batch, from which on DDP's sending is over with the backward pass."""
    sending = ddp_step(0.0, network, devices, cluster).waiting
    return sending * cluster.flops / (BACKWARD * cluster.overlap * network.flops) if cluster.overlap else math.inf


@dataclass(frozen=True)
class Held:
    """Bytes that a device holds between two steps; `gradients` are freed after each one."""

    weights: int
    gradients: int
    moments: int
    averages: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.averages


def held(shapes: Sequence[Sequence[int]], averages: int = 1, rank: int = 0, devices: int = 1) -> Held:
    """Exactly what a rank holds of parameters of these shapes, with Adam: all of them, or its rows under FSDP2.

    Args:
        shapes: of the trained parameters.
        averages: of the weights.
        rank: of `devices` that share the parameters' rows as torch.chunk does; 0 of 1: they are whole, as under DDP.
    """
    size = FLOAT * sum(rows(shape, rank, devices) * math.prod(shape[1:]) for shape in shapes)
    return Held(weights=size, gradients=size, moments=2 * size, averages=averages * size)


def rows(shape: Sequence[int], rank: int, devices: int) -> int:
    """The rows (dimension 0) of a parameter that a rank holds, as torch.chunk splits them."""
    each = -(-shape[0] // devices)
    return min(each, max(0, shape[0] - rank * each))


def ddp_memory(network: Network, images: int, devices: int = 2) -> float:
    """Bytes of a device in a step of `images` at once: gradients are there twice, in DDP's buckets as well."""
    states = (5 if devices > 1 else 4) + network.averages
    return FLOAT * states * network.parameters + network.copies + images * network.activations


def fsdp_memory(network: Network, images: int, devices: int, compute: int) -> float:
    """The same under FSDP2: a share of all states; two parts gathered, one of them with its whole gradient."""
    states = FLOAT * (4 + network.averages) * network.parameters / devices
    return states + network.largest * (2 * compute + compute + FLOAT) + images * network.activations


def checkpoint_bytes(network: Network) -> int:
    """Of a checkpoint: weights, averages, Adam's two moments."""
    return FLOAT * (3 + network.averages) * network.parameters


def save_seconds(network: Network, devices: int, cluster: Cluster, sharded: bool) -> float:
    """Until a checkpoint is on the disk: by rank 0, or by all ranks at once."""
    speed = min(cluster.storage, devices * cluster.writer) if sharded else min(cluster.storage, cluster.writer)
    return checkpoint_bytes(network) / speed


def dollars(seconds: float, devices: int, cluster: Cluster) -> float:
    """Of so many seconds of all devices."""
    return seconds / 3600 * devices * cluster.price
