"""What a resumed run may change, and how it is told."""

import json
from pathlib import Path

import pytest

from ldm import resume, run
from ldm.commandline import parse
from ldm.config import load
from ldm.errors import CheckpointError, ConfigError
from ldm.run import RunFolder

BASE = """
name: faces
seed: 1
model: {target: ldm.Model, params: {lr: 0.1, steps: "${lightning.trainer.max_steps}", widths: [1, 2]}}
data: {target: ldm.Data, params: {seed: "${seed}", batch_size: 8, num_workers: 0, autoencoder: "${newest:logs/*_vae}"}}
lightning: {trainer: {max_steps: 100, precision: 32-true, log_every_n_steps: 10}}
"""
FACTS = {"num_items": 50, "num_classes": None}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("logs/2026-01-01T00-00-00_vae").mkdir(parents=True)


@pytest.fixture
def folder() -> RunFolder:
    """A run of BASE that has begun; since then another autoencoder has appeared."""
    options = parse(["-b", "base.yaml"])
    start = resume.start(options)
    made = run.create(options.logdir, start.name)
    resume.save(made, start.source, start.config.resolved(FACTS), FACTS)
    Path("logs/2026-02-01T00-00-00_vae").mkdir(parents=True)
    return made


def started(*words: str) -> resume.Start:
    return resume.start(parse(list(words)))


def test_a_new_run_is_named_by_flag_config_or_file():
    assert started("-b", "base.yaml").name == "faces"
    assert started("-b", "base.yaml", "-n", "cats").name == "cats"
    Path("dogs.yaml").write_text("seed: 1\n")
    assert started("-b", "dogs.yaml").name == "dogs"
    assert started("-b", "base.yaml").folder is None


def test_a_resumed_run_keeps_what_it_ran_with(folder):
    for words in (["-r", str(folder.path)], ["-r", "auto", "-b", "base.yaml"]):
        start = started(*words)
        assert start.folder is not None
        assert start.folder.path.resolve() == folder.path.resolve()
        assert start.notes == ()
        tree = start.config.resolved()
        assert tree == load([folder.config_file]).resolved()
        assert tree["data"]["params"]["autoencoder"] == "logs/2026-01-01T00-00-00_vae"


def test_auto_without_a_run_starts_one():
    assert started("-r", "auto", "-b", "base.yaml").folder is None
    with pytest.raises(ConfigError, match="--base"):
        started("-r", "auto")


def test_the_length_and_the_logging_change_freely_and_stretch_nothing(folder):
    start = started(
        "-r", str(folder.path), "lightning.trainer.max_steps=200", "data.params.num_workers=2",
        "lightning.trainer.log_every_n_steps=1", "data.params.micro_batch_size=4",
    )  # fmt: skip
    tree = start.config.resolved()
    assert tree["lightning"]["trainer"] == {"max_steps": 200, "precision": "32-true", "log_every_n_steps": 1}
    assert tree["data"]["params"]["num_workers"] == 2
    assert tree["model"]["params"]["steps"] == 100
    assert "changed: lightning.trainer.max_steps from 100 to 200" in start.notes


@pytest.mark.parametrize(
    "change",
    ["seed=2", "data.params.batch_size=16", "model.params.lr=0.2", "model.params.widths.1=3", "model.target=ldm.Other",
     "data.params.autoencoder=logs/2026-02-01T00-00-00_vae", "lightning.trainer.precision=bf16-mixed",
     "data.params.new=1"],
)  # fmt: skip
def test_changes_of_the_mathematics_are_refused_unless_allowed(folder, change):
    key = change.split("=")[0].removesuffix(".1").removesuffix(".target")
    with pytest.raises(ConfigError, match=f"--allow-change {key}") as caught:
        started("-r", str(folder.path), change)
    assert caught.value.exit_code == 2
    for allowed in (key, key.split(".")[0]):
        assert key in "".join(started("-r", str(folder.path), change, "--allow-change", allowed).notes)
    with pytest.raises(ConfigError):
        started("-r", str(folder.path), change, "--allow-change", key[:-1])


def test_an_allowed_change_reaches_all_that_refers_to_it(folder):
    tree = started("-r", str(folder.path), "seed=2", "--allow-change", "seed").config.resolved()
    assert tree["data"]["params"]["seed"] == 2


def test_an_edited_file_is_a_change(folder):
    Path("base.yaml").write_text(BASE.replace("lr: 0.1", "lr: 0.3"))
    with pytest.raises(ConfigError, match=r"model\.params\.lr: the run has 0\.1, asked for is 0\.3"):
        started("-r", "auto", "-b", "base.yaml")
    # Without the file the run is what it was.
    assert started("-r", str(folder.path)).config.resolved()["model"]["params"]["lr"] == 0.1


def test_resumed_twice_with_the_same_words_is_no_change(folder):
    words = ["-r", "auto", "-b", "base.yaml", "lightning.trainer.max_steps=200"]
    start = started(*words)
    resume.save(folder, start.source, start.config.resolved(FACTS), FACTS)
    again = started(*words)
    assert again.notes == ()
    assert again.config.resolved() == start.config.resolved()


def test_other_data_is_refused_unless_allowed(folder):
    start = started("-r", str(folder.path))
    resume.check_facts(start, FACTS, [])
    with pytest.raises(ConfigError, match=r"num_items\): the run has 50, asked for is 51(.|\n)*--allow-change data"):
        resume.check_facts(start, FACTS | {"num_items": 51}, [])
    resume.check_facts(start, FACTS | {"num_items": 51}, ["data"])
    assert json.loads(folder.facts_file.read_text()) == FACTS


def test_flags_that_would_be_ignored_are_refused(folder):
    with pytest.raises(ConfigError, match="--scale-lr"):
        started("-r", str(folder.path), "--scale-lr")
    with pytest.raises(ConfigError, match="--name cats"):
        started("-r", str(folder.path), "--name", "cats")


def test_what_cannot_be_resumed(folder):
    with pytest.raises(CheckpointError, match=folder.path.name):
        started("-r", "logs/nothing")
    junk = Path("junk.ckpt")
    junk.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"junk\.ckpt"):
        started("-r", str(junk))
