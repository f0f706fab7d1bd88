"""`ldm tokenizer`: of the captions that a configuration trains on, before there is a run of stage 1."""

import pytest
import yaml

from ldm.cli import tokenizer
from ldm.data.held_out import hold_out
from ldm.data.sources.folder import ImageFolder
from ldm.diffusion.conditioners.tokenizer import SMALLEST, Tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture
def config(own_images, tmp_path):
    for number, picture in enumerate(sorted(own_images.rglob("*.png"))):
        picture.with_suffix(".txt").write_text(f"photo number {number} of a red cat 🐱")
    train = {"target": "ldm.data.sources.folder.ImageFolder", "params": {"root": "${where}"}}
    data = {"target": "ldm.latents.datamodule.LatentDataModule"}
    data |= {"params": {"train": train, "autoencoder": "${newest:logs/*_none}", "num_validation": 2}}
    file = tmp_path / "captions.yaml"
    file.write_text(yaml.safe_dump({"where": str(own_images), "data": data}))
    return file


def test_it_reads_the_captions_that_are_trained_on(config, own_images, tmp_path, capsys):
    out = tmp_path / "tokenizer.json"
    command = ["--base", str(config), "--vocab", "270", "--out", str(out), "--max-length", "8"]
    assert tokenizer.main(command) == 0
    made = Tokenizer(out.read_bytes(), 77, "here")
    assert SMALLEST < made.size <= 270
    total = len(hold_out(ImageFolder(own_images), 2)[0])
    said = capsys.readouterr().out
    assert f"{out}: {made.size} tokens, of {total} captions" in said
    assert f"{total} are longer than 8" in said
    assert f"sha256 {made.digest}" in said
    assert tokenizer.main(command) == 0, "the same again"
    assert tokenizer.main([*command, "data.params.num_validation=0", "--vocab", "300"]) == 2
    assert "is another tokenizer, which runs may need" in capsys.readouterr().err
    assert Tokenizer(out.read_bytes(), 77, "here").digest == made.digest


def test_without_captions_or_data_it_says_so(config, own_images, tmp_path, capsys):
    command = ["--base", str(config), "--out", str(tmp_path / "out.json")]
    assert tokenizer.main([*command, "data.params.train.params.captions=false"]) == 2
    assert "data.params.train: the data set has no captions" in capsys.readouterr().err
    assert tokenizer.main([*command, "--vocab", "100"]) == 2
    assert f"--vocab: expected {SMALLEST} or more" in capsys.readouterr().err
    config.write_text("name: nothing\n")
    assert tokenizer.main(command) == 2
    assert "names no data set of captions" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
