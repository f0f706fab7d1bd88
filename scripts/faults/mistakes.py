"""Faults of whoever writes the configuration: forty mistakes, each to be answered by name before anything is built."""

import resource
import subprocess
import sys

from scripts.faults.harness import Place, fault
from scripts.faults.interpreter import ROOT
from scripts.faults.processes import demand
from scripts.faults.runs import Run, last_line
from scripts.faults.tiny import stage1

Edit = str | tuple[str, str]
"""An override, or a change of the file's text: (old, new)."""

# (edit, what the answer has to say): where it stands (file:line, or the override itself) is asked for in every case.
MISTAKES: tuple[tuple[Edit, tuple[str, ...]], ...] = (
    # the shape of the file
    (("seed: 23", "seed: 23\nseed: 24"), ("seed", "duplicate")),
    (("seed: 23", "seed: !!python/name:os.system"), ("seed", "refused")),
    (("seed: 23", "seed: !include other.yaml"), ("seed", "tag")),
    (("seed: 23", "seed: *anchor"), ("alias",)),
    (("seed: 23", "\tseed: 23"), ("not valid YAML",)),
    (("seed: 23", "seed: [23"), ("not valid YAML",)),
    (("seed: 23", "seed: 012"), ("seed", "ambiguous", "write 12")),
    (("seed: 23", "seed: 23\na.b: 1"), ("without dots", "a.b")),
    # sections and nodes
    (("seed: 23", "seed: 23\nmodle: {}"), ("modle", "did you mean 'model'")),
    (("\ndata:", "\ndate:"), ("date", "did you mean 'data'")),
    (("seed: 23", "seed: abc"), ("seed", "expected a whole number", "'abc'")),
    (("seed: 23", "seed: 2.5"), ("seed", "expected a whole number", "2.5")),
    (("name: tiny_autoencoder", "name: 7"), ("name", "expected str")),
    ("model=unet", ("model", "target", "'unet'")),
    ("data.parms={}", ("data.parms", "did you mean 'params'")),
    ("data.params=[1]", ("data.params", "expected a mapping")),
    ("model.params.encoder.partial=1", ("model.params.encoder.partial", "true or false")),
    ("data.target=[a]", ("data.target", "dotted class name")),
    ("data.target=ImageDataModule", ("data.target", "dotted name")),
    ("data.target=my_data.Images", ("data.target", "allow-list", "--trust")),
    ("data.target=ldm.data.datamodul.ImageDataModule", ("data.target", "did you mean 'datamodule'")),
    ("data.target=ldm.data.datamodule.ImageDataModul", ("data.target", "did you mean 'ImageDataModule'")),
    ("model.params.optimizer.target=torch.optim.Adm", ("model.params.optimizer.target", "did you mean")),
    # lightning
    ("lightning.trainr={}", ("lightning.trainr", "did you mean 'trainer'")),
    ("lightning.trainer.max_step=3", ("lightning.trainer.max_step", "did you mean 'max_steps'")),
    ("lightning.trainer.max_steps=many", ("lightning.trainer.max_steps", "whole number", "'many'")),
    ("lightning.trainer.logger=false", ("lightning.trainer.logger", "lightning.logger")),
    ("lightning.callbacks.x=text", ("lightning.callbacks.x", "target", "'text'")),
    ("lightning.strategy=3", ("lightning.strategy", "int 3")),
    # parameters
    ("data.params.batchsize=8", ("data.params.batchsize", "did you mean 'batch_size'")),
    ("data.params.batch_size=many", ("data.params.batch_size", "expected a whole number", "'many'")),
    ("data.params.batch_size=8.5", ("data.params.batch_size", "expected a whole number", "8.5")),
    ("data.params.batch_size=true", ("data.params.batch_size", "expected a whole number", "bool")),
    ("data.params.batch_size=null", ("data.params.batch_size", "expected a whole number", "null")),
    (("  channels: 8", "  chanels: 8"), ("chanels", "did you mean 'channels'")),
    ("model.params.encoder.params.channel_mult=[1,x]", ("channel_mult.1", "'x'")),
    ("model.params.encoder=Encoder", ("model.params.encoder", "'Encoder'")),
    ("seed.x=1", ("seed.x", "int 23")),
    # references
    ("data.params.batch_size=${sed}", ("data.params.batch_size", "did you mean 'seed'")),
    ("name=${name}", ("name", "Recursive")),
    ("name=${oc.env:HOME}", ("name", "refused")),
    ("data.params.seed=${seed", ("data.params.seed", "closing }")),
    ("data.params.train.params.root=${newest:logs/*_kl}", ("data.params.train.params.root", "logs/*_kl")),
    ("data.params.num_workers=${data:num_items}", ("data.params.num_workers", "its own facts")),
    ("model.params.encoder.params.in_channels=4", ("in_channels", "${data:channels}")),
)


@fault(37, "mistakes in the configuration")
def mistakes(place: Place) -> str:
    """Typing errors, wrong types, duplicate keys, unknown targets, bad references, in files and on the command line;
    each given to a new interpreter.

    Expected: code 2 within 5 s of processor time (where the classes have to be imported to tell: within 3 s more than
    importing torch and Lightning takes), one message with the key, the file and line or the override, what was expected
    or the nearest right name; no traceback, nothing written.
    """
    _, imports = _timed([sys.executable, "-c", "import torch, pytorch_lightning"])
    limit, slowest = max(5.0, imports + 3.0), 0.0
    for edit, said in MISTAKES[:: 15 if place.figures.quick else 1]:
        with place.trial(edit if isinstance(edit, str) else edit[1].strip()):
            slowest = max(slowest, _demand_answered(place, edit, said, limit))
    return f"answered, in {slowest:.1f} s of processor time at most; the imports alone take {imports:.1f} s"


def _demand_answered(place: Place, edit: Edit, said: tuple[str, ...], limit: float) -> float:
    run = Run(place.new("run"), stage1(place.lab))
    words, where = [], f"{run.file}:"
    if isinstance(edit, str):
        words, where = [edit], f"command line: {edit}"
    else:
        text = run.file.read_text()
        demand(edit[0] in text, f"the catalogue is wrong: {edit[0]!r} is not in the file")
        run.file.write_text(text.replace(*edit, 1))
    line = [sys.executable, str(ROOT / "main.py"), "--base", str(run.file), "--logdir", str(run.logs), *words]
    ended, took = _timed(line)
    answer = ended.stderr
    demand(ended.returncode == 2, f"exit code {ended.returncode}: {last_line(answer)}")
    missing = [part for part in (where, *said) if part not in answer]
    demand(not missing, f"{missing} not in: {answer.strip()[-400:]}")
    demand("Traceback" not in answer, "a traceback")
    demand(not run.logs.exists() or not any(run.logs.iterdir()), "something was written")
    demand(took < limit, f"took {took:.1f} s, more than {limit:.1f} s")
    return took


def _timed(line: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Do it; also the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
