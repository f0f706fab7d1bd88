"""Training steps of ours beside those of others: which sides each table has, and what is to be known about them.

Equal mathematics, sizes and batches: a side that has other weights than ours says why in its docstring.
"""

from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.contest import Case, Side
from scripts.bench.sides import compvis, dits, huggingface, our_sampling, ours
from scripts.bench.sizes import FULL, TINY, Sizes
from scripts.bench.tables import compared

_OURS = "ldm: a real run's step, its batch from a loader, the average included; the others have theirs in memory"
_COMPVIS = (
    "CompVis: its modules in the loop that its Lightning of 2022 had; stand-ins for that version's "
    "`pytorch_lightning.utilities.distributed`"
)


def sizes(options: Any) -> Sizes:
    return TINY if options.tiny else FULL


def stage1(options: Any) -> str:
    """The table of `bench stage1`."""
    chosen = sizes(options)
    notes = [_OURS, *_missing(options, "compvis", "taming")]
    if options.compvis:
        notes.append(f"{_COMPVIS}; VGG16 at random weights, not fetched, LPIPS without dropout, as ours is")
    notes.append("diffusers: AutoencoderKL with Adam (fused), our LPIPS and discriminator, VQGAN's two passes")
    cases = []
    for size in chosen.autoencoders:
        for adversarial in (False, True):
            sides = [Side("ldm", partial(ours.autoencoder, size, adversarial))]
            if options.compvis and not adversarial:
                sides.append(Side("CompVis", partial(compvis.autoencoder, options.compvis, size)))
            if options.compvis and options.taming and adversarial:
                make = partial(compvis.adversarial_autoencoder, options.compvis, options.taming, size)
                sides.append(Side("CompVis", make))
            sides.append(Side("diffusers", partial(huggingface.autoencoder, size, adversarial)))
            loss = "LPIPS, discriminator" if adversarial else "L1, KL"
            cases.append(Case(f"{size.images} x {size.resolution} px, {loss}", size.images, sides))
    return compared(cases, options, chosen.product, notes)


def stage2(options: Any) -> str:
    """The table of `bench stage2`."""
    chosen = sizes(options)
    size, pixels = chosen.unet, chosen.unet.autoencoder.resolution
    notes = [_OURS, *_missing(options, "compvis")]
    sides = [Side("ldm, on the cache", partial(ours.unet, size))]
    if options.compvis:
        notes.append(f"{_COMPVIS} and for taming")
        sides += [
            Side("CompVis, on latents", partial(compvis.unet, options.compvis, size, False)),
            Side(f"CompVis, encoding {pixels} px", partial(compvis.unet, options.compvis, size, True)),
        ]
    sides.append(Side("diffusers, on latents", partial(huggingface.unet, size)))
    notes.append("diffusers: UNet2DModel with AdamW (fused) and its EMAModel")
    case = Case(f"UNet, {size.images} x {size.latent} x {size.side} x {size.side}", size.images, sides)
    return compared([case], options, chosen.product, notes)


def dit(options: Any) -> str:
    """The table of `bench dit`."""
    chosen = sizes(options)
    size = chosen.dit
    notes = [
        _OURS,
        *_missing(options, "dit", "sit", "lightningdit"),
        "DiT and SiT: without the learned variance that they have by default; a stand-in for torchdiffeq (SiT)",
        "diffusers: DiTTransformer2DModel with AdamW (fused) and its EMAModel; an embedding of the noise level a block",
    ]
    if options.lightningdit:
        notes.append("LightningDiT: compiled, as it comes; stand-ins for torchdiffeq and fairscale")

    def ldm(objective: Any, modern: bool = False, compiled: bool = False) -> Side:
        return Side("ldm, compiled" if compiled else "ldm", partial(ours.dit, size, modern, objective, compiled))

    def compiled(objective: Any, modern: bool = False) -> list[Side]:
        return [] if options.tiny else [ldm(objective, modern, True)]

    cases = {
        "DiT": [
            ldm(ours.ddpm),
            *compiled(ours.ddpm),
            *_given("DiT", dits.dit, options.dit, size),
            Side("diffusers", partial(huggingface.dit, size)),
        ],
        "SiT": [ldm(ours.flow), *compiled(ours.flow), *_given("SiT", dits.sit, options.sit, size)],
        "LightningDiT": [
            ldm(ours.lightning_flow, modern=True),
            *compiled(ours.lightning_flow, True),
            *_given("LightningDiT", dits.lightningdit, options.lightningdit, size),
        ],
    }
    shape = f"{size.images} x {size.latent} x {size.side} x {size.side}"
    name = "S/2" if not options.tiny else "tiny"
    made = [Case(f"{kind}-{name}, {shape}", size.images, sides) for kind, sides in cases.items()]
    return compared(made, options, chosen.product, notes)


def _given(name: str, make: Any, folder: Path | None, size: Any) -> list[Side]:
    return [Side(name, partial(make, folder, size))] if folder else []


def _missing(options: Any, *names: str) -> list[str]:
    return [f"without --{name}, a folder with its code" for name in names if getattr(options, name) is None]


def sampling(options: Any) -> str:
    """The table of `bench sampling`."""
    chosen = sizes(options)
    size = chosen.sampled
    sides = [
        Side("ldm", partial(our_sampling.sampling, size, chosen.steps)),
        Side("diffusers", partial(huggingface.sampling, size, chosen.steps)),
    ]
    name = f"{size.images} x {size.autoencoder.resolution} px, {chosen.steps} steps of DDIM"
    notes = [
        "from noise to pictures, networks of the same shape at random weights; diffusers: LDMPipeline with UNet2DModel",
        "in bf16: ldm with its weights in bf16, as its --precision has it; diffusers under autocast",
        "outside the networks: what is left of the time without UNet and decoder",
    ]
    return compared([Case(name, size.images, sides)], options, chosen.product, notes)


def choices(options: Any) -> str:
    """The table of `bench choices`: what a user may choose, beside what the configurations have."""
    chosen = sizes(options)
    size = chosen.unet
    kinds: dict[str, dict[str, Any]] = {
        "as it comes: AdamW fused, one average": {},
        "AdamW by foreach": {"adamw": {"foreach": True}},
        "AdamW, a weight at a time": {"adamw": {"foreach": False}},
        "activations computed again": {"checkpointing": True},
        "two more averages": {"extra_averages": 2},
    }
    sides = [Side(f"ldm, {name}", partial(ours.unet, size, **kind)) for name, kind in kinds.items()]
    name = f"UNet, {size.images} x {size.latent} x {size.side} x {size.side}"
    return compared([Case(name, size.images, sides)], options, chosen.product, [_OURS])
