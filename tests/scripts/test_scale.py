"""The cost model: closed forms, and what ranks really hold."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.latents.build import shard_items
from scripts.bench import cost, networks, ranks, scale
from scripts.bench.__main__ import main
from scripts.bench.child import Place
from scripts.bench.cost import Cluster, Network
from scripts.bench.networks import AUTOENCODER, NETWORKS, counted_network
from scripts.bench.ranks import Group, held
from scripts.bench.sides import links, ours
from scripts.bench.sides.launched import Rank
from scripts.bench.sizes import TINY
from tests.forked import Forked

ROOT = Path(__file__).parents[2]
CLUSTER = Cluster(8, 400e9, 50e9, 0.0, 1e14, 80e9, 2.0, 1.0, 1e9, 10e9)
# 1 GB of weights, of gradients, ...; 0.5 s of arithmetic for ten images on one device.
NETWORK = Network("it", 250_000_000, 10_000_000, 25, 5e12, 1e9, 0.0)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    """Patarasuk and Yuan 2009: each device sends 2 (n - 1) parts of n."""
    for n in (2, 3, 8, 512):
        assert cost.all_reduce(n * 1e6, n, 1e6) == pytest.approx(2 * (n - 1))
        assert cost.all_reduce(1e9, n, 1e9) == pytest.approx(2 * cost.gather(1e9, n, 1e9))
    assert cost.all_reduce(1e9, 1, 1e9) == 0
    assert [cost.steps_of_latency(n) for n in (1, 2, 8, 9, 512)] == [0, 2, 6, 8, 18]


@pytest.mark.parametrize("n", [2, 8, 512])
def test_traffic_of_fsdp2_is_half_as_much_again_in_float32_and_the_same_in_bf16(n):
    ddp = cost.ddp_traffic(1000, n)
    assert ddp == pytest.approx(8000 * (n - 1) / n)
    assert cost.fsdp_traffic(1000, n, 4) == pytest.approx(1.5 * ddp)
    assert cost.fsdp_traffic(1000, n, 2) == pytest.approx(ddp)


def test_the_narrowest_link_of_the_ring_counts():
    assert CLUSTER.bandwidth(8) == 400e9
    assert CLUSTER.bandwidth(9) == 50e9
    assert replace(CLUSTER, inside=1e9).bandwidth(9) == 1e9


def test_what_a_backward_pass_hides_of_the_sending():
    alone = cost.ddp_step(0.5, NETWORK, 1, CLUSTER)
    assert (alone.seconds, alone.waiting) == (0.5, 0.0)
    sending = 2 * 7 / 8 * 1e9 / 400e9
    buckets = math.ceil(1e9 / cost.BUCKET)
    hidden = cost.ddp_step(0.5, NETWORK, 8, CLUSTER)
    assert hidden.waiting == pytest.approx(sending / buckets)  # the last bucket
    bare = cost.ddp_step(0.5, NETWORK, 8, replace(CLUSTER, overlap=0.0))
    assert bare.seconds == pytest.approx(0.5 + sending)
    partly = cost.ddp_step(0.003, NETWORK, 8, CLUSTER)
    assert partly.waiting == pytest.approx(sending - 0.002)
    in_two = cost.ddp_step(0.003, NETWORK, 8, CLUSTER, micro_batches=2)
    assert in_two.waiting == pytest.approx(sending - 0.001)  # that of the last one


def test_what_both_passes_hide_under_fsdp2():
    gathering, reducing = 7 / 8 * 0.5e9 / 400e9, 7 / 8 * 1e9 / 400e9
    bare = cost.fsdp_step(0.5, NETWORK, 8, replace(CLUSTER, overlap=0.0), 2)
    assert bare.waiting == pytest.approx(2 * gathering + reducing)
    twice = cost.fsdp_step(0.5, NETWORK, 8, replace(CLUSTER, overlap=0.0), 2, micro_batches=2)
    assert twice.waiting == pytest.approx(4 * gathering + reducing)
    hidden = cost.fsdp_step(0.5, NETWORK, 8, CLUSTER, 2)
    assert hidden.waiting == pytest.approx((gathering + reducing) / 25)
    assert cost.fsdp_step(0.5, NETWORK, 1, CLUSTER, 2).waiting == 0


def test_sending_is_hidden_from_as_many_images_on():
    images = cost.images_to_hide(NETWORK, 64, CLUSTER)
    arithmetic = images * NETWORK.flops / CLUSTER.flops
    assert cost.BACKWARD * arithmetic == pytest.approx(2 * 63 / 64 * 1e9 / 50e9)
    assert cost.images_to_hide(NETWORK, 64, replace(CLUSTER, overlap=0.0)) == math.inf


def test_memory_files_and_dollars():
    one, both = cost.ddp_memory(NETWORK, 10, 1), cost.ddp_memory(NETWORK, 10, 2)
    assert (one, both - one) == (5e9 + 10e9, 1e9)  # DDP's buckets
    assert cost.fsdp_memory(NETWORK, 10, 1000, 2) == pytest.approx(5e6 + 10e6 * 10 + 10e9)
    assert cost.checkpoint_bytes(NETWORK) == 4e9
    saves = [cost.save_seconds(NETWORK, n, CLUSTER, sharded) for n, sharded in ((64, False), (4, True), (64, True))]
    assert saves == [4.0, 1.0, 0.4]
    assert cost.dollars(1800, 8, CLUSTER) == 8.0


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1), st.integers(1, 12))
def test_rows_are_shared_as_torch_does(shapes, devices):
    found = [cost.held(shapes, 2, rank, devices) for rank in range(devices)]
    whole = cost.held(shapes, 2)
    assert sum(one.total for one in found) == whole.total == 4 * 6 * sum(map(math.prod, shapes))
    for shape in shapes:
        chunks = [len(one) for one in torch.empty(shape).chunk(devices)]
        chunks += [0] * (devices - len(chunks))
        assert chunks == [cost.rows(shape, rank, devices) for rank in range(devices)]


@pytest.mark.parametrize(("strategy", "world"), [(None, 1), ("DDP", 2), ("FSDP2", 3)])
def test_what_a_rank_really_holds(forked: Forked, strategy, world):
    """To the byte; rows of 32 do not fall into three equal parts."""
    size = TINY.sampled

    def work(rank: int) -> dict[str, int]:
        place = Rank(rank, world, int(os.environ.get("MASTER_PORT", "0")))
        built, found = ours.ranked(size, strategy, place, Place("cpu", False)), {}

        def turns():
            yield
            found.update(held(built.networks[0]))

        built.train(turns())
        return found

    with torch.device("meta"):
        shapes = networks.shapes(ours.make_unet(size))
    sharing = world if strategy == "FSDP2" else 1
    expected = [cost.held(shapes, 1, rank % sharing, sharing) for rank in range(world)]
    assert forked(world, work) == [vars(one) for one in expected]


def test_networks_are_those_of_their_papers():
    """Peebles and Xie 2023, table 1 (multiply-adds); Rombach et al. 2022's code for Stable Diffusion 1."""
    known = NETWORKS["DiT-B/2, 256 px"]
    found, bf16 = (counted_network("DiT-B/2", known, bf16) for bf16 in (False, True))
    autoencoder = counted_network(*AUTOENCODER, bf16=True)
    assert found.flops == pytest.approx(2 * 3 * 23.01e9, rel=0.02)
    assert (found.parts, found.copies) == (13, 0)
    assert bf16.copies == pytest.approx(2 * found.parameters, rel=0.02)
    assert 0.5 < bf16.activations / found.activations < 0.7  # norms stay in float32
    with torch.device("meta"):
        unet = NETWORKS["UNet of Stable Diffusion 1, 512 px"].trained()
        large = NETWORKS["DiT-XL/2, 256 px"].trained()
    assert networks.count(unet) == 859_520_964
    assert autoencoder.parameters == 83_653_863  # as AutoencoderKL of Stable Diffusion 1
    assert autoencoder.copies == pytest.approx(2 * autoencoder.parameters, rel=0.02)
    assert networks.count(large) == pytest.approx(675e6, rel=0.001)


