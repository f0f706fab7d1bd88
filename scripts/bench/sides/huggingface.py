"""diffusers' networks in the usual loop, with the optimizer that we have; its pipelines as they are.

Its repository has no training of an autoencoder with a discriminator, so that loop is VQGAN's: one forward for the
generator and its adaptive adversarial weight, another for the discriminator, with our LPIPS and discriminator.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.lpips import LPIPS
from scripts.bench.child import Built, Place, count, repeat
from scripts.bench.learner import Learner, batches
from scripts.bench.sides.plain import l1_and_kl
from scripts.bench.sizes import AutoencoderSize, DiTSize, UNetSize

GROUPS = 32


def make_autoencoder(size: AutoencoderSize) -> Any:
    levels = len(size.multipliers)
    return diffusers.AutoencoderKL(
        block_out_channels=[size.channels * multiplier for multiplier in size.multipliers],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=size.blocks,
        latent_channels=size.latent,
        norm_num_groups=GROUPS,
        sample_size=size.resolution,
    )


def autoencoder(size: AutoencoderSize, adversarial: bool, place: Place) -> Built:
    model = make_autoencoder(size).to(place.device)
    images = torch.rand(size.images, 3, size.resolution, size.resolution, device=place.device) * 2 - 1
    make = _adversarial_step if adversarial else _autoencoder_step
    return Built(count(model), repeat(make(model, images), place))


def _adam(parameters: Sequence[nn.Parameter], images: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=4.5e-6 * len(images), betas=(0.5, 0.9), fused=True)


def _autoencoder_step(model: Any, images: Tensor) -> Callable[[], None]:
    optimizer = _adam([*model.parameters()], images)

    def step() -> None:
        posterior = model.encode(images).latent_dist
        l1_and_kl(images, model.decode(posterior.sample()).sample, posterior.kl()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adversarial_step(model: Any, images: Tensor) -> Callable[[], None]:
    perceptual = LPIPS(pretrained=False).to(images.device)
    critic = PatchDiscriminator().to(images.device)
    generator, discriminator = _adam([*model.parameters()], images), _adam([*critic.parameters()], images)
    last = model.decoder.conv_out.weight

    def forward() -> tuple[Tensor, Any]:
        posterior = model.encode(images).latent_dist
        return model.decode(posterior.sample()).sample, posterior

    def step() -> None:
        critic.requires_grad_(False)
        reconstruction, posterior = forward()
        error = (images - reconstruction).abs() + perceptual(images, reconstruction)[:, None, None, None]
        nll = error.sum() / len(images)
        fooled = -critic(reconstruction).mean()
        ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, fooled))
        weight = (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()
        (nll + 1e-6 * posterior.kl().mean() + 0.5 * weight * fooled).backward()
        generator.step()
        generator.zero_grad()
        critic.requires_grad_(True)
        with torch.no_grad():
            reconstruction, _ = forward()
        real, fake = critic(images), critic(reconstruction)
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        discriminator.step()
        discriminator.zero_grad()

    return step


def make_unet(size: UNetSize) -> Any:
    plain = len(size.multipliers) - 1
    return diffusers.UNet2DModel(
        sample_size=size.side,
        in_channels=size.latent,
        out_channels=size.latent,
        block_out_channels=[size.channels * multiplier for multiplier in size.multipliers],
        layers_per_block=size.blocks,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        attention_head_dim=size.channels * size.multipliers[-1] // size.heads,
        norm_num_groups=GROUPS,
    )


def unet(size: UNetSize, place: Place) -> Built:
    network = make_unet(size).to(place.device)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        return network(noisy, t).sample

    return _diffusion(network, predict, (size.images, size.latent, size.side, size.side), place)


def dit(size: DiTSize, place: Place) -> Built:
    """Its embedding of the noise level is one a block, where DiT has one: more weights, as good as no more work."""
    network: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=size.latent,
        out_channels=size.latent,
        num_layers=size.depth,
        sample_size=size.side,
        patch_size=size.patch,
        num_embeds_ada_norm=size.classes,
    ).to(place.device)
    classes = torch.randint(0, size.classes, (size.images,), device=place.device)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        return network(noisy, t, class_labels=classes).sample

    return _diffusion(network, predict, (size.images, size.latent, size.side, size.side), place)


def _diffusion(
    network: Any, predict: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], place: Place
) -> Built:
    """The loop of its train_unconditional.py on latents, with its average."""
    from diffusers.training_utils import EMAModel  # takes seconds to import

    latents = torch.randn(shape, device=place.device)
    scheduler: Any = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    average = EMAModel(network.parameters(), decay=0.9999)

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        loss = F.mse_loss(predict(scheduler.add_noise(latents, noise, t), t).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    network.train()
    return Built(count(network), repeat(step, place))


def sampling(size: UNetSize, steps: int, place: Place) -> Built:
    """LDMPipeline: DDIM, then the decoder."""
    network, first_stage = make_unet(size).to(place.device).eval(), make_autoencoder(size.autoencoder).to(place.device)
    parameters = count(network, first_stage.decoder, first_stage.post_quant_conv)
    scheduler: Any = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    pipeline: Any = diffusers.LDMPipeline(first_stage.eval(), network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    # It hands its pictures to numpy, which knows no bf16.
    first_stage.decoder.register_forward_hook(lambda module, inputs, output: output.float())

    def step() -> None:
        pipeline(batch_size=size.images, num_inference_steps=steps, eta=0.0)

    return Built(parameters, repeat(step, place), [network, first_stage.post_quant_conv, first_stage.decoder])


SCRIPT = (128, 128, 256, 256, 512, 512)
"""The channels of the network in its train_unconditional.py: 114 million weights."""


def learner(pictures: Path, channels: Sequence[int], steps: int, place: Place) -> Learner:
    """The training of its train_unconditional.py on pixels, with a class embedding, which that script does not have.

    Its optimizer, schedule of learning rates, clipping, average and batch; no mirror images, as on our side.

    Args:
        pictures: {"images": (N,C,H,W) uint8, "labels": (N,) int64}, from torch.save.
        channels: of each level; attention on the last but one, as there.
        steps: of DDIM.
    """
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    known = torch.load(pictures)
    images, labels = known["images"].to(place.device).float() / 127.5 - 1, known["labels"].to(place.device)
    _, depth, side, _ = images.shape
    attended = len(channels) - 2
    levels = range(len(channels))
    network: Any = diffusers.UNet2DModel(
        sample_size=side,
        in_channels=depth,
        out_channels=depth,
        layers_per_block=2,
        block_out_channels=[*channels],
        down_block_types=["AttnDownBlock2D" if level == attended else "DownBlock2D" for level in levels],
        up_block_types=["AttnUpBlock2D" if level == attended else "UpBlock2D" for level in reversed(levels)],
        num_class_embeds=int(labels.max()) + 1,
    ).to(place.device)
    scheduler: Any = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    size, epochs = 16, 100
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=len(images) // size * epochs)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    rows = batches(len(images), size)

    def step() -> None:
        chosen = rows()
        clean = images[chosen]
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (size,), device=place.device)
        predicted = network(scheduler.add_noise(clean, noise, t), t, class_labels=labels[chosen]).sample
        F.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(network.parameters())
        optimizer.zero_grad()

    def sample(classes: Tensor) -> Tensor:
        sampler: Any = diffusers.DDIMScheduler.from_config(scheduler.config)
        sampler.set_timesteps(steps)
        made = torch.randn(len(classes), depth, side, side, device=place.device)
        average.store(network.parameters())
        average.copy_to(network.parameters())
        for t in sampler.timesteps:
            made = sampler.step(network(made, t, class_labels=classes).sample, t, made).prev_sample
        average.restore(network.parameters())
        return made

    return Learner(count(network), size, step, sample)
