"""LoRA: a base that stays, adapters that are trained, saved, loaded, merged and scaled."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import main
from ldm.checkpoints import store
from ldm.cli import export, sample
from ldm.config.load import build, to_yaml
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.module import LatentDiffusion
from ldm.diffusion.objectives import DDPM
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import lora, lora_files
from ldm.interop.diffusers_models.networks import exported
from ldm.interop.exports import lora_format
from ldm.interop.lora import LoRA
from ldm.optim.ema import EMA, FixedDecay
from ldm.randomness import Draws
from ldm.sampling.pipeline import Pipeline
from tests.tiny_runs import ADAM, node
from tests.training.test_resume import as_killed_after, assert_same, final, metrics, only, saves

UNET = {"in_channels": 4, "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1]}
NETWORKS = {
    "unet": node("diffusion.networks.unet.UNet", num_heads=2, **UNET),
    "unet with tokens": node("diffusion.networks.unet.UNet", num_heads=2, context_dim=6, norm_groups=4, **UNET),
    "dit": node("diffusion.networks.dit.DiT", in_channels=4, patch_size=2, hidden_size=16, depth=2, num_heads=2),
}
DOG = [{"class_label": 1}] * 2
ADAPTER = node("interop.lora.LoRA", rank=2, alpha=6.0, dropout=0.1)
STRATEGY = "lightning.strategy={{target: ldm.training.strategies.{}, params: {{timeout: 60{}}}}}"
SHORT = ["lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2"]


def network(name: str, seed: int = 0) -> nn.Module:
    """Of weights none of which is zero."""
    torch.manual_seed(seed)
    made: nn.Module = build(NETWORKS[name])
    return shaken(made)


def shaken(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        if not weight.any():
            nn.init.normal_(weight.data, std=0.05)
    return module


def denoiser(name: str, seed: int = 0) -> nn.ModuleDict:
    unconditional = build(node("diffusion.conditioners.base.Unconditional"))
    return nn.ModuleDict({"network": network(name, seed), "conditioner": unconditional})


def adapted(name: str, **params: Any) -> nn.Module:
    """With an adapter that does something."""
    made = denoiser(name)
    LoRA(**{"rank": 2, "alpha": 6.0, **params})(made)
    return shaken(made["network"])


def output(net: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(9)
    tokens = torch.randn(2, 5, 6) if name == "unet with tokens" else None
    with torch.no_grad():
        return net.eval()(torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7]), Conditioning(None, tokens, None))


# ---- the network


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_adapter_computes_what_its_base_does(name):
    made = denoiser(name)
    before = output(made["network"], name)
    LoRA(rank=2)(made)
    assert torch.equal(output(made["network"], name), before)
    trained = [key for key, weight in made.named_parameters() if weight.requires_grad]
    assert trained
    assert all(map(lora.is_adapters, trained))


@pytest.mark.parametrize(
    ("name", "layers"),
    {
        "unet": {"qkv", "out"},
        "unet with tokens": {"query", "key", "value", "out"},
        "dit": {"qkv", "out", "fc1", "fc2"},
    }.items(),
)
def test_attention_is_adapted_by_default_and_the_blocks_of_a_transformer(name, layers):
    found = lora.layers(adapted(name))
    assert {key.rpartition(".")[2] for key in found} == layers
    assert "out" not in found, "the network's last layer is not attention's"


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_it_is_an_ordinary_network_with_the_same_output(name):
    net = adapted(name)
    before, base = output(net, name), output(network(name), name)
    lora.merge(net)
    assert net.state_dict().keys() == network(name).state_dict().keys()
    assert not lora.is_adapted(net)
    assert torch.allclose(output(net, name), before, atol=1e-6)
    assert not torch.allclose(before, base, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scale_of_0_is_the_base_and_1_the_adapter(name):
    net = adapted(name)
    full, base = output(net, name), output(network(name), name)
    lora.set_scale(net, 0.0)
    assert torch.equal(output(net, name), base)
    lora.set_scale(net, 0.5)
    assert not torch.allclose(output(net, name), base, atol=1e-4)
    lora.set_scale(net, 1.0)
    assert torch.equal(output(net, name), full)


@pytest.mark.parametrize("name", NETWORKS)
def test_its_dropout_drops_the_same_where_activations_are_computed_again(name):
    net: Any = adapted(name, dropout=0.5).train()
    tokens = torch.randn(2, 5, 6) if name == "unet with tokens" else None
    x, gradients = torch.randn(2, 4, 8, 8), []
    for net.checkpointing in (False, True):
        torch.manual_seed(2)
        net.zero_grad()
        net(x, torch.tensor([0.1, 0.7]), Conditioning(None, tokens, None)).square().sum().backward()
        gradients.append({key: one.grad.clone() for key, one in net.named_parameters() if one.grad is not None})
    assert gradients[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_layers_are_named_whole_or_by_their_end():
    net = adapted("dit", targets=["layers.1.attention.qkv", "modulation"])
    assert [*lora.layers(net)] == ["layers.0.modulation", "layers.1.attention.qkv", "layers.1.modulation"]


def test_a_name_that_fits_nothing_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"targets: UNet has no linear layer or convolution called to_q; there are: "):
        LoRA(targets=["qkv", "to_q"])(denoiser("unet"))
    with pytest.raises(ConfigError, match=r"there are: .*, qkv, out"):
        LoRA(targets=["kv"])(denoiser("unet"))


def test_a_network_of_other_layers_is_refused():
    made = nn.ModuleDict({"network": nn.Sequential(nn.Conv1d(1, 1, 1)), "conditioner": nn.Identity()})
    with pytest.raises(ConfigError, match="Sequential has no linear layer or convolution of torch to adapt"):
        LoRA()(made)
    sizes = {"model_channels": 16, "channel_mult": [1], "attention_levels": [0]}
    made["network"] = build(node("diffusion.networks.edm2.MagnitudePreservingUNet", in_channels=4, **sizes))
    with pytest.raises(ConfigError, match="MagnitudePreservingUNet has no linear layer or convolution of torch"):
        LoRA()(made)
    made["network"] = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"targets: name some; there are: "):
        LoRA()(made)


def test_without_peft_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft: pip install -e .\[interop\]"):
        LoRA()


def test_the_conditioner_is_trained_by_name():
    for trained in (False, True):
        made = denoiser("dit")
        made["conditioner"] = build(node("diffusion.conditioners.classes.ClassVector", num_classes=2, channels=16))
        LoRA(train_conditioner=trained)(made)
        assert all(weight.requires_grad is trained for weight in made["conditioner"].parameters())


# ---- training


def module(adapter: Any = None) -> LatentDiffusion:
    parts = denoiser("unet")
    objective = DDPM(build(node("diffusion.noise_schedules.SqrtLinear")))
    ema = partial(EMA, profile=FixedDecay())
    return LatentDiffusion(parts["network"], parts["conditioner"], objective, ADAM, ema, adapter=adapter)


def test_the_first_loss_is_the_base_s_and_the_optimizer_has_the_adapter_alone():
    batch = {"latent": torch.randn(3, 4, 8, 8), "draws": Draws(0, range(3), 3)}
    with_adapter = module(LoRA(rank=2))
    assert torch.equal(with_adapter.total_loss(batch), module().total_loss(batch))
    groups = with_adapter.configure_optimizers()["optimizer"].param_groups
    held = {id(weight) for group in groups for weight in group["params"]}
    names = {name for name, weight in with_adapter.denoiser.named_parameters() if id(weight) in held}
    assert names == {name for name in with_adapter.denoiser.state_dict() if lora.is_adapters(name)}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """Filled in by the first test that needs it: a base, and an adapter of it."""
    return {"place": tmp_path_factory.mktemp("trained")}


def run(tree: dict[str, Any], *words: str, name: str = "run.yaml") -> int:
    Path(name).write_text(to_yaml(tree))
    return main.main(["--base", name, *words])


@pytest.fixture
def base(trained, autoencoder_tree, diffusion_tree, tried_once, here) -> Path:
    """A diffusion run of four steps; `diffusion_tree` is on its latents from then on."""
    place = trained["place"]
    few = ["lightning.trainer.max_steps=4", "--logdir", str(place / "logs")]
    if "autoencoder" not in trained:
        assert run(autoencoder_tree, *few) == 0
        trained["autoencoder"] = only(place / "logs")
    diffusion_tree["data"]["params"] |= {"autoencoder": str(trained["autoencoder"]), "cache": str(place / "cache")}
    if "base" not in trained:
        assert run(diffusion_tree, *few) == 0
        (trained["base"],) = set((place / "logs").iterdir()) - {trained["autoencoder"]}
    return trained["base"]


def lora_tree(tree: dict[str, Any], base: Path, **init: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["name"] = "tiny_lora"
    tree["model"]["params"]["adapter"] = copy.deepcopy(ADAPTER)
    tree["model"]["params"]["gradient_clip"] = 1.0
    tree["model"]["params"]["optimizer"]["params"]["lr"] = 0.05
    return {**tree, "init_from": {"run": str(base), **init}}


@pytest.fixture
def lora_run(trained, base, diffusion_tree) -> Path:
    if "lora" not in trained:
        logs = trained["place"] / "lora"
        assert run(lora_tree(diffusion_tree, base), "--logdir", str(logs)) == 0
        trained["lora"] = only(logs)
    return trained["lora"]


def weights(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = store.load(store.verify(folder))["state_dict"]
    return found


def images(pipeline: Pipeline) -> list[bytes]:
    return [image.tobytes() for image in pipeline.generate([3, 4], DOG, steps=3)]


def differ(one: Pipeline, other: Pipeline) -> float:
    """The largest difference of the two networks' outputs."""
    rows, always = 64, torch.Generator().manual_seed(0)
    x, time = torch.randn(rows, *one.manifest.plan.shape, generator=always), torch.linspace(0.1, 0.9, rows)
    batch = {"class_label": torch.arange(rows) % 2}
    with torch.no_grad():
        outputs = [p.denoiser["network"](x, time, p.conditioner(batch)) for p in (one, other)]
    return float((outputs[0] - outputs[1]).abs().max())


