"""Measure ldm, and print Markdown tables.

    python scripts/bench.py steps       # our training steps beside diffusers' networks in the usual loop
    python scripts/bench.py quality     # FashionMNIST: train both stages, sample, and let a classifier judge
    python scripts/bench.py quality --autoencoder logs/<run> --diffusion logs/<run> --guidance 1 2 4

`steps`: the same sizes, LPIPS (random VGG16), discriminator, optimizer and batch, in turn, so that a busy machine slows
both. The usual autoencoder step is VQGAN's: one forward for the generator and its adaptive adversarial weight, another
for the discriminator. `quality`: see ldm/evaluation/report.py; the Fréchet distance in the classifier's own features
is not the FID.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ldm.runtime import threads

if __name__ == "__main__":
    threads.prepare()  # before torch is imported

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import run_folder
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.cli import program
from ldm.cli.options import Parser, finite, path, split_overrides, whole_number
from ldm.data.sources.arrays import FashionMNIST
from ldm.diffusion.conditioners.base import Conditioning
from ldm.diffusion.networks.unet import UNet
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM
from ldm.evaluation.report import compare, markdown
from ldm.files import write_text
from ldm.randomness import Draws
from ldm.runtime.precision import computes_bf16
from ldm.sampling.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
EPILOG = "With `quality`, words of the form key=value override the configuration of both stages."
Step = Callable[[], None]
Optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.5, 0.9), fused=True)


def hardware(device: str) -> str:
    """One line: when, on what, with which libraries."""
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        machine = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


# ---- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of the networks compared. The autoencoder is of the kl-f4 kind, the UNet has attention at its last level."""

    resolution: int = 64
    images: int = 8
    autoencoder: int = 64
    latents: int = 64
    unet: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2


TINY = Size(resolution=32, images=2, autoencoder=32, latents=2, unet=32, multipliers=(1, 2), blocks=1)


class Contestant(NamedTuple):
    parameters: int
    step: Step


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def our_autoencoder(size: Size, images: Tensor, perceptual: nn.Module) -> Contestant:
    """One forward and one backward for both optimizers (ldm/autoencoder/losses.py)."""
    encoder = Encoder(3, size.autoencoder, size.multipliers, size.blocks, latent_channels=4).to(images.device)
    decoder = Decoder(3, size.autoencoder, size.multipliers, size.blocks, latent_channels=4).to(images.device)
    critic = PatchDiscriminator()
    loss = AutoencoderLoss(perceptual, discriminator=critic, disc_start=0).to(images.device)
    generator = Optimizer([*encoder.parameters(), *decoder.parameters(), loss.logvar])
    discriminator = Optimizer(critic.parameters())

    def step() -> None:
        posterior = DiagonalGaussian(encoder(images).float())
        reconstruction = decoder(posterior.sample(torch.randn_like(posterior.mean)))
        total, _ = loss(images, reconstruction, posterior, decoder.last_layer, 0)
        total.backward()
        for optimizer in (discriminator, generator):
            optimizer.step()
            optimizer.zero_grad()

    return Contestant(count(encoder, decoder), step)


