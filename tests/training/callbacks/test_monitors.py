"""A `monitor` that nothing logs ends a run before its first step, whoever has it and however the run begins."""

from pathlib import Path
from typing import Any

import pytest

import main
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.training.callbacks.monitors import Monitors, monitored
from ldm.training.metrics_table import read_metrics
from tests.conftest import node

EVERY = {
    "best": node("pytorch_lightning.callbacks.ModelCheckpoint", monitor="val/beauty"),
    "early": node("pytorch_lightning.callbacks.EarlyStopping", monitor="val/beauty"),
    "checkpoints": node("ldm.training.callbacks.checkpoints.Checkpoints", monitor="val/beauty"),
}


@pytest.fixture
def tree(autoencoder_tree, tmp_path, monkeypatch, tried_once) -> dict[str, Any]:
    """Stage 1, four steps long, validated after two and four."""
    monkeypatch.chdir(tmp_path)
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    autoencoder_tree["lightning"]["callbacks"] = {"images": None}
    return autoencoder_tree


def write(tree: dict[str, Any], callbacks: dict[str, Any]) -> None:
    tree["lightning"]["callbacks"] = {"images": None} | callbacks
    Path("stage1.yaml").write_text(to_yaml(tree))


def train(tree: dict[str, Any], callbacks: dict[str, Any], *words: str) -> int:
    write(tree, callbacks)
    return main.main(["--base", "stage1.yaml", *words])


def the_run() -> Path:
    (path,) = Path("logs").iterdir()
    return path


def assert_refused(said: str, name: str, *parts: str) -> None:
    assert f"error: lightning.callbacks.{name}.params.monitor: " in said
    for part in parts:
        assert part in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", EVERY)
def test_a_name_that_validation_does_not_log(tree, capsys, name):
    assert train(tree, {name: EVERY[name]}) == 2
    assert_refused(capsys.readouterr().err, name, "there is no metric 'val/beauty'", "val/psnr", "val/ssim")
    assert not [*Path("logs").iterdir()]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_goes_on_is_told_by_its_checkpoint(tree, capsys, name, begun):
    write(tree, {})
    begun("stage1.yaml")
    step = "lightning.trainer.max_steps=6"
    words = ["-r", str(the_run()), step, f"lightning.callbacks.{name}={to_yaml(EVERY[name])}"]
    capsys.readouterr()
    assert main.main(words) == 2
    assert_refused(capsys.readouterr().err, name, "'val/beauty'", "val/psnr", "the validation before this checkpoint")
    assert [row["step"] for row in read_metrics(the_run() / "metrics.csv")] == ["1", "2", "3", "4"]
    good = ["-r", str(the_run()), step, words[-1].replace("beauty", "psnr")]
    if name == "early":
        good.append(f"lightning.callbacks.{name}.params.mode=max")
    assert main.main(good) == 0


def test_a_run_that_goes_on_may_measure_more_and_less(tree, begun):
    """It is no other run, so nothing has to be allowed; what is not named stays as it was."""
    write(tree, {})
    begun("stage1.yaml")
    lpips = node("ldm.autoencoder.lpips.LPIPS")
    more = {"lpips": node("ldm.autoencoder.metrics.Perceptual", distance=lpips), "ssim": None}
    early = EVERY["early"] | {"params": {"monitor": "val/lpips"}}
    words = [f"model.params.metrics={to_yaml(more)}", f"lightning.callbacks.early={to_yaml(early)}"]
    assert main.main(["-r", str(the_run()), "lightning.trainer.max_steps=6", *words]) == 0
    rows = [row for row in read_metrics(the_run() / "metrics.csv") if "val/psnr" in row]
    before, after = ({name for name in row if name.startswith("val/")} for row in rows[-2:])
    assert (after - before, before - after) == ({"val/lpips"}, {"val/ssim"})
    assert float(rows[-1]["val/lpips"]) > 0
    record = store.load(store.newest(the_run() / "checkpoints"))["ldm"]
    assert {*record["metrics"]} == after  # and none of before


def test_a_run_that_goes_on_with_another_model_is_told_by_its_first_validation(tree, capsys, begun):
    write(tree, {})
    begun("stage1.yaml")
    change = ["model.params.loss.params.l2_weight=0.5", "--allow-change", "model.params.loss.params.l2_weight"]
    early = EVERY["early"] | {"params": {"monitor": "val/l2"}}
    words = ["-r", str(the_run()), "lightning.trainer.max_steps=8", *change]
    assert main.main([*words, f"lightning.callbacks.early={to_yaml(early)}"]) == 0
    bad = [*words, "lightning.trainer.max_steps=12", "model.params.loss.params.l2_weight=0.25"]
    capsys.readouterr()
    assert main.main([*bad, f"lightning.callbacks.early={to_yaml(EVERY['early'])}"]) == 2
    assert_refused(capsys.readouterr().err, "early", "'val/beauty'", "val/l2")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("words", ["data.params.num_validation=0", "lightning.trainer.limit_val_batches=0"])
def test_a_monitor_without_a_validation(tree, capsys, name, words):
    of = EVERY[name] | {"params": {"monitor": "val/psnr"}}
    assert train(tree, {name: of}, words) == 2
    assert_refused(capsys.readouterr().err, name, "'val/psnr'", "has none", "data.params.num_validation")
    assert not [*Path("logs").iterdir()]


@pytest.mark.parametrize("name", EVERY)
def test_without_the_batch_that_is_tried_the_first_validation_says_so(tree, capsys, name):
    assert train(tree, {name: EVERY[name]}, "lightning.trainer.num_sanity_val_steps=0") == 2
    assert_refused(capsys.readouterr().err, name, "'val/beauty'", "val/psnr")


def test_a_metric_of_training(tree, capsys):
    best = EVERY["best"] | {"params": {"monitor": "train/loss", "every_n_train_steps": 2, "dirpath": "best"}}
    assert train(tree, {"best": best}) == 0
    assert [*Path("best").iterdir()]
    best["params"] |= {"monitor": "train/lss"}
    assert train(tree, {"best": best}, "-l", "other") == 2
    assert_refused(capsys.readouterr().err, "best", "'train/lss'", "train/loss", "train/gradient")
    (path,) = Path("other").iterdir()
    assert len(read_metrics(path / "metrics.csv")) <= 1


def test_good_names_train(tree):
    best = EVERY["best"] | {"params": {"monitor": "val/psnr", "mode": "max", "dirpath": "best"}}
    early = EVERY["early"] | {"params": {"monitor": "val/beauty", "strict": False}}
    own = EVERY["checkpoints"] | {"params": {"monitor": "val/l1"}}
    assert train(tree, {"best": best, "early": early, "checkpoints": own}) == 0
    assert (the_run() / "checkpoints" / "best.ckpt").is_symlink()


def test_what_waits_for_a_metric():
    nodes = {"a": node("x.Y", monitor="val/a"), "b": node("x.Y", monitor=None), "c": None, "d": {"target": "x.Y"}}
    assert monitored(nodes | {"e": node("x.Y", monitor="val/e", strict=False)}) == {"a": "val/a"}
    assert Monitors({}, None)._validated == {}
