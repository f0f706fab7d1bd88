"""What training would cost on 1 to 512 devices, and a cache of up to a billion pictures: the forms of cost.py.

Nothing of a GPU is measured here: what a device and its links can do is given by options, whose defaults are data
sheets and assumptions. ranks.py compares the same forms with two processes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ldm.cli.options import positive, share, some_share, whole_number
from ldm.errors import ConfigError
from ldm.evaluation.report import markdown
from ldm.latents.build import shard_items
from ldm.latents.claims import seal
from ldm.latents.manifest import CacheSpec, Manifest
from scripts.bench import cost
from scripts.bench.child import Place, counted, timed
from scripts.bench.contest import WARM_UP, Child, Side
from scripts.bench.cost import Cluster, Network
from scripts.bench.networks import AUTOENCODER, NETWORKS, counted_network, encoding_flops
from scripts.bench.sides import ours
from scripts.bench.steps import sizes
from scripts.bench.tables import saved

DEVICES = (1, 8, 64, 512)
PICTURES = (10**6, 10**8, 10**9)
BF16 = 2
"""Bytes of a weight in compute."""
_NOTES = (
    "no GPU was measured: figures of devices are inputs, not claims. Defaults are assumptions, partly of NVIDIA's data "
    "sheets: an H100 SXM (989 TFLOP/s of dense bf16, 80 GB, NVLink 900 GB/s both ways together), eight of them in a "
    "DGX H100 with 8 x 400 Gb/s; the others have no source: a step reaches 40% of the peak, latency is 10 us, a device "
    "costs 3 dollars an hour, one writer has 2 GB/s, the file system 40 GB/s",
    "weights, largest part, FLOPs and activations are counted from the real networks; losses are left out, and so are "
    "LPIPS and discriminator of the autoencoder",
    "waits: what a step waits for the others, beyond what the backward pass hides; slow ranks are left out",
    "memory: weights, gradients, moments, one average, what the forward pass keeps; neither what the allocator caches "
    "nor workspaces",
    "hides from: images a device in one micro-batch from which on sending is over with DDP's backward pass",
)


def add_options(add: Any) -> None:
    """Those of `bench scale`; rates are in thousands of millions."""
    add("--network", choices=[*NETWORKS], help="this one alone (default: all)")
    add("--images", type=whole_number, default=32, help="images a device and step (default: 32)")
    add("--step-seconds", type=positive, help="of a step of --network on one device, in place of the two below")
    add("--measure", action="store_true", help="take the speed of a step of DiT-S/2 on --device in place of them")
    add("--tflops", type=positive, default=989.0, help="peak of a device in bf16 (default: 989)")
    add("--utilization", type=some_share, default=0.4, help="share of it that a step reaches (default: 0.4)")
    add("--memory", type=positive, default=80.0, help="of a device, GB (default: 80)")
    add("--per-node", type=whole_number, default=8, help="devices of a machine (default: 8)")
    add("--inside", type=positive, default=450.0, help="GB/s that a device sends in its machine (default: 450)")
    add("--between", type=positive, default=400.0, help="GB/s that a machine sends to others (default: 400)")
    add("--latency", type=positive, default=10.0, help="microseconds from device to device (default: 10)")
    add("--overlap", type=share, default=1.0, help="share of the backward pass in which devices can send (default: 1)")
    add("--price", type=positive, default=3.0, help="dollars an hour of a device (default: 3)")
    add("--writer", type=positive, default=2.0, help="GB/s of a process that writes a file (default: 2)")
    add("--storage", type=positive, default=40.0, help="GB/s of the file system (default: 40)")


def cluster_of(options: Any) -> Cluster:
    """The machines that the options describe, but for the speed of a device where that is measured."""
    return Cluster(
        per_node=options.per_node,
        inside=options.inside * 1e9,
        between=options.between * 1e9,
        latency=options.latency * 1e-6,
        flops=options.tflops * 1e12 * options.utilization,
        memory=options.memory * 1e9,
        price=options.price,
        overlap=options.overlap,
        writer=options.writer * 1e9,
        storage=options.storage * 1e9,
    )


def scale(options: Any) -> str:
    """The tables of `bench scale`."""
    if options.step_seconds and not options.network:
        raise ConfigError("--step-seconds: is that of one network: expected --network as well, found none")
    names = [options.network] if options.network else [*NETWORKS]
    networks = [counted_network(name, NETWORKS[name], bf16=True) for name in names]
    cluster, notes = cluster_of(options), [*_NOTES]
    if options.step_seconds:
        cluster = replace(cluster, flops=networks[0].flops * options.images / options.step_seconds)
    elif options.measure:
        cluster = replace(cluster, flops=measured_flops(options))
        notes.append(f"measured: {cluster.flops / 1e12:.3g} TFLOP/s, a step of DiT-S/2 on {options.device}")
    on_devices = [row for one in networks for row in device_rows(one, options.images, cluster)]
    of_pictures = [picture_row(items, cluster) for items in PICTURES]
    tables = [about(networks, cluster), devices(on_devices, cluster), pictures(of_pictures)]
    record = {
        "table": options.what,
        "inputs": asdict(cluster),
        "networks": [asdict(one) for one in networks],
        "devices": on_devices,
        "pictures": of_pictures,
        "notes": notes,
    }
    return saved(options, record, "\n\n".join([*tables, "\n".join(f"- {note}" for note in notes)]) + "\n")


def measured_flops(options: Any) -> float:
    """FLOP/s of a real run's step of DiT-S/2 on the device, in bf16 there if it is a GPU."""
    size = sizes(options).dit
    place = Place(options.device, options.device.startswith("cuda"))
    with ExitStack() as stack:
        side = Side("DiT-S/2", partial(ours.dit, size, False, ours.ddpm, False))
        child = stack.enter_context(Child(side, place))
        child.answer()
        seconds = [child.ask(timed)["seconds"] for _ in range(WARM_UP + options.repeats)][WARM_UP:]
        flops: float = child.ask(counted)["flops"]
    return flops / statistics.median(seconds)