def test_what_is_kept_is_what_a_real_pass_keeps():
    known = NETWORKS["DiT-B/2, 256 px"]
    small = known._replace(trained=lambda: known.trained()[:0])  # nothing, of which nothing is kept
    assert networks._kept(small._replace(run=lambda modules, n: torch.ones(n, requires_grad=True)), 1, False).kept == 0
    weight = torch.nn.Linear(8, 4, bias=False)
    linear = small._replace(
        trained=lambda: torch.nn.ModuleList([torch.nn.Linear(8, 4, bias=False)]),
        run=lambda modules, n: modules[0](torch.empty(n, 8)).exp(),
    )
    found = networks._kept(linear, 3, False)
    assert found.kept == 4 * (3 * 8 + 3 * 4)  # the input, and the result of exp; not the weight
    assert found.flops == 2 * 2 * 3 * weight.weight.numel()  # forward, and the weight's gradient


def test_both_tables_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "NETWORKS", {"it": None})
    monkeypatch.setattr(scale, "counted_network", lambda name, known, bf16: replace(NETWORK, name=name))
    monkeypatch.setattr(scale, "PICTURES", (10**4, 10**6))
    words = ["--memory", "16", "--images", "10", "--overlap", "0", "--out", str(tmp_path)]
    assert main(["scale", *words]) == 0
    page = capsys.readouterr().out
    assert page.startswith((tmp_path / "scale.md").read_text())
    assert "no GPU was measured: figures of devices are inputs, not claims" in page
    record = json.loads((tmp_path / "scale.json").read_text())
    assert record["inputs"]["memory"] == 16e9
    assert [row["devices"] for row in record["devices"]] == [1, 8, 64, 512]
    assert [row["ddp_memory"] > 16e9 - 1 for row in record["devices"]] == [False, True, True, True]
    assert page.count("(too much)") == 0
    million = record["pictures"][1]
    assert million["cache"] == 10**6 * (2 * 2 * 4 * 32 * 32 * 2 + 8)
    assert million["shards"] == -(-(10**6) // shard_items(10**6, 32_776, 64))
    assert million["dollars"] == pytest.approx(million["hours"]["1"] * 3)


def test_the_seconds_of_a_step_are_an_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "counted_network", lambda name, known, bf16: replace(NETWORK, name=name))
    monkeypatch.setattr(scale, "PICTURES", (10**4,))
    words = ["--step-seconds", "0.25", "--network", "DiT-B/2, 256 px", "--images", "5", "--out", str(tmp_path)]
    assert main(["scale", *words]) == 0
    assert json.loads((tmp_path / "scale.json").read_text())["devices"][0]["arithmetic"] == pytest.approx(0.25)
    assert main(["scale", "--step-seconds", "1"]) == 2
    assert "--step-seconds: is that of one network: expected --network as well" in capsys.readouterr().err