def test_only_the_adapter_is_trained_and_the_facts_name_its_base(base, lora_run):
    then, now = weights(base), weights(lora_run)
    for part in ("denoiser", "ema.average"):
        inside = {key.removeprefix(f"{part}."): one for key, one in now.items() if key.startswith(f"{part}.")}
        for key, one in lora.base_weights(inside).items():
            assert torch.equal(one, then[f"ema.average.{key}"]), key
        added = [one for key, one in inside.items() if ".lora_B." in key]
        assert added
        assert all(one.any() for one in added)
    moments = store.load(store.verify(lora_run))["optimizer_states"][0]["state"]
    assert len(moments) == sum(key.startswith("denoiser.") and lora.is_adapters(key) for key in now)
    facts = store.record(store.verify(lora_run).path)["init_from"]
    assert facts["base"] == lora.base_hash(Pipeline.load(base).denoiser["network"])
    assert facts["base"] == lora.base_hash(Pipeline.load(lora_run).denoiser["network"])


def test_it_resumes_bit_exactly(base, diffusion_tree, here):
    tree = saves(lora_tree(diffusion_tree, base), every=5)
    assert run(tree, "--logdir", "first") == 0
    first = only(Path("first"))
    killed = as_killed_after(first, 5, here / "killed")
    assert main.main(["--base", "run.yaml", "--logdir", "killed", "-r", "auto"]) == 0
    assert_same(final(killed), final(first))
    assert metrics(killed, after=5) == metrics(first, after=5)


