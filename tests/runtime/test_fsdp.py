"""ldm.runtime.fsdp on two ranks of gloo: a sharded model computes, steps, averages and is saved like a whole one."""

import copy
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from ldm.checkpoints import sharded_state, store
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.networks.unet import UNet
from ldm.layers import timestep_embedding
from ldm.optim.ema import EMA, FixedDecay
from ldm.runtime import distributed, fsdp

BATCH = 4
LEVELS = torch.tensor([1.0, 250.0, 511.0, 999.0])  # bf16 knows 510 and 512, 996 and 1000


class Denoiser(nn.Module):
    """A UNet whose parameters do not fall into equal shares, and a table of fewer rows than ranks would like."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = UNet(3, 8, [1], num_res_blocks=1, attention_levels=[0], num_heads=1, vector_channels=5)
        self.conditioner = ClassVector(2, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)  # no branch that starts at zero

    def loss(self, rows: slice) -> Tensor:
        x = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))[rows]
        label = torch.tensor([0, 1, 0, 1])[rows]
        told: Conditioning = self.conditioner({"class_label": label})
        told = self.conditioner.null(len(x)).where(torch.tensor([True, False, False, False])[rows], told)
        return (self.network(x, LEVELS[rows], told) - x).square().mean()


def sharded(model: Denoiser, compute: torch.dtype | None = None) -> Denoiser:
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    fsdp.shard(model.network, mesh, model.network.blocks(), compute)
    fsdp.shard(model.conditioner, mesh, methods=["null"])
    return model


def mine() -> slice:
    """This rank's rows of the batch."""
    share = BATCH // distributed.world_size()
    return slice(distributed.rank() * share, (distributed.rank() + 1) * share)


def train(model: Denoiser, rows: slice, steps: int = 3, clip: float = 0.5, poison: int = -1) -> dict[str, Any]:
    """Fused AdamW with clipping, found_inf and an average, as stage 2 does it; all that comes of it."""
    ema = EMA(Denoiser(), FixedDecay(0.5))
    if isinstance(next(model.parameters()), DTensor):
        ema.average = sharded(Denoiser()).requires_grad_(False).eval()
    # So large an eps keeps Adam from blowing rounding up where a gradient is next to nothing.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
    losses, norms = [], []
    for step in range(steps):
        loss = model.loss(rows)
        (loss * float("nan") if step == poison and distributed.rank() == 0 else loss).backward()
        norm = fsdp.total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        clip_grads_with_norm_(list(model.parameters()), clip, norm)
        vars(optimizer)["found_inf"] = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, BATCH)
        losses.append(loss.item())
        norms.append(norm.item())
    with torch.no_grad():
        ema.average.loss(rows)  # a forward without a backward must leave nothing gathered
    ema.update(model, BATCH)
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "weights": sharded_state.gathered(model.state_dict()),
        "average": sharded_state.gathered(ema.average.state_dict()),
        "optimizer": sharded_state.gathered(optimizer.state_dict()),
    }


def close(ours: Any, theirs: Any, **tolerance: float) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            close(ours[name], theirs[name], **tolerance)
    elif isinstance(ours, list):
        for left, right in zip(ours, theirs, strict=True):
            close(left, right, **tolerance)
    elif isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, **tolerance)
    else:
        assert ours == theirs


def on_shards(rank: int, **options: Any) -> dict[str, Any]:
    model = sharded(Denoiser())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return train(model, mine(), **options)


