import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.dataset import Subset
from ldm.data.sources.arrays import DEBIAN_FASHION_MNIST, FashionMNIST
from ldm.run_folder import RunFolder, RunState
from ldm.runtime.precision import LIMITS, computes_bf16
from scripts.bench import contest, hardware, healthy, quality, steps, tables
from scripts.bench.__main__ import main
from scripts.bench.child import Place, count, serve
from scripts.bench.contest import Case, Side
from scripts.bench.primitives import _Like
from scripts.bench.sides import huggingface, ours, peak
from scripts.bench.sizes import FULL

ROOT = Path(__file__).parents[2]


TABLES = ("stage1", "stage2", "dit", "sampling", "choices", "roofline")


class _Thread(threading.Thread):
    """A side's process, without one: what it imports is there already."""

    exitcode = None

    def kill(self) -> None:
        pass


class _Threads:
    Pipe = staticmethod(multiprocessing.Pipe)

    @staticmethod
    def Process(target, args, daemon):
        connection, *others = args
        own = Connection(os.dup(connection.fileno()))  # the other end is closed when a process has it
        return _Thread(target=serve, args=(own, *others), daemon=daemon)


def test_tensors_of_any_stride_are_made_again():
    weight = torch.randn(6, 5)
    for like in (weight.expand(3, 6, 5), weight.t(), weight[:, 1:3], weight[:0], torch.zeros((), dtype=torch.int64)):
        made = _Like(tuple(like.shape), like.stride(), like.dtype).made("cpu")
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
        if like.is_floating_point() and like.numel():
            assert made.std() > 0


@pytest.fixture
def in_threads(monkeypatch):
    """Sides run in threads: a process of each would import torch and the libraries anew."""
    monkeypatch.setattr(contest.multiprocessing, "get_context", lambda method: _Threads)


