import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.diffusion.conditioners.base import Conditioning, latent_size
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.diffusion.conditioners.given import Field, Given
from ldm.diffusion.conditioners.joint import Joint
from ldm.errors import CheckpointError, ConfigError, NumericError
from ldm.latents.manifest import Manifest
from ldm.randomness import Draws
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.img2img import InitImage
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.samplers import ancestral, ddim

SEEDS, LABELS = [3, 1, 4, 1, 5, 9, 2, 6], [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def pipeline(runs):
    return Pipeline.load(runs.diffusion)


def of_classes(labels):
    return [{"class_label": label} for label in labels]


def pictures(pipeline, seeds=SEEDS, labels=LABELS, **options):
    """(N,H,W,C) int16, so that differences do not wrap around."""
    conditions = None if labels is None else of_classes(labels)
    samples = list(generate(pipeline, seeds, conditions, **{"steps": 4, "guidance": Guidance(3.0), **options}))
    assert [sample.seed for sample in samples] == list(seeds)
    assert [sample.condition for sample in samples] == (conditions or [None] * len(seeds))
    return np.stack([sample.image for sample in samples]).astype(np.int16)


@pytest.mark.parametrize("sampler", [ddim, ancestral, partial(ddim, eta=0.5)], ids=["ddim", "ancestral", "eta"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_depends_on_its_seed_and_class_alone(pipeline, sampler, batch_size):
    """On batch sizes 1, 3 and 8, and with other neighbours. A batch of another size may use another matrix kernel,
    whose sums round differently: that moves a pixel by one level at most."""
    together = pictures(pipeline, sampler=sampler, batch_size=8)
    assert np.abs(pictures(pipeline, sampler=sampler, batch_size=batch_size) - together).max() <= 1
    reversed_order = pictures(pipeline, SEEDS[::-1], LABELS[::-1], sampler=sampler, batch_size=batch_size)
    assert np.abs(reversed_order[::-1] - together).max() <= 1


def test_seed_class_guidance_and_sampler_all_matter(pipeline):
    images = pictures(pipeline, [0, 1, 0, 0], [0, 0, 1, 0])
    assert images.min() < images.max()
    assert np.array_equal(images[0], images[3])
    for other in (images[1], images[2]):
        assert np.abs(images[0] - other).max() > 8
    for options in ({"guidance": Guidance()}, {"steps": 5}, {"sampler": ancestral}):
        assert np.abs(pictures(pipeline, [0], [0], **options)[0] - images[0]).max() > 1


def test_images_are_the_decoded_samples(pipeline):
    """Against the sampler called by hand on the noise of one seed: standardization undone, [-1,1] mapped to 0..255."""
    noise = Draws(0, [5], 1).normal("noise", (4, 4, 4))
    network, conditioner = pipeline.denoiser["network"], pipeline.denoiser["conditioner"]
    with torch.no_grad():
        told = conditioner({"class_label": torch.tensor([1])})
        times = pipeline.objective.timesteps(4)
        latent = ddim(lambda x, t: pipeline.objective.denoise(network, x, t, told), pipeline.objective, noise, times)
        image = pipeline.codec.decode(latent * 2.0 + 0.5)[0]
    expected = ((image.permute(1, 2, 0) + 1) / 2 * 255).numpy()
    found = pictures(pipeline, [5], [1], guidance=Guidance())[0]
    assert np.abs(found - expected).max() <= 0.51


def test_averaged_and_raw_weights_are_those_of_the_module(runs, pipeline):
    raw = Pipeline.load(runs.diffusion, ema=False)
    manifest, codec = pipeline.manifest, pipeline.codec
    averaged = pictures(pipeline)
    assert np.abs(pictures(raw) - averaged).max() > 8
    assert np.array_equal(pictures(Pipeline.from_module(runs.module, codec, manifest)), averaged)
    assert np.array_equal(pictures(Pipeline.from_module(runs.module, codec, manifest, ema=False)), pictures(raw))


def test_a_preview_in_training_is_free_of_dropout_and_leaves_the_module_as_it_was(runs, pipeline):
    live = Pipeline.from_module(runs.module, pipeline.codec, pipeline.manifest, ema=False)
    runs.module.train()
    state = torch.get_rng_state()
    first = pictures(live)
    assert np.array_equal(pictures(live), first)
    assert runs.module.denoiser["network"].training
    assert torch.equal(torch.get_rng_state(), state)
    # And training goes on: nothing that the preview cached is closed to autograd.
    x0 = live.manifest.unstandardize(torch.randn(2, 4, 4, 4, requires_grad=True))
    x = live.objective.denoise(runs.module.denoiser["network"], x0, torch.tensor(9.0), live.conditioner.null(2))
    x.sum().backward()


def test_no_labels_is_the_null_class_and_cannot_be_guided(pipeline):
    alone = pictures(pipeline, [0, 1], None, guidance=Guidance())
    assert not np.array_equal(alone, pictures(pipeline, [0, 1], [0, 1], guidance=Guidance()))
    with pytest.raises(ConfigError, match="guidance scale: found 5, but no conditions are requested"):
        pictures(pipeline, [0, 1], None, guidance=Guidance(5.0))


@pytest.mark.parametrize("classes", [None, ["a", "b"]], ids=["unconditional", "classes"])
def test_grey_images(make_runs, classes):
    pipeline = Pipeline.load(make_runs(channels=1, classes=classes).diffusion)
    labels = None if classes is None else [0, 1]
    assert pictures(pipeline, [0, 1], labels, guidance=Guidance()).shape == (2, 16, 16, 1)


def test_an_unconditional_model_refuses_classes(make_runs):
    pipeline = Pipeline.load(make_runs(classes=None).diffusion)
    assert pipeline.num_classes is None
    with pytest.raises(ConfigError, match="trained without conditions: request none"):
        pictures(pipeline, [0], [0], guidance=Guidance())
    with pytest.raises(ConfigError, match="found 3, but this model was trained without conditions"):
        pictures(pipeline, [0], None)


def test_unknown_classes_and_step_counts_are_refused(pipeline):
    with pytest.raises(ConfigError, match="class 3: expected 0 to 2"):
        pictures(pipeline, [0, 1], [0, 3])
    with pytest.raises(ConfigError, match="1 to 1000"):
        pictures(pipeline, steps=1001)
    with pytest.raises(ValueError, match="a condition for each"):
        pictures(pipeline, [0, 1], [0])


def test_none_are_made_if_none_are_asked_for(pipeline):
    assert list(generate(pipeline, [], [])) == list(generate(pipeline, [])) == []


def test_samples_that_are_not_finite_are_an_error(runs):
    pipeline = Pipeline.load(runs.diffusion)
    next(pipeline.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(NumericError, match="seeds"):
        pictures(pipeline)


def test_origin_and_classes_come_from_the_checkpoint(runs, pipeline):
    file = str(runs.diffusion / "checkpoints" / "step=7.ckpt")
    assert pipeline.origin == {"checkpoint": file, "step": 7, "weights": "ema"}
    assert pipeline.num_classes == 3
    assert Pipeline.load(file, ema=False).origin["weights"] == "raw"


def test_another_autoencoder_is_refused_and_the_right_one_accepted_anywhere(runs, other_autoencoder, tmp_path):
    with pytest.raises(CheckpointError, match="not the autoencoder that made the latents") as refused:
        Pipeline.load(runs.diffusion, autoencoder=other_autoencoder)
    for part in (str(other_autoencoder), str(runs.diffusion), Codec.load(runs.autoencoder).weight_hash()[:16]):
        assert part in str(refused.value)
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(store.verify(runs.autoencoder).path.read_bytes())
    Pipeline.load(runs.diffusion, autoencoder=moved)


def test_a_missing_autoencoder_says_how_to_name_it(runs, tmp_path):
    state = store.load(store.verify(runs.diffusion).path)
    for path, message in (("/nowhere", "/nowhere"), (None, "does not say where")):
        manifest = Manifest.from_dict(state["ldm"]["latents"])
        manifest.plan.autoencoder["path"] = path
        state["ldm"]["latents"] = manifest.to_dict()
        file = tmp_path / "lost.ckpt"
        store.save(file, state)
        with pytest.raises(CheckpointError, match=message) as refused:
            Pipeline.load(file)
        assert "--autoencoder PATH" in str(refused.value)


def test_checkpoints_of_other_kinds_are_refused(runs, tmp_path):
    with pytest.raises(CheckpointError, match=r"stage 2.*'autoencoder'"):
        Pipeline.load(runs.autoencoder)
    store.save(tmp_path / "foreign.ckpt", {"state_dict": {}})
    with pytest.raises(CheckpointError, match="not saved by ldm"):
        Pipeline.load(tmp_path / "foreign.ckpt")
    state = store.load(store.verify(runs.diffusion).path)
    state["state_dict"].pop("ema.average.network.conv_in.bias")
    store.save(tmp_path / "torn.ckpt", state)
    with pytest.raises(CheckpointError, match=r"network\.conv_in\.bias"):
        Pipeline.load(tmp_path / "torn.ckpt")


NOT_OF_SAMPLING = {
    *("pytorch_lightning", "torchmetrics", "scipy", "matplotlib", "wandb"),
    *("torchvision", "torch._dynamo"),  # torch's compiler, which torchvision loads
}


def test_sampling_imports_neither_the_training_machinery_nor_torchs_compiler(runs, tmp_path):
    words = ["-r", str(runs.diffusion), "-n", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    code = (
        "import sys; from ldm.cli import sample\n"
        f"assert sample.main({words!r}) == 0\n"
        f"print('imported:', sorted({NOT_OF_SAMPLING!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["imported: []"], done.stdout + done.stderr


def test_a_negative_condition_takes_the_place_of_the_null(pipeline):
    guided = partial(pictures, pipeline, seeds=[1], labels=[0])
    against = guided(guidance=Guidance(3.0, negative={"class_label": 1}))
    assert not np.array_equal(against, guided(guidance=Guidance(3.0)))
    # Away from itself is nowhere: the conditional sample, at any scale.
    assert (
        np.abs(
            guided(guidance=Guidance(3.0, negative={"class_label": 0})).astype(int) - guided(guidance=Guidance())
        ).max()
        <= 1
    )
    untaught = replace(pipeline, label_dropout=0.0)
    assert np.array_equal(pictures(untaught, [1], [0], guidance=Guidance(3.0, negative={"class_label": 1})), against)
    with pytest.raises(ConfigError, match="guidance negative: caption: the model reads class_label alone"):
        guided(guidance=Guidance(3.0, negative={"caption": "a dog"}))
    with pytest.raises(ConfigError, match="class 9: expected"):
        guided(guidance=Guidance(3.0, negative={"class_label": 9}))
    with pytest.raises(ConfigError, match="only for classifier-free guidance; name a scale"):
        Guidance(1.0, negative={"class_label": 1})
    with pytest.raises(ConfigError, match="only for classifier-free guidance; leave out it or guide"):
        Guidance(2.0, negative={"class_label": 1}, guide=pipeline)


def test_a_condition_of_any_size_leaves_the_size_of_samples_free(pipeline, monkeypatch):
    conditioner, seen = Given(spatial=Field("picture", [3, None, None])), []
    drawn = replace(pipeline, denoiser=torch.nn.ModuleDict({**pipeline.denoiser, "conditioner": conditioner}))
    monkeypatch.setattr(type(drawn.objective), "denoise", lambda *inputs: seen.append(inputs[-1].spatial.shape))
    drawn.latent_shape((16, 32))
    assert seen == [(1, 3, *drawn.codec.latent_shape((16, 32))[1:])]


def test_any_size_that_divides(pipeline):
    (made,) = pipeline.generate([1], of_classes([0]), steps=2, size=(16, 32))
    assert made.size == (32, 16)
    (usual,) = pipeline.generate([1], of_classes([0]), steps=2)
    (named,) = pipeline.generate([1], of_classes([0]), steps=2, size=usual.size[::-1])
    assert [*named.getdata()] == [*usual.getdata()]
    with pytest.raises(ConfigError, match="size 18: "):
        pipeline.generate([1], of_classes([0]), steps=2, size=(18, 18))
    in_buckets = replace(pipeline, manifest=replace(pipeline.manifest, sizes=[[8, 16], [16, 16]]))
    with pytest.raises(ConfigError, match=r"size 18: .* It was trained on 8 x 16, 16\."):
        in_buckets.generate([1], of_classes([0]), steps=2, size=(18, 18))
    kept = InitImage(torch.zeros(3, 16, 16), 0.5)
    with pytest.raises(ConfigError, match="image to start from: expected 16 x 32 pixels, found 16 x 16"):
        pipeline.generate([1], of_classes([0]), steps=2, size=(16, 32), init_image=kept)


class Shaped(torch.nn.Module):
    """The picture, and how dark it is, on a latent of any size."""

    keys = ("picture",)

    def forward(self, batch):
        sides = batch["picture"].new_zeros(len(batch["picture"]), 2, *latent_size(batch))
        told = torch.stack([batch["picture"], batch["dark"]], dim=1)
        return Conditioning(spatial=sides + told[:, :, None, None])

    def null(self, n):
        return Conditioning(spatial=torch.zeros(n, 2, 1, 1))

    def defaults(self):
        return {"dark": 0.25}


@pytest.fixture
def inpainting(pipeline, monkeypatch):
    """A model of classes and a number that it keeps, and what its network is conditioned on."""
    conditioner = Joint({"class": ClassVector(3, 8), "picture": Shaped()}, kept=["picture"])
    seen = []

    def denoise(objective, network, x, t, conditioning):
        seen.append(conditioning)
        return x

    monkeypatch.setattr(type(pipeline.objective), "denoise", denoise)
    denoiser = torch.nn.ModuleDict({**pipeline.denoiser, "conditioner": conditioner})
    return replace(pipeline, denoiser=denoiser, label_dropout=0.1), seen


def test_guidance_leads_away_from_the_same_picture_without_its_class(inpainting):
    pipeline, seen = inpainting
    asked = [{"class_label": 1, "picture": 0.5}, {"class_label": 2, "picture": 0.7, "dark": 0.75}]
    list(generate(pipeline, [0, 1], [{"dark": 0.25, **asked[0]}, asked[1]], steps=1, guidance=Guidance(3.0)))
    rows = seen[0]
    table = pipeline.conditioner.conditioners["class"]
    assert torch.equal(
        rows.vector, torch.cat([table({"class_label": torch.tensor([1, 2])}).vector, table.null_rows(2)])
    )
    assert rows.spatial.shape == (4, 2, *pipeline.manifest.plan.shape[1:])
    assert rows.spatial[:, :, 0, 0].tolist() == [[0.5, 0.25], [pytest.approx(0.7), 0.75]] * 2
    pipeline.generate([0], [asked[0]], steps=1, size=(16, 32))
    wide = seen[-1].spatial
    assert wide.shape[2:] == pipeline.latent_shape((16, 32))[1:]
    assert wide[0, :, 0, 0].tolist() == [0.5, 0.25], "what the condition does not say is the default"


def test_a_model_that_keeps_a_condition_is_always_asked_for_it(inpainting):
    pipeline, _ = inpainting
    assert pipeline.knows_null
    with pytest.raises(ConfigError, match="never trained without picture; request some"):
        pipeline.generate([0], None, steps=1)
    with pytest.raises(ConfigError, match="expected the keys that the model reads, class_label, picture, dark"):
        pipeline.generate([0], [{"class_label": 1}], steps=1)
    never = replace(pipeline, label_dropout=0.0)
    assert not never.knows_null
    alone = Joint({"picture": Shaped()}, kept=["picture"])
    alone = replace(pipeline, denoiser=torch.nn.ModuleDict({**pipeline.denoiser, "conditioner": alone}))
    assert not alone.knows_null, "there is nothing to drop"
    with pytest.raises(ConfigError, match="guidance scale: found 2, but this model was never trained without its"):
        alone.generate([0], [{"picture": 0.5}], steps=1, guidance=Guidance(2.0))
