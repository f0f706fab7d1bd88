"""main.py as its users meet it: what a run leaves, what a mistake is answered with, and how it exits."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import wandb
from pytorch_lightning.callbacks import device_stats_monitor
from pytorch_lightning.loggers import CSVLogger

import main
from ldm import files
from ldm.autoencoder.module import AutoencoderKL
from ldm.checkpoints import store
from ldm.config.load import to_yaml
from ldm.data import transforms
from ldm.data.datamodule import ImageDataModule
from ldm.errors import ResourceError
from ldm.run_folder import RunFolder
from ldm.runtime.signals import Stopped
from ldm.training import defaults, fit, resume, trainer
from ldm.training.metrics_table import read_metrics
from scripts.faults.interpreter import as_new_interpreter
from scripts.faults.processes import fork
from tests.points import wait_until

ROOT = Path(main.__file__).parent


@pytest.fixture
def stage1(autoencoder_tree, tmp_path, monkeypatch, tried_once) -> dict[str, Any]:
    """Stage 1, two steps long, written to stage1.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)
    autoencoder_tree["lightning"]["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
    Path("stage1.yaml").write_text(to_yaml(autoencoder_tree))
    return autoencoder_tree


@pytest.fixture
def wandb_ended(stage1) -> Iterator[None]:
    """wandb's own process, which stays in the folder where it began, goes with the test."""
    yield
    wandb.teardown()


def the_run() -> RunFolder:
    (path,) = Path("logs").iterdir()
    return RunFolder(path)


def train(*words: str) -> int:
    return main.main(["--base", "stage1.yaml", *words])


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """What is said when `words` end with `code`, before there is a run."""
    assert train(*words) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert not Path("logs").exists() or not any(Path("logs").iterdir())
    return message


def test_a_run_leaves_its_folder(stage1, capsys):
    assert train("-n", "cats", "-f", "_dogs", "data.params.batch_size=4") == 0
    folder = the_run()
    assert folder.name == "cats_dogs"
    assert f"{folder.path}: finished at step 2" in capsys.readouterr().out
    state = folder.read_state()
    assert state is not None
    assert (state.status, state.step, state.exit_code) == ("finished", 2, 0)
    saved = store.load(folder.path / str(state.resume_from))
    tree = saved["ldm"]["config"]
    assert tree["data"]["params"]["batch_size"] == 4
    assert tree["model"]["params"]["encoder"]["params"]["in_channels"] == 3
    assert saved["ldm"]["metrics"]["val/psnr"] > 0  # saved after the last validation
    assert saved["ldm"]["latents"] is not None
    rows = read_metrics(folder.metrics_file)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert "val/psnr" in rows[1]
    assert "images_per_second" in rows[1]
    (sheet,) = (folder.images / "val").iterdir()
    assert sheet.name.endswith("_00000002.png")
    assert json.loads(folder.facts_file.read_text())["num_items"] == 16


def test_a_csv_logger_needs_a_line_of_yaml_and_writes_into_the_run_folder(stage1):
    line = "lightning.logger={csv: {target: pytorch_lightning.loggers.CSVLogger}, wandb: null}"
    assert train(line) == 0
    (written,) = the_run().path.rglob("lightning_logs/*/metrics.csv")
    assert "val/psnr" in written.read_text()
    assert {path.name for path in Path().iterdir()} == {"logs", "stage1.yaml"}


@pytest.mark.usefixtures("wandb_ended")
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_another_logger_stands_beside_wandb_with_a_line_of_yaml(stage1, capfd, kind):
    """TensorBoard's files, where its package is installed; where it is not, how to install it."""
    line = f"lightning.logger={{more: {{target: pytorch_lightning.loggers.{kind}}}}}"
    if kind == "TensorBoardLogger" and not find_spec("tensorboard"):
        assert "pip install" in refused(capfd, 2, line)
        return
    assert train(line) == 0
    folder = the_run().path
    assert [*folder.rglob("run-*.wandb")]
    (written,) = (folder / "lightning_logs").iterdir()
    names = {path.name.partition(".tfevents")[0] for path in written.iterdir()}
    assert names == {"hparams.yaml", "metrics.csv" if kind == "CSVLogger" else "events.out"}
    assert {path.name for path in Path().iterdir()} == {"logs", "stage1.yaml"}


def test_training_is_off_and_on(stage1, capsys, begun):
    assert "--resume" in refused(capsys, 2, "-t", "false")
    begun("stage1.yaml")
    folder = the_run()
    before = folder.read_state(), folder.metrics_file.read_text()
    assert main.main(["-r", str(folder.path), "--no-train"]) == 0
    assert "val/psnr" in capsys.readouterr().out
    assert (folder.read_state(), folder.metrics_file.read_text()) == before
    assert main.main(["-r", str(folder.path)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def configured(folder: RunFolder) -> list[str]:
    return [file.read_text() for file in (folder.config_file, folder.source_file, folder.facts_file)]


def test_a_run_keeps_its_configuration_until_it_has_made_a_step_with_another(stage1, capsys, begun, monkeypatch):
    begun("stage1.yaml")
    folder = the_run()
    before = configured(folder)
    words = ["-r", str(folder.path), "lightning.trainer.max_steps=3", "lightning.trainer.limit_val_batches=1"]
    assert main.main([*words, "--no-train"]) == 0
    assert configured(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(fit, "run", fails(ResourceError("no memory for the first step")))
        assert main.main(words) == 6
    assert configured(folder) == before
    assert main.main(words) == 0
    assert "limit_val_batches: 1" in configured(folder)[0]
    assert "limit_val_batches: 1" in configured(folder)[1]


def test_a_dry_run_tells_and_leaves_nothing(stage1, capsys):
    assert train("--dry-run", "seed=5") == 0
    said = capsys.readouterr().out
    assert "seed: 5" in said
    assert "in_channels: 3" in said
    for part in ("encoder", "decoder", "(6, 3, 16, 16) float32", "GFLOPs"):
        assert part in said
    assert not Path("logs").exists()


def test_the_rate_scales_with_the_global_batch_once(stage1, capsys):
    assert train("--scale-lr") == 0
    folder = the_run()
    assert "model.params.optimizer.params.lr to 0.006" in capsys.readouterr().out
    assert main.main(["-r", str(folder.path), "lightning.trainer.max_steps=3"]) == 0
    saved = store.load(store.verify(folder.path).path)
    assert saved["global_step"] == 3
    # The schedule was as long as the run when it began, and is at its end.
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == pytest.approx(6e-3)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--bose", "x.yaml"], 2, ["--bose", "--base"]),
        (["--base", "stage2.yaml"], 2, ["stage2.yaml", "stage1.yaml"]),
        (["modle.x=1"], 2, ["modle", "command line", "model"]),
        (["data.params.batchsize=2"], 2, ["data.params.batchsize", "batch_size"]),
        (["data.params.train.root=nowhere"], 2, ["did you mean 'data.params.train.params.root'?", "command line"]),
        (["data.params.batch_size=many"], 2, ["data.params.batch_size", "many", "whole number"]),
        (["data.params.micro_batch_size=4"], 2, ["micro_batch_size", "4", "6"]),
        (["model.params.encoder.target=os.system"], 2, ["os.system", "refused"]),
        (["lightning.trainer.max_stpes=3"], 2, ["max_stpes", "max_steps"]),
        (["lightning.trainer.max_steps=0"], 2, ["lightning.trainer.max_steps"]),
        (["lightning.trainer.accelerator=abacus"], 2, ["abacus"]),
        (["lightning.trainer.gradient_clip_val=1.0"], 2, ["clip"]),
        (["model.params.encoder.params.in_channels=4"], 2, ["in_channels", "4", "${data:channels}", "command line"]),
        (["data.params.resolution=15"], 2, ["image (6, 3, 15, 15)"]),
        (["-n", "a/b"], 2, ["a/b"]),
        (["name=../up"], 2, ["../up", "--name"]),
        (["data.params.train.params.root=nowhere"], 3, ["nowhere"]),
        (["data.params.num_validation=-1"], 2, ["data.params.num_validation", "-1", "from 0 up"]),
        (["-r", "nowhere"], 4, ["nowhere"]),
        (["-l", "/proc/logs"], 6, ["/proc/logs", "--logdir"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_mistakes_are_answered_before_there_is_a_run(stage1, capsys, words, code, said):
    message = refused(capsys, code, *words)
    for part in said:
        assert part in message


def test_a_package_that_is_not_installed(stage1, capsys):
    assert "pip install" in refused(capsys, 2, "lightning.trainer.accelerator=tpu")


def test_a_package_that_a_callback_lacks(stage1, capsys, monkeypatch):
    """Which it notices in `setup`."""
    monkeypatch.setattr(device_stats_monitor, "_PSUTIL_AVAILABLE", False)
    monitor = "lightning.callbacks.x={target: pytorch_lightning.callbacks.DeviceStatsMonitor}"
    message = refused(capsys, 2, monitor, "lightning.logger={}")
    assert "DeviceStatsMonitor" in message
    assert "pip install psutil" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_takes_all_memory_is_named(stage1, capsys, monkeypatch, workers):
    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(transforms.EvalTransform, "__call__", exhausted)
    message = refused(capsys, 6, f"data.params.num_workers={workers}")
    assert "The picture was " in message
    assert "16 x 16 pixels" in message
    assert "micro_batch_size" not in message


def test_an_empty_folder_of_images(stage1, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 images" in refused(capsys, 3, "data.params.train.params.root=empty")


def test_an_unsafe_environment_is_refused(stage1, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in refused(capsys, 4)


def test_a_loss_that_is_not_finite(stage1, capsys):
    assert train("model.params.optimizer.params.lr=1e30", "lightning.trainer.max_steps=9") == 5
    assert "not finite" in capsys.readouterr().err
    state = the_run().read_state()
    assert state is not None
    assert (state.status, state.exit_code) == ("failed", 5)


def test_damaged_checkpoints(stage1, capsys, begun):
    begun("stage1.yaml")
    folder = the_run()
    (file,) = folder.checkpoints.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    words = ["-r", str(folder.path), "lightning.trainer.max_steps=4"]
    assert main.main(words) == 4
    message = capsys.readouterr().err
    assert file.name in message
    assert "damaged" in message
    # It is never started from step 0 instead, however often one tries.
    assert main.main(words) == 4


def test_an_older_checkpoint_named_by_hand(stage1):
    every = "{target: ldm.training.callbacks.checkpoints.Checkpoints, params: {every: 1}}"
    assert train(f"lightning.callbacks.checkpoints={every}", "lightning.trainer.max_steps=3") == 0
    folder = the_run()
    assert {file.name for file in folder.checkpoints.iterdir()} == {"step=00000002.ckpt", "step=00000003.ckpt"}
    named = folder.checkpoints / "step=00000002.ckpt"
    assert main.main(["-r", str(named), "lightning.trainer.max_steps=3"]) == 0
    assert {file.name for file in folder.checkpoints.iterdir()} == {
        *("step=00000002.ckpt", "step=00000003.ckpt", "step=00000003.ckpt.superseded"),
    }


def test_a_checkpoint_from_elsewhere_starts_a_new_run(stage1, tmp_path, begun):
    begun("stage1.yaml")
    elsewhere = tmp_path / "downloaded.ckpt"
    store.verify(the_run().path).path.rename(elsewhere)
    assert main.main(["-r", str(elsewhere), "-l", "new", "lightning.trainer.max_steps=3"]) == 0
    (folder,) = (tmp_path / "new").iterdir()
    saved = store.load(store.verify(folder).path)
    assert saved["global_step"] == 3
    assert saved["ldm"]["images_seen"] == 18


def test_a_checkpoint_that_has_all_steps_already_leaves_a_run_that_is_finished(stage1, begun):
    begun("stage1.yaml")
    elsewhere = store.verify(the_run().path).path.rename("elsewhere.ckpt")
    assert main.main(["-r", str(elsewhere), "-l", "new"]) == 0
    (folder,) = Path("new").iterdir()
    state = RunFolder(folder).read_state()
    assert state is not None
    assert state.status == "finished"


def fails(error: BaseException) -> Any:
    def instead(*_: Any, **__: Any) -> None:
        raise error

    return instead


PLACES = [(files, "check_space"), (resume, "save"), (defaults, "make_callbacks"), (defaults, "make_loggers")]
PLACES += [(AutoencoderKL, "configure_optimizers"), (ImageDataModule, "train_dataloader"), (fit, "record")]
PLACES += [(AutoencoderKL, "validation_step"), (AutoencoderKL, "training_step")]
ERRORS = [ResourceError("no"), KeyboardInterrupt(), Stopped(signal.SIGTERM), RuntimeError("a bug"), SystemExit(1)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_failed_start_leaves_no_folder(stage1, monkeypatch, place, error):
    monkeypatch.setattr(*place, fails(error))
    assert_leaves_no_folder()


# What every kind of logger, and a profiler, has written by then. wandb is on by default.
CSV_AND_WANDB = "lightning.logger={csv: {target: pytorch_lightning.loggers.CSVLogger}}"
LATE = [(trainer, "make_trainer"), (fit, "record")]
LATE += [(AutoencoderKL, "validation_step"), (AutoencoderKL, "training_step")]


@pytest.mark.parametrize("place", LATE, ids=lambda place: place[1])
def test_a_failed_start_leaves_nothing_of_its_loggers(stage1, monkeypatch, place):
    real = getattr(*place)

    def late(tree: Any, data: Any, model: Any, *own: Any, **rest: Any) -> Any:
        # The first Trainer is made before there is a folder.
        return fails(ResourceError("no"))() if own else real(tree, data, model, *own, **rest)

    monkeypatch.setattr(*place, late if place[1] == "make_trainer" else fails(ResourceError("no")))
    assert_leaves_no_folder(CSV_AND_WANDB, "lightning.trainer.profiler=simple")


def test_a_logger_that_cannot_start_leaves_nothing_of_the_others(stage1, monkeypatch):
    monkeypatch.setattr(CSVLogger, "log_hyperparams", fails(ResourceError("no")))
    assert_leaves_no_folder(CSV_AND_WANDB)


def test_a_model_that_fails_in_validation_leaves_no_folder_beside_wandb(stage1, capsys):
    words = ["lightning.logger={}", "data.params.resolution=4", "model.params.loss.params.discriminator=null"]
    assert "SSIM" in refused(capsys, 2, *words)


@pytest.mark.usefixtures("wandb_ended")
def test_a_run_that_fails_after_a_step_keeps_all_of_it(stage1, monkeypatch):
    real = AutoencoderKL.training_step

    def second_fails(self: AutoencoderKL, *batch: Any) -> Any:
        return fails(ResourceError("no"))() if self.global_step else real(self, *batch)

    monkeypatch.setattr(AutoencoderKL, "training_step", second_fails)
    assert train(CSV_AND_WANDB) == 6
    folder = the_run()
    assert [row["step"] for row in read_metrics(folder.metrics_file)] == ["1"]
    assert [*folder.path.rglob("run-*.wandb")]
    assert [*folder.path.rglob("lightning_logs/*/hparams.yaml")]


def assert_leaves_no_folder(*words: str) -> None:
    with suppress(BaseException):
        assert train(*words) != 0
    assert Path("logs").is_dir()
    assert not [*Path("logs").iterdir()]


def test_a_checkpoint_of_another_model_leaves_no_run(stage1, capsys, begun):
    begun("stage1.yaml")
    file = store.verify(the_run().path).path.rename("elsewhere.ckpt")
    words = ["model.params.decoder.params.base_channels=24", "--allow-change", "model", "lightning.trainer.max_steps=3"]
    assert main.main(["-r", str(file), "-l", "new", *words]) == 4
    assert "another model" in capsys.readouterr().err
    assert not [*Path("new").iterdir()]
    # A validation alone is no run either.
    assert main.main(["-r", str(file), "-l", "new", "--no-train", "lightning.callbacks.images=null"]) == 0
    assert not [*Path("new").iterdir()]


def test_a_run_that_goes_on_keeps_its_folder_when_it_fails(stage1, monkeypatch, begun):
    begun("stage1.yaml")
    before = sorted(the_run().path.rglob("*"))
    monkeypatch.setattr(files, "check_space", fails(ResourceError("no")))
    assert main.main(["-r", str(the_run().path), "lightning.trainer.max_steps=3"]) == 6
    assert sorted(the_run().path.rglob("*")) == before


def test_a_fixed_logvar_changes_with_the_configuration(stage1, capsys):
    assert train("model.params.loss.params.learn_logvar=false") == 0
    key = "model.params.loss.params.logvar"
    words = ["-r", str(the_run().path), f"{key}=1.0", "--allow-change", key, "lightning.trainer.max_steps=3"]
    assert main.main(words) == 0
    assert f"changed: {key}" in capsys.readouterr().out
    assert store.load(store.verify(the_run().path).path)["state_dict"]["loss.logvar"].item() == 1.0


def test_a_file_in_the_place_of_a_folder(stage1, capsys):
    Path("taken").touch()
    for words in (["-l", "taken"], ["-l", "taken/logs"], ["-l", "taken", "-r", "auto"]):
        assert "taken" in refused(capsys, 6, *words)


def test_another_optimizer_is_refused_when_its_groups_differ(stage1, capsys, begun):
    begun("stage1.yaml")
    words = ["model.params.optimizer={target: ldm.optim.optimizers.AdamW, partial: true, params: {lr: 1.0e-3}}"]
    words += ["--allow-change", "model.params.optimizer", "lightning.trainer.max_steps=3"]
    assert main.main(["-r", str(the_run().path), *words]) == 4
    assert "the moments of another optimizer" in capsys.readouterr().err


# Each of these has a process of its own.


def start(*words: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter: one that goes on past the configuration waits for torch to be imported."""
    command = [sys.executable, str(ROOT / "main.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def start_warm(*words: str) -> tuple[int, str]:
    """The exit code and the output of main.py in a fork, which has the imports of the libraries from here."""
    log = Path(tempfile.mkdtemp(dir=".")) / "log"
    program = fork(lambda: as_new_interpreter(ROOT / "main.py", words, dict(os.environ)), log)
    code = program.wait(120)
    return code, program.output()


@pytest.mark.usefixtures("wandb_ended")
def test_paths_that_are_not_utf8(stage1, image_folder, tmp_path, capfd):
    """In all places, through both stages, beside wandb, with what goes on from there."""
    odd = os.fsdecode(b"caf\xe9")
    Path(odd).symlink_to(image_folder)
    logs, pictures = f"L{odd}", f"data.params.train.params.root={tmp_path}/{odd}"
    ended = start("--base", "stage1.yaml", "-l", logs, pictures, "lightning.logger={}")
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert "finished at step 2" in ended.stdout
    assert "wandb: ResourceError: it cannot write to L" in ended.stderr
    (folder,) = Path(logs).iterdir()
    # wandb knows no forks.
    code, said = start_warm("-r", str(folder), "lightning.trainer.max_steps=3", pictures, "lightning.logger=null")
    assert (code, "Traceback" in said) == (0, False), said
    assert "finished at step 3" in said
    assert train(pictures, "lightning.logger={}") == 0
    assert "Traceback" not in capfd.readouterr().err
    assert [*the_run().path.rglob("run-*.wandb")]


def test_stage_2_of_and_in_paths_that_are_not_utf8(stage1, diffusion_tree, tmp_path):
    odd = os.fsdecode(b"L\xe9")
    assert train("-l", odd) == 0
    diffusion_tree["lightning"]["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    Path("stage2.yaml").write_text(to_yaml(diffusion_tree))
    (folder,) = Path(odd).iterdir()
    words = [f"data.params.autoencoder={folder}", f"data.params.cache={tmp_path}/{odd}/cache", "-l", odd]
    code, said = start_warm("--base", "stage2.yaml", *words)
    assert (code, "Traceback" in said) == (0, False), said


def test_a_mistake_takes_less_than_five_seconds(stage1):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = start("--base", "stage1.yaml", "data.params.batchsize=2")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 2
    assert "did you mean 'batch_size'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    # Of the processor, not of the clock on a wall that other tests share.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


NOT_OF_A_START = {
    *("wandb", "tensorboard", "diffusers", "transformers"),  # asked for by name or not at all
    *("rich.traceback", "IPython", "pandas", "hypothesis", "pytest"),
}


@pytest.mark.slow
def test_a_start_imports_no_more_than_it_needs(stage1):
    # Lightning needs torchmetrics, which imports transformers by itself where that is installed.
    code = (
        "import sys, torchmetrics\n"
        "theirs = {'transformers'} & sys.modules.keys()\n"
        "import main\n"
        "assert main.main(['--base', 'stage1.yaml', '--dry-run']) == 0\n"
        f"print('imported:', sorted(({NOT_OF_A_START!r} & sys.modules.keys()) - theirs))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["imported: []"], done.stdout + done.stderr


def test_debug_shows_the_traceback(stage1):
    ended = start("--base", "stage1.yaml", "--debug", "modle.x=1")
    assert ended.returncode == 2
    assert "Traceback" in ended.stderr
    assert "error: modle" in ended.stderr


def test_a_second_process_is_refused(stage1, begun):
    begun("stage1.yaml")
    folder = the_run()
    with folder.owned():
        code, said = start_warm("-r", str(folder.path), "lightning.trainer.max_steps=4")
    assert code == 8
    assert f"process {os.getpid()} on " in said
    state = folder.read_state()
    assert state is not None
    assert state.step == 2


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_the_first_moment_on_ends_the_start_with_nothing_begun(stage1, number):
    command = [sys.executable, str(ROOT / "main.py"), "--base", "stage1.yaml"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: catches(child.pid, number), 60)
        child.send_signal(number)
        _, printed = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 128 + number
    assert f"stopped by {number.name}; nothing is lost" in printed
    assert not [*Path().glob("logs/*")]


def test_what_the_data_fills_in_is_checked_by_its_key(stage1, capsys):
    words = ["model.params.gradient_clip=${data:num_classes}", "data.params.train.params.classes=false"]
    words += ["model.params.encoder.params.latent_channels=${data:num_classes}"]
    assert main.main(["--base", "stage1.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert "model.params.encoder.params.latent_channels" in said
    assert "expected a whole number from 1 up, found null" in said
    assert "model.params.gradient_clip" not in said  # null is allowed there