def about(networks: Sequence[Network], cluster: Cluster) -> str:
    """A row for each network, the autoencoder included."""
    header = ["network", "parameters, M", "TFLOP an image", "gradients, GB", "checkpoint, GB", "kept, MB an image"]
    header += ["largest part, M", *(f"hides from, {n} devices" for n in DEVICES[1:])]
    rows = []
    for one in (*networks, counted_network(*AUTOENCODER, bf16=True)):
        hidden = [math.ceil(cost.images_to_hide(one, n, cluster)) if cluster.overlap else "never" for n in DEVICES[1:]]
        rows.append(
            [
                *(one.name, f"{one.parameters / 1e6:.1f}", f"{one.flops / 1e12:.2f}"),
                *(f"{cost.FLOAT * one.parameters / 1e9:.2f}", f"{cost.checkpoint_bytes(one) / 1e9:.2f}"),
                *(f"{one.activations / 1e6:.0f}", f"{one.largest / 1e6:.1f}" if one.largest else "", *map(str, hidden)),
            ]
        )
    return markdown(header, rows)


def device_rows(network: Network, images: int, cluster: Cluster) -> list[dict[str, Any]]:
    """What a network costs on each number of devices."""
    rows = []
    for n in DEVICES:
        arithmetic = images * network.flops / cluster.flops
        ddp = cost.ddp_step(arithmetic, network, n, cluster)
        fsdp = cost.fsdp_step(arithmetic, network, n, cluster, BF16)
        rows.append(
            {
                "network": network.name,
                "devices": n,
                "arithmetic": arithmetic,
                "ddp_waits": ddp.waiting,
                "fsdp_waits": fsdp.waiting,
                "ddp_images_per_second": n * images / ddp.seconds,
                "fsdp_images_per_second": n * images / fsdp.seconds,
                "ddp_traffic": cost.ddp_traffic(network.parameters, n),
                "fsdp_traffic": cost.fsdp_traffic(network.parameters, n, BF16),
                "ddp_memory": cost.ddp_memory(network, images, n),
                "fsdp_memory": cost.fsdp_memory(network, images, n, BF16),
                "saves_whole": cost.save_seconds(network, n, cluster, sharded=False),
                "saves_sharded": cost.save_seconds(network, n, cluster, sharded=True),
                "dollars_per_million": cost.dollars(1e6 * ddp.seconds / (n * images), n, cluster),
            }
        )
    return rows


