"""What a resumed run may change, and how it is told."""

import json
from pathlib import Path

import pytest

from ldm import run_folder
from ldm.checkpoints import store
from ldm.cli.options import parse
from ldm.config.load import load, to_yaml
from ldm.errors import CheckpointError, ConfigError
from ldm.run_folder import RunFolder
from ldm.training import resume

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
    made = run_folder.create(options.logdir, start.name)
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


@pytest.mark.parametrize("words", ["={mine: {target: ldm.Mine}}", ".mine.target=ldm.Mine", ".mine=null"])
def test_what_is_measured_changes_freely(folder, words):
    metrics = started("-r", str(folder.path), f"model.params.metrics{words}").config.resolved()["model"]["params"]
    assert metrics["metrics"] in ({"mine": {"target": "ldm.Mine"}}, {"mine": None})


def test_an_allowed_change_changes_nothing_else(folder):
    words = ["data.params.batch_size=2", "lightning.trainer.max_steps=200", "--allow-change", "data.params.batch_size"]
    start = started("-r", str(folder.path), *words)
    tree = load([folder.config_file]).resolved()
    tree["data"]["params"]["batch_size"] = 2
    tree["lightning"]["trainer"]["max_steps"] = 200
    assert start.config.resolved() == tree  # the old autoencoder, the old length of the schedule
    assert start.notes == (
        "changed: data.params.batch_size from 8 to 2",
        "changed: lightning.trainer.max_steps from 100 to 200",
    )
    # What is written stays a reference, for the next resume.
    assert start.source["data"]["params"]["autoencoder"] == "${newest:logs/*_vae}"
    assert start.source["model"]["params"]["steps"] == "${lightning.trainer.max_steps}"


LINKED = """
name: linked
seed: 1
model:
  target: ldm.Model
  params:
    size: 4
    twice: {target: ldm.Part, params: {size: "${model.params.size}", steps: "${lightning.trainer.max_steps}"}}
    parts: [{target: ldm.Part, params: {size: "${model.params.twice.params.size}"}}, "${newest:logs/*_vae}"]
    all: ${model.params.twice}
    text: size ${model.params.size} of ${data:num_items}
    items: ${data:num_items}
data: {target: ldm.Data, params: {batch_size: 8}}
lightning:
  trainer: {max_steps: 100}
  callbacks:
    saves: {target: ldm.Saves, params: {every: "${lightning.trainer.max_steps}", size: "${model.params.size}"}}
"""


@pytest.fixture
def linked() -> RunFolder:
    Path("linked.yaml").write_text(LINKED)
    return begun("linked.yaml")


def begun(file: str, facts: dict[str, object] = FACTS) -> RunFolder:
    start = started("-b", file)
    made = run_folder.create(Path("logs"), start.name)
    resume.save(made, start.source, start.config.resolved(facts), facts)
    Path("logs/2026-02-01T00-00-00_vae").mkdir(parents=True, exist_ok=True)
    return made


def test_what_refers_to_an_allowed_change_follows_it_and_nothing_else(linked):
    start = started("-r", str(linked.path), "model.params.size=6", "--allow-change", "model.params.size")
    made = start.config.resolved(FACTS)
    params = made["model"]["params"]
    part = {"target": "ldm.Part", "params": {"size": 6, "steps": 100}}
    assert params["twice"] == params["all"] == part
    assert params["parts"] == [{"target": "ldm.Part", "params": {"size": 6}}, "logs/2026-01-01T00-00-00_vae"]
    assert params["text"] == "size 6 of 50"
    assert made["lightning"]["callbacks"]["saves"]["params"] == {"every": 100, "size": 6}
    assert "changed with it: model.params.twice.params.size from 4 to 6" in start.notes


def test_a_free_change_reaches_what_is_free(linked):
    start = started("-r", str(linked.path), "lightning.trainer.max_steps=300")
    made = start.config.resolved()
    assert made["lightning"]["callbacks"]["saves"]["params"]["every"] == 300
    assert made["model"]["params"]["twice"]["params"]["steps"] == 100
    assert made["model"]["params"]["all"]["params"]["steps"] == 100
    assert "changed with it: lightning.callbacks.saves.params.every from 100 to 300" in start.notes


