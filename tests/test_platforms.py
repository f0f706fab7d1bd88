"""macOS, Apple's GPU and Windows, as far as they can be imitated on Linux."""

import ast
import ctypes
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.accelerators import CPUAccelerator, MPSAccelerator

from ldm.autoencoder.metrics import Output, Perceptual, standard
from ldm.autoencoder.posterior import DiagonalGaussian, latent_sums, statistics
from ldm.autoencoder.quantizer import Quantized, usage
from ldm.data.datamodule import ImageDataModule
from ldm.data.sources.folder import ImageFolder
from ldm.diffusion.noise_levels import LogitNormal, LogNormal
from ldm.diffusion.noise_schedules import SqrtLinear
from ldm.diffusion.objectives import DDPM, EDM
from ldm.evaluation.agreement import accuracy
from ldm.runtime import launcher, signals
from ldm.runtime.float64 import double, home
from ldm.runtime.validation_metrics import ValidationMetrics
from ldm.sampling.steps import log_ratios
from ldm.training import trainer
from tests.apple import MPS, apple

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
# Of os, signal and fcntl, what macOS lacks.
LINUX_ONLY = {
    *("sigwaitinfo", "sigtimedwait", "sched_getaffinity", "sched_setaffinity", "sync_file_range", "posix_fadvise"),
    *("posix_fallocate", "epoll", "memfd_create", "pidfd_open", "copy_file_range", "setresuid", "setresgid"),
    *("F_OFD_SETLK", "F_OFD_SETLKW", "prctl", "O_DIRECT", "O_TMPFILE", "malloc_trim", "mallopt"),
}


# ---- Apple's GPU -------------------------------------------------------------------------------------------------


def test_the_stand_in_refuses_float64_as_apple_does():
    with apple() as device, pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=device).double()


