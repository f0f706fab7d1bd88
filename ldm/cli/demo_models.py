"""The models of the page: which controls each has, and the one that is in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoints import store
from ldm.cli.sample_dense import only_by_file
from ldm.diffusion.conditioners.base import defaults
from ldm.diffusion.conditioners.low_resolution import LEVEL
from ldm.diffusion.conditioners.pictures import FeaturePicture
from ldm.diffusion.conditioners.text import FeatureText
from ldm.errors import ConfigError
from ldm.images import FILED
from ldm.sampling.dense import most_noise
from ldm.sampling.dense_files import picture_key
from ldm.sampling.pipeline import Pipeline
from ldm.sizes import SIZES


@dataclass(frozen=True)
class Abilities:
    """What can be asked of a model.

    Args:
        checkpoint: the file that it was loaded from.
        step: of training.
        size: (height, width) of its pictures, pixels.
        captions: it reads a prompt.
        classes: the names of the classes that it reads, numbers where they have none; None: it reads none.
        guided: it can be guided: it was also trained without its conditions.
        begins: it can begin with a picture of the visitor's.
        prompts: examples, those of its previews in training.
        picture: it reads a picture of the visitor's, whole or small, as what is asked for.
        hole: and what is painted over in it.
        noise: of the noise that it reads a small picture with, the usual level and the highest; None: it has none.
        map_classes, box_classes: the names of the classes of the maps and boxes that it reads; None: it reads none.
        longest_side: of its training pictures, pixels, where they were of several sizes.
    """

    checkpoint: str
    step: int
    size: tuple[int, int]
    captions: bool
    classes: Sequence[str] | None
    guided: bool
    begins: bool
    prompts: Sequence[str] = ()
    picture: bool = False
    hole: bool = False
    noise: tuple[float, float] | None = None
    map_classes: Sequence[str] | None = None
    box_classes: Sequence[str] | None = None
    longest_side: int = 0

    @classmethod
    def of(cls, pipeline: Pipeline) -> "Abilities":
        """
        Raises:
            ConfigError: the model reads what the page has no control for.
        """
        plan, reads = pipeline.manifest.plan, pipeline.conditioner.keys
        checkpoint = pipeline.origin["checkpoint"]
        if others := [key for key in only_by_file(reads) if key not in ("class_label", "caption", *SIZES)]:
            raise ConfigError(
                f"{checkpoint}: the model reads {', '.join(others)}, which the page cannot ask for; expected captions, "
                "classes, pictures, masks, maps or layouts. Sample with --conditions FILE (python scripts/sample.py "
                "--help)."
            )
        number, dense, most = pipeline.num_classes, pipeline.dense, most_noise(pipeline)
        names = plan.class_names or [f"class {label}" for label in range(number or 0)]
        return cls(
            checkpoint=checkpoint,
            step=pipeline.origin["step"],
            size=pipeline.image_size(),
            captions="caption" in reads,
            classes=None if number is None else names,
            guided=bool(reads) and pipeline.knows_null,
            begins=plan.pixels["channels"] in FILED,
            picture=picture_key(reads) is not None,
            hole="masked_latent" in reads,
            noise=None if most is None else (defaults(pipeline.conditioner).get(LEVEL, 0.0), most),
            map_classes=_classes(dense.map_classes, dense.num_map_classes) if "map" in reads else None,
            box_classes=_classes(dense.box_classes, None) if "boxes" in reads else None,
            longest_side=max((max(height, width) for height, width in pipeline.manifest.sizes or ()), default=0),
        )


def _classes(names: Sequence[str] | None, number: int | None) -> Sequence[str]:
    """Names, or numbers where there are none; as many as have a color on a map where nothing is known."""
    return names or [str(label) for label in range(number or 255)]


class Models:
    """The runs by the names that visitors choose from; at most one is in memory.

    Only the worker thread loads (demo_line.py).

    Args:
        runs: the runs by name.
        load: a run to its pipeline.
    """

    def __init__(self, runs: Mapping[str, str], load: Callable[[str], Pipeline]) -> None:
        self.runs = runs
        self.known: dict[str, Abilities] = {}
        self._load = load
        self._loaded: tuple[str, Pipeline] | None = None

    def pipeline(self, name: str, say: Callable[[str], None]) -> Pipeline:
        """Load a run, unless it is in memory; the one that was there is let go first.

        Args:
            say: called with what takes long.

        Raises:
            ConfigError: there is no such run, or the page cannot ask for what its model reads.
            CheckpointError: it cannot be loaded.
        """
        if name not in self.runs:
            raise ConfigError(f"model {name}: there is none of this name; there are: {', '.join(self.runs)}")
        if self._loaded is not None and self._loaded[0] == name:
            return self._loaded[1]
        if self._loaded is not None:
            _forget_encoders(self._loaded[1])
        self._loaded = None
        say(f"Loading {name}")
        pipeline = self._load(self.runs[name])
        self.known[name] = replace(Abilities.of(pipeline), prompts=prompts(pipeline.origin["checkpoint"]))
        self._loaded = name, pipeline
        return pipeline


def _forget_encoders(pipeline: Pipeline) -> None:
    """Give back the memory of frozen encoders, which are no part of a model and would outlive it."""
    for part in pipeline.denoiser["conditioner"].modules():
        if isinstance(part, FeatureText | FeaturePicture):
            part.feature.release()


def prompts(checkpoint: str) -> list[str]:
    """The captions of the previews in a run's training."""
    found = store.record(Path(checkpoint)).get("config", {})
    for key in ("lightning", "callbacks", "images", "params"):
        found = found.get(key) or {}
    asked = [{"caption": prompt} for prompt in found.get("prompts") or ()]
    asked += found.get("conditions") or []
    return [row["caption"] for row in asked if isinstance(row.get("caption"), str)]


def named(runs: Sequence[Any]) -> dict[str, str]:
    """Runs by the name of their folder; by their whole path where two folders have one name."""
    paths = [*dict.fromkeys(map(str, runs))]
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return {path if names.count(name) > 1 else name: path for path, name in zip(paths, names, strict=True)}