@pytest.mark.parametrize("more", [("DDP", ""), ("FSDP2", ""), ("FSDP2", ", sharded_checkpoints: true")])
def test_on_two_ranks(more, base, trained, diffusion_tree, forked):
    tree = lora_tree(diffusion_tree, base)
    for part in ("adapter", "network"):
        tree["model"]["params"][part]["params"]["dropout"] = 0.0  # it is each rank's own
    if "alone" not in trained:
        logs = trained["place"] / "alone"
        assert run(tree, "--logdir", str(logs)) == 0
        trained["alone"] = only(logs)
    Path("run.yaml").write_text(to_yaml(tree))
    words = ["--base", "run.yaml", "--logdir", "ranks", STRATEGY.format(*more)]
    assert forked(2, lambda rank: main.main(words)) == [0, 0]
    ours, alone = Pipeline.load(only(Path("ranks"))), Pipeline.load(trained["alone"])
    assert lora.base_hash(ours.denoiser["network"]) == lora.base_hash(alone.denoiser["network"])
    assert differ(ours, alone) < 1e-4 * differ(ours, Pipeline.load(base))


@pytest.mark.slow
def test_its_blocks_are_compiled(base, diffusion_tree, monkeypatch):
    compiled = []
    whole = nn.Module.compile
    backend = lambda graph, inputs: (compiled.append(graph), graph.forward)[1]  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend=backend))
    tree = lora_tree(diffusion_tree, base)
    tree["model"]["params"]["compile_blocks"] = True
    assert run(tree, *SHORT) == 0
    assert compiled