def usual_autoencoder(size: Size, images: Tensor, perceptual: nn.Module) -> Contestant:
    """diffusers' AutoencoderKL in the two passes of the usual code."""
    levels = len(size.multipliers)
    model: Any = diffusers.AutoencoderKL(
        block_out_channels=[size.autoencoder * multiplier for multiplier in size.multipliers],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=size.blocks,
        latent_channels=4,
        norm_num_groups=min(32, size.autoencoder // 4),
    )
    model.to(images.device)
    critic = PatchDiscriminator().to(images.device)
    logvar = nn.Parameter(torch.zeros((), device=images.device))
    generator, discriminator = Optimizer([*model.parameters(), logvar]), Optimizer(critic.parameters())
    last = model.decoder.conv_out.weight

    def forward() -> tuple[Tensor, Any]:
        posterior = model.encode(images).latent_dist
        return model.decode(posterior.sample()).sample, posterior

    def step() -> None:
        critic.requires_grad_(False)
        reconstruction, posterior = forward()
        error = (images - reconstruction).abs() + perceptual(images, reconstruction)[:, None, None, None]
        nll = (error / logvar.exp() + logvar).sum() / len(images)
        fooled = -critic(reconstruction).mean()
        ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, fooled))
        weight = (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()
        (nll + 1e-6 * posterior.kl().mean() + 0.5 * weight * fooled).backward()
        generator.step()
        generator.zero_grad()
        critic.requires_grad_(True)
        reconstruction, _ = forward()
        real, fake = critic(images), critic(reconstruction.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        discriminator.step()
        discriminator.zero_grad()

    return Contestant(count(model), step)


def our_unet(size: Size, latents: Tensor) -> Contestant:
    last = len(size.multipliers) - 1
    network = UNet(4, size.unet, size.multipliers, size.blocks, attention_levels=[last], num_heads=4).to(latents.device)
    objective, optimizer = DDPM(SqrtLinear()), Optimizer(network.parameters())
    draws = Draws(0, range(len(latents)), len(latents), latents.device)

    def step() -> None:
        objective.loss(network, latents, Conditioning(), draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(count(network), step)


def usual_unet(size: Size, latents: Tensor) -> Contestant:
    plain = len(size.multipliers) - 1
    network: Any = diffusers.UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=[size.unet * multiplier for multiplier in size.multipliers],
        layers_per_block=size.blocks,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        attention_head_dim=size.unet * size.multipliers[-1] // 4,
        norm_num_groups=min(32, size.unet // 4),
    )
    network.to(latents.device)
    scheduler: Any = diffusers.DDPMScheduler()
    optimizer = Optimizer(network.parameters())

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        F.mse_loss(network(scheduler.add_noise(latents, noise, t), t).sample.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(count(network), step)


def seconds(contestants: Sequence[Contestant], device: str, bf16: bool, repeats: int) -> list[list[float]]:
    """Of each contestant's steps, taken in turn; the first two of each are not counted."""
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats + 2):
        for contestant, times in zip(contestants, taken, strict=True):
            start = time.perf_counter()
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
                contestant.step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [times[2:] for times in taken]


def steps(options: Any) -> str:
    """The table of `bench.py steps`."""
    size, device = TINY if options.tiny else Size(), options.device
    images = torch.rand(size.images, 3, size.resolution, size.resolution, device=device) * 2 - 1
    latents = torch.randn(size.latents, 4, size.resolution // 4, size.resolution // 4, device=device)
    perceptual = LPIPS(pretrained=False).to(device)
    autoencoders = [make(size, images, perceptual) for make in (our_autoencoder, usual_autoencoder)]
    unets = [make(size, latents) for make in (our_unet, usual_unet)]
    pairs = {
        f"autoencoder, {size.images} x {size.resolution} px": autoencoders,
        f"UNet, {size.latents} x {latents.shape[-1]} px": unets,
    }
    rows = []
    native, reason = computes_bf16(device.split(":")[0])
    for name, pair in pairs.items():
        for bf16 in (False, True) if native else (False,):
            times = seconds(pair, device, bf16, options.repeats)
            ratio = statistics.median(times[1]) / statistics.median(times[0])
            sizes = " / ".join(f"{contestant.parameters / 1e6:.2f}" for contestant in pair)
            rows.append([name, "bf16" if bf16 else "fp32", *map(spread, times), f"{ratio:.2f}", sizes])
    header = ["step", "precision", "ldm, ms (min to max)", "diffusers, ms (min to max)", "ratio", "parameters, M"]
    left_out = "" if native else f"; without bf16: {reason}"
    return f"{hardware(device)}; medians of {options.repeats}{left_out}\n\n{markdown(header, rows)}"


def spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"


# ---- quality -----------------------------------------------------------------------------------------------------


def train(options: Any) -> Path:
    """Train the stages that are not given, by main.py as a user would; the folder of the second."""
    autoencoder = options.autoencoder or train_stage("autoencoder", options)
    return train_stage("diffusion", options, f"data.params.autoencoder={autoencoder}")


def train_stage(stage: str, options: Any, *overrides: str) -> Path:
    """Train configs/fashion_mnist/<stage>.yaml; the run's folder."""
    config = ROOT / "configs" / "fashion_mnist" / f"{stage}.yaml"
    command: list[str | Path] = [sys.executable, ROOT / "main.py", "--base", config]
    code = subprocess.run([*command, "--logdir", options.logdir, *options.overrides, *overrides]).returncode
    folder = run_folder.newest(options.logdir, f"fashion_mnist_{stage}")
    if code or folder is None:
        sys.exit(code or 1)  # main.py has said why
    return folder.path


def quality(options: Any) -> str:
    """The table of `bench.py quality`; also writes quality.json and pictures.png."""
    started = time.perf_counter()
    diffusion = options.diffusion or train(options)
    trained = time.perf_counter()
    pipeline = Pipeline.load(diffusion, autoencoder=options.autoencoder, device=options.device)
    data = FashionMNIST(), FashionMNIST(train=False)
    report = compare(pipeline, *data, options.number, options.epochs, options.guidance, options.steps)
    folder = options.out or Path(diffusion) / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(report.sheet()).save(folder / "pictures.png")
    record = {
        "hardware": hardware(options.device),
        **pipeline.origin,
        "images_a_class": options.number,
        "sampler_steps": options.steps,
        "classifier_test_accuracy": report.test_accuracy,
        "rows": {name: row._asdict() for name, row in report.scores.items()},
        "minutes": {"training": (trained - started) / 60, "judging": (time.perf_counter() - trained) / 60},
    }
    write_text(folder / "quality.json", json.dumps(record, indent=1) + "\n")
    about = f"{record['hardware']}; {options.number} images a class, DDIM {options.steps}; {record['checkpoint']}"
    return f"{about}\n\n{report.markdown()}\n\n{folder / 'pictures.png'}"


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="bench.py", description="Measure ldm.", epilog=EPILOG, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("what", choices=["steps", "quality"])
    add = parser.add_argument_group("both").add_argument
    add("--device", default=device, help="such as cuda or cpu (default: cuda where there is one)")
    add = parser.add_argument_group("steps").add_argument
    add("--tiny", action="store_true", help="the smallest networks: to see that it runs")
    add("--repeats", type=whole_number, default=9, help="steps timed of each kind (default: 9)")
    add = parser.add_argument_group("quality").add_argument
    add("--autoencoder", type=path, metavar="RUN", help="a trained first stage (default: train it)")
    add("--diffusion", type=path, metavar="RUN", help="a trained second stage (default: train it)")
    add("--number", type=whole_number, default=100, help="images a class (default: 100)")
    add("--guidance", type=finite, nargs="+", default=[2.0], help="scales to sample with (default: 2)")
    add("--steps", type=whole_number, default=30, help="DDIM steps (default: 30)")
    add("--epochs", type=whole_number, default=4, help="of the classifier (default: 4)")
    add("--logdir", type=path, default=Path("logs"), help="where runs are made (default: logs)")
    add("--out", type=path, help="folder for quality.json and pictures.png (default: <diffusion run>/quality)")
    overrides, words = split_overrides(argv)
    options = parser.parse_strictly(words)
    options.overrides = overrides
    return options


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""

    def work() -> None:
        options = parse(argv)
        print({"steps": steps, "quality": quality}[options.what](options))

    return program.answer(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
