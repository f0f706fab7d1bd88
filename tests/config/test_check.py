"""Mistakes in a configuration: each is refused before anything is built, with its key, its place and a way out."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ldm.config import check
from ldm.config.load import build
from ldm.config.tree import Node
from ldm.errors import ConfigError
from tests.config.house import BASE, TRUST, load, model, write

pytestmark = pytest.mark.usefixtures("house")

# name: (edit of BASE (old, new) or an override, key, place (line number, or None for the override), words of the text)
BAD: dict[str, tuple[tuple[str, str] | str, str, int | None, tuple[str, ...]]] = {
    # the shape of the file
    "duplicate key": (model("channels: 9"), "model.params.channels", 7, ("duplicate", "base.yaml:6")),
    "duplicate section": (("lightning:", "seed: 1\nlightning:"), "seed", 14, ("duplicate", "base.yaml:2")),
    "python tag": (("channels: 8", "channels: !!python/name:os.system"), "model.params.channels", 6, ("refused",)),
    "local tag": (("channels: 8", "channels: !include x.yaml"), "model.params.channels", 6, ("tag", "refused")),
    "alias": (("channels: 8", "channels: *x"), "", 6, ("alias", "${a.b}")),
    "tab": (("  params:\n    batch", "\tparams:\n    batch"), "", 12, ("not valid YAML",)),
    "unclosed bracket": (("{size: 3}", "{size: 3"), "", 10, ("not valid YAML", "expected ',' or '}'")),
    "reference in a flow list": (model("pair: [${seed}, 2]"), "", 7, ("not valid YAML", "quote")),
    "octal or not": (("channels: 8", "channels: 012"), "model.params.channels", 6, ("'012'", "ambiguous", "write 12")),
    "yes or true": (model("on: yes"), "model.params.on", 7, ("'yes'", "ambiguous", "true or false")),
    "key with a dot": (("seed: 23", "seed: 23\na.b: 1"), "", 3, ("without dots", "'a.b'")),
    # sections and nodes
    "unknown section": (("seed: 23", "seed: 23\nmodle: {}"), "modle", 3, ("did you mean 'model'?",)),
    "missing section": (("data:", "date:"), "date", 10, ("did you mean 'data'?", "data (", "missing")),
    "seed is text": (("seed: 23", "seed: abc"), "seed", 2, ("a whole number from 0", "'abc'")),
    "seed is a fraction": (("seed: 23", "seed: 2.0"), "seed", 2, ("a whole number from 0", "2.0", "write 2")),
    "name is a number": (("name: house", "name: 7"), "name", 1, ("expected str", "7", "quotes")),
    "model is text": ("model=unet", "model", None, ("'target'", "'unet'")),
    "node key": (("  params:\n    batch", "  parms:\n    batch"), "data.parms", 12, ("did you mean 'params'?",)),
    "params is a list": ("data.params=[1]", "data.params", None, ("expected a mapping", "a list of 1")),
    "partial is text": ("model.params.part.partial=1", "model.params.part.partial", None, ("true or false", "int 1")),
    "target is a list": ("data.target=[a]", "data.target", None, ("dotted class name", "a list of 1")),
    "target without a dot": ("data.target=Data", "data.target", None, ("dotted name", "'Data'")),
    "package not allowed": ("data.target=horse.parts.Data", "data.target", None, ("allow-list", "'house'", "--trust")),
    "no such module": ("data.target=house.part.Data", "data.target", None, ("no 'part'", "did you mean 'parts'?")),
    "no such class": ("data.target=house.parts.Date", "data.target", None, ("no 'Date'", "did you mean 'Data'?")),
    "no such ldm module": ("data.target=ldm.randomnes.Draws", "data.target", None, ("did you mean 'randomness'?",)),
    "function as an object": ("data.target=house.parts.double", "data.target", None, ("function", "partial: true")),
    # lightning
    "lightning key": (("  trainer:", "  trainr:"), "lightning.trainr", 15, ("did you mean 'trainer'?",)),
    "trainer key": (("max_steps", "max_step"), "lightning.trainer.max_step", 16, ("did you mean 'max_steps'?",)),
    "trainer type": ("lightning.trainer.max_steps=many", "lightning.trainer.max_steps", None, ("whole", "'many'")),
    "trainer's logger": ("lightning.trainer.logger=false", "lightning.trainer.logger", None, (" lightning.logger",)),
    "callback is text": ("lightning.callbacks={a: b}", "lightning.callbacks.a", None, ("'target'", "'b'")),
    "callbacks are a list": ("lightning.callbacks=[{target: a.B}]", "lightning.callbacks", None, ("a list", "names")),
    "callbacks are one": ("lightning.callbacks={target: a.B}", "lightning.callbacks", None, ("names to nodes",)),
    "strategy is a number": ("lightning.strategy=3", "lightning.strategy", None, ("ddp", "int 3")),
    # parameters
    "parameter": (("channels: 8", "chanels: 8"), "model.params.chanels", 6, ("no parameter", "mean 'channels'?")),
    "override of a parameter": ("data.params.batchsize=3", "data.params.batchsize", None, ("mean 'batch_size'?",)),
    "missing parameter": (("    batch_size: 16", "    root: x"), "data.params.batch_size", 12, ("missing", "int")),
    "inherited parameter": (("size: 3", "sice: 3"), "model.params.part.params.sice", 9, ("did you mean 'size'?",)),
    "text for int": (("channels: 8", 'channels: "8"'), "model.params.channels", 6, ("expected int", "'8'")),
    "fraction for int": (("channels: 8", "channels: 8.5"), "model.params.channels", 6, ("expected int", "8.5")),
    "bool for int": (("channels: 8", "channels: true"), "model.params.channels", 6, ("expected int", "bool True")),
    "null for int": (("channels: 8", "channels:"), "model.params.channels", 6, ("expected int", "null")),
    "int for bool": (model("on: 1"), "model.params.on", 7, ("expected true or false", "int 1")),
    "choice": (model("mode: slow"), "model.params.mode", 7, ("'fast', 'exact'", "'slow'")),
    "length of a tuple": (model("pair: [1, 2, 3]"), "model.params.pair", 7, ("list of 2", "list of 3")),
    "inside a list": (model("rates: [1, 1e-3, x]"), "model.params.rates.2", 7, ("expected float", "'x'")),
    "text for a list": (model("last: a"), "model.params.last", 7, ("list of str", "'a'")),
    "inside a mapping": (model("table: {a: b}"), "model.params.table.a", 7, ("expected float", "'b'")),
    "text for an object": ("model.params.part=Bolt", "model.params.part", None, ("Part", "'Bolt'", "target:")),
    "text for a factory": (model("make: Bolt"), "model.params.make", 7, ("a callable", "'Bolt'")),
    "override through a value": ("seed.x=1", "seed.x", None, ("int 23", "base.yaml:2", "seed=")),
    # references
    "reference": (("channels: 8", "channels: ${sed}"), "model.params.channels", 6, ("'sed'", "did you mean 'seed'?")),
    "circle": (("name: house", "name: ${name}"), "name", 1, ("'${name}'", "Recursive interpolation")),
    "circle of two": (
        model("text: ${model.params.last}", "last: ['${model.params.text}']"), "model.params.text", 7, ("parent node",)
    ),
    "circle of mappings": (
        model("table: {a: '${model.params.last}'}", "last: {b: '${model.params.table}'}"), "model.params.last.b", 8,
        ("refers to itself",),
    ),
    "environment": (model("text: ${oc.env:HOME}"), "model.params.text", 7, ("'oc.env:'", "refused")),
    "unclosed": (model("text: ${seed"), "model.params.text", 7, ("closing }",)),
    "no run": (model("path: ${newest:logs/*_kl}"), "model.params.path", 7, ("logs/*_kl", "train 'kl' first")),
    "facts in data": ("data.params.num_workers=${data:n}", "data.params.num_workers", None, ("its own facts",)),
    "mapping inside text": (model("text: a${data.params}"), "model.params.text", 7, ("inside a text",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit, key, line, words = BAD[case]
    text, overrides = BASE, []
    if isinstance(edit, str):
        overrides = [edit]
    else:
        assert edit[0] in BASE
        text = BASE.replace(*edit, 1)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides).check()
    message = str(caught.value)
    place = f"command line: {edit}" if line is None else f"{tmp_path / 'base.yaml'}:{line}"
    for part in (f"{key} ({place})" if key else place, *words):
        assert part in message


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 40


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    overrides = ["sed=1", "data.parms={}", "data.params.batch=2", "model.params.channels=a", "model.params.text=${x}"]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE, *overrides).check()
    message = str(caught.value)
    assert message.startswith("5 problems")
    assert all(f"(command line: {override})" in message for override in overrides)


def test_a_good_configuration_passes(tmp_path: Path) -> None:
    good = """
      last: [a, b]
      path: logs
      pair: [1, 2]
      rates: [1, 2.5, 1e-3]
      table: {a: 1}
      mode: exact
      later: null
      make: {target: house.parts.Bolt, partial: true, params: {size: 3}}
      shape: {target: house.parts.Nut}
      parts: [{target: house.Shown}, {target: house.parts.Part, params: {scale: 2, unknown: whatever}}]
      text: ${name} with ${seed} and ${data:anything}
    """
    text = BASE.replace(*model(*textwrap.dedent(good).strip().splitlines())).partition("lightning:")[0]
    load(tmp_path, text).check()


PARAMETER_CASES = [
    case for case, (_, key, _, _) in BAD.items() if ".params." in key and "parts" not in str(BAD[case][0])
]


@pytest.mark.parametrize("case", PARAMETER_CASES)
def test_the_source_tells_what_the_class_tells(case: str, tmp_path: Path) -> None:
    edit = BAD[case][0]
    try:
        made = load(tmp_path, BASE, edit) if isinstance(edit, str) else load(tmp_path, BASE.replace(*edit, 1))
    except ConfigError:
        return  # refused before parameters are looked at
    tree = made.root
    quick = check.parameters(_without_lightning(tree), check.quick_look_up(TRUST))
    full = check.parameters(_without_lightning(tree), check.full_look_up(TRUST))
    assert set(quick) <= set(full)


def _without_lightning(root: Node) -> Node:
    assert isinstance(root.value, dict)
    return Node({name: node for name, node in root.value.items() if name != "lightning"}, root.origin)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.params.part={target: house.parts.Nut}", ("expected Part", "found house.parts.Nut")),
        ("model.params.parts=[{target: house.parts.Nut}]", ("parts.0", "expected Part")),
        ("model.params.part={target: house.parts.double}", ("function", "partial: true")),
        ("model.params.channels={target: house.parts.Nut}", ("expected int", "found house.parts.Nut")),
        (
            "model.params.channels={target: house.parts.Nut, partial: true}",
            ("expected int", "found a factory (partial: true) of house.parts.Nut"),
        ),
    ],
)
def test_an_object_of_another_class_is_refused(override: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE.partition("lightning:")[0], override).check()
    for part in (override, *words):
        assert part in str(caught.value)


def test_torch_and_lightning_are_checked_by_their_own_signatures(tmp_path: Path) -> None:
    import torch

    layer = "model={target: torch.nn.Sequential}"
    text = BASE.partition("lightning:")[0]
    load(tmp_path, text, layer).check()
    conv = (
        "model={target: torch.nn.Conv2d, params: {in_channels: 3, out_channels: 4, kernel_size: [3, x], padding: same}}"
    )
    with pytest.raises(ConfigError, match=r"model.params.kernel_size.1 .*expected int, found str 'x'"):
        load(tmp_path, text, conv).check()
    adam = {"target": "torch.optim.AdamW", "partial": True, "params": {"lr": 1e-3, "betas": [0.5, 0.9]}}
    optimizer = build(adam)([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert list(optimizer.defaults["betas"]) == [0.5, 0.9]


@pytest.mark.slow
def test_a_trainer_section_passes_and_is_checked(tmp_path: Path) -> None:
    load(tmp_path, BASE, "lightning.trainer.precision=bf16-mixed", "lightning.strategy=ddp").check()
    with pytest.raises(ConfigError, match=r"lightning.trainer.precision \(command line.*'bf17'"):
        load(tmp_path, BASE, "lightning.trainer.precision=bf17").check()


def test_a_mistake_is_reported_without_importing_torch(tmp_path: Path) -> None:
    path = write(
        tmp_path, BASE.replace("house.parts.", "torch.nn.").replace("Network", "Linear").replace("Data", "GELU")
    )
    code = f"""
        import sys
        from pathlib import Path
        from ldm.config.load import ConfigError, load
        try:
            load([Path({str(path)!r})], ["lightning.trainer.max_step=1"]).check()
        except ConfigError as error:
            print(error)
        print("torch" in sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert "did you mean 'max_steps'?" in run.stdout
    assert "model.params.in_features" in run.stdout
    assert run.stdout.rstrip().endswith("False"), run.stdout + run.stderr


def test_facts_are_checked_once_they_are_known(tmp_path: Path) -> None:
    made = load(tmp_path, BASE.partition("lightning:")[0].replace(*model("later: ${data:n}", "text: ${data:title}")))
    made.check()
    made.check({"n": 5, "title": "x"})
    with pytest.raises(ConfigError, match=r"model.params.later \(.*:7\): expected int or null, found str 'five'"):
        made.check({"n": "five", "title": "x"})
