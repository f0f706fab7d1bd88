"""ldm.cli.demo and demo_page without a browser: the command line, the port, and what the controls do."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import demo, demo_page
from ldm.cli.demo_line import Line
from ldm.cli.demo_models import Models
from ldm.cli.demo_page import Page
from ldm.cli.demo_request import Constants, Wish
from ldm.errors import CheckpointError, ConfigError
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline

ROOT = Path(demo.__file__).parents[2]


@pytest.fixture
def page(runs, make_runs, tmp_path):
    """A page of two runs, `tiny` with classes and `plain` without, built and not served."""
    plain = make_runs(classes=None)
    models = Models({"tiny": str(runs.diffusion), "plain": str(plain.diffusion), "none": "nowhere"}, Pipeline.load)
    made = Page(models, Line(), Constants(), tmp_path)
    made.build()
    yield made
    made.line.close()


def asks(page: Page, visitor: str = "a", model: str = "tiny", history: Any = (), editor: Any = None, **settings: Any):
    """What `make` answers to these settings, as an asynchronous iterator."""
    values = {**{name: getattr(Wish(), name) for name in page.controls.of_wish}, "steps": 3, "number": 2, "label": 0}
    request = SimpleNamespace(session_hash=visitor)
    return page.make(request, model, [*history], editor, None, None, *({**values, **settings}.values()))


async def all_of(answers: Any) -> list[Any]:
    return [answer async for answer in answers]


def status(page: Page, answers: list[Any]) -> str:
    """The last that is said of a request."""
    return [answer[page.controls.status] for answer in answers if page.controls.status in answer][-1]


def test_pictures_settings_and_command(page, runs):
    answers = asyncio.run(all_of(asks(page, label=2, guidance=2, seed=7)))
    assert "2 pictures in" in status(page, answers)
    last = answers[-1]
    history = last[page.history]
    expected = generate(Pipeline.load(runs.diffusion), [7, 8], [{"class_label": 2}] * 2, steps=3, guidance=Guidance(2))
    for one, made in zip(history, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(one.file)), made.image)
    assert last[page.settings] == (
        "<dl><dt>Model</dt><dd>tiny</dd><dt>Class</dt><dd>Ankle boot</dd><dt>Seed</dt><dd>7</dd>"
        "<dt>Sampler</dt><dd>ddim, 3 steps</dd><dt>Guidance</dt><dd>2</dd><dt>Size</dt><dd>16</dd></dl>"
    )
    assert "--classes</span> &#x27;Ankle boot&#x27; <span" in last[page.command]
    assert answers[0][page.controls.stop]["interactive"] is True
    assert last[page.controls.stop]["interactive"] is False


def test_new_pictures_come_first_and_a_click_shows_its_settings(page):
    first = asyncio.run(all_of(asks(page, number=1)))[-1][page.history]
    both = asyncio.run(all_of(asks(page, number=1, seed=9, history=first)))[-1][page.history]
    assert [one.settings["Seed"] for one in both] == ["9", "0"]
    assert "<dd>0</dd>" in page.show(both, SimpleNamespace(index=1))[page.settings]


def test_errors_are_said_and_the_page_goes_on(page, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text: warned.append(text))
    wrong = [
        ({"steps": 0}, "--steps: expected a whole number of 1 or more"),
        ({"schedule": "compvis", "steps": 7}, "expects a proper divisor of 1000; found 7"),
        ({"model": "none"}, "nowhere: no such file or folder"),
        ({"width": 13, "height": 16}, "size 16 x 13"),
        ({"width": 33, "height": 16}, "width and height: expected 32 at most on this page, found 33"),
        ({"guidance": 1e38}, "not finite"),
    ]
    for settings, message in wrong:
        answers = asyncio.run(all_of(asks(page, **settings)))
        assert message in status(page, answers)
        assert message in warned.pop()
        assert answers[-1][page.controls.generate]["interactive"] is True
    assert "2 pictures" in status(page, asyncio.run(all_of(asks(page))))


def test_a_fault_of_ours_is_told_without_its_traceback(page, monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise KeyError("<secret>")

    monkeypatch.setattr(gr, "Warning", lambda text: None)
    monkeypatch.setattr(demo_page.demo_request, "carried_out", fail)
    said = status(page, asyncio.run(all_of(asks(page))))
    assert "this failed (KeyError); the terminal of the server says more" in said
    assert "secret" not in said
    assert "KeyError: '<secret>'" in capsys.readouterr().err


def test_two_visitors_wait_for_each_other_and_get_their_own(page):
    async def both() -> tuple[list[Any], list[Any]]:
        return await asyncio.gather(
            all_of(asks(page, "a", steps=60, seed=1)), all_of(asks(page, "b", model="plain", steps=60, seed=50))
        )

    one, other = asyncio.run(both())
    told = [answer.get(page.controls.status, "") for answer in [*one, *other]]
    assert any("Waiting: 1 request before yours" in text for text in told)
    assert any("Step " in text for text in told)
    assert [made.settings["Seed"] for made in one[-1][page.history]] == ["1", "2"]
    assert [made.settings["Model"] for made in other[-1][page.history]] == ["plain"] * 2
    folders = {made.file.parent.parent for made in [*one[-1][page.history], *other[-1][page.history]]}
    assert len(folders) == 2


@pytest.mark.parametrize("leaves", [False, True])
def test_a_request_is_stopped_or_left_and_the_next_is_done(page, leaves):
    visitor = SimpleNamespace(session_hash="a")

    async def stopped() -> list[Any]:
        answers = []
        async for answer in asks(page, steps=900):
            answers.append(answer)
            if "Step " in answer.get(page.controls.status, ""):
                (page.leave if leaves else page.stop)(visitor)
        return answers

    assert "Stopped" in status(page, asyncio.run(stopped()))
    assert (visitor.session_hash in page.visits) is not leaves
    assert "2 pictures" in status(page, asyncio.run(all_of(asks(page, "b"))))


def test_an_older_request_that_ends_late_does_not_stop_the_newer_one(page):
    async def both() -> list[Any]:
        older = asks(page, steps=900)
        while "Step " not in (await anext(older)).get(page.controls.status, ""):
            pass
        newer = asks(page)
        answers = [await anext(newer)]
        await older.aclose()
        return answers + await all_of(newer)

    assert "2 pictures" in status(page, asyncio.run(both()))


def test_one_visitor_cannot_stop_another(page):
    async def others() -> list[Any]:
        answers = []
        async for answer in asks(page, steps=30):
            page.stop(SimpleNamespace(session_hash="b"))
            answers.append(answer)
        return answers

    assert "2 pictures" in status(page, asyncio.run(others()))


def test_who_leaves_takes_the_pictures_along(page):
    kept = asyncio.run(all_of(asks(page, "../../b")))[-1][page.history]
    assert kept[0].file.is_relative_to(page.folder / "made")
    page.leave(SimpleNamespace(session_hash="../../b"))
    assert not kept[0].file.parent.parent.exists()


def test_each_model_has_its_own_controls(page):
    of = page.controls.of_wish
    tiny, plain = (asyncio.run(page.choose(model)) for model in ("tiny", "plain"))
    assert tiny[of["label"]]["choices"] == [("cat", 0), ("dog", 1), ("Ankle boot", 2)]
    assert [found[of["label"]]["visible"] for found in (tiny, plain)] == [True, False]
    assert [found[of["guidance"]]["visible"] for found in (tiny, plain)] == [True, False]
    assert not tiny[of["prompt"]]["visible"]
    assert tiny[page.controls.facts] == "16 pixels, 7 steps of training"


class ByLength(torch.nn.Module):
    """Reads captions: the class that a caption's length says."""

    def __init__(self, classes: torch.nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.classes, self.keys = classes, keys

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.classes({"class_label": torch.tensor([len(text) % 3 for text in batch["caption"]])})

    def null(self, number: int) -> Any:
        return self.classes.null(number)


@pytest.mark.parametrize("keys", [("caption",), ("caption", "class_label")])
def test_a_model_of_captions_has_a_prompt_and_a_negative_one(page, monkeypatch, keys):
    def load(run: str) -> Pipeline:
        pipeline = Pipeline.load(run)
        pipeline.denoiser["conditioner"] = ByLength(pipeline.denoiser["conditioner"], keys)
        return pipeline

    monkeypatch.setattr(page.models, "_load", load)
    monkeypatch.setattr("ldm.cli.demo_models.prompts", lambda checkpoint: ["a red heart", "a cat"])
    of, controls = page.controls.of_wish, asyncio.run(page.choose("tiny"))
    assert controls[of["prompt"]]["visible"]
    assert controls[of["negative"]]["visible"]
    assert controls[of["label"]]["visible"] is ("class_label" in keys)
    assert controls[page.controls.prompts]["samples"] == [["a red heart"], ["a cat"]]
    wanted = {"prompt": "ab", "guidance": 3, "number": 1, "label": 1}
    plain, away = (asyncio.run(all_of(asks(page, negative=text, **wanted)))[-1] for text in ("", "a"))
    assert plain[page.settings].startswith("<dl><dt>Model</dt><dd>tiny</dd><dt>Prompt</dt><dd>ab</dd>")
    assert "<dt>Negative prompt</dt><dd>a</dd>" in away[page.settings]
    condition = {"caption": "ab", "class_label": 1}
    for answer, negative in ((plain, None), (away, {"caption": "a"})):
        (expected,) = generate(
            load(page.models.runs["tiny"]),
            [0],
            [{key: condition[key] for key in keys}],
            steps=3,
            guidance=Guidance(3, negative=negative),
        )
        assert np.array_equal(np.asarray(Image.open(answer[page.history][0].file)), expected.image)


def test_the_next_free_port_is_taken_and_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        found = demo.free_port("127.0.0.1", taken)
        assert found > taken
        assert f"port {taken} is taken; {found} is free" in capsys.readouterr().out
    assert demo.free_port("127.0.0.1", 0) > 0
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1: cannot be listened at"):
        demo.free_port("192.0.2.1", 7860)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--run"),
        (["-r", "x", "--port", "70000"], 2, "expected a port, 0 to 65535, found '70000'"),
        (["-r", "x", "--share"], 2, "Unknown flag --share"),
        (["-r", "logs/nowhere"], 4, "logs/nowhere: no such file or folder"),
        (["-r", "logs/*_nothing"], 2, "no run folder <time>_<name> matches"),
    ],
)
def test_wrong_command_lines(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.main(words) == code
    assert message in capsys.readouterr().err


def test_an_adapter_is_put_on_each_model(runs, tmp_path):
    options = demo.parse(["-r", "x", "--lora-scale", "0.5"])
    with pytest.raises(ConfigError, match="--lora-scale: this model has no adapter"):
        demo.loaded(str(runs.diffusion), options, "cpu", torch.float32)
    options = demo.parse(["-r", "x", "--lora", str(tmp_path / "none")])
    with pytest.raises(CheckpointError, match="none"):
        demo.loaded(str(runs.diffusion), options, "cpu", torch.float32)
    options = demo.parse(["-r", "x"])
    assert (options.max_steps, options.max_pictures, options.max_size) == (1000, 64, None)
    assert demo.loaded(str(runs.diffusion), options, "cpu", torch.float32).origin["weights"] == "ema"
    assert demo.loaded(str(runs.diffusion), options, "cpu", torch.bfloat16).compute == torch.bfloat16


def test_an_autoencoder_that_was_moved_is_named(runs, tuned_autoencoder):
    options = demo.parse(["-r", "x", "--autoencoder", str(tuned_autoencoder)])
    pipeline = demo.loaded(str(runs.diffusion), options, "cpu", torch.float32)
    assert pipeline.manifest.plan.autoencoder["path"].startswith(str(tuned_autoencoder))
    assert Constants(autoencoder=options.autoencoder).words() == ["--autoencoder", str(tuned_autoencoder)]


def test_without_its_package_the_extra_is_named(runs):
    code = "import sys; sys.modules['gradio'] = None\nfrom ldm.cli.demo import main\nsys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "-r", str(runs.diffusion)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2
    assert "ldm demo needs the package gradio: pip install -e .[demo]" in done.stderr


def test_pictures_that_commands_name_stay(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with demo.places() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder / "served")
        for name in ("made", "served", "begun"):
            (folder / name).mkdir()
            (folder / name / "x.png").touch()
    assert [path.name for path in folder.iterdir()] == ["begun"]
    with demo.places() as other:
        pass
    assert not other.exists()
