"""The command line of evaluate.py: which flags there are, and what they say together."""

from collections.abc import Callable, Sequence
from typing import Any

from ldm.cli.options import FLOAT32, Parser, add_precision, at_home, called, path, seed, whole_number
from ldm.cli.sample_options import add_guidance, add_sampler, check_guidance
from ldm.errors import ConfigError
from ldm.evaluation.fidelity import RECONSTRUCTION
from ldm.evaluation.followed import FOLLOWED
from ldm.evaluation.measure import METRICS, OF_ITEMS
from ldm.evaluation.pictures.labels import ITEMS, RULES

PARTS = ("train", "validation")

OF_RECONSTRUCTIONS = (*RECONSTRUCTION, *(name for name in METRICS if name not in (*RECONSTRUCTION, "fdr")))
"""Metrics of a stage-1 run: there are no held-out pictures, which FDr divides by."""

OF_SAMPLES = (*OF_ITEMS, *FOLLOWED)
"""Metrics of a stage-2 run; which of `FOLLOWED` there are is decided by what the model reads."""

_OF_SAMPLING = (
    *("seed", "labels", "raw", "autoencoder", "steps", "sampler", "schedule"),
    *("guidance", "rescale", "interval", "guidance_channels", "negative", "guide"),
)
_MEANINGLESS = {
    "pictures": _OF_SAMPLING,
    "reconstructions": (*_OF_SAMPLING, "held_out", "reference_images", "resolution"),
    "samples": (),
}
"""Flags that decide nothing, by the kind of what is measured."""