def test_facts_are_filled_in_anew_where_changes_of_the_data_are_allowed(linked):
    more = FACTS | {"num_items": 70}
    kept = started("-r", str(linked.path))
    assert kept.config.resolved(more)["model"]["params"]["items"] == 50
    allowed = started("-r", str(linked.path), "--allow-change", "data")
    assert allowed.config.resolved(more)["model"]["params"]["items"] == 70
    assert allowed.config.resolved(more)["model"]["params"]["twice"]["params"]["steps"] == 100


def test_an_allowed_change_undoes_no_scaled_rate(folder):
    tree = load([folder.config_file]).resolved()
    tree["model"]["params"]["lr"] = 0.8  # by --scale-lr: the file says 0.1
    folder.config_file.write_text(to_yaml(tree))
    start = started("-r", str(folder.path), "seed=2", "--allow-change", "seed")
    assert start.config.resolved()["model"]["params"]["lr"] == 0.8


@pytest.mark.parametrize(
    "value", ["'\N{GRINNING FACE} \\ \" x'", ".inf", "1.0e-05", "[1, {a: ~}]", "{b: '1'}", "'~/x'"]
)
def test_a_changed_value_is_taken_as_it_is_written(folder, value):
    words = [f"model.params.lr={value}", "--allow-change", "model"]
    start = started("-r", str(folder.path), *words)
    expected = started("-b", "base.yaml", f"model.params.lr={value}").config.resolved()["model"]["params"]["lr"]
    assert start.config.resolved()["model"]["params"]["lr"] == expected


def test_a_reference_is_what_it_leads_to(folder):
    Path("base.yaml").write_text(BASE.replace("max_steps: 100", 'max_steps: "${model.params.limit}"').replace(
        "lr: 0.1", "lr: 0.1, limit: 100"
    ))  # fmt: skip
    with pytest.raises(ConfigError, match=r"limit: the run has null, requested is 100"):
        started("-r", "auto", "-b", "base.yaml")
    # Written out then, a reference now; the other way round; and one that leads elsewhere.
    other = Path("other.yaml")
    other.write_text(
        BASE.replace("batch_size: 8", 'batch_size: "${model.params.widths.1}"').replace("[1, 2]", "[1, 8]")
    )
    made = begun("other.yaml")
    for now in ("8", "'${model.params.widths.1}'", "'${data.params.batch_size}'"):
        started("-r", str(made.path), f"data.params.batch_size={now}")
    with pytest.raises(ConfigError, match=r"batch_size: the run has .*widths.1.*, requested is .*widths.0"):
        started("-r", str(made.path), "data.params.batch_size='${model.params.widths.0}'")


def saved(folder: RunFolder, file: str = "elsewhere.ckpt", **more: object) -> str:
    """A checkpoint of that run, outside of it."""
    record = {"config": load([folder.config_file]).resolved(), "step": 3, "data": FACTS, **more}
    store.save(Path(file), {"global_step": 3, "ldm": record})
    return file


@pytest.mark.parametrize("file", ["base.yaml", "linked.yaml"])
def test_a_checkpoint_goes_on_under_the_very_file_of_its_run(folder, linked, file):
    made = folder if file == "base.yaml" else linked
    kept = load([made.config_file]).resolved()
    start = started("-r", saved(made), "-b", file)
    assert (start.notes, start.folder) == ((), None)
    assert start.config.resolved() == kept  # with a newer autoencoder in logs/
    longer = started("-r", saved(made), "-b", file, "lightning.trainer.max_steps=200")
    assert longer.config.resolved()["model"] == kept["model"]
    edited = Path("edited.yaml")
    edited.write_text(Path(file).read_text().replace("seed: 1", "seed: 2"))
    with pytest.raises(ConfigError, match=r"seed: the run has 1, requested is 2"):
        started("-r", saved(made), "-b", "edited.yaml")
    edited.write_text(Path(file).read_text().replace("logs/*_vae", "logs/*_gan").replace("steps: ", "strides: "))
    with pytest.raises(ConfigError, match=r"strides|_gan"):
        started("-r", saved(made), "-b", "edited.yaml")