def test_the_speed_of_a_step_is_measured_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "counted_network", lambda name, known, bf16: replace(NETWORK, name=name))
    monkeypatch.setattr(scale, "PICTURES", (10**4,))
    monkeypatch.setattr(scale, "measured_flops", lambda options: 3e12)
    assert main(["scale", "--measure", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scale.json").read_text())
    assert record["inputs"]["flops"] == 3e12
    assert re.match("measured: 3 TFLOP/s, a step of DiT-S/2 on ", record["notes"][-1])


def test_a_prediction_adds_what_is_sent_to_a_step_without_it():
    """Two passes of half of the bytes under DDP; two gathers and a reduction under FSDP2."""
    size = TINY.sampled
    network = ranks.described(size)
    sent = {turn: [0.5 * turn[0].passes] for turn in links.turns((10**6,))}  # a million bytes a second each
    groups = [Group(name, []) for name in ("1", "2, apart")]
    groups += [Group(f"2, {one.name}", [], one) for one in ranks.STRATEGIES]
    for group in groups:
        group.seconds, group.peak = [2.0], 2**30
    rows = {row[0]: row for row in ranks.steps_rows(groups, size, sent)}
    each = 4 * network.parameters / 2 / 1e6
    assert rows["1"][3:5] == ["", ""]
    assert float(rows["2, DDP"][3]) == pytest.approx(1e3 * (2 + 2 * each), abs=1)
    assert float(rows["2, FSDP2"][3]) == pytest.approx(1e3 * (2 + 3 * each), abs=1)
    assert rows["2, DDP"][4] == f"{(2 + 2 * each) / 2 - 1:+.0%}"


@pytest.mark.slow
def test_two_processes_are_measured(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "ranks", "--tiny", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "logs/bench/ranks.json").read_text())
    held = {case["name"]: sum(case["held"].values()) for case in record["cases"] if "held" in case}
    assert held["2, DDP, 2 images each"] == 2 * held["2, FSDP2, 2 images each"]