def test_the_conditioner_goes_on_training_where_that_is_asked_for(base, diffusion_tree):
    tree = lora_tree(diffusion_tree, base)
    tree["model"]["params"]["adapter"]["params"]["train_conditioner"] = True
    assert run(tree, *SHORT, "--logdir", "logs") == 0
    then, now = weights(base), weights(only(Path("logs")))
    (name,) = [key for key in now if key.startswith("denoiser.conditioner.")]
    assert not torch.equal(now[name], then[name.replace("denoiser", "ema.average")])


def test_another_adapter_starts_from_the_first_and_an_ordinary_run_says_why_not(lora_run, diffusion_tree, capsys):
    tree = lora_tree(diffusion_tree, lora_run)
    assert run(tree, *SHORT, "lightning.trainer.max_steps=1", "lightning.trainer.val_check_interval=1") == 0
    capsys.readouterr()
    plain = {**tree, "model": copy.deepcopy(diffusion_tree["model"])}
    assert run(plain, *SHORT, name="plain.yaml") == 2
    assert "ldm export --to merged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "nowhere: no such file or folder"),
        ({"parts": ["conditioner"]}, "all of it has to come from here"),
        ({"adapter": "nowhere"}, "adapter_config.json: cannot be read"),
    ],
)
def test_a_base_that_does_not_do_is_refused(base, diffusion_tree, capsys, change, message):
    code = run(lora_tree(diffusion_tree, base, **change), *SHORT)
    assert (code, [*Path("logs").glob("*")]) == (2 if "parts" in change else 4, [])
    assert message in capsys.readouterr().err


def test_random_weights_are_no_base(base, diffusion_tree, capsys):
    tree = lora_tree(diffusion_tree, base)
    del tree["init_from"]
    assert run(tree, *SHORT) == 2
    assert "model.params.adapter: this would adapt random weights" in capsys.readouterr().err


def test_targets_that_fit_nothing_are_refused_before_a_run_folder(base, diffusion_tree, capsys):
    tree = lora_tree(diffusion_tree, base)
    tree["model"]["params"]["adapter"]["params"]["targets"] = ["to_q"]
    assert run(tree, *SHORT) == 2
    assert "called to_q; there are:" in capsys.readouterr().err
    assert not [*Path("logs").glob("*")]


# ---- sampling, files


def sampled(folder: Path, out: str, *words: str) -> bytes:
    words = ("-n", "1", "--classes", "1", "--steps", "2", "--device", "cpu", "--out", out, *words)
    assert sample.main(["-r", str(folder), *words]) == 0
    return b"".join(file.read_bytes() for file in sorted(Path(out).glob("*.png")))