def test_it_trains_like_a_whole_model(grouped):
    expected = train(Denoiser(), slice(0, BATCH))
    first, second = grouped(2, on_shards)
    losses = (first.pop("losses") + second["losses"]) / 2  # each rank's is that of its rows
    torch.testing.assert_close(losses, expected.pop("losses"), rtol=1e-5, atol=0)
    assert all(value is None for value in second["weights"].values())  # the others hold nothing
    close(first, expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_changes_no_row(grouped):
    first, _ = grouped(2, partial(on_shards, steps=2, poison=1))
    before, _ = grouped(2, partial(on_shards, steps=1))
    assert not first["norms"][1].isfinite()
    close(first["weights"], before["weights"], rtol=0, atol=0)


def in_bf16(rank: int) -> tuple[Tensor, Tensor, bool]:
    model = sharded(Denoiser(), compute=torch.bfloat16)
    told: list[Tensor] = []
    model.network.embed.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(mine())
    loss.backward()
    kept = all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    return loss.detach(), told[0], kept


def test_bf16_is_for_computing_only(grouped):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = [Denoiser().loss(rows).detach() for rows in (slice(0, 2), slice(2, 4))]
    for (loss, told, kept), expected, levels in zip(grouped(2, in_bf16), alone, LEVELS.split(2), strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)  # the same roundings as under autocast
        assert torch.equal(told, timestep_embedding(levels, 8))
        assert kept, "rows and gradients stay in float32"


def saved_by(rank: int, path: Path) -> dict[str, Any]:
    model = sharded(Denoiser())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model.loss(mine()).backward()
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    store.save(path, sharded_state.cut(state, f"{path.name}.x.shards", 20.0))
    return {
        "state_dict": sharded_state.gathered(state["state_dict"]),
        "moments": sharded_state.gathered(optimizer.state_dict()),
    }


@pytest.fixture(scope="module")
def shards(grouped, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder with a.ckpt, which two ranks have saved, and what it holds."""
    folder = tmp_path_factory.mktemp("saved")
    held, _ = grouped(2, partial(saved_by, path=folder / "a.ckpt"))
    return folder, held


def loaded_by(rank: int, path: Path, cut: bool) -> dict[str, Any]:
    torch.manual_seed(5)
    model = sharded(Denoiser())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    state = store.load(path, partial(sharded_state.rows, mesh=mesh) if cut else None)
    fsdp.load_weights(model, state["state_dict"])
    fsdp.load_optimizer(optimizer, state["optimizer_states"][0])
    assert all(isinstance(value["exp_avg"], DTensor) for value in optimizer.state.values())
    moments = copy.deepcopy(sharded_state.gathered(optimizer.state_dict()))
    model.loss(mine()).backward()
    optimizer.step()  # with what was loaded
    return {"state_dict": sharded_state.gathered(state["state_dict"]), "moments": moments}


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("world", [2, 1, 3])
def test_shards_load_on_any_number_of_ranks(grouped, shards, tmp_path, world, cut):
    folder, saved = shards
    path = shutil.copytree(folder, tmp_path, dirs_exist_ok=True) / "a.ckpt"
    # What torch's own reader would unpickle lies beside the shards, and is never looked at.
    (tmp_path / "a.ckpt.x.shards" / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    assert {len(tensor) for tensor in saved["state_dict"].values()} >= {3}, "a share of one row, and one of two"
    loaded, *_ = grouped(world, partial(loaded_by, path=path, cut=cut))
    close(loaded["moments"], saved["moments"], rtol=0, atol=0)
    close(loaded["state_dict"], saved["state_dict"], rtol=0, atol=0)
    alone = store.load(path)
    close(alone["state_dict"], saved["state_dict"], rtol=0, atol=0)
    close(alone["optimizer_states"][0], saved["moments"], rtol=0, atol=0)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_whole_file_is_mapped_and_not_kept(grouped, tmp_path, world):
    """Ranks that take their rows need no copy of it each, and its space on the disk is free once it is removed."""
    path = tmp_path / "whole.ckpt"

    def saved(rank: int) -> None:
        model = Denoiser()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        model.loss(slice(0, BATCH)).backward()
        optimizer.step()
        store.save(path, {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]})

    def loaded(rank: int) -> tuple[bool, bool]:
        model = sharded(Denoiser())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        state = store.load(path, partial(sharded_state.rows, mesh=mesh))
        first = is_mapped(path)
        fsdp.load_weights(model, state["state_dict"])
        fsdp.load_optimizer(optimizer, state["optimizer_states"][0])
        expected = state["optimizer_states"][0]["state"]
        moments = sharded_state.gathered(optimizer.state_dict())["state"]
        if rank == 0:
            close(moments, expected, rtol=0, atol=0)
            close(sharded_state.gathered(model.state_dict()), dict(state["state_dict"]), rtol=0, atol=0)
        else:
            sharded_state.gathered(model.state_dict())
        del state, expected, moments
        return first, is_mapped(path)

    grouped(1, saved)
    assert grouped(world, loaded) == [(True, False)] * world


def is_mapped(path: Path) -> bool:
    return os.fsencode(path) in Path("/proc/self/maps").read_bytes()


def test_a_checkpoint_of_another_model_is_told_by_its_shapes(grouped, shards):
    folder, _ = shards

    def other(rank: int) -> str:
        model = sharded(Denoiser())
        weights = store.load(folder / "a.ckpt")["state_dict"]
        weights["conditioner.table.weight"] = torch.ones(7, 5)
        with pytest.raises(RuntimeError) as caught:
            fsdp.load_weights(model, weights)
        return str(caught.value)

    (message,) = grouped(1, other)
    assert message.startswith("Error(s) in loading state_dict")
    assert "conditioner.table.weight" in message