def test_a_checkpoint_of_a_longer_run_goes_on_under_its_first_file(folder):
    start = started("-r", str(folder.path), "lightning.trainer.max_steps=200")
    resume.save(folder, start.source, start.config.resolved(FACTS), FACTS)
    start = started("-r", saved(folder), "-b", "base.yaml")
    assert start.notes == ("changed: lightning.trainer.max_steps from 200 to 100",)
    assert start.config.resolved()["model"]["params"]["steps"] == 100


def test_a_precision_that_the_start_has_chosen_is_no_change(folder):
    automatic = BASE.replace("32-true", "auto")
    Path("base.yaml").write_text(automatic)
    start = started("-r", saved(folder), "-b", "base.yaml")
    assert start.config.resolved()["lightning"]["trainer"]["precision"] == "32-true"


def test_the_facts_of_a_checkpoint_are_asked_for_too(folder):
    start = started("-r", saved(folder))
    with pytest.raises(ConfigError, match=r"elsewhere\.ckpt(.|\n)*num_items\): the run has 50, requested is 51"):
        resume.check_facts(start, FACTS | {"num_items": 51}, [])
    resume.check_facts(started("-r", saved(folder, data=None)), {"num_items": 51}, [])  # an old one has none


def test_another_autoencoder_is_refused_by_name_but_for_old_runs(folder):
    resume.check_facts(started("-r", str(folder.path)), FACTS | {"autoencoder": "ab" * 32}, [])
    folder.facts_file.write_text(json.dumps(FACTS | {"autoencoder": "cd" * 32}))
    start = started("-r", str(folder.path))
    with pytest.raises(ConfigError, match=r"data \(autoencoder\): the run has \"cdcd"):
        resume.check_facts(start, FACTS | {"autoencoder": "ab" * 32}, [])
    for allowed in ("data.params.autoencoder", "data"):
        resume.check_facts(start, FACTS | {"autoencoder": "ab" * 32}, [allowed])


def test_an_allowed_change_reaches_all_that_refers_to_it(folder):
    tree = started("-r", str(folder.path), "seed=2", "--allow-change", "seed").config.resolved()
    assert tree["data"]["params"]["seed"] == 2


def test_an_edited_file_is_a_change(folder):
    Path("base.yaml").write_text(BASE.replace("lr: 0.1", "lr: 0.3"))
    with pytest.raises(ConfigError, match=r"model\.params\.lr: the run has 0\.1, requested is 0\.3"):
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
    with pytest.raises(ConfigError, match=r"num_items\): the run has 50, requested is 51(.|\n)*--allow-change data"):
        resume.check_facts(start, FACTS | {"num_items": 51}, [])
    resume.check_facts(start, FACTS | {"num_items": 51}, ["data"])
    resume.check_facts(start, FACTS | {"autoencoder": "a hash"}, [])  # a fact that was not known then
    assert json.loads(folder.facts_file.read_text()) == FACTS


@pytest.mark.parametrize("fact", ["source", "validation_source"])
def test_replaced_pictures_are_refused_and_a_run_from_before_they_were_noticed_goes_on(folder, fact):
    for source in (None, "abc", "abc:contents:12"):
        folder.facts_file.write_text(json.dumps(FACTS | ({fact: source} if source else {})))
        start = started("-r", str(folder.path))
        resume.check_facts(start, FACTS | {fact: "abc:contents:12"}, [])
    refused = rf"data \({fact}\): the run has"
    with pytest.raises(ConfigError, match=rf'{refused} ":contents:12", requested is ":contents:13"'):
        resume.check_facts(start, FACTS | {fact: "abc:contents:13"}, [])
    with pytest.raises(ConfigError, match=rf'{refused} "abc:contents:12", requested is "abd"'):
        resume.check_facts(start, FACTS | {fact: "abd"}, [])


