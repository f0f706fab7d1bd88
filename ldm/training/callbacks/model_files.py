"""Files that a model reads, such as a tokenizer: a run folder keeps what its model was trained with."""

import pytorch_lightning as pl

from ldm.diffusion.conditioners.base import Filed
from ldm.diffusion.module import LatentDiffusion
from ldm.files import published
from ldm.run_folder import RunFolder


def readers(model: object) -> dict[str, Filed]:
    """The parts of a model's conditioner that read files, by their names in it."""
    if not isinstance(model, LatentDiffusion):
        return {}
    return {name: part for name, part in model.denoiser["conditioner"].named_modules() if isinstance(part, Filed)}


def model_files(model: object) -> dict[str, bytes]:
    """{name in the run folder: content}: of a part of the conditioner with the part's name before it.

    Raises:
        ConfigError: one is missing.
    """
    found = {place: part.files() for place, part in readers(model).items()}
    return {f"{place}.{name}".lstrip("."): one for place, files in found.items() for name, one in files.items()}


class ModelFiles(pl.Callback):
    """Writes them, once the weights are there, which may bring files with them.

    Args:
        folder: the run folder, of rank 0.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for name, content in model_files(pl_module).items():
            if not (file := self._folder.path / name).exists():
                with published(file) as aside:
                    aside.write_bytes(content)
