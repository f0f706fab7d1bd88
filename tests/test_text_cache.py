"""A trained text encoder whose tokens the cache keeps: from a folder with captions to a run that is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.checkpoints import store
from ldm.cli import cache, sample
from ldm.config.load import to_yaml
from ldm.diffusion.conditioners.text_models import TextModel
from ldm.latents.claims import read_sealed, seal
from ldm.run_folder import RunFolder
from tests.conftest import node
from tests.tiny_text import LONGEST, WIDTH, forget, save_text_encoder

pytest.importorskip("transformers")

FEATURES = "data.params.features"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


@pytest.fixture
def tree(diffusion_tree, runs, here):
    """12 pictures with captions of different lengths, tokens and vector of which condition a UNet."""
    for number in range(12):
        path = here / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * number, 99, 0)).save(path)
        path.with_suffix(".txt").write_text("a photo of a red cat on a boat"[: 4 + 2 * number])
    encoder = save_text_encoder(here / "text")
    feature = node(
        "ldm.diffusion.conditioners.text.TextEncoder", encoder=str(encoder), channels=WIDTH, max_length=LONGEST
    )
    model, data = diffusion_tree["model"]["params"], diffusion_tree["data"]["params"]
    model["network"]["params"] |= {"vector_channels": None, "context_dim": WIDTH}
    model["conditioner"] = node("ldm.diffusion.conditioners.text.FeatureText", feature=f"${{{FEATURES}.text}}")
    data |= {"autoencoder": str(runs.autoencoder), "resolution": 16, "num_validation": 2, "features": {"text": feature}}
    data["train"] = node("ldm.data.sources.folder.ImageFolder", root=str(here / "pictures"))
    diffusion_tree["lightning"]["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    return diffusion_tree


def train(tree, *words: str) -> int:
    Path("config.yaml").write_text(to_yaml(tree))
    return main.main(["--base", "config.yaml", *words])


def run(name: str = "tiny_diffusion") -> Path:
    (folder,) = Path("logs").glob(f"*_{name}")
    return folder


def weights(name: str = "tiny_diffusion") -> dict[str, torch.Tensor]:
    return store.load(store.verify(run(name)))["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    shared = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in shared)


def uncached(tree):
    """The same without a cache of the text."""
    feature = tree["data"]["params"].pop("features")["text"]
    tree["model"]["params"]["conditioner"]["params"]["feature"] = feature
    return tree


def test_the_command_builds_verifies_and_tells_sizes(tree, capsys):
    Path("config.yaml").write_text(to_yaml(tree))
    assert cache.main(["--base", "config.yaml", "data.params.cache=here"]) == 0
    said = capsys.readouterr().out
    assert "here/train: 10 items of (4, 4, 4), 0 broken, 0.0 MB" in said
    assert "here/train-captions: captions of 10 captions, 10 items, 0 broken, 0.0 MB" in said
    assert "here/validation-text: text of 2 captions, 2 items, 0 broken, 0.0 MB" in said
    folders = sorted(map(str, Path("here").iterdir()))
    assert len(folders) == 6
    assert cache.main(["--verify", *folders]) == 0
    assert "here/train-text: sound, 10 items" in capsys.readouterr().out
    shard = Path("here/train-text/shard-00000.bin")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert cache.main(["--verify", *folders]) == 3
    assert "error: here/train-text/shard-00000.bin: damaged: crc32: expected" in capsys.readouterr().err


def test_a_dry_run_makes_nothing(tree, capsys):
    assert train(tree, "--dry-run") == 0
    assert "text.tokens_mask" in capsys.readouterr().out
    assert not Path("cache").exists()


def test_what_the_cache_keeps_is_what_the_conditioner_would_make(tree, capsys):
    own = {**tree["data"]["params"]["features"]["text"]}
    own["params"] = {**own["params"], "layer": -2}
    tree["model"]["params"]["conditioner"]["params"]["feature"] = own
    assert train(tree, "--dry-run") == 2
    assert "of which layer is -2, and here -1; write feature: ${data.params.features.text}" in capsys.readouterr().err
    tree["model"]["params"]["conditioner"]["params"] |= {"feature": f"${{{FEATURES}.text}}", "name": "texts"}
    assert train(tree, "--dry-run") == 2
    assert "name: texts: the cache keeps this feature as text; write name: text" in capsys.readouterr().err


def test_a_second_start_does_not_load_the_encoder(tree, monkeypatch):
    monkeypatch.setattr("ldm.weights.remembered._SETTLED", -(10**12))  # files of this moment are old enough
    Path("config.yaml").write_text(to_yaml(tree))
    assert cache.main(["--base", "config.yaml"]) == 0
    forget()
    monkeypatch.setattr(TextModel, "network", property(lambda self: pytest.fail("loaded")))
    assert cache.main(["--base", "config.yaml"]) == 0


def test_dropped_captions_need_no_encoder_while_training(tree, monkeypatch, caplog):
    """Nor in a run that is resumed: the cache keeps the empty text as well."""
    monkeypatch.setattr("ldm.weights.remembered._SETTLED", -(10**12))
    tree["model"]["params"]["label_dropout"] = 0.9
    tree["lightning"]["callbacks"] = {"images": None}
    Path("config.yaml").write_text(to_yaml(tree))
    assert cache.main(["--base", "config.yaml", "data.params.cache=here"]) == 0
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(TextModel, "network", property(lambda self: pytest.fail("loaded")))
        assert train(tree, "data.params.cache=here", "lightning.trainer.max_steps=2") == 0
    kept = weights()

    # Caches of former versions go on, with a notice that says how to keep it.
    for folder in ("here/train-text", "here/validation-text"):
        manifest = Path(folder, "manifest.json")
        found = read_sealed(manifest)
        del found["null"]
        manifest.write_bytes(seal(found))
    forget()
    shutil.rmtree("logs")
    assert train(tree, "data.params.cache=here", "lightning.trainer.max_steps=2") == 0
    assert "here/train-text: was made before caches kept what an encoder makes of ''" in caplog.text
    assert equal(kept, weights())
    manifest.unlink()
    forget()
    assert cache.main(["--base", "config.yaml", "data.params.cache=here"]) == 0
    assert read_sealed(manifest)["null"]["tokens"]["length"] == 2


@pytest.mark.slow
def test_a_run_with_cached_text_is_one_without_and_its_parts_too(tree, here, monkeypatch):
    assert train(tree, "-n", "cached") == 0
    assert train(tree, "-n", "parts", "lightning.trainer.max_steps=2") == 0
    assert main.main(["-r", str(run("parts")), "lightning.trainer.max_steps=4"]) == 0
    forget()
    assert train(uncached(tree), "-n", "uncached") == 0
    assert equal(weights("cached"), weights("uncached"))
    assert equal(weights("cached"), weights("parts"))
    Path("wanted.json").write_text(json.dumps([{"caption": "a red cat"}]))
    made = []
    for name in ("cached", "uncached"):
        assert sample.main(["-r", str(run(name)), "-n", "1", "--steps", "2", "--conditions", "wanted.json"]) == 0
        (file,) = run(name).glob("samples/*/*-000000.png")
        made.append(Image.open(file).tobytes())
    assert made[0] == made[1]


def test_another_encoder_or_truncation_is_refused_by_key(tree, here, capsys):
    assert train(tree, "lightning.trainer.max_steps=2") == 0
    assert json.loads(RunFolder(run()).facts_file.read_text())["features"]["text"]["max_length"] == LONGEST
    facts = store.record(store.verify(run()).path)["data"]
    assert facts["features"]["text"].keys() >= {"weights", "tokenizer", "max_length"}
    more = ["-r", str(run()), "lightning.trainer.max_steps=4"]
    capsys.readouterr()
    assert main.main([*more, f"{FEATURES}.text.params.max_length=8"]) == 2
    assert f"{FEATURES}.text.params.max_length: the run has {LONGEST}, requested is 8" in capsys.readouterr().err
    shutil.rmtree("text")
    forget()
    save_text_encoder(here / "text", seed=1)
    assert main.main(more) == 2
    assert "data (features.text.weights): the run has " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ranks_share_the_parts_and_train_as_one(tree, forked, world):
    """The bytes of the parts, and the loss up to the order of sums."""
    tree["model"]["params"]["network"]["params"]["dropout"] = 0.0  # whose draws are a rank's own
    assert train(tree, "-n", "alone", "data.params.cache=alone") == 0
    Path("config.yaml").write_text(to_yaml(tree))
    strategy = "lightning.strategy={target: ldm.training.strategies.DDP, params: {timeout: 60}}"
    words = ["-n", "both", "data.params.cache=both", f"lightning.trainer.devices={world}"]
    words += [strategy] if world > 1 else []
    assert forked(world, lambda rank: main.main(["--base", "config.yaml", *words])) == [0] * world
    files = [path.relative_to("alone") for path in Path("alone").rglob("*") if path.is_file() and path.name != "claims"]
    assert len(files) == 6 * 4
    assert all((Path("alone") / file).read_bytes() == (Path("both") / file).read_bytes() for file in files)
    one, two = weights("alone"), weights("both")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