def test_float64_is_held_where_it_exists():
    assert home(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert home(MPS) == torch.device("cpu")
    with apple() as device:
        moved = double(torch.full((3,), 0.1, device=device))
    assert moved.device.type == "cpu"
    assert moved.dtype == torch.float64


def on_both(compute: Any) -> tuple[Any, Any]:
    """What `compute` makes on the CPU, and on Apple's GPU, taken to the CPU."""
    usual = compute(torch.device("cpu"))
    with apple() as device:
        there = compute(device)
        there = {name: value.cpu() for name, value in there.items()} if isinstance(there, dict) else there
        there = there.cpu() if isinstance(there, torch.Tensor) else there
    return usual, there


@pytest.mark.parametrize(
    "compute",
    [
        lambda device: latent_sums(DiagonalGaussian(torch.linspace(-1, 1, 64).reshape(2, 4, 2, 4).to(device))),
        lambda device: usage(torch.tensor([3, 0, 5, 1]).to(device)),
        lambda device: LogitNormal()(torch.linspace(0.1, 0.9, 5).to(device)),
        lambda device: LogNormal()(torch.linspace(0.1, 0.9, 5).to(device)),
        lambda device: DDPM(SqrtLinear()).time_at(torch.tensor([0.5, 2.0, 30.0]).to(device)),
        lambda device: torch.tensor(log_ratios(DDPM(SqrtLinear()), torch.tensor([1000.0, 250.0, 3.5]).to(device))),
        lambda device: torch.tensor(log_ratios(EDM(), torch.tensor([80.0, 1.0, 0.01]).to(device))),
        lambda device: torch.tensor(accuracy(torch.eye(3).to(device), torch.tensor([0, 1, 1]).to(device))),
    ],
)
def test_what_is_computed_in_float64_is_the_same_there(compute):
    usual, there = on_both(compute)
    torch.testing.assert_close(there, usual, rtol=0, atol=0)


def test_validation_is_measured_there():
    """But for PSNR and SSIM, which torchmetrics computes by calls that the stand-in cannot see."""
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def measured(device: torch.device) -> dict[str, float]:
        metrics = ValidationMetrics(
            standard(codebook=True), {"psnr": None, "ssim": None, "distance": Perceptual(Distance())}
        )
        for _ in range(2):  # the second begins anew
            metrics.start(device)
            for rows in (slice(0, 3), slice(3, 5)):
                indices = torch.tensor([0, 1, 1]).to(device)
                codes = Quantized(torch.zeros(1).to(device), indices, torch.zeros(1).to(device), 0.0, 4)
                shown, original = (0.9 * images[rows]).to(device), images[rows].to(device)
                losses = {"l1": (shown - original).abs().mean((1, 2, 3))}
                metrics.update({"image": original}, Output(shown, codes, partial(dict, losses)))
            found = metrics.compute()
        return {name: float(value) for name, value in found.items()}

    usual = measured(torch.device("cpu"))
    with apple() as device:
        there = measured(device)
    assert {*usual} == {f"val/{name}" for name in ("l1", "perplexity", "codes_used", "distance")}
    assert there == pytest.approx(usual, rel=1e-6)


class Distance(torch.nn.Module):
    """With a weight, which lies where its metric does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.weight * (a - b)).square().mean((1, 2, 3))


def test_statistics_of_latents_are_added_up_there():
    """As validation does: the sums' home is chosen by the module's device."""
    with apple() as device:
        total = torch.zeros(3, 2, dtype=torch.float64, device=home(device))
        for seed in range(3):
            moments = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
            total += latent_sums(DiagonalGaussian(moments.to(device)))
    assert all(np.isfinite(statistics(total)["std"]))


def test_nothing_else_turns_a_tensor_into_float64():
    """`.double()` and `.to(torch.float64)` fail on Apple's GPU: ldm.runtime.float64 is the one place for them."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "float64.py" or not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            words = [ast.unparse(argument) for argument in (*node.args, *(word.value for word in node.keywords))]
            device = next((ast.unparse(word.value) for word in node.keywords if word.arg == "device"), "")
            made_there = "torch.float64" in words and device and "home(" not in device
            converted = name == "double" or (name in ("to", "type") and "torch.float64" in words)
            place = f"{path}:{node.lineno}: {ast.unparse(node)}"
            assert not made_there, place
            assert not converted, place


def test_auto_is_the_cpu_of_a_mac(monkeypatch, caplog):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    trainer._accelerator.cache_clear()
    data: Any = type("Data", (), {"accumulation": lambda self, world_size: 1})()
    for _ in range(2):
        made = trainer.make_trainer({"seed": 1, "lightning": {"trainer": {"max_steps": 3}}}, data, LightningModule())
        assert isinstance(made.accelerator, CPUAccelerator)
    assert caplog.text.count("lightning.trainer.accelerator=mps") == 1
    assert trainer._accelerator("mps") == "mps"
    trainer._accelerator.cache_clear()


# ---- macOS -------------------------------------------------------------------------------------------------------


def test_what_only_linux_has_is_asked_for_on_linux_alone():
    for path in SOURCES:
        source = path.read_text()
        names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        for name in names & LINUX_ONLY:
            guarded = "sys.platform" in source or f'"{name}"' in source
            assert guarded, f"{path} uses {name}, which macOS lacks, and does not ask for the platform"


def test_processes_do_without_what_only_linux_has(monkeypatch, tmp_path):
    """No prctl, no sigwaitinfo, no /proc: launchers and workers are then not tied to one another, but work."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(signal, "sigwaitinfo")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("a library of Linux was asked for"))
    monkeypatch.setattr(launcher, "Path", lambda path: tmp_path / "nothing" / str(path).lstrip("/"))
    handled: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.update({number: handler}))
    launcher.die_with_parent()
    signals.ignore_in_worker(0)
    assert handled == {number: signal.SIG_IGN for number in signals.STOPPING if number != signal.SIGTERM}
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert [*launcher._siblings()] == []
    assert launcher._state(1) == ""


def test_what_loader_workers_get_can_be_pickled(image_folder):
    """macOS starts them anew instead of forking them."""
    data = ImageDataModule(ImageFolder(image_folder), batch_size=4, resolution=16, num_workers=1, num_validation=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        dataset, collate, begin = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        first = collate([dataset[(0, 1)]])
        torch.testing.assert_close(first["image"], loader.collate_fn([loader.dataset[(0, 1)]])["image"])
        assert begin is signals.ignore_in_worker


# ---- Windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["import main", "from ldm.cli import program"])
def test_windows_is_sent_to_wsl(words):
    code = f"import sys; sys.platform = 'win32'; {words}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "WSL 2" in ended.stderr
    assert "Traceback" not in ended.stderr
