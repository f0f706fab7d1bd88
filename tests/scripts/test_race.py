import json
import sys
from argparse import Namespace

import pytest
import torch

from ldm.data.dataset import Subset
from ldm.data.sources.arrays import DEBIAN_FASHION_MNIST, FashionMNIST
from ldm.errors import ConfigError
from ldm.evaluation.report import Pictures, Score
from scripts.bench import learner, race
from scripts.bench.__main__ import main
from scripts.bench.child import Place
from scripts.bench.learner import Learner, learn
from scripts.bench.race import Reached, begun, table


def test_an_epoch_has_every_row_once():
    following = learner.batches(10, 5)
    epochs = [torch.cat([following(), following()]) for _ in range(3)]
    assert all(epoch.sort().values.tolist() == [*range(10)] for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_samples_are_drawn_at_each_mark_and_cost_no_time(tmp_path, monkeypatch):
    """A clock that goes on by two seconds a look: so a step takes two, and the beginning two."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which it replaces
    looks = iter(range(0, 1000, 2))
    monkeypatch.setattr(learner.time, "perf_counter", lambda: float(next(looks)))
    steps, asked = [], []

    def sample(labels):
        asked.append(len(labels))
        return labels[:, None, None, None].float() + len(steps)

    def make(place):
        return Learner(7, 16, lambda: steps.append(place.device), sample)

    labels = torch.arange(3).repeat_interleave(50)
    learn("theirs", make, Place("cpu", False), [1.0, 5.0, 12.0], labels, tmp_path)
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
    assert [one["seconds"] for one in found] == [2.0, 6.0, 12.0]
    assert [one["images"] for one in found] == [0, 32, 80]
    assert all(one["parameters"] == 7 for one in found)
    assert torch.equal(found[1]["samples"].flatten(), labels + 2.0)
    assert asked == [100, 50] * 3


def test_the_table_compares_with_ours():
    none = Pictures(torch.empty(0), torch.empty(0))
    found = [Reached("ldm", 10.0, none), Reached("theirs", 40.0, none, 1600, 2_500_000)]
    rows = table(found, [Score(0.9, 0.1), Score(0.8, 1.0), Score(0.5, 3.0)]).splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]] == [
        ["real pictures", "", "", "", "", "90.0%", "0.10"],
        ["ldm", "10.0", "1.00", "", "", "80.0%", "1.00"],
        ["theirs", "40.0", "4.00", "2.5", "1,600", "50.0%", "3.00"],
    ]


def test_a_race_goes_on_with_its_own_settings_alone(tmp_path):
    file = tmp_path / "race.json"
    options = Namespace(number=5, steps=4, times=[2.0, 1.0], overrides=["lightning.trainer.max_steps=3"])
    record = begun(options, file)
    assert record["settings"]["times"] == [1.0, 2.0]
    file.write_text(json.dumps(record | {"minutes": {"autoencoder": 1.5}}))
    assert begun(options, file)["minutes"] == {"autoencoder": 1.5}
    options.steps, options.overrides = 30, []
    with pytest.raises(ConfigError, match=r"other steps and overrides\. Name another --out"):
        begun(options, file)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_a_race_from_nothing_to_the_table_and_once_more(tmp_path, monkeypatch, capsys):
    """The whole path, small: nobody learns much. The second time all is there, and is judged alone."""
    monkeypatch.chdir(tmp_path)
    part = [*range(3000)]
    monkeypatch.setattr(race, "FashionMNIST", lambda train=True: Subset(FashionMNIST(train=train), part))
    monkeypatch.setattr(race.huggingface, "SCRIPT", (32, 32, 64))
    source = "{target: ldm.data.sources.arrays.FashionMNIST}"
    words = [
        "lightning.trainer.max_steps=20",
        "lightning.trainer.val_check_interval=20",
        "lightning.logger=null",
        f"data.params.train={{target: ldm.data.dataset.Subset, params: {{dataset: {source}, indices: {part[:500]}}}}}",
        "data.params.num_validation=100",
    ]
    few = ["--number", "5", "--epochs", "1", "--steps", "3"]
    command = ["race", "--device", "cpu", "--times", "0.1", "0.2", *few, *words]
    assert main(command) == 0
    page = capsys.readouterr().out
    record = json.loads((tmp_path / "logs/race/race.json").read_text())
    names = ["ldm", *["diffusers on pixels, a network of our width"] * 2]
    names += ["diffusers on pixels, its script's network"] * 2
    assert [row["name"] for row in record["rows"]] == names
    assert all(f"| {row['name']} | {row['minutes']:.1f} |" in page for row in record["rows"])
    assert (tmp_path / "logs/race/race.png").stat().st_size > 1000
    before = record["minutes"]
    monkeypatch.setattr(race, "train_stage", None)
    assert main(command) == 0
    record = json.loads((tmp_path / "logs/race/race.json").read_text())
    assert record["minutes"] == before
