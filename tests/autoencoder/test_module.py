"""AutoencoderKL under a Trainer: counting, accumulation, clipping, the discriminator's start, validation, facts."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.autoencoder import module as autoencoder
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.metrics import Perceptual
from ldm.autoencoder.module import AutoencoderKL
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian, latent_sums, statistics
from ldm.autoencoder.quantizer import VectorQuantizer
from ldm.optim.optimizers import AdamW, Muon
from ldm.randomness import Draws
from ldm.runtime.fsdp import total_norm


class Data(pl.LightningDataModule):
    """The same 24 images in the same order, in micro-batches of `micro`, `parts` of them a step."""

    def __init__(self, micro: int = 4, parts: int = 1) -> None:
        super().__init__()
        self.micro, self.parts = micro, parts
        images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
        self.items = [{"image": image, "number": number} for number, image in enumerate(images)]

    def accumulation(self, world_size: int) -> int:
        return self.parts

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items, batch_size=self.micro)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.items[:10], batch_size=self.micro)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        batch["draws"] = Draws(0, batch.pop("number").numpy(), self.micro * self.parts)
        return batch


adam = partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9))
sgd = partial(torch.optim.SGD, lr=1e-5)


def make(
    start: int | None = None, optimizer=adam, perceptual: nn.Module | None = None, learn_logvar=True, **options
) -> AutoencoderKL:
    """A tiny model, the same each time; with a discriminator from step `start` on."""
    torch.manual_seed(0)
    discriminator = None if start is None else PatchDiscriminator(3, 8, 1)
    loss = AutoencoderLoss(perceptual, discriminator=discriminator, disc_start=start or 0, learn_logvar=learn_logvar)
    return AutoencoderKL(Encoder(3, 8, (1, 2), 1, 2), Decoder(3, 8, (1, 2), 1, 2), loss, optimizer, **options)


def fit(
    model: AutoencoderKL, data: Data | None = None, steps: int = 3, ckpt_path: Path | None = None, **options
) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    settings = quiet | {"accelerator": "cpu", "num_sanity_val_steps": 0, "limit_val_batches": 0} | options
    trainer = pl.Trainer(max_steps=steps, **settings)
    trainer.fit(model, data or Data(), ckpt_path=ckpt_path)
    return trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def batch(numbers: list[int], size: int = 16) -> dict:
    images = torch.rand(len(numbers), 3, size, size, generator=torch.Generator().manual_seed(9)) * 2 - 1
    return {"image": images, "draws": Draws(0, numbers, len(numbers))}


class Watch(pl.Callback):
    """Keeps what a test asks about after each micro-batch."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append(self.look(trainer, pl_module))


@pytest.mark.parametrize(("start", "parts"), [(None, 1), (0, 1), (2, 1), (0, 2)])
def test_global_step_counts_one_a_global_batch(start, parts):
    watch = Watch(lambda trainer, _: trainer.global_step)
    trainer = fit(make(start), Data(2, parts), steps=4, callbacks=[watch])
    assert trainer.global_step == 4
    assert watch.seen == [(index + 1) // parts for index in range(4 * parts)]


def test_discriminator_starts_when_it_should_and_not_before():
    initial = weights(make(start=2).loss.discriminator)
    watch = Watch(lambda _, module: weights(module.loss.discriminator))
    fit(make(start=2), steps=4, callbacks=[watch])
    same = [torch.equal(initial, seen) for seen in watch.seen]
    assert same == [True, True, False, False]


def test_both_optimizers_move_from_one_backward():
    model = make(start=0)
    before = [weights(network) for network in (model.encoder, model.decoder, model.loss.discriminator)]
    logvar = model.loss.logvar.item()
    fit(model, steps=1)
    after = [weights(network) for network in (model.encoder, model.decoder, model.loss.discriminator)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.loss.logvar.item() != logvar


@pytest.mark.parametrize("optimizer", [adam, partial(torch.optim.AdamW, lr=1e-3, fused=True), AdamW, Muon])
def test_a_fixed_logvar_stays_where_it_is(optimizer):
    model = make(start=0, optimizer=partial(optimizer, lr=1e-3), learn_logvar=False)
    before = weights(model.decoder)
    fit(model, steps=2)
    assert model.loss.logvar.item() == 0
    assert not torch.equal(before, weights(model.decoder))


@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True), (False, False)])
def test_a_run_goes_on_whether_its_logvar_was_learned_or_not(learned, tmp_path):
    before, after = (make(start=0, learn_logvar=learn) for learn in learned)
    saved = tmp_path / "some.ckpt"
    fit(before, steps=2).save_checkpoint(saved)
    start = before.loss.logvar.item()
    assert (start != 0) == learned[0]
    assert fit(after, steps=4, ckpt_path=saved).global_step == 4
    # A fixed one has its configured value, whatever was learned before.
    assert (after.loss.logvar.item() not in (0.0, start)) == learned[1]


