"""Names that have changed: what was stored under former ones is read under those of today."""

import importlib

import pytest

from ldm.config import moved
from ldm.config.load import build, from_tree, load
from ldm.config.moved import MOVED, PARAMETERS
from ldm.config.targets import resolve
from ldm.config.tree import current_plain
from ldm.errors import ConfigError

UNET = {"target": "ldm.diffusion.unet.UNet", "params": {"blocks": [{"target": "ldm.diffusion.samplers.heun"}]}}
TODAY = {
    "target": "ldm.diffusion.networks.unet.UNet",
    "params": {"blocks": [{"target": "ldm.sampling.samplers.heun"}]},
}


@pytest.mark.parametrize("then", MOVED)
def test_what_moved_is_where_the_table_says(then):
    now = MOVED[then]
    if now.rpartition(".")[2][0].isupper():
        assert resolve(now, partial=True)
    else:
        assert importlib.import_module(now)


@pytest.mark.parametrize("then", MOVED)
def test_nothing_stands_under_a_former_name(then):
    """Else two names would mean one class, or one name two."""
    module, _, last = then.rpartition(".")
    try:
        found = importlib.import_module(module if last[0].isupper() else then)
    except ModuleNotFoundError:
        return
    if last[0].isupper():
        assert not hasattr(found, last)
    else:
        assert found.__spec__ is not None
        assert found.__spec__.submodule_search_locations is not None  # a package of that name has come since


def test_nothing_is_moved_twice():
    """A name of today is no former one: else the order in which rows are read would matter."""
    assert not set(MOVED) & set(MOVED.values())
    for of, renamed in PARAMETERS.items():
        assert moved.target(of) == of
        assert not set(renamed) & set(renamed.values()), of


def test_every_renamed_parameter_is_one_of_its_class():
    for of, renamed in PARAMETERS.items():
        known = resolve(of).__init__.__annotations__
        for then, now in renamed.items():
            assert now in known, f"{of} has no parameter {now}"
            assert then not in known, f"{of} still has the parameter {then}"


def test_stored_configurations_are_read_under_the_names_of_today(tmp_path):
    assert current_plain(UNET) == TODAY
    assert from_tree({"model": UNET}, "last.ckpt").root.plain() == {"model": TODAY}
    file = tmp_path / "old.yaml"
    file.write_text(
        "model: {target: ldm.diffusion.unet.UNet, params: {blocks: [{target: ldm.diffusion.samplers.heun}]}}\n"
    )
    assert load([file]).root.plain() == {"model": TODAY}
    # A file of today laid over an old one changes parameters, as it did when both had one name.
    over = tmp_path / "new.yaml"
    over.write_text("model: {target: ldm.diffusion.networks.unet.UNet, params: {num_heads: 4}}\n")
    assert set(load([file, over]).root.plain()["model"]["params"]) == {"blocks", "num_heads"}


def test_overrides_may_use_former_names(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {target: ldm.diffusion.networks.unet.UNet}\n")
    assert load([file], ["model.target=ldm.diffusion.dit.DiT"]).root.plain()["model"]["target"] == (
        "ldm.diffusion.networks.dit.DiT"
    )


def test_text_that_only_looks_like_a_name_stays():
    tree = {"name": "ldm.ema", "target": 3, "list": ["ldm.ema.EMA", {"target": "other.ldm.ema.EMA"}]}
    assert current_plain(tree) == tree
    assert from_tree(tree | {"target": "x"}, "file").root.plain() == tree | {"target": "x"}


def test_building_does_not_translate():
    """Only stored names are: code and configurations of today say what they mean."""
    with pytest.raises(ConfigError, match="does not exist"):
        build(UNET)
