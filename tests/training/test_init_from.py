"""A new run starts from weights that exist, in the parts that are asked for, and goes on as any other run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from ldm.autoencoder.codec import AutoencoderCodec, Codec
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.cli import sample
from ldm.config.load import to_yaml
from ldm.diffusion.module import LatentDiffusion
from ldm.latents import writing
from ldm.latents.manifest import Manifest
from ldm.sampling.pipeline import Pipeline
from tests.training.test_resume import as_killed_after, assert_same, final, metrics, only, saves

SHORT = ["lightning.trainer.max_steps=1", "lightning.trainer.val_check_interval=1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Filled in by the first test that needs it: a run of each stage."""
    return {"place": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def sources(trained, autoencoder_tree, diffusion_tree, tried_once) -> dict[str, Path]:
    """A run folder of each stage, of four steps."""
    place = trained["place"]
    few = ["lightning.trainer.max_steps=4", "--logdir", str(place / "logs")]
    if "autoencoder" not in trained:
        assert run(autoencoder_tree, *few) == 0
        trained["autoencoder"] = only(place / "logs")
        diffusion_tree["data"]["params"] |= {"autoencoder": str(trained["autoencoder"]), "cache": str(place / "cache")}
        assert run(diffusion_tree, *few) == 0
        (trained["diffusion"],) = set((place / "logs").iterdir()) - {trained["autoencoder"]}
    diffusion_tree["data"]["params"] |= {"autoencoder": str(trained["autoencoder"]), "cache": str(place / "cache")}
    return trained


def run(tree: dict[str, Any], *words: str, name: str = "run.yaml") -> int:
    Path(name).write_text(to_yaml(tree))
    return main.main(["--base", name, *words])


@pytest.fixture
def started(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The state dict of each run from here on, as it is when training begins."""
    seen: list[dict[str, torch.Tensor]] = []
    for module in (AutoencoderKL, LatentDiffusion):

        def note(self: Any) -> None:
            seen.append({key: value.clone() for key, value in self.state_dict().items() if torch.is_tensor(value)})

        monkeypatch.setattr(module, "on_train_start", note)
    return seen


def weights(folder: Path) -> dict[str, Any]:
    return store.load(store.verify(folder))["state_dict"]


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    found = weights(folder)
    return {key.removeprefix("ema.average."): one for key, one in found.items() if key.startswith("ema.average.")}


def other_seed(tree: dict[str, Any], source: Any) -> dict[str, Any]:
    return {**tree, "seed": 5, "init_from": source if isinstance(source, dict) else str(source)}


# ---- whole runs


def test_an_autoencoder_starts_from_another_and_says_so(sources, autoencoder_tree, started, capsys):
    assert run(other_seed(autoencoder_tree, sources["autoencoder"]), *SHORT) == 0
    then = weights(sources["autoencoder"])
    assert all(torch.equal(started[0][key], value) for key, value in then.items())
    out = capsys.readouterr().out
    assert f"init_from {sources['autoencoder']}/checkpoints/step=00000004.ckpt (step 4), tensors:" in out
    assert not any(word in out for word in ("resized (", "left out", "note:"))
    new = only(Path("logs"))
    facts = store.record(store.verify(new).path)["init_from"]
    assert facts == json.loads((new / "init_from.json").read_text())
    assert (facts["step"], Path(facts["checkpoint"]).name, len(facts["weights"])) == (4, "step=00000004.ckpt", 64)
    kept = {part: count["kept"] for part, count in facts["tensors"].items()}
    assert sum(kept.values()) == len(then)
    assert kept.keys() == {"encoder", "decoder", "loss"}


def test_a_diffusion_model_and_its_average_start_from_the_averaged_weights(sources, diffusion_tree, started):
    assert run(other_seed(diffusion_tree, sources["diffusion"]), *SHORT) == 0
    for name, value in averaged(sources["diffusion"]).items():
        for place in ("denoiser", "ema.average"):
            assert torch.equal(started[0][f"{place}.{name}"], value), name
    state = store.load(store.verify(only(Path("logs"))))
    assert state["state_dict"]["ema._extra_state"] == {"images_seen": 6}


def test_or_from_those_of_the_last_step(sources, diffusion_tree, started):
    section = {"run": str(sources["diffusion"]), "average": False}
    assert run(other_seed(diffusion_tree, section), *SHORT) == 0
    then = weights(sources["diffusion"])
    names = [key.removeprefix("denoiser.") for key in then if key.startswith("denoiser.")]
    for name in names:
        assert torch.equal(started[0][f"denoiser.{name}"], then[f"denoiser.{name}"])
        assert torch.equal(started[0][f"ema.average.{name}"], then[f"denoiser.{name}"])


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_it_is_repeatable_and_resumes_bit_exactly(stage, sources, autoencoder_tree, diffusion_tree, here):
    tree = saves(autoencoder_tree if stage == "autoencoder" else diffusion_tree, every=5)
    tree["init_from"] = f"${{newest:{sources['place']}/logs/*_tiny_{stage}}}"
    assert run(tree, "--logdir", "first") == 0
    assert run(tree, "--logdir", "second") == 0
    first, second = only(Path("first")), only(Path("second"))
    assert_same(final(first), final(second))
    killed = as_killed_after(first, 5, here / "killed")
    assert main.main(["--base", "run.yaml", "--logdir", "killed", "-r", "auto"]) == 0
    assert_same(final(killed), final(first))
    assert metrics(killed, after=5) == metrics(first, after=5)
    assert final(killed)["ldm"]["init_from"]["step"] == 4


def test_killed_before_its_first_save_it_starts_from_the_same_weights(sources, autoencoder_tree, started):
    tree = other_seed(autoencoder_tree, sources["autoencoder"])
    assert run(tree, *SHORT) == 0
    folder = only(Path("logs"))
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    (folder / "run_state.json").unlink()
    assert main.main(["-r", str(folder)]) == 0
    assert_same(started[1], started[0])


def test_a_resumed_run_keeps_it_as_a_record_and_refuses_another(sources, autoencoder_tree, capsys, here):
    source = here / "source"
    shutil.copytree(sources["autoencoder"], source)
    assert run(other_seed(autoencoder_tree, source), *SHORT) == 0
    shutil.rmtree(source)  # which nobody needs any more
    folder = only(Path("logs"))
    assert main.main(["-r", str(folder), "lightning.trainer.max_steps=2"]) == 0
    assert store.record(store.verify(folder).path)["init_from"]["step"] == 4
    capsys.readouterr()
    assert main.main(["-r", str(folder), "lightning.trainer.max_steps=3", "init_from=logs/other"]) == 2
    assert "init_from: the run has" in capsys.readouterr().err


def test_a_dry_run_compares_and_writes_nothing(sources, autoencoder_tree, capsys):
    autoencoder_tree["init_from"] = str(sources["autoencoder"])
    assert run(autoencoder_tree, "--dry-run") == 0
    assert "init_from" in capsys.readouterr().out
    assert not Path("logs").exists()


STRATEGY = "lightning.strategy={{target: ldm.training.strategies.{}, params: {{timeout: 60{}}}}}"


@pytest.mark.parametrize("more", [("DDP", ""), ("FSDP2", ""), ("FSDP2", ", sharded_checkpoints: true")])
def test_on_two_ranks(more, sources, diffusion_tree, forked):
    """Also from what those ranks have saved, in shards or not. A rate of next to nothing leaves the weights alone."""
    diffusion_tree["model"]["params"]["optimizer"]["params"]["lr"] = 1e-12
    Path("run.yaml").write_text(to_yaml(diffusion_tree))
    for logdir, source in (("first", sources["diffusion"]), ("second", None)):
        words = ["--base", "run.yaml", "--logdir", logdir, STRATEGY.format(*more), *SHORT]
        words += [f"init_from={source or only(Path('first'))}"]
        assert forked(2, lambda rank, words=tuple(words): main.main(words)) == [0, 0]
        folder = only(Path(logdir))
        found = weights(folder)
        for name, value in averaged(sources["diffusion"]).items():
            for place in ("denoiser", "ema.average"):
                torch.testing.assert_close(found[f"{place}.{name}"], value, rtol=0, atol=1e-7)
        facts = store.record(store.verify(folder).path)["init_from"]
        assert facts == json.loads((folder / "init_from.json").read_text())
        assert facts["tensors"]["network"]["new"] == 0


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "code", "texts"),
    [
        ({"run": "RUN", "prats": ["encoder"]}, 2, ["init_from.prats", "did you mean 'parts'?"]),
        ({"parts": ["encoder"]}, 2, ["init_from.run", "missing"]),
        ({"run": "RUN", "parts": "encoder"}, 2, ["init_from.parts", "expected a list of str or null"]),
        ({"run": "RUN", "resize": ["clases"]}, 2, ["init_from.resize.0", "'classes'"]),
        ({"run": "RUN", "strict": 1}, 2, ["init_from.strict", "true or false"]),
        (["RUN"], 2, ["init_from", "expected a run, or a mapping with 'run', found a list of 1"]),
        ({"run": "RUN", "parts": ["encodr"]}, 2, ["init_from.parts: this model has no 'encodr'", "'encoder'?"]),
        ("logs/none", 4, ["init_from: logs/none: no such file or folder"]),
        ("DIFFUSION", 4, ["expected the checkpoint of an autoencoder (stage 1)"]),
    ],
)
def test_mistakes_are_one_message(section, code, texts, sources, autoencoder_tree, capsys):
    words = {"RUN": str(sources["autoencoder"]), "DIFFUSION": str(sources["diffusion"])}
    text = json.dumps(section)
    for word, path in words.items():
        text = text.replace(f'"{word}"', json.dumps(path))
    autoencoder_tree["init_from"] = json.loads(text)
    assert run(autoencoder_tree) == code
    error = capsys.readouterr().err
    assert all(one in error for one in texts), error
    assert not any(Path("logs").glob("*"))


def test_what_does_not_fit_is_listed_and_nothing_is_made(sources, autoencoder_tree, capsys):
    params = autoencoder_tree["model"]["params"]
    params["encoder"]["params"]["num_res_blocks"] = 2
    params["loss"]["params"].pop("discriminator")
    autoencoder_tree["init_from"] = str(sources["autoencoder"])
    assert run(autoencoder_tree) == 2
    error = capsys.readouterr().err
    assert "not in the file" in error
    assert "in no place of this model" in error
    assert "encoder.levels.*.*.conv1.weight" in error
    assert "parts: [encoder, decoder, loss]" in error
    assert not any(Path("logs").glob("*"))


# ---- parts, and what fits


def test_one_part_alone(sources, autoencoder_tree, started):
    section = {"run": str(sources["autoencoder"]), "parts": ["decoder", "loss.discriminator"]}
    assert run(other_seed(autoencoder_tree, section), *SHORT) == 0
    then = weights(sources["autoencoder"])
    for name, value in then.items():
        taken = name.startswith(("decoder.", "loss.discriminator."))
        assert torch.equal(started[0][name], value) >= taken, name
    changed = [name for name in then if not torch.equal(started[0][name], then[name])]
    assert {name.split(".")[0] for name in changed if name != "loss.logvar"} == {"encoder"}


def test_network_without_conditioner(sources, diffusion_tree, started):
    section = {"run": str(sources["diffusion"]), "parts": ["network"]}
    assert run(other_seed(diffusion_tree, section), *SHORT) == 0
    then = averaged(sources["diffusion"])
    assert torch.equal(started[0]["denoiser.network.conv_in.weight"], then["network.conv_in.weight"])
    assert not torch.equal(started[0]["denoiser.conditioner.table.weight"], then["conditioner.table.weight"])


def test_what_fits(sources, autoencoder_tree, started, capsys):
    autoencoder_tree["model"]["params"]["decoder"]["params"]["num_res_blocks"] = 2
    section = {"run": str(sources["autoencoder"]), "strict": False}
    assert run(other_seed(autoencoder_tree, section), *SHORT) == 0
    then = weights(sources["autoencoder"])
    for name, value in started[0].items():
        if name in then and then[name].shape == value.shape:
            assert torch.equal(value, then[name]), name
    out = capsys.readouterr().out
    assert "new, not in the file" in out
    assert "note: model.params.decoder.params.num_res_blocks: there 1, here 2" in out
    facts = json.loads((only(Path("logs")) / "init_from.json").read_text())
    assert facts["tensors"]["decoder"]["new"] > 0 == facts["tensors"]["encoder"]["new"]


def test_another_objective_is_named(sources, diffusion_tree, capsys):
    diffusion_tree["model"]["params"]["objective"]["params"]["prediction"] = {
        "target": "ldm.diffusion.predictions.X0",
        "params": {},
    }
    assert run(other_seed(diffusion_tree, sources["diffusion"]), "--dry-run") == 0
    assert "note: model.params.objective.params.prediction: there " in capsys.readouterr().out


# ---- a frozen encoder


def test_a_fine_tuned_decoder_needs_no_new_cache_and_samples_decode_with_both(
    sources, autoencoder_tree, diffusion_tree, monkeypatch, capsys, caplog
):
    """Cache built by the first autoencoder, decoder fine-tuned, cache used again, samples decoded by either."""
    autoencoder_tree["model"]["params"]["train_encoder"] = False
    tree = other_seed(autoencoder_tree, sources["autoencoder"]) | {"name": "tuned"}
    assert run(tree, "lightning.trainer.max_steps=6", "--logdir", "tuned") == 0
    tuned = only(Path("tuned"))
    old, new = Codec.load(sources["autoencoder"]), Codec.load(tuned)
    assert old.describe()["encoder"] == new.describe()["encoder"]
    assert old.weight_hash() != new.weight_hash()

    monkeypatch.setattr(writing, "_write_if_free", lambda *_: pytest.fail("nothing is encoded again"))
    diffusion_tree["data"]["params"]["autoencoder"] = str(tuned)
    assert run(diffusion_tree, *SHORT, "--logdir", "second") == 0
    second = only(Path("second"))
    manifest = Manifest.from_dict(store.record(store.verify(second).path)["latents"])
    assert manifest.plan.autoencoder["path"].startswith(str(tuned))

    words = ["-n", "1", "--steps", "2", "--classes", "0"]
    assert sample.main(["-r", str(second), "--out", "own", *words]) == 0
    for name, autoencoder in (("other", sources["autoencoder"]), ("named", tuned)):
        assert sample.main(["-r", str(second), "--out", name, *words, "--autoencoder", str(autoencoder)]) == 0
    assert "another decoder of the same encoder" in caplog.text
    pictures = {name: only_picture(Path(name)) for name in ("own", "other", "named")}
    assert pictures["own"] == pictures["named"] != pictures["other"]
    # The first model takes the new decoder, too, and says which it decodes with.
    pipeline = Pipeline.load(sources["diffusion"], autoencoder=tuned)
    assert pipeline.manifest.plan.autoencoder["weights"] == new.weight_hash()


def test_caches_and_models_from_before_plans_had_the_encoder_s_hash_serve_as_well(
    sources, autoencoder_tree, diffusion_tree, monkeypatch
):
    params = diffusion_tree["data"]["params"] = diffusion_tree["data"]["params"] | {"cache": None}
    with monkeypatch.context() as before:
        before.setattr(AutoencoderCodec, "describe", Codec.describe)
        assert run(diffusion_tree, *SHORT, "--logdir", "first") == 0
    first = only(Path("first"))
    assert "encoder" not in store.record(store.verify(first).path)["latents"]["plan"]["autoencoder"]
    autoencoder_tree["model"]["params"]["train_encoder"] = False
    tree = other_seed(autoencoder_tree, sources["autoencoder"]) | {"name": "tuned"}
    assert run(tree, "lightning.trainer.max_steps=6", "--logdir", "tuned") == 0
    tuned = only(Path("tuned"))

    monkeypatch.setattr(writing, "_write_if_free", lambda *_: pytest.fail("nothing is encoded again"))
    params["autoencoder"] = str(tuned)
    assert run(other_seed(diffusion_tree, first), *SHORT, "--logdir", "second") == 0
    plan = Manifest.from_dict(store.record(store.verify(only(Path("second"))).path)["latents"]).plan
    assert plan.autoencoder == Codec.load(tuned).describe()
    assert Pipeline.load(first, autoencoder=tuned).manifest.plan.autoencoder == plan.autoencoder


def only_picture(folder: Path) -> bytes:
    return next(file for file in sorted(folder.rglob("*.png")) if "grid" not in file.name).read_bytes()


def test_another_encoder_is_refused_as_before(sources, autoencoder_tree, capsys):
    assert run(autoencoder_tree | {"seed": 9}, *SHORT, "--logdir", "another") == 0
    words = ["-r", str(sources["diffusion"]), "-n", "1", "--steps", "2", "--autoencoder", str(only(Path("another")))]
    assert sample.main(words) == 4
    assert "not the autoencoder that made the latents" in capsys.readouterr().err


def test_an_encoder_of_random_weights_is_not_frozen(sources, autoencoder_tree, capsys):
    autoencoder_tree["model"]["params"]["train_encoder"] = False
    assert run(autoencoder_tree) == 2
    assert "model.params.train_encoder: this would freeze an encoder of random weights" in capsys.readouterr().err
    autoencoder_tree["init_from"] = {"run": str(sources["autoencoder"]), "parts": ["decoder"]}
    assert run(autoencoder_tree) == 2
    assert "all of the encoder has to come from here" in capsys.readouterr().err


def test_nor_is_a_codebook(sources, autoencoder_tree, capsys):
    params = autoencoder_tree["model"]["params"]
    params["encoder"]["params"]["moments"] = False
    params["quantizer"] = {"target": "ldm.autoencoder.quantizer.VectorQuantizer", "params": {"size": 8, "channels": 2}}
    first = [*SHORT, "--logdir", "first"]
    assert run(autoencoder_tree, *first) == 0
    params["train_encoder"] = False
    assert run(autoencoder_tree) == 2
    assert "parts: [encoder, quantizer, decoder]" in capsys.readouterr().err
    autoencoder_tree["init_from"] = {"run": str(only(Path("first"))), "parts": ["encoder", "decoder"]}
    assert run(autoencoder_tree) == 2
    assert "all of the quantizer has to come from here" in capsys.readouterr().err
    autoencoder_tree["init_from"]["parts"].append("quantizer")
    assert run(autoencoder_tree, "--dry-run") == 0


# ---- the scale of latents


def other_pictures(image_folder: Path) -> str:
    pictures = Path("others")
    for folder in ("cats", "dogs"):
        shutil.copytree(image_folder / folder, pictures / folder)
    for file in sorted(pictures.rglob("*.png"))[:8]:
        file.unlink()
    return str(pictures)


def test_latents_on_another_scale_are_refused_until_they_are_on_the_old_one(
    sources, diffusion_tree, image_folder, capsys
):
    then = Manifest.from_dict(store.record(store.verify(sources["diffusion"]).path)["latents"])
    data = diffusion_tree["data"]["params"]
    data["train"]["params"]["root"] = other_pictures(image_folder)
    data["cache"] = "others_cache"
    diffusion_tree["init_from"] = str(sources["diffusion"])
    assert run(diffusion_tree) == 2
    error = capsys.readouterr().err
    fix = f"data.params.statistics='{{mean: {then.mean}, std: {then.std}}}'"
    assert "this run's are by the statistics of a cache that is not built yet" in error
    assert fix in error
    assert not Path("others_cache").exists()
    assert run(diffusion_tree, *SHORT, fix.replace("'", "")) == 0
    now = Manifest.from_dict(store.record(store.verify(only(Path("logs"))).path)["latents"])
    assert (now.mean, now.std) == (then.mean, then.std)
    assert Manifest.read(Path("others_cache/train")).std != then.std
    data["statistics"] = {"mean": [0.0, 0.0], "std": [9.0, 9.0]}
    assert run(diffusion_tree) == 2
    error = capsys.readouterr().err
    assert "this run's are by {mean: [0.0, 0.0], std: [9.0, 9.0]}" in error
    assert fix in error


@pytest.mark.parametrize(
    ("statistics", "text"),
    [
        ({"mean": [0.0], "std": [1.0, 1.0]}, "data.params.statistics.mean: expected 2 numbers, one a channel, found 1"),
        ({"mean": [0.0, 0.0], "std": [1.0, 0.0]}, "data.params.statistics.std: expected numbers above 0, found 0"),
        ({"mean": [0.0, 0.0], "sdt": [1.0, 1.0]}, "data.params.statistics.std: missing"),
        ({"mean": [0.0, 0.0], "std": [1, 1], "men": [0]}, "did you mean 'mean'?"),
    ],
)
def test_statistics_that_are_none_are_refused(statistics, text, sources, diffusion_tree, capsys):
    diffusion_tree["data"]["params"]["statistics"] = statistics
    assert run(diffusion_tree) == 2
    assert text in capsys.readouterr().err


# ---- other classes and channels


def three_classes(image_folder: Path) -> str:
    """Cats were there before, in another place; birds and these dogs were not."""
    pictures = Path("three")
    for name, own in (("a_dogs", "dogs"), ("birds", "cats"), ("cats", "cats")):
        shutil.copytree(image_folder / own, pictures / name)
    return str(pictures)


def test_class_tables_keep_the_rows_of_equal_names(sources, diffusion_tree, image_folder, started, capsys):
    then = Manifest.from_dict(store.record(store.verify(sources["diffusion"]).path)["latents"])
    data = diffusion_tree["data"]["params"]
    data["train"]["params"]["root"] = three_classes(image_folder)
    data |= {"cache": "three_cache", "statistics": {"mean": then.mean, "std": then.std}}
    diffusion_tree["init_from"] = str(sources["diffusion"])
    assert run(diffusion_tree) == 2
    assert "conditioner.table.weight: expected [4, 8], found [3, 8]" in capsys.readouterr().err
    diffusion_tree["init_from"] = {"run": str(sources["diffusion"]), "resize": ["classes"]}
    assert run(diffusion_tree, *SHORT) == 0
    assert "resized (1)" in capsys.readouterr().out
    old = averaged(sources["diffusion"])["conditioner.table.weight"]  # cats, dogs, none
    for place in ("denoiser", "ema.average"):
        new = started[0][f"{place}.conditioner.table.weight"]  # a_dogs, birds, cats, none
        assert torch.equal(new[2], old[0])
        assert torch.equal(new[3], old[2])
        assert not any(torch.equal(new[row], one) for row in (0, 1) for one in old)
    facts = json.loads((only(Path("logs")) / "init_from.json").read_text())
    assert facts["tensors"]["conditioner"] == {"kept": 0, "resized": 1, "new": 0}


def test_another_resolution_is_named(sources, autoencoder_tree, capsys):
    autoencoder_tree["data"]["params"]["resolution"] = 8
    autoencoder_tree["init_from"] = str(sources["autoencoder"])
    assert run(autoencoder_tree) == 2
    assert "trained at a resolution of 16, this run's is 8" in capsys.readouterr().err
    autoencoder_tree["init_from"] = {"run": str(sources["autoencoder"]), "resize": ["resolution"]}
    assert run(autoencoder_tree, "--dry-run") == 0
    assert "note: trained at a resolution of 16, this run's is 8" in capsys.readouterr().out


def test_gray_pictures_for_an_autoencoder_of_color(sources, autoencoder_tree, started):
    autoencoder_tree["data"]["params"]["channels"] = 4
    autoencoder_tree["model"]["params"]["loss"]["params"].pop("discriminator")
    section = {"run": str(sources["autoencoder"]), "parts": ["encoder", "decoder"], "resize": ["channels"]}
    assert run(other_seed(autoencoder_tree, section), *SHORT) == 0
    then = weights(sources["autoencoder"])
    entry = started[0]["encoder.conv_in.weight"]
    assert torch.equal(entry[:, :3], then["encoder.conv_in.weight"])
    assert not entry[:, 3].any()
    assert torch.equal(started[0]["decoder.conv_out.weight"][:3], then["decoder.conv_out.weight"])
