"""Which callbacks and loggers a run has, and how its configuration changes them."""

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger

from ldm.diffusion.conditioners.given import Field, Given
from ldm.errors import ConfigError
from ldm.run_folder import RunFolder
from ldm.training import defaults
from ldm.training.callbacks.checkpoints import Checkpoints
from ldm.training.callbacks.health import Health
from ldm.training.callbacks.previews import SampleLogger
from ldm.training.callbacks.progress import Progress, Throughput
from ldm.training.callbacks.provenance import Provenance
from ldm.training.callbacks.skip_nonfinite import SkipNonFinite
from ldm.training.callbacks.stop import StopOnSignal
from ldm.training.loggers import FencedWandb, MetricsFile


def tree() -> dict[str, Any]:
    return {"seed": 1, "lightning": {"trainer": {"max_steps": 100}}}


def callbacks(section: dict[str, Any], tmp_path: Path) -> list[Any]:
    config = tree()
    config["lightning"]["callbacks"] = section
    return defaults.make_callbacks(config, RunFolder(tmp_path), LightningModule(), {"num_classes": None})


def test_a_run_is_kept_without_a_line_of_yaml(tmp_path):
    kinds = [type(callback) for callback in callbacks({}, tmp_path)]
    assert kinds == [Provenance, SkipNonFinite, StopOnSignal, Throughput, Progress, Health, Checkpoints]


def test_previews_ask_for_a_class_only_of_a_model_that_reads_one(runs, tmp_path, monkeypatch):
    def conditions() -> Any:
        made = defaults.make_callbacks(tree(), RunFolder(tmp_path), runs.module, {"num_classes": 3})
        (previews,) = [one for one in made if isinstance(one, SampleLogger)]
        return previews._conditions

    assert {row["class_label"] for row in conditions()} == {0, 1, 2}
    monkeypatch.setitem(runs.module.denoiser._modules, "conditioner", Given(tokens=Field("tokens", [4, 8])))
    assert conditions() is None  # the data has classes all the same


def test_callbacks_are_replaced_added_and_left_out_by_name(tmp_path):
    made = callbacks(
        {
            "checkpoints": {"target": "ldm.training.callbacks.checkpoints.Checkpoints", "params": {"every": 7}},
            "progress": None,
            "mine": {"target": "pytorch_lightning.callbacks.Timer", "params": {"duration": "00:01:00:00"}},
        },
        tmp_path,
    )
    names = [type(callback).__name__ for callback in made]
    assert names == ["Provenance", "SkipNonFinite", "StopOnSignal", "Throughput", "Health", "Checkpoints", "Timer"]
    assert made[-2].every == 7


def test_metrics_are_always_written_and_wandb_is_a_choice(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    started: list[str] = []
    monkeypatch.setattr(FencedWandb, "log_hyperparams", lambda self, params: started.append(self.version))

    def kinds(config: dict[str, Any]) -> list[type]:
        return [type(logger) for logger in defaults.make_loggers(config, folder, "project")]

    assert kinds(tree()) == [MetricsFile, FencedWandb]
    assert started == [tmp_path.name]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert kinds(tree()) == [MetricsFile]
    without = tree()
    without["lightning"]["logger"] = None
    monkeypatch.setenv("WANDB_MODE", "online")
    assert kinds(without) == [MetricsFile]


CSV = {"target": "pytorch_lightning.loggers.CSVLogger"}
WANDB = {"target": "ldm.training.loggers.FencedWandb"}


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        ({"csv": CSV}, [FencedWandb, CSVLogger]),
        ({"csv": CSV, "wandb": None}, [CSVLogger]),
        ({"wandb": None}, []),
        ({"wandb": WANDB, "csv": CSV}, [FencedWandb, CSVLogger]),
        (CSV, [CSVLogger]),
        ([CSV], [CSVLogger]),
        ([CSV, WANDB], [CSVLogger, FencedWandb]),
        ([], []),
        (None, []),
    ],
)
def test_loggers_stand_beside_wandb_or_in_its_place(logger, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FencedWandb, "log_hyperparams", lambda self, params: None)
    config = tree()
    config["lightning"]["logger"] = logger
    folder = RunFolder(tmp_path / "logs" / "run 1")
    made = defaults.make_loggers(config, folder, "project")[1:]
    assert [type(one) for one in made] == expected
    for one in made:
        assert Path(str(one.save_dir)) == folder.path
        if isinstance(one, FencedWandb):
            assert (one.name, one.version) == ("project", "run-1")
            assert one._wandb_init["name"] == "run 1"


def test_what_a_logger_is_given_is_kept(tmp_path):
    config = tree()
    config["lightning"]["logger"] = {"csv": {**CSV, "params": {"save_dir": str(tmp_path / "own")}}, "wandb": None}
    _, made = defaults.make_loggers(config, RunFolder(tmp_path), "project")
    assert made.save_dir == str(tmp_path / "own")


@pytest.mark.parametrize(
    ("target", "package"),
    [("CometLogger", "comet-ml"), ("MLFlowLogger", "mlflow")],
)
def test_a_logger_without_its_package_is_refused_by_key(target, package, tmp_path, monkeypatch):
    config = tree()
    config["lightning"]["logger"] = {"more": {"target": f"pytorch_lightning.loggers.{target}"}, "wandb": None}
    with pytest.raises(ConfigError) as caught:
        defaults.make_loggers(config, RunFolder(tmp_path), "project")
    message = str(caught.value)
    assert message.startswith(f"lightning.logger.more: pytorch_lightning.loggers.{target} cannot be built")
    assert "pip install" in message
    assert package in message


def test_a_wandb_id_fits_into_a_file_name():
    assert defaults.wandb_id("2026-01-01T00-00-00_faces.b=1") == "2026-01-01T00-00-00_faces-b-1"
    long = [defaults.wandb_id("2026-01-01T00-00-00_" + "\N{GREEK SMALL LETTER PI}" * 110 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 128 for name in long)