@pytest.mark.parametrize("allowed", ["data", "data.params.validation", "data.params.validation.params.root"])
def test_another_validation_set_that_is_allowed_by_its_parameter_is_not_asked_for_again(folder, allowed):
    folder.facts_file.write_text(json.dumps(FACTS | {"validation_source": "abc:contents:12"}))
    start = started("-r", str(folder.path))
    resume.check_facts(start, FACTS | {"validation_source": "abd"}, [allowed])
    resume.check_facts(start, FACTS, [allowed])  # now there is none
    with pytest.raises(ConfigError, match=r"validation_source"):
        resume.check_facts(start, FACTS, ["data.params.train"])


def test_flags_that_would_be_ignored_are_refused(folder):
    for run_or_file in (str(folder.path), saved(folder)):
        with pytest.raises(ConfigError, match="--scale-lr"):
            started("-r", run_or_file, "--scale-lr")
    # The command that has started a run goes on with it.
    assert not started("-r", "auto", "-b", "base.yaml", "--scale-lr").is_new
    with pytest.raises(ConfigError, match="--name cats"):
        started("-r", str(folder.path), "--name", "cats")


def test_what_cannot_be_resumed(folder):
    with pytest.raises(CheckpointError, match=folder.path.name):
        started("-r", "logs/nothing")
    junk = Path("junk.ckpt")
    junk.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"junk\.ckpt"):
        started("-r", str(junk))


PI = "\N{GREEK SMALL LETTER PI}"  # two bytes
BAD_NAMES = [
    "a/b",
    "../a",
    "/tmp/a",
    "..",
    ".",
    ".a",
    "a.",
    "a b",
    "a\tb",
    "a\n",
    "x" * 236,
    PI * 118,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_checked_wherever_it_comes_from(folder, name, tmp_path):
    named = {**load([folder.config_file]).resolved(), "name": name}
    Path("named.yaml").write_text(to_yaml(named))
    store.save(Path("named.ckpt"), {"ldm": {"config": named, "step": 1}})
    indirect = {**named, "name": "${text}", "text": name}
    Path("indirect.yaml").write_text(to_yaml(indirect))
    sources = [["-b", "named.yaml"], ["-b", "indirect.yaml"], ["-b", "base.yaml", "-n", name], ["-r", "named.ckpt"]]
    sources += [["-b", "base.yaml", "-r", "auto", "-n", name], ["-r", "auto", "-b", "named.yaml"]]
    if name[0] not in "./":
        sources += [["-b", "base.yaml", "-f", name]]
    if "/" not in name and len(name) < 100:
        Path(f"{name}.yaml").write_text("seed: 1\n")
        sources += [["-b", f"{name}.yaml"]] if Path(f"{name}.yaml").stem == name else []
    for words in sources:
        with pytest.raises(ConfigError, match="cannot be the name of a run"):
            started(*words)
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        run_folder.create(tmp_path / "logs", name)
    # One choice by the user is enough.
    assert started("-r", "named.ckpt", "-n", "mine").name == "mine"


@pytest.mark.parametrize("name", ["a", "a.b", "kl_f8-2+x=1,y", PI * 117, "x" * 235, "-", "_"])
def test_a_run_is_found_again_by_its_name(name, tmp_path):
    made = run_folder.create(tmp_path / "logs", name)
    made.config_file.write_text("seed: 1\n")
    assert run_folder.newest(tmp_path / "logs", name) == made


def test_an_old_run_of_a_name_that_is_refused_now_goes_on(folder):
    Path("two words.yaml").write_text(BASE.replace("name: faces\n", ""))
    old = RunFolder(folder.path.rename(folder.path.with_name("2026-03-01T00-00-00_two words")))
    for words in (["-r", "auto", "-b", "two words.yaml"], ["-r", str(old.path)]):
        assert started(*words).folder.path.resolve() == old.path.resolve()