@pytest.mark.parametrize("perceptual", [None, LPIPS])
def test_accumulation_equals_the_large_batch(perceptual):
    whole, split = (make(optimizer=sgd, perceptual=perceptual and perceptual()) for _ in range(2))
    start = weights(whole)
    fit(whole, Data(6, 1), steps=3)
    fit(split, Data(2, 3), steps=3)
    moved = (weights(whole) - start).norm()
    assert moved > 1e-3
    assert (weights(whole) - weights(split)).norm() < 1e-4 * moved


def test_gradients_are_clipped_by_norm_for_each_optimizer():
    model = make(start=0, optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=1e-3)
    names = ("generator", "discriminator")
    parts = [[model.encoder, model.decoder], [model.loss.discriminator]]
    before = [torch.cat([weights(module) for module in modules]) for modules in parts]
    logvar = model.loss.logvar.item()
    trainer = fit(model, steps=1)
    moved = [
        (torch.cat([weights(m) for m in modules]) - old).square().sum()
        for modules, old in zip(parts, before, strict=True)
    ]
    moved[0] += (model.loss.logvar.item() - logvar) ** 2
    for name, square in zip(names, moved, strict=True):
        assert square.sqrt().item() == pytest.approx(1e-3, rel=1e-2), name
    # What is logged is the norm before clipping.
    assert trainer.callback_metrics["train/gradient"] > 1.0


@pytest.mark.parametrize(("clip", "measured"), [(None, 2), (1.0, 4)])
def test_gradients_are_measured_where_they_are_logged_or_clipped(clip, measured, monkeypatch):
    calls = []
    monkeypatch.setattr(autoencoder, "total_norm", lambda gradients: calls.append(1) or total_norm(gradients))
    trainer = fit(make(gradient_clip=clip), steps=4, log_every_n_steps=2)
    assert len(calls) == measured
    assert trainer.callback_metrics["train/gradient"] > 0


def test_schedules_advance_once_a_step_of_their_own_optimizer():
    def look(trainer, module):
        return [optimizer.param_groups[0]["lr"] for optimizer in module.optimizers()]

    watch = Watch(look)

    def halve(step: int) -> float:
        return 0.5**step

    model = make(start=1, schedule=halve, discriminator_schedule=halve, discriminator_optimizer=partial(adam, lr=8.0))
    fit(model, Data(2, 2), steps=3, callbacks=[watch])
    after_steps = watch.seen[1::2]
    assert after_steps == [[5e-4, 8.0], [2.5e-4, 4.0], [1.25e-4, 2.0]]
    assert watch.seen[2] == watch.seen[1]


def test_lpips_sleeps_through_training():
    model = make(perceptual=LPIPS())
    before = weights(model.loss.perceptual)
    watch = Watch(lambda _, module: any(part.training for part in module.loss.perceptual.modules()))
    fit(model, steps=2, limit_val_batches=1, val_check_interval=1, callbacks=[watch])
    assert model.training
    assert watch.seen == [False, False]
    assert torch.equal(before, weights(model.loss.perceptual))


def test_a_batch_brings_its_own_randomness():
    model = make()
    first = model.total_loss(batch([1, 2]))
    torch.manual_seed(123)
    assert torch.equal(first, model.total_loss(batch([1, 2])))
    assert not torch.equal(first, model.total_loss(batch([1, 3])))


def test_forward_without_noise_draws_it():
    model, images = make(), batch([0])["image"]
    torch.manual_seed(0)
    first, posterior = model(images)
    second, _ = model(images)
    assert posterior.mean.shape == (1, 2, 8, 8)
    assert not torch.equal(first, second)


def test_bf16_trains_and_keeps_the_posterior_in_float32():
    model = make(start=0, perceptual=LPIPS())
    before = weights(model.decoder)
    trainer = fit(model, steps=2, precision="bf16-mixed", log_every_n_steps=1)
    assert not torch.equal(before, weights(model.decoder))
    assert trainer.callback_metrics["train/loss"].isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode(batch([0])["image"]).mean.dtype == torch.float32


def test_validation_repeats_itself_and_says_what_it_should():
    model = make(start=0, perceptual=LPIPS())
    trainer = fit(model, steps=1, limit_val_batches=1.0, val_check_interval=1)
    first = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    measured = {"psnr", "ssim", "l1", "lpips", "rec_loss", "kl", "dead_channels", "latent_std"}
    assert set(first) == {f"val/{name}" for name in measured}
    torch.manual_seed(77)
    (second,) = trainer.validate(model, Data(), verbose=False)
    assert first == pytest.approx(second, rel=1e-6)


