"""Stage 2 under Lightning, on latents made up here: the clock, accumulation, dropped labels, the average, resuming."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader

from ldm.data.datamodule import ElasticDataModule
from ldm.diffusion.conditioners.base import Unconditional
from ldm.diffusion.conditioners.classes import ClassOneHot, ClassVector
from ldm.diffusion.masked_loss import MaskedLoss
from ldm.diffusion.module import LatentDiffusion, parts
from ldm.diffusion.networks.edm2 import MagnitudePreservingUNet, MPConv
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.errors import ConfigError
from ldm.optim.ema import EMA, HalfLife
from ldm.optim.lr_schedules import Linear
from ldm.randomness import Draws

BATCH, SHAPE = 8, (2, 4, 4)


def make_batch(numbers, device="cpu"):
    """What a data module gives for these sample numbers; latents that depend on the number alone."""
    draws = Draws(0, numbers, BATCH, device)
    labels = torch.tensor(draws.numbers % 3).to(device)
    return {"latent": draws.normal("data", SHAPE) + 1, "class_label": labels, "draws": draws}


class Manifest:
    def to_dict(self):
        return {"plan": "made up"}


class Latents(pl.LightningDataModule):
    """Sample numbers in order, from `start`, in micro-batches."""

    manifest = Manifest()

    def __init__(self, micro, start=0):
        super().__init__()
        self.micro, self.start = micro, start

    def _numbers(self, first, last):
        return DataLoader(range(first, last), batch_size=self.micro, collate_fn=list)

    def train_dataloader(self):
        return self._numbers(self.start, 10_000)

    def val_dataloader(self):
        return self._numbers(0, BATCH)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return make_batch(batch, device)


def make_module(**changes):
    torch.manual_seed(0)
    parameters = {
        "network": UNet(2, 8, (1, 2), 1, (1,), num_heads=2, vector_channels=4),
        "conditioner": ClassVector(3, 4),
        "objective": DDPM(SqrtLinear()),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True),
        "ema": partial(EMA, profile=HalfLife(100)),
        "label_dropout": 0.3,
    }
    module = LatentDiffusion(**{**parameters, **changes})
    for parameter in module.denoiser.parameters():  # so that labels matter from the first step
        torch.nn.init.normal_(parameter, std=0.3)
    module.ema = EMA(module.denoiser, HalfLife(100))
    return module


def fit(module, data, steps, tmp_path, ckpt_path=None, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"limit_val_batches": 0, **options},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def assert_same_state(ours, theirs, **tolerance):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, left), right in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert left == right


def test_accumulation_is_one_big_batch(tmp_path):
    # Not Adam: it blows rounding up where a gradient is zero, such as that of a key's bias.
    whole, parts = (make_module(optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9)) for _ in range(2))
    fit(whole, Latents(BATCH), 4, tmp_path)
    fit(parts, Latents(BATCH // 4), 4, tmp_path, accumulate_grad_batches=4)
    assert whole.ema.images_seen == parts.ema.images_seen == 4 * BATCH
    assert_same_state(whole, parts, rtol=1e-4, atol=1e-6)


def test_five_and_seven_steps_are_twelve(tmp_path):
    module_of = partial(make_module, schedule=Linear(12, warm_up=3))
    straight = module_of()
    fit(straight, Latents(BATCH), 12, tmp_path)
    trainer = fit(module_of(), Latents(BATCH), 5, tmp_path)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    assert torch.load(tmp_path / "five.ckpt", weights_only=True)["global_step"] == 5
    resumed = module_of()
    fit(resumed, Latents(BATCH, start=5 * BATCH), 12, tmp_path, ckpt_path=tmp_path / "five.ckpt")
    assert_same_state(straight, resumed, rtol=0, atol=0)


def test_a_resumed_schedule_is_the_configured_one(tmp_path):
    trainer = fit(make_module(schedule=Linear(5)), Latents(BATCH), 5, tmp_path)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    longer = make_module(schedule=Linear(20))
    trainer = fit(longer, Latents(BATCH, start=5 * BATCH), 10, tmp_path, ckpt_path=tmp_path / "five.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5)


def test_errors_are_weighted_in_training_and_validation():
    batch = make_batch(range(8))
    batch["mask"] = torch.zeros(8, 1, 8, 8)
    batch["mask"][:, :, 2:4, 4:] = 1
    plain, masked = make_module(label_dropout=0.0), make_module(label_dropout=0.0, masked_loss=MaskedLoss(0.2))
    network, conditioner = parts(masked.denoiser)
    expected = masked.objective.loss(
        network, batch["latent"], conditioner(batch), batch["draws"], MaskedLoss(0.2)(batch)
    )
    assert torch.equal(masked.total_loss(batch), expected.mean())
    assert torch.equal(masked.evaluate(batch).loss, expected)
    assert not torch.allclose(plain.total_loss(batch), expected.mean(), rtol=1e-3)


def test_everything_random_depends_on_the_sample_number_alone():
    module = make_module(label_dropout=0.5)
    together = module.total_loss(make_batch(range(40, 48)))
    alone = [module.total_loss(make_batch([number])) for number in range(40, 48)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert len({loss.item() for loss in alone}) == 8


def test_dropped_labels_train_the_null_row():
    for dropout, rows in ((0.0, [True, True, True, False]), (1.0, [False, False, False, True])):
        module = make_module(label_dropout=dropout)
        module.total_loss(make_batch(range(BATCH))).backward()
        gradient = module.denoiser["conditioner"].table.weight.grad
        assert (gradient.abs().sum(1) > 0).tolist() == rows


def test_share_of_dropped_labels():
    numbers = range(2000)
    dropped = Draws(0, numbers, BATCH).uniform("label_dropout") < 0.1
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_average_follows_the_weights(tmp_path):
    module = make_module(ema=partial(EMA, profile=HalfLife(100)))
    expected = {name: value.clone() for name, value in module.denoiser.state_dict().items()}

    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            # ... after the step: the first module update comes before this hook.
            keep = HalfLife(100)(batch_idx * BATCH, BATCH)
            for name, value in module.denoiser.state_dict().items():
                expected[name].mul_(keep).add_(value, alpha=1 - keep)

    fit(module, Latents(BATCH), 6, tmp_path, callbacks=[ByHand()])
    for name, value in module.ema.average.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.equal(module.ema.average["conditioner"].table.weight, module.denoiser["conditioner"].table.weight)
    assert not module.ema.training


def test_training_learns_and_validation_repeats(tmp_path):
    module = make_module()
    data, options = Latents(BATCH), {"limit_val_batches": 1, "num_sanity_val_steps": 0}
    untrained = fit(module, data, 0, tmp_path, **options)
    before = [untrained.validate(module, datamodule=data, verbose=False)[0] for _ in range(2)]
    assert before[0] == before[1]
    assert before[0]["val/loss"] == before[0]["val/loss_ema"]
    trainer = fit(module, data, 60, tmp_path, **options)
    after = trainer.validate(module, datamodule=data, verbose=False)[0]
    assert after["val/loss"] < 0.8 * before[0]["val/loss"]
    assert after["val/loss_ema"] != after["val/loss"]


def test_checkpoint_facts_are_plain(tmp_path):
    module = make_module()
    fit(module, Latents(BATCH), 2, tmp_path, limit_val_batches=1, num_sanity_val_steps=0, val_check_interval=2)
    facts = module.checkpoint_facts()
    assert facts["kind"] == "diffusion"
    assert facts["latents"] == {"plan": "made up"}
    assert {"val/loss", "val/loss_ema"} <= facts["metrics"].keys()
    assert all(type(value) is float for value in facts["metrics"].values())


def test_a_step_never_reads_the_device():
    """On the meta device there are no values: reading one would be an error."""
    with torch.device("meta"):
        module = make_module()
    module.total_loss(make_batch([0, 1], "meta")).backward()
    module.ema.update(module.denoiser, BATCH)


def test_bf16_training_keeps_float32_weights(tmp_path):
    module = make_module()
    fit(module, Latents(BATCH), 2, tmp_path, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_gradients_are_clipped_by_norm(tmp_path):
    module = make_module(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=1e-3)
    before = torch.cat([parameter.detach().flatten() for parameter in module.denoiser.parameters()])
    trainer = fit(module, Latents(BATCH // 2), 1, tmp_path, accumulate_grad_batches=2)
    moved = torch.cat([parameter.detach().flatten() for parameter in module.denoiser.parameters()]) - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert trainer.callback_metrics["train/gradient"] > 0.1  # before clipping


def test_a_conditioner_that_lacks_something_is_refused():
    with pytest.raises(ConfigError, match=r"model.params.conditioner: expected .* keys, forward and null .* Linear"):
        make_module(conditioner=torch.nn.Linear(1, 1))


def test_a_fused_optimizer_is_clipped_in_bf16_and_refused_in_fp16(tmp_path):
    module = make_module(gradient_clip=1e-3)
    trainer = fit(module, Latents(BATCH), 1, tmp_path, precision="bf16-mixed")
    moments = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizers[0].state.values()])
    assert moments.norm().item() == pytest.approx(1e-4, rel=1e-2)  # a tenth of the gradient
    fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="fused"):
        fit(make_module(), Latents(BATCH), 1, tmp_path, plugins=[fp16])


def test_compiled_blocks_train_alike_under_the_same_names(tmp_path, monkeypatch):
    translated = []
    whole = torch.nn.Module.compile

    def backend(graph, inputs):
        translated.append(graph)
        return graph.forward

    # The default backend would need a C++ compiler.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend=backend))
    networks = [UNet(2, 8, (1, 2), 2, (1,), num_heads=2, vector_channels=4) for _ in range(2)]
    sgd = partial(torch.optim.SGD, lr=1e-3)
    plain = make_module(optimizer=sgd, network=networks[0])
    other = make_module(optimizer=sgd, network=networks[1], compile_blocks=True)
    for module in (plain, other):
        fit(module, Latents(BATCH), 2, tmp_path)
    assert len(translated) > 8  # of 12 blocks, some alike; the usual limit is 8
    assert_same_state(plain, other, rtol=1e-4, atol=1e-5)


def test_blocks_are_compiled_for_each_size_of_the_buckets(monkeypatch):
    """What torch makes for any size would depend on which came first, and a resumed run would compute otherwise."""
    data, compiled = ElasticDataModule(2, 0), []
    data.bucketing = SimpleNamespace(sizes=lambda: [(8, 8)] * 30)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(how))
    module = make_module(compile_blocks=True)
    module._trainer = SimpleNamespace(datamodule=data, precision_plugin=None, optimizers=[])
    limits: Any = torch._dynamo.config
    with limits.patch(recompile_limit=8):  # pytest's own patch would leave it deleted
        module.on_fit_start()
        assert limits.recompile_limit == 4 * 30 * len(compiled)
    assert compiled
    assert all(how == {"dynamic": False} for how in compiled)


def test_a_network_without_blocks_is_not_compiled(tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 1)

        def forward(self, x, noise_level, conditioning):
            return self.conv(x)

    module = make_module(network=Bare(), conditioner=Unconditional(), compile_blocks=True)
    with pytest.raises(ConfigError, match=r"compile_blocks: .*Bare has no method blocks\(\).*leave it out"):
        fit(module, Latents(BATCH), 1, tmp_path)


def test_constrained_weights_have_unit_length_after_each_step(tmp_path):
    network = MagnitudePreservingUNet(2, 8, (1, 2), 1, (1,), vector_channels=3)
    module = make_module(network=network, conditioner=ClassOneHot(3))
    fit(module, Latents(BATCH), 2, tmp_path)
    for layer in network.modules():
        if isinstance(layer, MPConv):
            lengths = layer.weight.flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-3, atol=0)