def devices(found: Sequence[Mapping[str, Any]], cluster: Cluster) -> str:
    """A row for each network on each number of devices."""
    header = ["network", "devices", "images/s, DDP", "FSDP2", "ms of arithmetic", "waits, DDP", "FSDP2"]
    header += ["sends, GB a step", "memory, GB, DDP", "FSDP2", "saves in s, whole", "sharded", "$ a million images"]
    rows = []
    for row in found:
        memory = [
            f"{row[key] / 1e9:.1f}" + (" (too much)" if row[key] > cluster.memory else "")
            for key in ("ddp_memory", "fsdp_memory")
        ]
        rows.append(
            [
                *(row["network"], str(row["devices"])),
                *(f"{row[key]:,.0f}" for key in ("ddp_images_per_second", "fsdp_images_per_second")),
                *(f"{row[key] * 1e3:.3g}" for key in ("arithmetic", "ddp_waits", "fsdp_waits")),
                *(f"{row['ddp_traffic'] / 1e9:.2f}", *memory),
                *(f"{row[key]:.2g}" for key in ("saves_whole", "saves_sharded")),
                f"{row['dollars_per_million']:.2f}",
            ]
        )
    return markdown(header, rows)


def spec(items: int) -> CacheSpec:
    """A cache of latents 4 x 32 x 32 (f8, 256 px) of so many pictures, laid out as a real one."""
    plan = CacheSpec((4, 32, 32), items, "0" * 64, {"resolution": 256}, {"weights": "0" * 64})
    return replace(plan, shard_items=shard_items(items, plan.record.itemsize, plan.encode_batch))


def picture_row(items: int, cluster: Cluster) -> dict[str, Any]:
    """What a data set of so many pictures costs."""
    plan = spec(items)
    shards = [{"crc32": "0" * 8, "items": len(plan.shard_range(shard))} for shard in range(plan.num_shards)]
    manifest = Manifest(plan, [0.0] * 4, [1.0] * 4, [], shards)
    seconds = items * encoding_flops() / cluster.flops
    return {
        "pictures": items,
        "cache": items * plan.record.itemsize,
        "shards": plan.num_shards,
        "manifest": len(seal(manifest.to_dict())),
        "hours": {n: seconds / 3600 / n for n in DEVICES},
        "dollars": cost.dollars(seconds, 1, cluster),
        "checked": items * plan.record.itemsize / cluster.storage,
    }


def pictures(found: Sequence[Mapping[str, Any]]) -> str:
    """A row for each size of a data set."""
    header = ["pictures", "cache, TB", "shards", "manifest, MB"]
    header += ["reading it once, s", *(f"hours to encode, {n} devices" for n in DEVICES), "$"]
    rows = []
    for row in found:
        rows.append(
            [
                *(f"{row['pictures'] / 1e6:,.0f} M", f"{row['cache'] / 1e12:.3g}", f"{row['shards']:,}"),
                *(f"{row['manifest'] / 1e6:.2g}", f"{row['checked']:,.0f}"),
                *(f"{hours:,.3g}" for hours in row["hours"].values()),
                f"{row['dollars']:,.0f}",
            ]
        )
    return markdown(header, rows)
