"""Which targets are allowed, and how nodes become objects; above all: no target runs what a stranger wrote."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.config.load import build, from_tree
from ldm.errors import ConfigError
from tests.config.house import TRUST

pytestmark = pytest.mark.usefixtures("house")


def test_leaves_are_built_first_and_containers_are_walked() -> None:
    node = {
        "target": "house.parts.Network",
        "params": {
            "channels": 1,
            "part": {"target": "house.parts.Bolt"},
            "parts": [{"target": "house.parts.Part", "params": {"size": 2}}],
            "make": {"target": "house.parts.Part", "params": {"size": 9}, "partial": True},
        },
    }
    network = build(node, TRUST)
    given = network.given
    from house import parts  # type: ignore[import-not-found]

    assert parts.made[-1] is network
    assert parts.made[-3:-1] == [given["part"], given["parts"][0]]
    assert given["make"](scale=3.0).size == 9
    pair = build({"a": node["params"]["part"], "b": [1, None, "x"]}, TRUST)
    assert isinstance(pair["a"], parts.Bolt)
    assert pair["b"] == [1, None, "x"]
    assert build({"target": "house.parts.double", "partial": True, "params": {"factor": 3.0}}, TRUST)(2) == 6.0


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (
            {"target": "house.parts.Fragile", "params": {"value": 4}},
            ("model.x", "house.parts.Fragile", "must be prime"),
        ),
        ({"target": "house.parts.Bolt", "params": {"sice": 4}}, ("model.x", "house.parts.Bolt", "'sice'")),
        ({"target": "house.parts.Bolt", "params": {"size": "${data:n}"}}, ("model.x.params.size", "not resolved")),
        ({"target": "house.parts.Bolt", "param": {}}, ("model.x.param", "unknown key")),
        ({"target": "house.parts.Bold"}, ("model.x.target", "did you mean 'Bolt'?")),
        ({"target": "house.parts.double"}, ("model.x.target", "partial: true")),
    ],
)
def test_what_cannot_be_built_is_named(node: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(node, TRUST, key="model.x")
    for part in words:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "error", ["OSError", "RuntimeError", "AttributeError", "KeyError", "IndexError", "ZeroDivisionError", "ImportError"]
)
def test_whatever_a_constructor_raises_comes_with_the_key(error: str) -> None:
    node = {"target": "house.parts.Raises", "params": {"error": error, "text": "out of tea"}}
    with pytest.raises(ConfigError, match=rf"^model\.x: house\.parts\.Raises cannot be built: {error}: .*out of tea"):
        build({"x": node}, TRUST, key="model")


def test_no_memory_is_no_mistake_of_the_configuration() -> None:
    with pytest.raises(MemoryError):
        build({"target": "house.parts.Raises", "params": {"error": "MemoryError", "text": ""}}, TRUST)


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    words = r"model: .*it needs a package that is not installed: .*; install it: pip install surely_not_installed$"
    with pytest.raises(ConfigError, match=words):
        build({"target": "house.parts.NeedsPackage"}, TRUST, key="model")


def test_errors_that_are_the_users_pass_through() -> None:
    with pytest.raises(ConfigError, match=r"^a class refused$"):
        build({"target": "house.parts.Anything", "params": {"x": {"target": "house.parts.Refuses"}}}, TRUST)


TOUCH = "touch MARKER"
PYTHON = "open('MARKER', 'w').close()"
ATTACKS: list[tuple[str, dict[str, Any]]] = [
    ("os.system", {"command": TOUCH}),
    ("posix.system", {"command": TOUCH}),
    ("os.execv", {"path": "/bin/touch", "argv": ["touch", "MARKER"]}),
    ("builtins.exec", {"source": PYTHON}),
    ("builtins.eval", {"source": PYTHON}),
    ("builtins.open", {"file": "MARKER", "mode": "w"}),
    ("builtins.__import__", {"name": "os"}),
    ("subprocess.Popen", {"args": ["touch", "MARKER"]}),
    ("subprocess.run", {"args": ["touch", "MARKER"]}),
    ("importlib.import_module", {"name": "antigravity"}),
    ("runpy.run_path", {"path_name": "MARKER"}),
    ("pathlib.Path.touch", {"self": "MARKER"}),
    ("pickle.loads", {"data": "x"}),
    ("functools.partial", {"func": "x"}),
    ("shutil.rmtree", {"path": "MARKER"}),
    ("logging.FileHandler", {"filename": "MARKER"}),
    ("torch.load", {"f": "MARKER"}),
    ("torch.save", {"obj": 1, "f": "MARKER"}),
    ("torch.hub.load", {"repo_or_dir": "MARKER", "model": "x", "source": "local"}),
    ("torch.hub.os.system", {"command": TOUCH}),
    ("torch.os.system", {"command": TOUCH}),
    ("torch.nn.modules.module.warnings.sys.exit", {}),
    ("torch.utils.cpp_extension.load_inline", {"name": "x", "cpp_sources": "x"}),
    ("torch.utils.benchmark.Timer", {"stmt": PYTHON}),
    ("torch.package.PackageImporter", {"file_or_buffer": "MARKER"}),
    ("torch.jit.load", {"f": "MARKER"}),
    (
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        {"entrypoint": "touch", "args": ["MARKER"], "env": {}, "stdout": "", "stderr": "", "local_rank_id": 0},
    ),
    ("torch.multiprocessing.spawn", {"fn": "os.system", "args": [TOUCH]}),
    ("torch.nn.Linear.__init__.__globals__", {}),
    ("torch.nn.__builtins__.exec", {"source": PYTHON}),
    ("torch.nn.Module.load_state_dict", {"state_dict": {}}),
    ("torchvision.datasets.utils.download_url", {"url": "file:///etc/hostname", "root": "MARKER"}),
    ("torchvision.io.write_file", {"filename": "MARKER", "data": "x"}),
    ("pytorch_lightning.cli.LightningCLI", {"args": ["fit"]}),
    ("pytorch_lightning.utilities.imports.os.system", {"command": TOUCH}),
    ("lightning_fabric.utilities.cloud_io.os.system", {"command": TOUCH}),
    ("ldm.config.yaml_text.yaml.load", {"stream": "!!python/object/apply:os.system ['touch MARKER']", "Loader": "x"}),
    ("ldm.config.yaml_text.yaml.UnsafeLoader", {"stream": "x"}),
    ("ldm.config.signatures.importlib.import_module", {"name": "antigravity"}),
    ("ldm.runtime.distributed.os.system", {"command": TOUCH}),
    ("ldm.config.yaml_text.Path.touch", {"self": "MARKER"}),
    ("ldm.config.yaml_text.Path", {}),
    ("torch.Generator", {}),
    ("torch.nn.modules.container.OrderedDict", {}),
    ("ldm.config.load.build", {"node": {}, "trust": ["os"]}),
    ("house.parts.os.system", {"command": TOUCH}),
    ("house.parts.system", {"command": TOUCH}),
    ("house.parts.Part.__init__", {"self": "x"}),
    ("house..parts.Part", {}),
    ("../house.parts.Part", {}),
    ("house/parts.Part", {}),
    ("house.parts:Part", {}),
    ("hou\u017fe.parts.Part", {}),
    ("", {}),
    (".", {}),
]


@pytest.mark.parametrize("partial", [False, True], ids=["object", "partial"])
@pytest.mark.parametrize(("target", "params"), ATTACKS, ids=[target or "empty" for target, _ in ATTACKS])
def test_no_target_runs_code(target: str, params: dict[str, Any], partial: bool, tmp_path: Path) -> None:
    if partial and target == "ldm.config.load.build":
        return  # an own function as a factory: harmless, since the nodes it would be given were built before
    marker = tmp_path / "marker"

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        return value.replace("MARKER", str(marker)) if isinstance(value, str) else value

    node = {"target": target, "params": fill(params), "partial": partial}
    with pytest.raises(ConfigError, match=r"model.target:"):
        build(node, TRUST, key="model")
    tree = {"seed": 1, "model": node, "data": {"target": "house.parts.Nut"}}
    with pytest.raises(ConfigError, match=r"model\.(target|params)"):
        from_tree(tree, "stranger.ckpt", TRUST).check()
    # Nor inside the parameters of something harmless.
    with pytest.raises(ConfigError):
        build({"target": "house.parts.Anything", "params": {"x": [{"y": node}]}}, TRUST)
    assert not marker.exists()


def test_a_module_that_is_not_trusted_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("from pathlib import Path\nPath('marker').touch()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--trust trap"):
        build({"target": "trap.Trap"})
    assert "trap" not in sys.modules
    assert not (tmp_path / "marker").exists()
    assert type(build({"target": "trap.Trap"}, ["trap"])).__name__ == "Trap"
    sys.modules.pop("trap")
