"""ldm.cli.demo_line and demo_models: requests one after another, each to be stopped; one model in memory."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from ldm.cli.demo_line import Halted, Line, Ticket, watched
from ldm.cli.demo_models import Abilities, Models, named
from ldm.diffusion.conditioners.text import FeatureText, TextEncoder
from ldm.errors import ConfigError
from ldm.sampling import samplers
from ldm.sampling.generate import generate
from ldm.sampling.pipeline import Pipeline
from tests.tiny_runs import CLASSES
from tests.tiny_text import LONGEST, WIDTH, save_text_encoder


@pytest.fixture
def line():
    made = Line()
    yield made
    made.close()


def test_one_at_a_time_in_order(line):
    go, order = threading.Event(), []
    tickets = [line.ask(lambda ticket, number=number: (go.wait(10), order.append(number))) for number in range(3)]
    assert [line.ahead(ticket) for ticket in tickets] == [0, 1, 2]
    go.set()
    for ticket in tickets:
        ticket.future.result(10)
    assert order == [0, 1, 2]
    assert [line.ahead(ticket) for ticket in tickets] == [0, 0, 0]


def test_one_that_waits_is_stopped_at_once_and_the_others_move_up(line):
    go = threading.Event()
    first, second, third = (line.ask(lambda ticket: go.wait(10)) for _ in range(3))
    second.stop()
    with pytest.raises(CancelledError):
        second.future.result(0)
    assert line.ahead(third) == 1
    go.set()
    assert third.future.result(10) is True
    assert first.future.result(0) is True


def test_an_error_ends_its_own_request_alone(line):
    def fail(ticket):
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        line.ask(fail).future.result(10)
    assert line.ask(lambda ticket: 3).future.result(10) == 3


def test_closing_stops_all(line):
    def endless(ticket):
        while True:
            ticket.go_on()

    tickets = [line.ask(endless) for _ in range(2)]
    line.close()
    with pytest.raises(Halted):
        tickets[0].future.result(0)
    with pytest.raises(CancelledError):
        tickets[1].future.result(0)


@pytest.mark.parametrize(("sampler", "calls"), [(samplers.ddim, 5), (samplers.heun, 9), (samplers.ancestral, 5)])
def test_every_call_of_the_network_is_told_and_changes_nothing(runs, sampler, calls):
    pipeline, seen = Pipeline.load(runs.diffusion), []

    class Recorded(Ticket):
        def go_on(self) -> None:
            seen.append(self.step)

    ticket = Recorded()
    (plain,) = generate(pipeline, [3], [{"class_label": 1}], sampler=sampler, steps=5)
    (made,) = generate(pipeline, [3], [{"class_label": 1}], sampler=watched(sampler, ticket), steps=5)
    assert (plain.image == made.image).all()
    assert len(seen) == calls
    assert seen == sorted(seen)
    assert (ticket.step, ticket.steps) == (5, 5)


def test_a_stop_comes_before_the_next_call(runs):
    pipeline, ticket = Pipeline.load(runs.diffusion), Ticket()
    calls = []

    def counted(module, inputs, output):
        calls.append(ticket.step)
        if ticket.step == 2:
            ticket.stop()

    handle = pipeline.denoiser["network"].register_forward_hook(counted)
    with pytest.raises(Halted):
        list(generate(pipeline, [3], [{"class_label": 1}], sampler=watched(samplers.ddim, ticket), steps=50))
    handle.remove()
    assert calls == [1, 2]
    assert not pipeline.denoiser.training
    assert list(generate(pipeline, [3], [{"class_label": 1}], steps=2)), "the model goes on"


def test_one_model_is_in_memory_and_is_let_go_before_the_next_is_loaded():
    log: list[str] = []
    pipeline = None

    class Loaded:
        def __init__(self, run: str) -> None:
            self.origin, self.run = {"checkpoint": run, "step": 1}, run
            self.denoiser = {"conditioner": torch.nn.Module()}
            log.append(f"load {run}")

        def __del__(self) -> None:
            log.append(f"free {self.run}")

    models = Models({"a": "/a", "b": "/b"}, Loaded)
    facts = Abilities("", 1, (8, 8), False, None, False, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Abilities, "of", lambda pipeline: facts)
        patch.setattr("ldm.cli.demo_models.prompts", lambda checkpoint: [])
        said: list[str] = []
        for name in ("a", "a", "b", "a"):
            pipeline = None
            pipeline = models.pipeline(name, said.append)
            assert pipeline.run == f"/{name}"
    assert log == ["load /a", "free /a", "load /b", "free /b", "load /a"]
    assert said == ["Loading a", "Loading b", "Loading a"]
    assert {*models.known} == {"a", "b"}
    with pytest.raises(ConfigError, match="model c: there is none of this name; there are: a, b"):
        models.pipeline("c", said.append)


def test_its_text_encoder_goes_with_it(runs, tmp_path, monkeypatch):
    feature = TextEncoder(save_text_encoder(tmp_path / "encoder"), WIDTH, LONGEST)

    def load(run: str) -> Pipeline:
        pipeline = Pipeline.load(runs.diffusion)
        pipeline.denoiser["conditioner"] = FeatureText(feature)
        return pipeline

    models = Models({"a": "a", "b": "b"}, load)
    models.pipeline("a", print).conditioner.null(1)
    feature.encode("a red cat", torch.device("cpu"))
    assert feature.model.is_loaded
    models.pipeline("b", print)
    assert not feature.model.is_loaded


def test_what_can_be_asked_of_a_model(runs, make_runs):
    found = Abilities.of(Pipeline.load(runs.diffusion))
    assert (found.size, found.classes, found.captions) == ((16, 16), CLASSES, False)
    assert (found.guided, found.begins, found.step) == (True, True, 7)
    plain = Abilities.of(Pipeline.load(make_runs(channels=1, classes=None).diffusion))
    assert (plain.classes, plain.guided, plain.begins) == (None, False, True)


def test_a_model_that_reads_something_else_is_refused(runs):
    pipeline = Pipeline.load(runs.diffusion)

    class Other(torch.nn.Module):
        keys = ("depth", "original_size")

    pipeline.denoiser["conditioner"] = Other()
    with pytest.raises(ConfigError, match="reads depth, which the page cannot ask for"):
        Abilities.of(pipeline)
    pipeline.denoiser["conditioner"].keys = ("original_size",)
    assert not Abilities.of(pipeline).captions, "samples have sizes of themselves"


def test_runs_are_named_by_their_folders_or_by_their_paths():
    assert named(["logs/a", "logs/b/", "logs/a"]) == {"a": "logs/a", "b": "logs/b/"}
    assert named(["logs/a", "other/a"]) == {"logs/a": "logs/a", "other/a": "other/a"}
