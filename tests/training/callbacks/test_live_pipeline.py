"""The model in training samples as a checkpoint of it would."""

from types import SimpleNamespace
from typing import Any

from ldm.data.masks import Masks
from ldm.latents.datamodule import LatentDataModule
from ldm.latents.dense import Dense
from ldm.latents.masked import MaskedLatents
from ldm.randomness import STANDARD
from ldm.sampling.pipeline import Pipeline
from ldm.training.callbacks import frechet, live_pipeline, previews
from ldm.training.callbacks.live_pipeline import LivePipeline


class Black(LatentDataModule):
    """Of an open data module of inpainting what is asked of it; its holes are black."""

    manifest: Any = None

    def __init__(self, manifest: Any) -> None:
        self.manifest = manifest
        self.randomness = STANDARD
        self.train_dataset: Any = SimpleNamespace()
        self.dense = Dense({}, {}, MaskedLatents(Masks(), variants=2, fill=-1.0))


def test_what_the_data_says_of_conditions_is_known(runs):
    """`val/fd` once filled holes with gray, where training and `ldm evaluate` filled them with what was configured."""
    manifest = Pipeline.load(runs.diffusion).manifest
    trainer: Any = SimpleNamespace(datamodule=Black(manifest))
    pipeline = LivePipeline(None, (), "a test", "Test").of(trainer, runs.module)
    assert pipeline.dense.fill == -1
    assert pipeline.denoiser is runs.module.ema.average
    assert frechet.LivePipeline is previews.LivePipeline is live_pipeline.LivePipeline


def test_the_autoencoder_is_loaded_once(runs, monkeypatch):
    loaded = []
    load = live_pipeline.load_codec
    monkeypatch.setattr(live_pipeline, "load_codec", lambda *given: loaded.append(given) or load(*given))
    live = LivePipeline(None, (), "a test", "Test")
    data = SimpleNamespace(manifest=Pipeline.load(runs.diffusion).manifest, randomness=STANDARD)
    trainer: Any = SimpleNamespace(datamodule=data)
    first = live.of(trainer, runs.module)
    live.leave_device()
    assert live.of(trainer, runs.module).codec is first.codec
    assert [given[2] for given in loaded] == ["a test"]
