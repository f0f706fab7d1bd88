"""What `auto` becomes on which device, who is warned, and that a run keeps what it started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from ldm.checkpoints import store
from ldm.config.load import load, to_yaml
from ldm.errors import ConfigError
from ldm.runtime import precision
from ldm.runtime.precision import TYPES, Answer, settle, settled

ROOT = Path(precision.__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def cpu(monkeypatch):
    """Say whether the processor computes bf16 natively."""
    monkeypatch.setattr(precision, "_device", lambda accelerator: "cpu")
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 27.4)

    def says(native: bool | None) -> None:
        monkeypatch.setattr(precision, "_cpu_says", lambda: native)

    return says


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true"), (None, "32-true")])
@pytest.mark.parametrize("asked", [{}, {"precision": None}, {"precision": "auto"}])
def test_auto_is_the_default_and_becomes_what_the_processor_is_good_at(cpu, native, expected, asked):
    cpu(native)
    trainer = {"max_steps": 3, **asked}
    (note,) = settle(trainer, is_new=True)
    assert trainer == {"max_steps": 3, "precision": expected}
    assert note.startswith(f"precision: {expected}, since ")
    assert ("27 times" in note) == (native is None)


def test_in_doubt_it_is_measured(cpu, monkeypatch):
    cpu(None)
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 0.51)
    assert precision.computes_bf16("cpu") == Answer(
        True, "a matrix product in bf16 takes 0.51 times as long as in float32"
    )


def test_a_run_that_goes_on_and_says_nothing_stays_in_float32(cpu):
    cpu(True)
    trainer: dict[str, object] = {}
    assert settle(trainer, is_new=False) == []
    assert trainer == {"precision": "32-true"}


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "bf16"])
def test_emulated_bf16_is_warned_of_with_the_factor_and_the_key(cpu, asked):
    cpu(False)
    (warning,) = settle(trainer := {"precision": asked}, is_new=True)
    assert trainer == {"precision": asked}
    assert "27 times as long" in warning
    assert warning.endswith("lightning.trainer.precision=32-true")
    (warning,) = settle({"precision": asked}, is_new=False)
    assert warning.endswith("lightning.trainer.precision=32-true --allow-change lightning.trainer.precision")
    cpu(True)
    assert settle({"precision": asked}, is_new=True) == []


@pytest.mark.parametrize("asked", ["16-mixed", "16", 16])
def test_float16_on_a_processor_is_refused(cpu, asked):
    cpu(True)
    with pytest.raises(ConfigError, match=r"lightning\.trainer\.precision: 16\S* is for GPUs.*precision=auto$"):
        settle({"precision": asked}, is_new=True)
    remedy = r"Write lightning\.trainer\.precision=bf16-mixed --allow-change lightning\.trainer\.precision$"
    with pytest.raises(ConfigError, match=remedy):  # that is what the run was computed in
        settle({"precision": asked}, is_new=False)


@pytest.mark.parametrize("asked", ["32-true", 32, 64])
def test_what_is_asked_for_stays(cpu, asked):
    cpu(False)
    assert settle(trainer := {"precision": asked}, is_new=True) == []
    assert trainer == {"precision": asked}


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_gpus(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    (note,) = settle(trainer := {}, is_new=True)
    assert (trainer["precision"], "Some GPU" in note) == (expected, True)
    # The processor is asked where it is the device.
    monkeypatch.setattr(precision, "_cpu_says", lambda: not native)
    settle(trainer := {"accelerator": "cpu"}, is_new=True)
    assert trainer["precision"] != expected


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "bf16"])
def test_a_gpu_that_emulates_bf16_is_warned_of(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for native in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        found = settle(trainer := {"precision": asked}, is_new=True)
        assert trainer == {"precision": asked}
        assert len(found) == (not native)
        assert all("Tesla T4 emulates" in note and note.endswith("precision=32-true") for note in found)
    assert settle({"precision": "16-mixed"}, is_new=True) == []


def test_apples_gpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settle(trainer := {"accelerator": "mps"}, is_new=True)
    assert trainer["precision"] == "32-true"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_programs_that_sample_have_the_same_words(cpu, native, expected):
    cpu(native)
    assert settled("32-true", "cpu") == ("32-true", [])
    found, (note,) = settled("auto", "cpu")
    assert (found, TYPES[found] == torch.bfloat16) == (expected, native)
    assert note.startswith(f"precision: {expected}, since this processor")
    found, notes = settled("bf16-mixed", "cpu")
    assert (found, len(notes)) == ("bf16-mixed", not native)
    assert all(note.startswith("warning: --precision is bf16-mixed, which this processor emulates") for note in notes)
    assert all(note.endswith("27 times as long as in float32. Use --precision 32-true") for note in notes)
    # Nobody has tried it on others, where it is neither chosen nor advised against.
    assert settled("auto", "mps")[0] == "32-true"
    assert settled("bf16-mixed", "mps") == ("bf16-mixed", [])


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_torch_without_the_private_probes_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delattr(torch.cpu, name)
    assert precision._cpu_says() is None


@pytest.mark.parametrize("capability", ["SVE256", "DEFAULT"])
@pytest.mark.parametrize("machine", ["arm64", "aarch64", "ppc64le"])
def test_other_processors_are_measured(monkeypatch, machine, capability):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert precision._cpu_says() is None


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_an_x86_processor_without_avx2_has_no_bf16(monkeypatch, machine):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision._cpu_says() is False


def test_the_measurement_changes_no_state():
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.get_num_threads()
    assert 0 < precision.bf16_slowdown() < 1e4
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


def test_the_configuration_takes_auto_and_no_other_new_word(tmp_path):
    file = ROOT / "configs" / "quickstart" / "autoencoder.yaml"
    load([file], ["lightning.trainer.precision=auto"]).check()
    with pytest.raises(ConfigError, match=r"lightning\.trainer\.precision.*'automatic'"):
        load([file], ["lightning.trainer.precision=automatic"]).check()


def test_a_run_holds_the_answer_and_a_resumed_one_keeps_it(cpu, autoencoder_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    autoencoder_tree["lightning"]["trainer"] |= {"precision": "auto", "max_steps": 2, "val_check_interval": 2}
    Path("run.yaml").write_text(to_yaml(autoencoder_tree))
    cpu(True)
    assert main.main(["--base", "run.yaml"]) == 0
    assert capsys.readouterr().out.count("precision: bf16-mixed") == 1
    (run,) = Path("logs").iterdir()
    assert load([run / "configs" / "config.yaml"]).resolved()["lightning"]["trainer"]["precision"] == "bf16-mixed"
    cpu(False)
    assert main.main(["-r", str(run), "--base", "run.yaml", "lightning.trainer.max_steps=3"]) == 0
    said = capsys.readouterr().out
    assert "precision: " not in said
    assert "27 times as long" in said
    (last,) = (run / "checkpoints").glob("*3*.ckpt")
    assert store.load(last)["ldm"]["config"]["lightning"]["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.slow
def test_as_a_processor_without_bf16(autoencoder_tree, tmp_path):
    """The whole first run as AVX2 alone computes it."""
    del autoencoder_tree["lightning"]["trainer"]["precision"]
    (tmp_path / "run.yaml").write_text(to_yaml(autoencoder_tree))
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--base", "run.yaml"],
        cwd=tmp_path,
        env=os.environ | AVX2 | {"WANDB_MODE": "disabled"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "precision: 32-true, since this processor has no bf16 instructions" in done.stdout
    assert "finished at step 12" in done.stdout


@pytest.mark.slow
def test_the_quickstart_as_a_processor_without_bf16(tmp_path):
    """A few steps of its own first stage."""
    few = ["lightning.trainer.max_steps=3", "lightning.trainer.val_check_interval=3", "data.params.num_workers=0"]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "main.py"), "--base"),
            *(str(ROOT / "configs" / "quickstart" / "autoencoder.yaml"), *few, "lightning.trainer.limit_val_batches=2"),
        ],
        cwd=tmp_path,
        env=os.environ | AVX2 | {"WANDB_MODE": "disabled"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "precision: 32-true, since this processor has no bf16 instructions" in done.stdout
    assert "finished at step 3" in done.stdout
