"""scripts/reconstruct_ema.py: from snapshots to a checkpoint that samples."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoints import store
from ldm.cli import ema as script
from ldm.optim.ema import power_exponent
from ldm.sampling.pipeline import Pipeline


@pytest.fixture
def run(make_runs):
    """A stage-2 run with three snapshots of two averages."""
    runs = make_runs()
    for step in (10, 20, 30):
        average = {name: value * step for name, value in runs.module.ema.average.state_dict().items()}
        state = {
            "averages": [average, {name: value / 2 for name, value in average.items()}],
            "exponents": [power_exponent(0.05), power_exponent(0.1)],
            "images_seen": step * 8,
        }
        store.save(runs.diffusion / "averages" / f"step={step:08d}.ckpt", state)
    return runs


def test_what_it_writes_can_be_sampled_from(run, capsys):
    assert script.main(["-r", str(run.diffusion), "--std", "0.1", "0.05", "--step", "20"]) == 0
    wide, narrow = (Path(line) for line in capsys.readouterr().out.split())
    assert wide == run.diffusion / "averages" / "std=0.1_step=00000020.ckpt"
    weights = run.module.ema.average.state_dict()
    for path, factor in ((wide, 10), (narrow, 20)):
        pipeline = Pipeline.load(path)
        assert pipeline.origin["step"] == 20
        for name, value in pipeline.denoiser.state_dict().items():
            torch.testing.assert_close(value, weights[name] * factor, rtol=1e-4, atol=1e-5)
    # The run's own checkpoints are left alone.
    assert store.verify(run.diffusion).path.parent.name == "checkpoints"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--std", "0.5"], 2, "less than 0.289"),
        (["--std", "0.1", "--step", "15"], 2, "there are 10, 20, 30"),
        *((["--std", "0.1", "--step", number], 2, "--step: expected a whole number") for number in ("0", "-1", "x")),
        (["--sdt", "0.1"], 2, "--std"),
    ],
)
def test_mistakes_are_one_message(run, capsys, arguments, code, message):
    assert script.main(["-r", str(run.diffusion), *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("std", ["0", "-0.1", "0.2887", "nan", "x"])
def test_the_width_is_checked_before_the_run_is_read(capsys, std):
    assert script.main(["-r", "nowhere", "--std", "0.1", std]) == 2
    message = capsys.readouterr().err
    assert "--std: expected more than 0 and less than 0.289" in message
    assert repr(std) in message


def test_a_run_without_snapshots(runs, capsys):
    assert script.main(["-r", str(runs.diffusion), "--std", "0.1"]) == 4
    assert "EMASnapshots" in capsys.readouterr().err
