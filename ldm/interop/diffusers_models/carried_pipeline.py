# Copyright (c) 2026 The ldm authors. MIT License, https://opensource.org/license/mit
"""Pictures of a diffusion model that was trained with ldm, the same as `ldm sample` makes of the same noise.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipe(batch_size=4).images                              # a model without conditions
    pipe(class_labels=[3, 7], guidance_scale=2.0).images   # of classes
    pipe(prompt=["a red boat"], guidance_scale=5.0).images # of texts

`ldm export --to diffusers` puts this file into folders of models that no pipeline of the library samples exactly:
because of their conditions, their latents' scale, their time, or a DiT, whose timesteps the library embeds with other
frequencies. It needs diffusers (and transformers, for texts), not ldm.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class LatentDiffusionPipeline(DiffusionPipeline):
    """A denoiser with its scheduler, and what it needs of these: a first stage, a text encoder and its tokenizer.

    Args:
        scheduler: DDIMScheduler, EDMEulerScheduler or FlowMatchEulerDiscreteScheduler as exported, or one like it.
        unet, transformer: the denoiser is one of them.
        vae: decodes latents; None: the denoiser makes images.
        latents_mean, latents_std: of the decoder's latents per channel; the denoiser's are (latents - mean) / std.
        timestep_scale: the denoiser is given timestep_scale times the scheduler's timestep.
        num_classes: class number `num_classes` stands for none; None: the model has no classes.
        class_tokens: whether the class is a token that the denoiser attends to, rather than part of its embedding.
        class_names: of the classes, if they are known.
        max_length: tokens of a text.
        patch_size: the decoder's channels hold patches of patch_size x patch_size pixels.
        norm_groups: {part: {channels: groups}} where the norms of a part have several numbers of groups, of which the
            library's classes have one.
    """

    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    _optional_components = ("unet", "transformer", "vae", "text_encoder", "tokenizer")

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        latents_mean: list[float] | tuple[float, ...] = (0.0,),
        latents_std: list[float] | tuple[float, ...] = (1.0,),
        timestep_scale: float = 1.0,
        num_classes: int | None = None,
        class_tokens: bool = False,
        class_names: Sequence[str] | None = None,
        max_length: int | None = None,
        patch_size: int = 1,
        norm_groups: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            unet=unet,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            latents_mean=[*latents_mean],
            latents_std=[*latents_std],
            timestep_scale=timestep_scale,
            num_classes=num_classes,
            class_tokens=class_tokens,
            class_names=class_names,
            max_length=max_length,
            patch_size=patch_size,
            norm_groups=norm_groups,
        )
        for part, groups in (norm_groups or {}).items():
            for norm in getattr(self, part).modules():
                if isinstance(norm, torch.nn.GroupNorm):
                    norm.num_groups = groups[str(norm.num_channels)]
        for block in () if transformer is None else transformer.transformer_blocks:
            # DiT's frequencies are 10000^(-k / 128) for k = 0 .. 127; the library divides by 127.
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One picture for each row.

        Args:
            batch_size: number of pictures; None: of the latents, labels or prompts, or 1.
            class_labels: one for each picture; None: no class.
            prompt: one for each picture, or one for all; None: no text.
            guidance_scale: 1: no guidance; above 1: away from what the model makes without conditions.
            num_inference_steps: calls of the denoiser. DDIMScheduler needs a divisor of its number of levels to step
                from one of its times to the next.
            eta: of DDIMScheduler: 0 is deterministic, 1 is DDPM.
            generator: of the noise.
            latents: (N, C, h, w), the standard normal noise to begin with; None: drawn.
            output_type: "pil"; "np": (N, H, W, C) in [0, 1]; "pt": (N, C, H, W) in [0, 1]; "latent": not decoded.
            return_dict: False: a tuple.
        """
        device = self._execution_device
        denoiser = self.unet if self.transformer is None else self.transformer
        rows = [None if prompt is None or isinstance(prompt, str) else prompt, class_labels, latents]
        number = batch_size or next((len(row) for row in rows if row is not None), 1)
        if any(row is not None and len(row) != number for row in rows):
            raise ValueError(f"prompt, class_labels, latents: expected one for each of {number} pictures")
        if latents is None:
            size = denoiser.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            shape = (number, denoiser.config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=denoiser.dtype)
        x = latents.to(device, denoiser.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        guided = guidance_scale != 1.0
        conditions = self._conditions(number, class_labels, prompt, guided)
        self._set_timesteps(num_inference_steps)
        settings = {"eta": eta, "generator": generator}
        known = inspect.signature(self.scheduler.step).parameters
        settings = {name: value for name, value in settings.items() if name in known}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            both = torch.cat([scaled, scaled]) if guided else scaled
            time = (t * self.config.timestep_scale).to(device).expand(len(both))
            output = denoiser(both, time, **conditions).sample
            if guided:
                conditional, unconditional = output.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(output, t, x, **settings).prev_sample
        images = x if output_type == "latent" else self._decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_timesteps(self, steps: int) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Even steps that end with data; the library's own end at sigma 0.001 and take one more.
            self.scheduler.set_timesteps(
                sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist(), device=self._execution_device
            )
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _conditions(
        self, number: int, class_labels: Sequence[int] | None, prompt: str | Sequence[str] | None, guided: bool
    ) -> dict[str, Tensor]:
        """What the denoiser is given besides noise and time: of the rows and, if they are guided, of no conditions."""
        conditions = {}
        if self.config.num_classes is not None:
            none = [self.config.num_classes] * number
            labels = torch.tensor(
                [*(none if class_labels is None else class_labels), *(none if guided else [])],
                device=self._execution_device,
            )
            if self.config.class_tokens:
                # One-hot rows, which the denoiser's first layer turns into tokens.
                rows = torch.nn.functional.one_hot(labels, self.config.num_classes + 1)[:, None]
                conditions["encoder_hidden_states"] = rows.to(self.unet.dtype)
            else:
                conditions["class_labels"] = labels
        elif class_labels is not None:
            raise ValueError("class_labels: this model was trained without classes")
        if self.text_encoder is not None:
            texts = [prompt or ""] * number if prompt is None or isinstance(prompt, str) else [*prompt]
            conditions["encoder_hidden_states"] = self._encoded(texts + [""] * number if guided else texts)
        elif prompt is not None:
            raise ValueError("prompt: this model was trained without texts")
        return conditions

    def _encoded(self, texts: list[str]) -> Tensor:
        """(N, max_length, D)."""
        words = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.config.max_length, return_tensors="pt"
        ).to(self._execution_device)
        # CLIP's words never see what follows them, so that no padding need be hidden.
        mask = None if self.text_encoder.config.model_type.startswith("clip") else words["attention_mask"]
        return self.text_encoder(input_ids=words["input_ids"], attention_mask=mask).last_hidden_state

    def _decoded(self, x: Tensor, output_type: str) -> Any:
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        x = x * std + mean
        images = x if self.vae is None else self.vae.decode(x.to(self.vae.dtype)).sample
        images = torch.nn.functional.pixel_shuffle(images, self.config.patch_size)
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.float().permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
