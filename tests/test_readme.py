"""Every command of the README, the documents and the configurations' headers does what it says, on a few pictures.

What trains is run dry, on stand-ins for the runs that it names; what samples, plots or reconstructs is run on these.
The commands of docs/extending.md need its examples: test_docs.py runs them.
"""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import save_file

import main
from ldm.checkpoints import store
from ldm.cli import cache, convert, demo, ema, evaluate, export, plot, sample, tokenizer, weights
from ldm.config.load import to_yaml
from ldm.data.sources.emoji_scenes import EMOJI
from ldm.interop import lora, lora_files
from ldm.optim.ema import power_exponent
from ldm.sampling.pipeline import Pipeline
from scripts import compare
from scripts.bench import __main__ as bench
from scripts.faults import __main__ as faults
from tests.dense_models import save_dense
from tests.evaluation.spaces import Projection
from tests.interop import foreign
from tests.tiny_runs import save_adapted, save_diffusion
from tests.tiny_text import save_models, save_vocabulary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "extending.md"),
]
CONFIGURATIONS = [*sorted((ROOT / "configs").rglob("*")), *sorted((ROOT / "docs").rglob("*.yaml"))]
HEADERS = [path for path in CONFIGURATIONS if path.suffix in (".yaml", ".sh", ".sbatch")]
PROGRAMS = r"([A-Z]+=\S+ )*(make|python|torchrun|pip|conda|sbatch|bash|main\.py) "
PICTURES = "pictures"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
CLASSES = ["faces", "food", *"23456789"]
DENSE = {
    "--layout": ["boxes", "boxes_mask"],
    "--map": ["map"],
    r"--image \S*small": ["low_resolution"],
    r"--image \S*picture.png --mask": ["mask", "masked_latent"],
}
"""What a model reads that is sampled with these words."""


def whole_lines(text: str) -> list[str]:
    """Without comments at the end, what may be left out (` [...]`), and line ends that a backslash takes away."""
    lines = [line.strip() for line in re.sub(r"\s*\\\n[#\s]*", " ", text).splitlines()]
    lines = [re.sub(r"(?<!\S)\[[^\]]*\]", "", line) for line in lines]
    return [re.sub(r"(\s{2,}|\s+#)[#(].*|\s+# .*", "", line).strip() for line in lines]