def test_sampling_has_a_scale(base, lora_run, here):
    of_base, full = sampled(base, "base"), sampled(lora_run, "full")
    assert sampled(lora_run, "zero", "--lora-scale", "0") == of_base
    assert sampled(lora_run, "one", "--lora-scale", "1") == full
    assert len({of_base, full, sampled(lora_run, "some", "--lora-scale", "0.5")}) == 3
    assert '"lora_scale": 0.5' in Path("some/samples.json").read_text()


def test_a_scale_without_an_adapter_is_refused(base, capsys):
    assert sample.main(["-r", str(base), "--lora-scale", "0.5", "--device", "cpu"]) == 2
    assert "--lora-scale: this model has no adapter" in capsys.readouterr().err


@pytest.fixture
def folder(lora_run, here) -> Path:
    """The adapter as files."""
    assert export.main([str(lora_run), "--to", "lora", "--out", "adapter"]) == 0
    return here / "adapter"


def test_its_files_are_peft_s(folder, base, lora_run):
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in folder.iterdir() if file.is_file()} == names
    ours, theirs = Pipeline.load(lora_run), Pipeline.load(base)
    theirs.denoiser["network"] = PeftModel.from_pretrained(theirs.denoiser["network"], str(folder)).eval()
    assert differ(ours, theirs) == 0


def test_a_base_of_ours_takes_the_files_up_again(folder, base, lora_run):
    assert sampled(base, "again", "--lora", str(folder)) == sampled(lora_run, "full")
    assert sampled(base, "zero", "--lora", str(folder), "--lora-scale", "0") == sampled(base, "base")


def test_an_adapter_is_put_on_before_weights_are_rounded(folder, base, lora_run):
    """Or its base would be another one; and A and B are rounded, too."""
    half = "--precision", "bf16-mixed"
    found = sampled(base, "again", "--lora", str(folder), *half)
    assert found == sampled(lora_run, "full", *half)
    assert len({found, sampled(lora_run, "in float32"), sampled(base, "base", *half)}) == 3


def test_the_bits_of_an_adapter_are_those_of_autocast(lora_run):
    half = Pipeline.load(lora_run, compute=torch.bfloat16)
    unconverted = replace(Pipeline.load(lora_run), compute=torch.bfloat16)
    assert images(half) == images(unconverted)
    assert all(
        layer.lora_A[lora.ADAPTER].weight.dtype == torch.bfloat16
        for layer in lora.layers(half.denoiser["network"]).values()
    )


def test_training_starts_from_files(folder, base, lora_run, diffusion_tree, monkeypatch):
    seen = {}
    monkeypatch.setattr(LatentDiffusion, "on_train_start", lambda self: seen.update(copy.deepcopy(self.state_dict())))
    assert run(lora_tree(diffusion_tree, base, adapter=str(folder)), *SHORT) == 0
    averaged = {key: one for key, one in weights(lora_run).items() if key.startswith("ema.average.network")}
    for key, one in averaged.items():
        assert torch.equal(seen[key], one)
        assert torch.equal(seen[key.replace("ema.average", "denoiser")], one)
    record = store.record(store.verify(only(Path("logs"))).path)["init_from"]["adapter"]
    assert record["folder"] == str(folder)


def test_an_adapter_of_another_base_is_refused(folder, base, lora_run, capsys):
    read, other = lora_files.read(folder), Pipeline.load(base, ema=False)
    with pytest.raises(ConfigError, match="an adapter of another base: it was trained on weights"):
        lora_files.attach(other.denoiser, read)
    with pytest.raises(ConfigError, match="the model has an adapter already"):
        lora_files.attach(Pipeline.load(lora_run).denoiser, read)


