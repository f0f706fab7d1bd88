"""A snapshot is equal, apart, and made in the same memory each time."""

from typing import Any

import torch

from ldm.checkpoints.snapshot import HostMemory


def a_state() -> dict[str, Any]:
    weight = torch.arange(12.0).reshape(3, 4)
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return {
        "state_dict": {"weight": torch.nn.Parameter(weight), "tied": weight, "row": weight[1], "images": images},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, dtype=torch.bfloat16)}}}
        ],
        "empty": [torch.empty(0), torch.empty(0, 3)],
        "global_step": 3,
        "names": ("a", None, 2.5),
    }


def test_a_copy_is_equal_and_apart():
    state = a_state()
    copy = HostMemory().copy(state)
    weights, copied = state["state_dict"], copy["state_dict"]
    assert copy["names"] == state["names"]
    assert copy["global_step"] == 3
    assert copy["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert [tensor.shape for tensor in copy["empty"]] == [(0,), (0, 3)]
    for name in weights:
        assert type(copied[name]) is torch.Tensor
        assert torch.equal(copied[name], weights[name])
        assert copied[name].stride() == weights[name].stride()
    before = copied["weight"].clone()
    with torch.no_grad():
        weights["weight"].zero_()
    state["names"] = ()
    assert torch.equal(copied["weight"], before)
    assert copy["names"] == ("a", None, 2.5)


def test_what_is_one_tensor_stays_one():
    copied = HostMemory().copy(a_state())["state_dict"]
    assert copied["weight"] is copied["tied"]
    assert copied["row"].untyped_storage().nbytes() == 16  # of its own, and no larger than it is


def test_the_next_copy_uses_the_same_memory_where_it_fits():
    memory, state = HostMemory(), a_state()
    first = memory.copy(state)
    state["state_dict"]["tied"] = state["state_dict"]["tied"] + 1
    state["state_dict"]["row"] = torch.zeros(7)
    second = memory.copy(state)
    places = [{name: tensor.data_ptr() for name, tensor in copy["state_dict"].items()} for copy in (first, second)]
    assert places[0]["weight"] == places[1]["weight"]
    assert places[0]["images"] == places[1]["images"]
    assert second["state_dict"]["tied"] is not second["state_dict"]["weight"]
    assert torch.equal(second["state_dict"]["tied"], state["state_dict"]["tied"])
    assert second["state_dict"]["row"].shape == (7,)
    memory.release()
    assert memory.copy(state)["state_dict"]["row"].shape == (7,)