Add = Callable[..., Any]


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError for a wrong one."""
    parser = Parser(
        prog=called("evaluate.py", "evaluate"),
        description="Measure samples, reconstructions or any pictures. `compare A B` compares records and runs; "
        "`classifier YAML` trains a judge for --classifier, --boxes-classifier or --segmenter.",
        allow_abbrev=False,
    )
    _add_subject(parser.add_argument_group("what is measured").add_argument)
    _add_measures(parser.add_argument_group("how").add_argument)
    add_sampler(parser.add_argument_group("the sampler, of a stage-2 run").add_argument)
    add_guidance(parser.add_argument_group("guidance, of a stage-2 run").add_argument)
    _add_places(parser.add_argument_group("models and places").add_argument)
    options = parser.parse_strictly(argv)
    options.named = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    options.image = options.mask = options.strength = options.size = None  # sample.py's, which has no meaning here
    _check_together(options)
    return options


def _add_subject(add: Add) -> None:
    add("pictures", nargs="?", type=path, metavar="FOLDER_OR_NPZ", help="pictures to measure, instead of a run")
    place = "run folder or checkpoint of either stage, or a quoted glob (its newest run)"
    add("-r", "--run", metavar="RUN", type=at_home, help=place)
    many = "how many (default: 10000 samples; of what there is, all)"
    add("-n", "--images", type=whole_number, metavar="N", help=many)
    add("--seed", type=seed, default=0, help="of the first sample, counted up from there (default: 0)")
    drawn = "each in turn, drawn evenly, or drawn as often as they are in the training pictures; or the classes and "
    drawn += "captions of the items of --part, and what lies on their pictures, in turn (default: balanced; of a model "
    drawn += f"that reads more than classes {ITEMS})"
    add("--labels", choices=(*RULES, ITEMS), help=f"classes of samples: {drawn}")
    add("--resolution", type=whole_number, nargs="+", metavar="PIXELS", help="resize and crop folders of pictures")


def _add_measures(add: Add) -> None:
    kinds = (
        "a folder, an .npz of pictures or of statistics (ADM's mu and sigma), or a configuration (its data set; words "
    )
    words = ("REFERENCE", "key=value")
    kinds += "key=value after it override it)"
    add("--against", nargs="+", metavar=words, help=f"{kinds} (default: what the run was trained on)")
    unseen = "real pictures that are not in it, for fdr and nearest (default: the validation part)"
    add("--held-out", type=path, metavar="FOLDER_OR_NPZ", help=unseen)
    whole = "of the data set (default: train; of a stage-1 run validation, if there is one); of a model that reads "
    whole += "pictures, masks, maps or boxes the items that ask for samples, which train is compared with all the same"
    add("--part", choices=PARTS, help=whole)
    add("--reference-images", type=whole_number, metavar="N", help="how many pictures of it (default: all)")
    spaces = "inception, alexnet, vgg16, dinov2, clip, timm:MODEL, ... (default: inception if its weights are there, "
    add("--features", nargs="+", metavar="NAME", help=f"{spaces}else alexnet)")
    every = [*dict.fromkeys([*OF_SAMPLES, *RECONSTRUCTION])]
    default = f"all of {', '.join(METRICS)}, with --labels {ITEMS} retrieval; of a model that reads pictures, masks, "
    default += f"maps or boxes those of {', '.join(FOLLOWED)} that fit; of a stage-1 run {', '.join(RECONSTRUCTION)}"
    add("--metrics", nargs="+", choices=every, metavar="METRIC", help=f"(default: {default})")
    add("--classifier", type=path, metavar="FILE", help="how often it sees the class that a sample was made of")
    boxes = "of a model that reads boxes, how often it sees in a box what was asked for there; "
    boxes += "`classifier YAML --of boxes` trains one"
    add("--boxes-classifier", type=path, metavar="FILE", help=boxes)
    maps = "of a model that reads maps, how far the map that it draws agrees with the one that was asked for; "
    maps += "`classifier YAML --of map` trains one"
    add("--segmenter", type=path, metavar="FILE", help=maps)
    add("--save-reference", type=path, metavar="FILE.npz", help="write the reference's statistics as ADM's")


def _add_places(add: Add) -> None:
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    add(
        "--autoencoder",
        type=path,
        metavar="RUN",
        help="stage-1 run, checkpoint or diffusers' folder, if it moved",
    )
    add("--batch-size", type=whole_number, default=64, help="pictures made at once (default: 64)")
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add_precision(add)
    beside = "<run>/evaluation/<protocol>.json, or beside the pictures"
    add("--out", type=path, metavar="FILE.json", help=f"the record (default: {beside})")
    add("--project", default="ldm", help="the Weights & Biases project, of a run that logs there (default: ldm)")
    trusted = "let the checkpoint, the configuration, --sampler and --schedule use objects of it"
    add("--trust", action="append", default=[], metavar="PACKAGE", help=trusted)


def _check_together(options: Any) -> None:
    """ConfigError for flags that contradict one another, or miss another."""
    if (options.run is None) == (options.pictures is None):
        raise ConfigError("What is to be measured? Name either a run (--run), or a folder or an .npz of pictures.")
    if options.pictures is not None and options.against is None:
        raise ConfigError(f"{options.pictures}: compared with what? Name a reference with --against.")
    if options.pictures is not None and options.precision != FLOAT32:
        raise ConfigError(f"--precision {options.precision}: pictures that are there are not made; leave it out.")
    if options.against is not None:
        _check_reference(*options.against)
    if options.resolution is not None and len(options.resolution) > 2:
        raise ConfigError("--resolution: expected one number, or height and width.")
    if options.out is not None and options.out.suffix != ".json":
        raise ConfigError(f"--out {options.out}: expected the name of a record, which ends in .json.")
    if options.save_reference is not None and options.save_reference.suffix != ".npz":
        raise ConfigError(f"--save-reference {options.save_reference}: expected a name that ends in .npz.")
    if options.save_reference is not None and len(options.features or ()) > 1:
        found = " ".join(options.features)
        raise ConfigError(f"--save-reference: holds the statistics of one feature space, found --features {found}")
    check_guidance(options)


def check_named(options: Any, kind: str) -> None:
    """ConfigError for flags that decide nothing.

    Args:
        kind: of what is measured: "pictures", "reconstructions" or "samples".
    """
    compared = options.against is not None and not is_configuration(options.against[0])
    idle = dict.fromkeys(_MEANINGLESS[kind], f"has no meaning for {kind}")
    if kind == "samples" and not compared and options.held_out is None:
        idle["resolution"] = "resizes folders of pictures, of which there is none here"
    if kind == "pictures" and compared:
        idle["part"] = "is a part of a data set, and there is none here"
    if options.metrics is not None and not {"fdr", "nearest"} & {*options.metrics}:
        idle["held_out"] = "is of the metrics fdr and nearest alone"
    for name in options.named:
        if name in idle:
            raise ConfigError(f"--{name.replace('_', '-')}: {idle[name]}; leave it out")


def check_metrics(asked: Sequence[str] | None, kind: str, known: Sequence[str]) -> None:
    """ConfigError for metrics that what is measured does not have."""
    if others := [name for name in asked or () if name not in known]:
        raise ConfigError(f"--metrics {' '.join(others)}: {kind} have none; they have {', '.join(known)}")


def is_configuration(reference: str) -> bool:
    """Whether a reference is a configuration's data set, as its name says."""
    return reference.endswith((".yaml", ".yml"))


def _check_reference(reference: str, *overrides: str) -> None:
    """ConfigError where something stands behind the reference that is no override of a configuration."""
    configured = is_configuration(reference)
    for word in overrides:
        if not configured or "=" not in word:
            kind = "key=value" if configured else "one reference"
            raise ConfigError(f"--against {reference}: expected {kind}, found '{word}' behind it")