def written_commands(document: str) -> list[str]:
    """Lines of code blocks, and code spans."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", document, flags=re.DOTALL | re.MULTILINE)
    spans = [re.sub(r"\s*\n\s*", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    return [line for text in [*blocks, *spans] for line in whole_lines(text)]


def header_commands() -> list[str]:
    headers = ["\n".join(line for line in path.read_text().splitlines() if line.startswith("#")) for path in HEADERS]
    return [line.lstrip("# ").strip() for header in headers for line in whole_lines(header)]


def commands(lines: list[str]) -> list[str]:
    return [line for line in dict.fromkeys(lines) if re.match(PROGRAMS, line)]


COMMANDS = commands([*(line for page in DOCUMENTS for line in written_commands(page.read_text())), *header_commands()])


def as_run(command: str) -> str:
    """The same for all commands that are one to these tests, wherever their pictures lie and whoever starts main.py."""
    return re.sub(r"/path/to/[\w/]+", PICTURES, command).removeprefix("python ")


DIFFERENT = [*{as_run(command): command for command in COMMANDS[::-1]}.values()][::-1]


def test_the_readme_and_the_headers_have_commands():
    assert {"make quickstart", "make test"} <= set(COMMANDS)
    assert sum("data.params.train.params.root=" in command for command in COMMANDS) > 20
    assert any(command.startswith("sbatch") for command in COMMANDS)
    # A code span may go on in the next line, and leave out what runs main.py.
    assert any(command.startswith("python scripts/compare.py --autoencoder RUN") for command in COMMANDS)
    assert any(command.startswith("main.py --base") for command in COMMANDS)


@pytest.fixture(scope="module")
def workshop(make_runs, tmp_path_factory):
    """The repository with pictures to train on, and a stand-in for each run that a command or a reference names."""
    place = tmp_path_factory.mktemp("workshop")
    for name in (
        "configs",
        "docs",
        "scripts",
        "main.py",
        "Makefile",
        "environment.yaml",
        "requirements.lock",
        "pyproject.toml",
    ):
        (place / name).symlink_to(ROOT / name)
    random = np.random.default_rng(7)
    for number in range(30):
        file = place / PICTURES / CLASSES[number % 10] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"picture {number}")
    (place / "prompts.txt").write_text("red heart\na cat\n")
    save_models(place)
    for name in ("images", "imagenet/train"):  # where the configurations look if nothing is said
        (place / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / name).symlink_to(place / PICTURES)
    for name in ("photo.png", "mask.png"):
        Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(place / name)
    save_beside(place)
    rgb, grey = make_runs(classes=CLASSES), make_runs(channels=1)
    text = "\n".join([*COMMANDS, *(path.read_text() for path in HEADERS)])
    (place / "logs").mkdir()
    save_diffusion(place / "captioned", rgb.autoencoder, None, vocabulary=save_vocabulary(place / "vocab.txt"))
    captioned = re.findall(r"logs/\*_(\w+)' --prompt", text)
    dense = {name: keys for words, keys in DENSE.items() for name in re.findall(rf"logs/\*_(\w+)' {words}", text)}
    for name, keys in dense.items():
        save_dense(place / f"dense_{name}", rgb, keys, {"facts": {"box_class_names": [*EMOJI]}})
    for name in sorted({"tiny_autoencoder", *re.findall(r"logs/\*_(\w+)", text)}):
        runs = grey if "fashion" in name else rgb
        folder = runs.autoencoder if re.search(r"autoencoder|^(kl|vq)_f\d+$", name) else runs.diffusion
        folder = place / "captioned" if name in captioned else folder
        folder = place / f"dense_{name}" if name in dense else folder
        (place / "logs" / f"2026-01-01T00-00-00_{name}").symlink_to(folder)
    (rgb.diffusion / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.25\n")
    averages = [rgb.module.ema.average.state_dict()] * 2
    exponents = [power_exponent(0.05), power_exponent(0.1)]
    snapshot = {"averages": averages, "exponents": exponents, "images_seen": 2048}
    store.save(rgb.diffusion / "averages" / "step=01048576.ckpt", snapshot)
    # Of which a command samples: that which makes it may be tested in another process.
    assert ema.main(["-r", str(rgb.diffusion), "--std", "0.13"]) == 0
    (place / "RUN").symlink_to(rgb.diffusion)
    (adapted,) = (place / "logs").glob("*_emoji_lora")
    adapted.unlink()
    save_adapted(adapted, rgb)
    network = Pipeline.load(adapted).denoiser["network"]
    lora_files.save(network, place / "ADAPTER", lora.base_hash(network))
    return place


def save_beside(place: Path) -> None:
    """What lies on the pictures, and what samples are asked for by: pictures of 16 pixels, small ones of 4."""
    pictures = sorted((place / PICTURES).rglob("*.png"))
    images = [
        {"id": number, "file_name": str(path.relative_to(place / PICTURES)), "width": 16, "height": 16}
        for number, path in enumerate(pictures)
    ]
    boxes = [{"image_id": one["id"], "category_id": 5, "bbox": [0, 0, 8, 16]} for one in images]
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}]}
    (place / f"{PICTURES}.json").write_text(json.dumps(whole))
    (place / f"{PICTURES}.txt").write_text("sky\nsea\n")
    for path in pictures:
        file = place / "maps" / path.relative_to(place / PICTURES)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 1).save(file)
    for name, side in {"picture": 16, "map": 16, "small": 4, "small_1": 4, "small_2": 4}.items():
        Image.new("L" if name == "map" else "RGB", (side, side)).save(place / f"{name}.png")
    (place / "boxes.json").write_text('[{"class": "cat", "box": [0.1, 0.2, 0.6, 0.9]}]')


@pytest.fixture
def run(workshop, tmp_path, monkeypatch, autoencoder_tree, diffusion_tree, tried_once):
    """run(command) -> exit code, within the workshop and this process; seven commands are of one large model."""
    monkeypatch.chdir(workshop)

    def train(words: list[str]) -> int:
        (workshop / "FILE.yaml").write_text(to_yaml(autoencoder_tree))
        words = [re.sub(r"/path/to/[\w/]+", "maps" if "map.params.root" in word else PICTURES, word) for word in words]
        if any("fashion_mnist" in word for word in words):  # which not every machine has
            words.append(
                f"data.params.train={{target: ldm.data.sources.folder.ImageFolder, params: {{root: {PICTURES}}}}}"
            )
        if any("mean: [0, 0, 0]" in Path(word).read_text() for word in words if word.startswith("configs/diffusion")):
            words.append("data.params.statistics=null")  # of three channels, where the stand-in has four
        if "configs/diffusion/inpainting_big.yaml" in words:
            words.append("model.params.network.params.spatial_channels=5")
        own_size = "configs/quickstart/buckets.yaml" not in words
        if own_size and any(
            re.search(r"(quickstart|fluent_emoji|fashion|text_to)\w*/diffusion|emoji_scenes/(?!auto)", word)
            for word in words
        ):
            words.append("data.params.resolution=32")  # the stand-ins do not say theirs
        if "configs/quickstart/lora.yaml" in words:  # on a base of the same architecture
            own = [word for word in words if not word.startswith(("configs/quickstart/lora", "init_from"))]
            own = own[: own.index("--name")] if "--name" in own else own
            short = ["data.params.resolution=32", "lightning.trainer.max_steps=1", "--logdir", str(tmp_path / "base")]
            assert main.main([*own, *short]) == 0
            words = [word for word in words if not word.startswith("init_from")]
            words.append(f"init_from={next((tmp_path / 'base').iterdir())}")
        if "RUN" in words:  # one that can be gone on with
            assert main.main(["--base", "FILE.yaml", "lightning.trainer.max_steps=1", "-l", "again"]) == 0
            words = [str(next((workshop / "again").iterdir())) if word == "RUN" else word for word in words]
            words.append("lightning.trainer.max_steps=2")
        return main.main([*words, *([] if "--dry-run" in words else ["--dry-run"])])

    def build_cache(words: list[str]) -> int:
        (workshop / "FILE.yaml").write_text(to_yaml(diffusion_tree))
        return cache.main([*words, "data.params.resolution=32"])

    def started(words: list[str]) -> int:
        """Of a cluster: its scripts are valid, and what they and torchrun start is a run."""
        if "scripts/evaluate.py" in words:
            return measured(words[words.index("scripts/evaluate.py") + 1 :])
        file = next(
            (word for word in words if word.startswith("configs/cluster/") and not word.endswith(".yaml")), None
        )
        if file is None:
            return train(words[words.index("main.py") + 1 :])
        assert '-r auto --base "$@"' in (ROOT / file).read_text()
        assert subprocess.run(["bash", "-n", str(ROOT / file)]).returncode == 0
        return train(["-r", "auto", "--base", *words[words.index(file) + 1 :]])

    def measured(words: list[str]) -> int:
        """A few of the pictures, in features that need no weights, against those of the workshop."""
        monkeypatch.setattr(evaluate, "choose", lambda name, device: Projection(name))
        if words[0] == "classifier" and "configs/emoji_scenes" in words[1]:
            few = [f"data.params.{part}.params.length=8" for part in ("train", "validation")]
            return evaluate.main([*words[:-1], str(tmp_path / words[-1]), *few, "data.params.resolution=64"])
        if "_scenes_" in words[1]:  # of whole data sets, with judges: test_evaluate_dense.py, test_evaluate_judges.py
            return 0 if evaluate.parse(words) else 1
        if words[0] == "compare":
            own = [f"{tmp_path}/{name}.json" for name in "ab"]
            codes = [measured(["-r", "RUN", "--out", record]) for record in own]
            return max(*codes, evaluate.main(["compare", *own, "--out", str(tmp_path / "comparison")]))
        words = [re.sub(r"/path/to/[\w/]+", PICTURES, word) for word in words]
        few = ["-n", "8", "--steps", "2"] if "-r" in words else []
        if "FILE.yaml" in words:
            (workshop / "FILE.yaml").write_text(to_yaml(autoencoder_tree))
        elif "kl_f8" in " ".join(words):
            (workshop / "own.yaml").write_text(to_yaml(autoencoder_tree))
            words += ["--against", "own.yaml", "--metrics", "fd", "psnr"]
            few = ["-n", "8"]  # reconstructions take no steps
        else:
            words += ["--against", PICTURES, "--resolution", "16"]
        out = [] if "--out" in words else ["--out", str(tmp_path / "record.json")]
        return evaluate.main([*words, *few, *out])

    def converted(words: list[str]) -> int:
        """A small autoencoder of others in the place of the file, a YAML that fits any in that of its own."""
        (torch.save if words[0].endswith(".ckpt") else save_file)(foreign.first_stage(), workshop / words[0])
        if "--config" in words:
            (workshop / words[words.index("--config") + 1]).write_text("model: {params: {ddconfig: {resolution: 32}}}")
        return convert.main([*words, "--logdir", str(tmp_path)])

    def exported(words: list[str]) -> int:
        """Those that need neither minutes nor a network are done."""
        chosen = export.parse(words)
        if chosen.push is not None or chosen.to in (None, "onnx", "torch", "FORMAT"):
            return 0
        return export.main([str(tmp_path / "out") if word == "FOLDER" else word for word in words])

    def tokenized(words: list[str]) -> int:
        words = [re.sub(r"/path/to/\w+", PICTURES, word) for word in words]
        return tokenizer.main([str(tmp_path / word) if word.endswith(".json") else word for word in words])

    def parsed(parse):
        return lambda words: 0 if parse(words) else 1

    programs = {
        "main.py": train,
        "scripts/cache_latents.py": build_cache,
        "scripts/sample.py": lambda words: sample.main(
            [*words, "--steps", "2", "-n", "1", "--trust", "tests", "--out", str(tmp_path)]
        ),
        "scripts/reconstruct_ema.py": ema.main,
        "scripts/plot_run.py": plot.main,
        "scripts/tokenizer.py": tokenized,
        "scripts/weights.py": weights.main,
        "scripts/convert.py": converted,
        "scripts/evaluate.py": measured,
        "scripts/export.py": exported,
        # These take minutes to hours, and have tests of their own.
        "scripts/bench": parsed(bench.parse),
        "scripts/compare.py": parsed(compare.parse),
        "scripts/faults": parsed(faults.parse),
        "scripts/demo.py": parsed(demo.parse),
        "-m": lambda words: 0 if words[0] == "pytest" and (ROOT / words[1]).is_dir() else 1,
        "same.py": lambda words: 0 if len(words) == 2 else 1,  # test_docs.py writes and runs it
    }

    def run(command: str) -> int:
        words = shlex.split(command.replace("logs/<run>", "RUN"))
        words = [word for word in words if not re.fullmatch(r"[A-Z]+=\S+", word) or words[0] == "make"]
        if words[0] == "make":
            return subprocess.run(["make", "-n", *words[1:]], capture_output=True).returncode
        if words[:2] == ["pip", "install"]:  # an extra of ours, or packages that are in one
            named = re.fullmatch(r"-e \.\[([\w,]+)\]", " ".join(words[2:]))
            extras, packages = PROJECT["optional-dependencies"], {Requirement(line).name for line in EXTRAS}
            return 0 if (set(named[1].split(",")) <= set(extras) if named else set(words[2:]) <= packages) else 1
        if words[0] == "conda":
            return 0 if Path(words[words.index("-f") + 1]).is_file() else 1
        return programs[words[1]](words[2:]) if words[0] == "python" else started(words)

    return run


@pytest.mark.parametrize("command", DIFFERENT)
def test_command_works(run, command, capsys):
    assert run(command) == 0, capsys.readouterr().err


def test_pictures_of_the_readme_exist_and_are_attributed():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
    assert "CC BY-SA 4.0" in README
    assert "openmoji.org" in README