@pytest.fixture
def bench_sides(monkeypatch):
    """Found by a process that is told where to look, as it is not in the package of the tests."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    return importlib.import_module("bench_sides")


def test_sides_take_turns_in_processes_of_their_own_and_one_that_fails_is_a_note(tmp_path, bench_sides):
    sides = [
        Side("ldm", partial(bench_sides.counting, tmp_path, "a", 3)),
        Side("broken", bench_sides.broken),
        Side("other", partial(bench_sides.counting, tmp_path, "b", 3)),
    ]
    found, notes = contest.contest(Case("a step", 1, sides), [Place("cpu", False)], 3)
    assert notes == ["a step: without broken: ModuleNotFoundError: No module named 'taming'"]
    assert [(one.side, one.parameters, one.flops) for one in found] == [("ldm", 3, 1024), ("other", 3, 1024)]
    assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in found)
    assert all(one.peak_bytes > 50 * 2**20 for one in found)
    warm_up, timed, counted = "ab", "ab" * 3, "ab"
    assert (tmp_path / "steps").read_text() == warm_up + timed + counted


def test_without_our_own_side_there_is_no_table(in_threads, bench_sides, capsys):
    with pytest.raises(contest.SideFailed, match="ldm: ModuleNotFoundError: No module named 'taming'"):
        contest.contest(Case("a step", 1, [Side("ldm", bench_sides.broken)]), [Place("cpu", False)], 1)
    assert "in broken" in capsys.readouterr().err  # the traceback of the side


@pytest.mark.parametrize("what", TABLES)
def test_each_table_is_printed_and_written(what, in_threads, tmp_path, capsys, monkeypatch):
    """At the smallest size, without the code of others but diffusers."""
    for name in (*LIMITS, hardware.MKL_LIMIT):  # which the first line would name
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tables, "computes_bf16", lambda kind: (False, "it is emulated"))
    assert main([what, "--tiny", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    page = capsys.readouterr().out.lstrip()  # after what Lightning prints in a thread
    assert page.startswith((tmp_path / f"{what}.md").read_text())
    assert re.match(
        r"\d{4}-\d\d-\d\d, .+ \(\w+\), \d+ threads, torch \S+, diffusers \S+; medians of 1\n\n\| step ", page
    )
    assert "- without bf16: it is emulated" in page
    record = json.loads((tmp_path / f"{what}.json").read_text())
    assert (record["table"], record["tiny"], record["machine"]["threads"]) == (what, True, torch.get_num_threads())
    for case in record["cases"]:
        if what == "roofline":
            check_profile(case)
        else:
            check_case(case)
    for missing in {"stage1": ["compvis", "taming"], "stage2": ["compvis"], "dit": ["dit", "sit"]}.get(what, []):
        assert f"- without --{missing}, " in page


def check_case(case):
    """Sides of one case do the same work with networks of the same size."""
    first, *others, product = case["sides"]
    assert first["side"].startswith("ldm")
    assert product["side"] == "matrix product, 256"
    assert product["flops"] == 2 * 256**3
    for other in others:
        if not case["name"].startswith("DiT"):  # whose counterpart in diffusers embeds the noise level in every block
            assert other["parameters"] == first["parameters"]
        assert other["flops"] == pytest.approx(first["flops"], rel=0.6)
        assert other["peak_bytes"] > 0


def check_profile(case):
    kinds = case["kinds"]
    every = kinds.pop("all of these")
    assert {"convolutions, forward", "matrix products"} & {*kinds}
    assert every["flops"] == sum(kind["flops"] for kind in kinds.values()) > 0
    assert every["inside"][0] == pytest.approx(sum(kind["inside"][0] for kind in kinds.values()))
    assert 0 < every["inside"][0] < case["seconds"][0]
    assert all(kind["alone"][0] > 0 for kind in kinds.values())


def test_the_networks_of_the_tables_are_of_the_same_size():
    """At full size, without values; those of CompVis, DiT, SiT and LightningDiT were compared by hand."""
    with torch.device("meta"):
        for size in (FULL.unet, FULL.sampled):
            assert count(ours.make_unet(size)) == count(huggingface.make_unet(size))
        for size in (*FULL.autoencoders, FULL.unet.autoencoder):
            assert count(*ours.coders(size)) == count(huggingface.make_autoencoder(size))
    for size in (FULL.unet, FULL.sampled):
        assert size.autoencoder.resolution == 8 * size.side


@pytest.mark.parametrize(
    ("what", "given", "sides"),
    [
        ("stage1", ["compvis"], [["ldm", "CompVis", "diffusers"], ["ldm", "diffusers"]]),
        ("stage1", ["compvis", "taming"], [["ldm", "CompVis", "diffusers"]] * 2),
        (
            "stage2",
            ["compvis"],
            [["ldm, on the cache", "CompVis, on latents", "CompVis, encoding 32 px", "diffusers, on latents"]],
        ),
        ("dit", ["dit", "sit"], [["ldm", "DiT", "diffusers"], ["ldm", "SiT"], ["ldm"]]),
        ("dit", ["lightningdit"], [["ldm", "diffusers"], ["ldm"], ["ldm", "LightningDiT"]]),
    ],
)
def test_the_code_of_others_takes_part_where_it_is_given(what, given, sides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "compared", lambda cases, *_: json.dumps([[s.name for s in c.sides] for c in cases]))
    folders = [word for name in given for word in (f"--{name}", str(tmp_path))]
    assert main([what, "--tiny", *folders]) == 0
    assert json.loads(capsys.readouterr().out) == sides


def test_transformers_are_compiled_too_but_for_the_smallest(monkeypatch, capsys):
    monkeypatch.setattr(steps, "compared", lambda cases, *_: json.dumps([[s.name for s in c.sides] for c in cases]))
    assert main(["dit"]) == 0
    ours = ["ldm", "ldm, compiled"]
    assert json.loads(capsys.readouterr().out) == [[*ours, "diffusers"], ours, ours]


def test_a_table_compares_with_ours_at_the_same_precision_and_with_ours_in_bf16():
    def measured(side, bf16, seconds, inside=0.0):
        return contest.Measured(side, bf16, 1000, [seconds], [inside], 2**20, 10**9)

    sides = [Side(name, partial(peak.product, 8)) for name in ("ldm", "theirs", "product")]
    found = [measured(side.name, bf16, 1.0 + index) for index, side in enumerate(sides) for bf16 in (False, True)]
    found[1] = measured("ldm", True, 0.5)
    lines = tables.table([tables.Finished(Case("a step", 4, sides), found)]).splitlines()
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    wanted = [header.index(name) for name in ("side", "precision", "times ldm", "times ldm in bf16", "of the peak")]
    assert [[row[place] for place in wanted] for row in rows] == [
        ["ldm", "fp32", "1.00", "2.00", "300%"],
        ["ldm", "bf16", "1.00", "1.00", "600%"],
        ["theirs", "fp32", "2.00", "4.00", "150%"],
        ["theirs", "bf16", "4.00", "4.00", "150%"],
        ["product", "fp32", "", "", "100%"],
        ["product", "bf16", "", "", "100%"],
    ]


def test_another_ldm_is_imported_from_its_folder(tmp_path):
    """In a process of its own, although ours is installed, and although theirs has no __init__.py."""
    (tmp_path / "ldm" / "models").mkdir(parents=True)
    (tmp_path / "ldm" / "models" / "autoencoder.py").write_text("import missing.part\nNAME = 'theirs'\n")
    code = (
        "import sys; from pathlib import Path; from scripts.bench.sides import imports\n"
        "imports.package('ldm', Path(sys.argv[1]))\n"
        "imports.stand_in('missing.part', thing=1); imports.stand_in('json.decoder', thing=1)\n"
        "from ldm.models.autoencoder import NAME; import missing.part, json.decoder\n"
        "print(NAME, missing.part.thing, json.decoder.JSONDecoder.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "theirs 1 JSONDecoder\n", done.stderr


@pytest.mark.parametrize("flags", ["fpu avx2", "avx2 avx512f", "avx2 avx512f avx512_bf16", "avx512_bf16 amx_bf16"])
def test_the_processor_is_named_by_its_widest_instructions(flags):
    about = ["model name\t: a processor", f"flags\t\t: {flags}"]
    assert hardware.kind(about) == flags.split()[-1]


def test_instructions_that_are_switched_off_are_named(monkeypatch):
    for name in (*LIMITS, hardware.MKL_LIMIT):
        monkeypatch.delenv(name, raising=False)
    assert "AVX2" not in hardware.hardware("cpu")
    for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.setenv(name, "AVX2")
    assert ", ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2), " in hardware.hardware("cpu")


def test_a_folder_of_others_that_is_not_there_is_refused(capsys, tmp_path):
    assert main(["dit", "--sit", str(tmp_path / "none")]) == 2
    assert "--sit: expected a folder with the code of willisma/SiT" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_with_processes_of_their_own(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "sampling", "--tiny", "--repeats", "2"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    sides = json.loads((tmp_path / "logs/bench/sampling.json").read_text())["cases"][0]["sides"]
    # Where bf16 is native each side is also measured in it.
    for bf16 in {False, computes_bf16("cpu").native}:
        assert [side["side"] for side in sides if side["bf16"] == bf16] == ["ldm", "diffusers", "matrix product, 256"]


@pytest.mark.parametrize("arguments", [["speed"], ["stage1", "--tinny"], []])
def test_mistakes_are_one_message(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", ["--guidance nan", "--guidance 2 inf", "--steps 0", "--number -1", "--epochs nan"])
def test_numbers_out_of_range_are_refused_before_any_training(words, capsys):
    assert main(["quality", *words.split()]) == 2
    error = capsys.readouterr().err
    assert f"{words.split()[0]}: expected" in error
    assert f"found {words.split()[-1]!r}" in error


def test_the_page_of_healthy_runs_has_what_its_commands_make():
    runs = healthy.commands()
    assert {file.stem for file in healthy.FOLDER.glob("*.csv")} == {*runs}
    assert {figure.beside for figure in healthy.FIGURES.values()} | {*healthy.FIGURES} == {*runs}
    pictures = {file.stem: file.stat().st_size for file in healthy.FOLDER.glob("*.png")}
    assert {*pictures} == {*healthy.FIGURES}
    assert max(pictures.values()) < 150 * 1024
    assert set(re.findall(r"\]\(healthy/(\w+)\.png\)", healthy.PAGE.read_text())) == {*healthy.FIGURES}


def test_the_page_of_healthy_runs_is_made_anew_from_finished_runs(tmp_path, monkeypatch, capsys):
    """Without training: the runs of its pictures, with the metrics that they had."""
    for name in healthy.commands():
        run = RunFolder(tmp_path / "logs" / f"2026-01-01T00-00-00_{name}")
        sheet = (
            run.images / "val" / f"{'samples' if 'train/kl' not in (kept := metrics_of(name)) else 'all'}_00000100.png"
        )
        run.make()
        run.config_file.touch()
        Image.fromarray(np.zeros((4 * healthy.ROW + 2, 8 * healthy.ROW + 2, 3), np.uint8)).save(sheet)
        run.metrics_file.write_text(kept)
        run.write_state(RunState("finished"))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(healthy, "ROOT", tmp_path)
    monkeypatch.setattr(healthy, "FOLDER", tmp_path / "docs")
    assert main(["healthy", "--logdir", str(tmp_path / "logs")]) == 0
    assert {file.stem for file in (tmp_path / "docs").glob("*.png")} == {*healthy.FIGURES}
    assert all((tmp_path / "docs" / f"{name}.csv").read_text() == metrics_of(name) for name in healthy.commands())
    assert "docs/kl_too_high.png: " in capsys.readouterr().out


def metrics_of(name: str) -> str:
    return (ROOT / "docs" / "healthy" / f"{name}.csv").read_text()


@pytest.mark.slow
def test_the_folder_is_a_program_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: bench ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_quality_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    """The whole path, small: 2,000 images and a few steps teach neither stage much, but more than nothing."""
    monkeypatch.chdir(tmp_path)  # where the latent cache goes
    part = [*range(10_000)]
    monkeypatch.setattr(quality, "FashionMNIST", lambda train=True: Subset(FashionMNIST(train=train), part))
    source = "{target: ldm.data.sources.arrays.FashionMNIST}"
    subset = f"{{target: ldm.data.dataset.Subset, params: {{dataset: {source}, indices: %s}}}}"
    small = [
        "lightning.trainer.max_steps=60",
        "lightning.trainer.val_check_interval=60",
        "lightning.logger=null",
        f"data.params.train={subset % [*range(2000)]}",
        "data.params.num_validation=100",
    ]
    few = ["--number", "5", "--epochs", "3", "--steps", "4", "--guidance", "1", "2"]
    assert main(["quality", "--device", "cpu", *few, *small]) == 0
    output = capsys.readouterr().out
    (record,) = tmp_path.glob("logs/*_fashion_mnist_diffusion/quality/quality.json")
    found = json.loads(record.read_text())
    rows = found["rows"]
    assert found["classifier_test_accuracy"] > 0.8
    assert rows["real"]["accuracy"] > 0.7
    distances = [rows[name]["distance"] for name in ("real", "reconstructions of these", "samples, guidance 1")]
    assert distances == sorted(distances)
    assert "| samples, guidance 2 |" in output
    assert (record.parent / "pictures.png").stat().st_size > 1000