def test_what_metrics_see_is_float32_under_autocast(monkeypatch):
    model, of = make(perceptual=LPIPS()), batch([0, 1], size=32)
    with torch.no_grad():
        made = 0.9 * of["image"], model.encode(of["image"])
    monkeypatch.setattr(model, "reconstruct", lambda batch: made)
    expected = model.evaluate(of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.evaluate(of)
    assert {value.dtype for value in (mixed.reconstruction, *mixed.losses.values())} == {torch.float32}
    assert all(torch.equal(expected.losses[name], mixed.losses[name]) for name in expected.losses)


@pytest.mark.parametrize(("metrics", "calls"), [({"losses": None}, 0), (None, 1)])
def test_losses_are_computed_only_if_a_metric_asks_for_them(metrics, calls, monkeypatch):
    model, measured = make(perceptual=LPIPS(pretrained=False), metrics=metrics), []
    trainer = fit(model, steps=0, limit_val_batches=1)
    monkeypatch.setattr(
        model.loss.perceptual, "forward", lambda *pair: measured.append(pair) or torch.ones(len(pair[0]))
    )
    (found,) = trainer.validate(model, Data(), verbose=False)
    assert len(measured) == calls
    assert ("val/lpips" in found, "val/psnr" in found) == (calls > 0, True)


def test_metrics_are_no_part_of_the_model():
    """Not trained, saved, moved by a strategy, or counted."""
    plain, measured = make(), make(metrics={"lpips": Perceptual(LPIPS())})
    assert plain.state_dict().keys() == measured.state_dict().keys()
    assert [*dict(plain.named_parameters())] == [*dict(measured.named_parameters())]
    assert [*dict(plain.named_buffers())] == [*dict(measured.named_buffers())]
    (metrics,) = fit(measured, steps=1, limit_val_batches=1.0).validate(measured, Data(), verbose=False)
    assert metrics["val/lpips"] > 0


def test_metrics_do_not_depend_on_the_batches():
    """Of 10 pictures: 4, 4 and 2; 3, 3, 3 and 1; all at once."""
    model = make(perceptual=LPIPS())
    model.loss.l2_weight = 0.5
    trainer = fit(model, steps=0, limit_val_batches=1.0)
    several, other, whole = (trainer.validate(model, Data(micro), verbose=False)[0] for micro in (4, 3, 10))
    measured = ("psnr", "ssim", "l1", "l2", "lpips", "rec_loss", "kl", "dead_channels", "latent_std")
    assert {*whole} == {f"val/{name}" for name in measured}
    assert several == pytest.approx(whole, rel=1e-6)
    assert other == pytest.approx(whole, rel=1e-6)


def test_the_batch_of_the_sanity_check_leaves_no_trace():
    with_check, without = make(), make()
    options = {"limit_val_batches": 1.0, "val_check_interval": 1}
    found = [fit(model, steps=1, num_sanity_val_steps=n, **options) for model, n in ((with_check, 1), (without, 0))]
    checked, unchecked = (trainer.callback_metrics for trainer in found)
    assert checked.keys() == unchecked.keys()
    assert all(torch.equal(checked[name], unchecked[name]) for name in unchecked)


def test_latent_statistics_are_those_of_the_draws():
    moments = torch.randn(50, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    moments[:, :2] += torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    posterior = DiagonalGaussian(moments)
    found = statistics(latent_sums(posterior))
    drawn = torch.cat([posterior.sample(generator=torch.Generator().manual_seed(s)) for s in range(20)])
    np.testing.assert_allclose(found["mean"], drawn.mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(found["std"], drawn.std((0, 2, 3)), rtol=0.01)
    halves = latent_sums(DiagonalGaussian(moments[:20])) + latent_sums(DiagonalGaussian(moments[20:]))
    assert statistics(halves)["mean"] == pytest.approx(found["mean"])


def test_facts_come_from_validation_and_survive_a_resume(tmp_path):
    model = make(perceptual=LPIPS())
    assert model.checkpoint_facts() == {"kind": "autoencoder", "latents": None, "metrics": {}}
    trainer = fit(model, steps=1, limit_val_batches=1.0, val_check_interval=1)
    facts = model.checkpoint_facts()
    assert facts["kind"] == "autoencoder"
    posteriors = [model.encode(model_batch["image"]) for model_batch in Data().val_dataloader()]
    expected = statistics(sum(latent_sums(posterior) for posterior in posteriors))
    assert facts["latents"]["std"] == pytest.approx(expected["std"], rel=1e-4)
    assert facts["metrics"]["val/psnr"] > 0

    state = trainer._checkpoint_connector.dump_checkpoint()
    assert not any("perceptual" in name for name in state["state_dict"])
    torch.save(state | {"ldm": facts}, tmp_path / "some.ckpt")
    resumed = make(perceptual=LPIPS())
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    pl.Trainer(max_steps=2, limit_val_batches=0, **quiet).fit(resumed, Data(), ckpt_path=tmp_path / "some.ckpt")
    assert resumed.checkpoint_facts() == facts


def test_pictures_lie_in_the_range_of_images():
    model = make()
    pictures = model.images(batch([0, 1, 2]))
    assert list(pictures) == ["input", "reconstruction", "difference", "prior"]
    for picture in pictures.values():
        assert picture.shape == (3, 3, 16, 16)
        assert picture.dtype == torch.float32
        assert picture.abs().max() <= 1
        assert not picture.requires_grad
    assert torch.equal(pictures["prior"], model.images(batch([0, 1, 2]))["prior"])


RANKS = """
import sys, torch, pytorch_lightning as pl
from functools import partial
from ldm.runtime import distributed
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.metrics import Perceptual
from ldm.autoencoder.module import AutoencoderKL
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.randomness import Draws

class Data(pl.LightningDataModule):
    def accumulation(self, world_size): return 4 // world_size
    def train_dataloader(self):
        images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        items = [{"image": image, "number": number} for number, image in enumerate(images)]
        mine = [item for item in items if item["number"] // 2 % distributed.world_size() == distributed.rank()]
        return torch.utils.data.DataLoader(mine, batch_size=2)
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["draws"] = Draws(0, batch.pop("number").numpy(), 8)
        return batch

devices, start, path, learned = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
torch.manual_seed(0)
norm = partial(torch.nn.InstanceNorm2d, affine=True)
loss = AutoencoderLoss(
    discriminator=PatchDiscriminator(3, 8, 1, norm=norm), disc_start=start, learn_logvar=learned
)
model = AutoencoderKL(
    Encoder(3, 8, (1, 2), 1, 2), Decoder(3, 8, (1, 2), 1, 2), loss, partial(torch.optim.SGD, lr=1e-5)
)
trainer = pl.Trainer(max_steps=3, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
                     logger=False, enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False)
trainer.fit(model, Data())
assert trainer.global_step == 3
torch.save(model.state_dict(), f"{path}.{distributed.rank()}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("start", "learned"), [(1, True), (9, True), (1, False)])
def test_two_ranks_agree_with_each_other_and_with_one(start, learned, tmp_path):
    """Plain DDP, two micro-batches a step and rank, the discriminator asleep in the first step or in all."""
    script, root = tmp_path / "train.py", Path(__file__).parents[2]
    script.write_text(RANKS)
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), str(start), str(tmp_path / f"of{devices}"), str(learned)]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(root)})
    alone, first, second = (torch.load(tmp_path / name) for name in ("of1.0", "of2.0", "of2.1"))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        # The adaptive weight is each rank's and micro-batch's own, of the same sets of images here.
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("codebook", [False, True])
def test_a_frozen_encoder_stays_what_it_is(codebook):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 2) if codebook else None
    encoder = Encoder(3, 8, (1, 2), 1, 2, moments=not codebook, dropout=0.5)
    loss = AutoencoderLoss(discriminator=PatchDiscriminator(3, 8, 1), disc_start=1)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5)
    model = AutoencoderKL(
        encoder, Decoder(3, 8, (1, 2), 1, 2), loss, optimizer, quantizer=quantizer, train_encoder=False
    )
    parts = [part for part in (encoder, quantizer) if part is not None]
    frozen = [weights(part) for part in parts]
    decoder = weights(model.decoder)
    trainer = fit(model)
    assert all(torch.equal(weights(part), before) for part, before in zip(parts, frozen, strict=True))
    assert not torch.equal(weights(model.decoder), decoder)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())
    listed = {id(one) for made in trainer.optimizers for group in made.param_groups for one in group["params"]}
    assert listed.isdisjoint(id(parameter) for part in parts for parameter in part.parameters())
    model.train()
    assert model.decoder.training
    assert not any(module.training for part in parts for module in part.modules())
    posterior = model.encode(torch.zeros(1, 3, 16, 16))
    assert not posterior.mean.requires_grad


def test_the_cost_of_a_frozen_encoder_is_left_out(monkeypatch):
    monkeypatch.setattr(DiagonalGaussian, "kl", lambda *_: pytest.fail("nobody asked"))
    fit(make(train_encoder=False), steps=1)