def test_a_foreign_adapter_of_the_same_layers_is_taken(folder, base, lora_run):
    """As peft itself writes it, which knows nothing of our hash."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")
    pipeline = Pipeline.load(base, ema=False)
    lora_files.attach(pipeline.denoiser, lora_files.read(folder))
    assert images(pipeline) != images(Pipeline.load(base, ema=False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, ConfigError, "use_dora=True: only plain LoRA"),
        ({"rank_pattern": {"qkv": 4}}, ConfigError, "rank_pattern="),
        ({"r": 0}, CheckpointError, "r: expected a number above 0, found 0"),
        ({"lora_alpha": 7}, ConfigError, "alpha / rank: expected 3, found 3.5"),
        ({"r": 3, "lora_alpha": 9}, None, ""),  # told by the tensors
    ],
)
def test_other_settings_are_refused(folder, lora_run, change, error, message):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    net = Pipeline.load(lora_run).denoiser["network"]
    if error is None:
        lora_files.load(net, lora_files.read(folder))
        return
    with pytest.raises(error, match=message):
        lora_files.load(net, lora_files.read(folder))


def test_other_layers_and_damaged_files_are_refused(folder, lora_run):
    file = folder / "adapter_model.safetensors"
    tensors, net = load_file(file), Pipeline.load(lora_run).denoiser["network"]
    name = next(iter(tensors))
    save_file({key: one for key, one in tensors.items() if key != name}, file)
    with pytest.raises(ConfigError, match="not in the file"):
        lora_files.load(net, lora_files.read(folder))
    save_file({**tensors, name: tensors[name][:1]}, file)
    with pytest.raises(ConfigError, match=r"of another shape(.|\n)*expected \["):
        lora_files.load(net, lora_files.read(folder))
    save_file({**tensors, name: tensors[name] * torch.nan}, file)
    with pytest.raises(CheckpointError, match="finite numbers"):
        lora_files.read(folder)
    save_file({**tensors, "base_model.model.x.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"x\.weight: expected <layer>"):
        lora_files.read(folder)
    file.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        lora_files.read(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        lora_files.read(folder)


@pytest.mark.parametrize("targets", [None, ["attend_cross.query", "conv_in", "embed.0", "embedding"]])
def test_diffusers_loads_it(targets, tmp_path):
    name = "unet with tokens"
    ours, made = adapted(name, targets=targets), exported(NETWORKS[name], network(name).state_dict())
    theirs = getattr(diffusers, made.class_name).from_config(made.config).eval()
    theirs.load_state_dict(made.tensors)
    torch.manual_seed(9)
    tokens, x, time = torch.randn(2, 5, 6), torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7])

    def output_of_theirs() -> torch.Tensor:
        with torch.no_grad():
            return theirs(x, time, encoder_hidden_states=tokens).sample

    before = output_of_theirs()
    save_file(lora_format.for_diffusers(ours), tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    after = output_of_theirs()
    assert not torch.allclose(after, before, atol=1e-3)
    assert (after - output(ours, name)).abs().max() < 1e-5 * after.abs().max()


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_networks_whose_like_takes_no_adapters_in_diffusers_have_no_such_file(name):
    assert lora_format.for_diffusers(adapted(name)) == {}


# ---- merged


@pytest.mark.parametrize("words", [[], ["--raw"]])
def test_a_merged_run_is_an_ordinary_one(lora_run, base, here, words, diffusion_tree):
    assert export.main([str(lora_run), "--to", "merged", "--out", "merged", *words]) == 0
    merged, ours = Pipeline.load("merged"), Pipeline.load(lora_run, ema=not words)
    assert differ(merged, ours) < 1e-6
    assert merged.denoiser.state_dict().keys() == Pipeline.load(base).denoiser.state_dict().keys()
    origin = json.loads(Path("merged/origin.json").read_text())
    assert "was added to its base" in origin["notes"][0]
    assert main.main(["-r", "merged", *SHORT]) == 0
    assert run({**diffusion_tree, "init_from": "merged"}, *SHORT, "--logdir", "logs") == 0


def test_other_formats_have_the_adapter_in_their_weights(lora_run, here):
    assert export.main([str(lora_run), "--to", "safetensors", "--out", "out"]) == 0
    assert not any(map(lora.is_adapters, load_file("out/model.safetensors")))


@pytest.mark.parametrize("format", ["lora", "merged"])
def test_a_run_without_an_adapter_has_none_to_export(base, here, capsys, format):
    assert export.main([str(base), "--to", format, "--out", "out"]) == 2
    assert "has no adapter" in capsys.readouterr().err
    assert not Path("out").exists()
