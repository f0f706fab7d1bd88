"""Everything needed to generate images, loaded from a checkpoint: network, conditioner, objective, codec, manifest.

images = Pipeline.load("logs/<run>").generate(range(8), [{"class_label": 3}] * 8)
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import nn

from ldm.autoencoder.codec import Codec, with_encoder
from ldm.autoencoder.tiling import Tiling
from ldm.checkpoints import store
from ldm.config import randomness
from ldm.config.load import build
from ldm.config.tree import current_plain
from ldm.diffusion.conditioners.base import Conditioner, drops_all, kept_keys, require_conditioner
from ldm.diffusion.objectives import Objective
from ldm.errors import CheckpointError, ConfigError
from ldm.images import picture
from ldm.latents.manifest import Manifest, same_encoder
from ldm.normals import Normals
from ldm.randomness import STANDARD
from ldm.sampling.conditions import Condition
from ldm.sampling.dense import Dense
from ldm.sampling.generate import UNGUIDED, generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.precision import computing_in, network
from ldm.sampling.samplers import Sampler, ddim
from ldm.sampling.timesteps import TimestepSchedule, default
from ldm.sizes import Size, SizeError, spell

if TYPE_CHECKING:  # sampling from a checkpoint needs none of the training code
    from ldm.diffusion.module import LatentDiffusion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Everything needed to generate images.

    Args:
        denoiser: the modules `network` and `conditioner`.
        objective: what the network was trained on.
        codec: the autoencoder whose latents it was trained on.
        manifest: of the latent cache: shape and scale of the latents, the classes.
        label_dropout: the fraction of images that it was trained on without their conditions.
        origin: where the weights come from, in plain values: {"checkpoint", "step", "weights"}, and "autoencoder", the
            first digits of its hash, where another decoder of the same encoder is used.
        dense: what is known of its pictures, maps and layouts as conditions.
        normals: what makes the noise that samples begin with, and that samplers add.
        compute: what network and decoder compute in, as `precision.computing_in` says.
    """

    denoiser: nn.ModuleDict
    objective: Objective
    codec: Codec
    manifest: Manifest
    label_dropout: float
    origin: Mapping[str, Any] = field(default_factory=dict)
    dense: Dense = field(default_factory=Dense)
    normals: Normals = STANDARD.normals
    compute: torch.dtype = torch.float32

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        ema: bool = True,
        autoencoder: Path | str | None = None,
        device: torch.device | str = "cpu",
        trust: Sequence[str] = (),
        compute: torch.dtype = torch.float32,
    ) -> "Pipeline":
        """From a stage-2 checkpoint; builds the network, its conditioner and the objective, but no optimizer or data.

        Args:
            path: run folder (its newest good checkpoint) or checkpoint file.
            ema: the averaged weights; False: those of the last step.
            autoencoder: stage-1 run folder or checkpoint, or a folder of diffusers; None: its path when the latents
                were made.
            trust: packages besides ldm's own that the checkpoints' configurations may name.
            compute: torch.bfloat16: faster on devices that compute it natively, and pictures that differ slightly.

        Raises:
            CheckpointError: missing, damaged, not from stage 2, or not the autoencoder that made the latents.
        """
        verified = store.verify(Path(path))
        state, file = store.load(verified), verified.path
        record = store.facts(state, "diffusion", file)
        config = current_plain(record["config"], str(file))
        params = config["model"]["params"]
        denoiser = nn.ModuleDict({name: build(params[name], trust) for name in ("network", "conditioner")})
        require_conditioner(denoiser["conditioner"])
        if params.get("adapter"):
            build(params["adapter"], trust)(denoiser)
        objective = build(params["objective"], trust)
        store.fill(denoiser, state["state_dict"], "ema.average" if ema else "denoiser", file)
        store.fill(objective, state["state_dict"], "objective", file)
        manifest = Manifest.from_dict(record["latents"])
        codec = load_codec(manifest, autoencoder, file, trust)
        if autoencoder is not None:
            manifest = manifest.decoded_by(codec.describe())
        origin = {"checkpoint": str(file), "step": record["step"], "weights": "ema" if ema else "raw"}
        decoder = manifest.plan.autoencoder["weights"]
        if decoder != record["latents"]["plan"]["autoencoder"]["weights"]:
            origin["autoencoder"] = decoder[:16]
        denoiser.requires_grad_(False).eval()
        dropout = params.get("label_dropout", 0.0)
        dense = Dense.of(record.get("data") or {})
        normals = randomness.chosen(config, trust).normals
        pipeline = cls(
            denoiser.to(device), objective.to(device), codec.to(device), manifest, dropout, origin, dense, normals
        )
        return computing_in(pipeline, compute)

    @classmethod
    def from_module(
        cls,
        module: "LatentDiffusion",
        codec: Codec,
        manifest: Manifest,
        ema: bool = True,
        facts: Mapping[str, Any] | None = None,
        normals: Normals = STANDARD.normals,
    ) -> "Pipeline":
        """From a model in training, whose weights it shares; `codec` should be on the module's device.

        Args:
            facts: of the data module.
            normals: of the run.
        """
        denoiser = module.ema.average if ema else module.denoiser
        assert isinstance(denoiser, nn.ModuleDict)
        dense = Dense.of(facts or {})
        return cls(denoiser, module.objective, codec, manifest, module.label_dropout, dense=dense, normals=normals)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def conditioner(self) -> Conditioner:
        return cast(Conditioner, self.denoiser["conditioner"])

    @property
    def num_classes(self) -> int | None:
        """The number of classes that the model knows; None: it does not read the class."""
        return self.manifest.plan.num_classes if "class_label" in self.conditioner.keys else None

    @property
    def knows_null(self) -> bool:
        """Whether the model was also trained without its conditions, but for those that it keeps (Joint)."""
        kept = kept_keys(self.conditioner)
        if kept and {*kept} == {*self.conditioner.keys}:
            return False
        return self.label_dropout > 0 or drops_all(self.conditioner)

    def latent_shape(self, size: Size | None = None, tile: Tiling | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image of `size` (height, width), pixels; None: of most training images.

        Args:
            tile: the network meets its tiles alone, so that only they need to suit it.

        Raises:
            ConfigError: the autoencoder or the network cannot divide it, or the tiles do not fit it.
        """
        if tile is not None:
            tile.require(self.image_size(size), self.codec.down_factor)
            self._shape(tile.tile, "tile")
        return self.manifest.plan.shape if size is None else self._shape(size, "size", whole=tile is None)

    def _shape(self, size: Size, what: str, whole: bool = True) -> tuple[int, int, int]:
        """Of what a network meets as a `whole`, or in parts; ConfigError, beginning with `what` it is, if it cannot."""
        trained = self.manifest.plan.shape
        try:
            shape = self.codec.latent_shape(size)
            if shape != trained and whole:
                self._require(shape)
        except SizeError as error:
            sizes = ", ".join(spell((height, width)) for height, width in self.manifest.sizes or ())
            known = f" It was trained on {sizes}." if sizes else ""
            raise ConfigError(f"{what} {spell(size)}: {error}{known}{self._advice(size)}") from error
        return shape

    def _advice(self, size: Size) -> str:
        """What a picture that is larger than those of training can do about a network that cannot divide it."""
        least, factor = self.image_size(), self.codec.down_factor
        if size[0] % factor or size[1] % factor or min(size[0] - least[0], size[1] - least[1]) < 0:
            return ""
        return f" In tiles the network need not: --tile {' '.join(map(str, least))}."

    def image_size(self, size: Size | None = None) -> Size:
        """(height, width) of the images that are made, pixels; `size`, or that of the training images."""
        _, height, width = self.manifest.plan.shape
        return size or (height * self.codec.down_factor, width * self.codec.down_factor)

    @torch.no_grad()
    def _require(self, shape: tuple[int, int, int]) -> None:
        """SizeError unless the network takes such a latent: one call of one row, since only the network knows."""
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            time = torch.tensor(self.objective.t_max)
            x = torch.zeros(1, *shape, device=self.device)
            null = self.conditioner.null(1)
            if null.spatial is not None:  # its sides are 1 where any are accepted
                null = replace(null, spatial=null.spatial.expand(1, -1, *shape[1:]))
            self.objective.denoise(network(self), x, time, null)
        finally:
            self.denoiser.train(training)

    def generate(
        self,
        seeds: Sequence[int],
        conditions: Sequence[Condition] | None = None,
        *,
        sampler: Sampler = ddim,
        steps: int = 50,
        schedule: TimestepSchedule = default,
        guidance: Guidance = UNGUIDED,
        init_image: InitImage | None = None,
        size: Size | None = None,
        tile: Tiling | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> list[Image.Image]:
        """One image for each seed, in order: `ldm.sampling.generate.generate`, which describes the arguments."""
        samples = generate(
            self,
            seeds,
            conditions,
            sampler=sampler,
            steps=steps,
            schedule=schedule,
            guidance=guidance,
            init_image=init_image,
            size=size,
            tile=tile,
            batch_size=batch_size,
            progress=progress,
        )
        return [picture(sample.image) for sample in samples]


def load_codec(
    manifest: Manifest,
    given: Path | str | None,
    file: Path | str,
    trust: Sequence[str] = (),
    where: str = "with --autoencoder PATH",
) -> Codec:
    """The autoencoder that made the latents, or one with the same encoder; the identity if they are pixels.

    Verified by the hash of its weights, or that of its encoder's.

    Args:
        manifest: of the latents.
        given: its run folder, checkpoint or folder of diffusers; None: its path when the latents were made.
        file: what needs it, for messages.
        trust: packages besides ldm's own that its configuration may name.
        where: how to specify it, for messages.

    Raises:
        CheckpointError: it is missing, or it is another autoencoder.
    """
    recorded = manifest.plan.autoencoder
    if not recorded["config"]:
        return Codec.pixels(manifest.plan.shape[0])
    fix = f"Name that autoencoder's run folder, checkpoint or folder {where}."
    if not (path := given or recorded.get("path")) and "target" not in recorded["config"]:
        raise CheckpointError(f"{file}: does not say where the autoencoder of its latents is. {fix}")
    try:
        codec = Codec.of(recorded["config"], path or "", trust)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{file} needs the autoencoder that made its latents. {fix}") from error
    found = codec.describe()
    if found["weights"] == recorded["weights"]:
        return codec
    if same_encoder(found, with_encoder(recorded, trust)):
        log.warning("%s: decodes the latents of %s, and is another decoder of the same encoder", path, file)
        return codec
    raise CheckpointError(
        f"{codec.path}: not the autoencoder that made the latents of {file}: weights {found['weights'][:16]}..., "
        f"expected {recorded['weights'][:16]}.... {fix}"
    )
