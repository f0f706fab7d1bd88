"""Numbers out of range: each is refused with its key, place, range and value, before anything is built."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Gt, Interval, Le

import ldm
from ldm import ranges
from ldm.config.load import load
from ldm.config.signatures import live_signature, static_signature
from ldm.errors import ConfigError
from ldm.ranges import Count, Finite, Fraction, FractionBelowOne, Positive, Seed

ROOT = Path(__file__).parents[1]
STAGE_1 = ROOT / "configs" / "autoencoder" / "kl_f8.yaml"
STAGE_2 = ROOT / "configs" / "diffusion" / "imagenet_f8_class.yaml"
DIT = ROOT / "configs" / "diffusion" / "lightningdit_xl1_f16.yaml"


@pytest.mark.parametrize(
    ("hint", "inside", "outside", "words"),
    [
        (Count, [1, 10**400], [0, -3], "a whole number from 1 up"),
        (Seed, [0, 2**64 - 1], [-1, 2**64], "a whole number from 0 up, below 18446744073709551616"),
        (Positive, [1e-300, 3], [0, 0.0, -1, math.inf, math.nan], "a number above 0"),
        (Fraction, [0, 1, 0.5], [2, -1e-9, 1.5, math.nan, math.inf], "a number from 0 to 1"),
        (FractionBelowOne, [0, 0.999], [1, 1.0, math.nan], "a number from 0 up, below 1"),
        (Finite, [0, -1e300], [math.inf, -math.inf, math.nan], "a finite number"),
        (float, [1e9, -5], [math.inf, math.nan], None),
        (Annotated[float, Gt(0), Le(math.inf)], [1, math.inf], [0, math.nan], "a number above 0"),
        (Annotated[float, Interval(gt=0, le=2)], [2], [0, 2.1], "a number above 0, up to 2"),
    ],
)
def test_a_range_admits_what_lies_within_it(hint, inside, outside, words):
    assert all(ranges.admits(hint, value) for value in inside)
    assert not any(ranges.admits(hint, value) for value in outside)
    assert words is None or ranges.spell(hint) == words


# (file, override, key that it is about, what is expected)
OUT_OF_RANGE = [
    (STAGE_1, "model.params.gradient_clip=0", "a number above 0 or null"),
    (STAGE_2, "model.params.gradient_clip=-1", "a number above 0 or null"),
    (STAGE_2, "model.params.label_dropout=2", "a number from 0 to 1"),
    (STAGE_2, "model.params.label_dropout=-0.1", "a number from 0 to 1"),
    (STAGE_1, "data.params.batch_size=0", "a whole number from 1 up"),
    (STAGE_1, "data.params.resolution=-3", "a whole number from 1 up"),
    (STAGE_1, "data.params.num_workers=-1", "a whole number from 0 up"),
    (STAGE_1, "data.params.micro_batch_size=0", "a whole number from 1 up or null"),
    (STAGE_1, "data.params.max_broken=1.5", "a number from 0 to 1"),
    (STAGE_1, "data.params.max_broken=.nan", "a number from 0 to 1"),
    (STAGE_1, "data.params.num_validation=-1", "a whole number from 0 up"),
    (STAGE_1, "data.params.channels=0", "a whole number from 1 up"),
    (STAGE_1, "data.params.resolution=[48]", "a list of 2 (a whole number from 1 up, a whole number from 1 up)"),
    (STAGE_1, "data.params.resolution=[48,64,3]", "a whole number from 1 up or a list of 2"),
    (STAGE_2, "data.params.resolution=wide", "a whole number from 1 up or a list of 2"),
    (STAGE_1, "data.params.seed=-1", "a whole number from 0 up, below"),
    (STAGE_1, "seed=-1", "a whole number from 0 up, below"),
    (STAGE_1, "seed=18446744073709551616", "a whole number from 0 up, below"),
    (STAGE_1, "model.params.optimizer.params.lr=.nan", "a finite number"),
    (STAGE_1, "model.params.optimizer.params.lr=.inf", "a finite number"),
    (STAGE_1, "model.params.optimizer.params.betas=[0.5,.nan]", "a finite number"),
    (STAGE_1, "model.params.loss.params.kl_weight=-1e-6", "a number from 0 up"),
    (STAGE_1, "model.params.loss.params.kl_weight=.inf", "a number from 0 up"),
    (STAGE_1, "model.params.loss.params.disc_start=-1", "a whole number from 0 up"),
    (STAGE_1, "model.params.loss.params.logvar=.inf", "a finite number"),
    (STAGE_1, "model.params.encoder.params.dropout=1", "a number from 0 up, below 1"),
    (STAGE_1, "model.params.encoder.params.channel_mult=[1,0,2]", "a whole number from 1 up"),
    (STAGE_2, "model.params.network.params.num_head_channels=0", "a whole number from 1 up or null"),
    (STAGE_2, "model.params.network.params.dropout=-0.1", "a number from 0 up, below 1"),
    (STAGE_2, "model.params.objective.params.steps=0", "a whole number from 1 up"),
    (STAGE_2, "data.params.encode_batch_size=0", "a whole number from 1 up"),
    (DIT, "model.params.network.params.depth=0", "a whole number from 1 up"),
    *(
        (STAGE_2, f"{key}={{target: {target}, params: {{{params}}}{', partial: true' * partial}}}", expected)
        for key, target, params, partial, expected in [
            ("model.params.schedule", "ldm.optim.lr_schedules.Cosine", "steps: 0", False, "a whole number from 1 up"),
            (
                "model.params.schedule",
                "ldm.optim.lr_schedules.Linear",
                "steps: 9, warm_up: -1",
                False,
                "a whole number from 0",
            ),
            (
                "model.params.schedule",
                "ldm.optim.lr_schedules.Linear",
                "steps: 9, final: 2",
                False,
                "a number from 0 to 1",
            ),
            (
                "model.params.schedule",
                "ldm.optim.lr_schedules.InverseSqrt",
                "flat: 0",
                False,
                "a whole number from 1 up",
            ),
            ("model.params.optimizer", "ldm.optim.optimizers.AdamW", "lr: -1", True, "a number above 0"),
            ("model.params.optimizer", "ldm.optim.optimizers.AdamW", "lr: 0", True, "a number above 0"),
            ("model.params.optimizer", "ldm.optim.optimizers.AdamW", "lr: 1, betas: [0.9, 1]", True, "below 1"),
            ("model.params.optimizer", "ldm.optim.optimizers.Muon", "lr: 1, momentum: 1.5", True, "below 1"),
            (
                "model.params.optimizer",
                "ldm.optim.optimizers.Muon",
                "lr: 1, weight_decay: -1",
                True,
                "a number from 0 up",
            ),
            (
                "model.params.ema.params.profile",
                "ldm.optim.ema.FixedDecay",
                "decay: 1.5",
                False,
                "a number from 0 to 1",
            ),
            ("model.params.ema.params.profile", "ldm.optim.ema.HalfLife", "images: 0", False, "a number above 0"),
            ("model.params.ema.params.profile", "ldm.optim.ema.PowerFunction", "width: 0.3", False, "below 0.2887"),
            (
                "lightning.callbacks.checkpoints",
                "ldm.training.callbacks.checkpoints.Checkpoints",
                "every: 0",
                False,
                "from 1 up",
            ),
            (
                "lightning.callbacks.finite",
                "ldm.training.callbacks.skip_nonfinite.SkipNonFinite",
                "folder: a, limit: -1",
                False,
                "from 0 up",
            ),
            (
                "lightning.callbacks.images",
                "ldm.training.callbacks.previews.SampleLogger",
                "classes: [-1]",
                False,
                "from 0 up",
            ),
            (
                "lightning.callbacks.images",
                "ldm.training.callbacks.previews.SampleLogger",
                "steps: 0",
                False,
                "from 1 up",
            ),
            (
                "lightning.callbacks.averages",
                "ldm.training.callbacks.ema_snapshots.EMASnapshots",
                "every: -5",
                False,
                "from 1 up",
            ),
            ("lightning.strategy", "ldm.training.strategies.DDP", "timeout: 0", False, "a number above 0"),
            ("lightning.logger", "ldm.training.loggers.FencedWandb", "save_dir: a, time_limit: .nan", False, "above 0"),
        ]
    ),
    (STAGE_1, "lightning.trainer.max_steps=0", "a whole number from 1 up"),
    (STAGE_1, "lightning.trainer.max_steps=-1", "a whole number from 1 up"),
    (STAGE_1, "lightning.trainer.val_check_interval=0", "a whole number from 1 up or null"),
    (STAGE_1, "lightning.trainer.log_every_n_steps=0", "a whole number from 1 up"),
    (STAGE_1, "lightning.trainer.gradient_clip_val=.nan", "a number above 0 or null"),
    (STAGE_1, "lightning.trainer.limit_train_batches=0.0", "above 0, up to 1"),
    (STAGE_1, "lightning.trainer.limit_val_batches=1.5", "a number from 0 to 1"),
    (STAGE_1, "lightning.trainer.num_nodes=-2", "a whole number from 1 up"),
]


@pytest.mark.parametrize(("file", "override", "expected"), OUT_OF_RANGE, ids=[case[1] for case in OUT_OF_RANGE])
def test_a_number_out_of_range_is_refused_with_its_key_and_place(file, override, expected):
    words = ["data.params.autoencoder=logs/none"] if file != STAGE_1 else []
    with pytest.raises(ConfigError) as caught:
        load([file], [*words, override]).check()
    message = str(caught.value)
    assert f"(command line: {override}): expected " in message
    assert expected in message
    assert override.partition("=")[0] in message


def test_the_place_is_file_and_line(tmp_path):
    text = STAGE_1.read_text().replace("adversarial_weight: 0.5", "adversarial_weight: -1")
    (tmp_path / "mine.yaml").write_text(text)
    line = text[: text.index("adversarial_weight: -1")].count("\n") + 1
    with pytest.raises(ConfigError, match=rf"adversarial_weight \(.*mine.yaml:{line}\): expected a number from 0 up"):
        load([tmp_path / "mine.yaml"]).check()


def test_a_fact_of_the_data_is_checked_once_it_is_known():
    made = load([STAGE_1], ["model.params.encoder.params.in_channels=${data:channels}"])
    with pytest.raises(ConfigError, match=r"in_channels .* from 1 up, found int 0"):
        made.check({"channels": 0})


# ---- every class that a YAML may name --------------------------------------------------------------------------


# Goes into exported folders, where it is loaded without ldm: it can import no hints, and no YAML names it.
CARRIED = "ldm.interop.diffusers_models.carried_pipeline"


def targets() -> Iterator[type]:
    """Every class of ldm with a constructor of its own or of a parent's; records that only code makes are left out."""
    for found in pkgutil.walk_packages(ldm.__path__, "ldm."):
        if found.name == CARRIED:
            continue
        for name, made in vars(importlib.import_module(found.name)).items():
            if not inspect.isclass(made) or made.__module__ != found.name or name.startswith("_"):
                continue
            is_record = dataclasses.is_dataclass(made) or issubclass(made, tuple | dict | BaseException)
            if not is_record and not getattr(made, "_is_protocol", False):
                yield made


def unranged(hint: Any) -> bool:
    """Whether a number may stand somewhere in the hint without a range."""
    if hint in (int, float):
        return True
    origin = typing.get_origin(hint)
    if origin in (Annotated, typing.Literal, Callable, *_NOT_INSIDE):
        return origin is Annotated and not ranges.bounds(hint)
    return any(unranged(of) for of in typing.get_args(hint))


_NOT_INSIDE = (type, typing.get_origin(Callable[..., int]))


@pytest.mark.parametrize("made", targets(), ids=lambda made: f"{made.__module__}.{made.__name__}")
def test_every_number_of_a_constructor_states_its_range(made):
    found = [name for name, parameter in live_signature(made).parameters.items() if unranged(parameter.hint)]
    assert not found, f"{made.__module__}.{made.__name__}: say the range of {found} by a hint of ldm/ranges.py"


def test_the_walk_finds_numbers():
    assert len(list(targets())) > 80
    assert unranged(int | None)
    assert unranged(typing.Sequence[int])
    assert unranged(tuple[float, Count])
    assert not unranged(Count | None)
    assert not unranged(Callable[[int], float])


@pytest.mark.parametrize("made", targets(), ids=lambda made: f"{made.__module__}.{made.__name__}")
def test_the_source_tells_the_same_ranges(made):
    read = static_signature(f"{made.__module__}.{made.__name__}")
    if read is not None:
        for name, parameter in live_signature(made).parameters.items():
            if ranges.bounds(parameter.hint):
                assert ranges.bounds(read.parameters[name].hint) == ranges.bounds(parameter.hint), name


def test_the_defaults_lie_within_their_ranges():
    for made in targets():
        for name, parameter in inspect.signature(made).parameters.items():
            hint = live_signature(made).parameters.get(name)
            if hint and ranges.bounds(hint.hint) and isinstance(parameter.default, int | float):
                assert ranges.admits(hint.hint, parameter.default), f"{made}.{name}"


# What takes two numbers in a fixed order: (maker, the lower one, the upper one, whether they may be equal).
PAIRS = [
    ("diffusion.paths.VE", "sigma_min", "sigma_max", False),
    ("diffusion.objectives.EDM", "sigma_min", "sigma_max", False),
    ("diffusion.paths.VP", "beta_min", "beta_max", True),
    ("diffusion.noise_schedules.Linear", "start", "end", True),
    ("diffusion.noise_schedules.SqrtLinear", "start", "end", True),
]


@pytest.mark.parametrize(("name", "lower", "upper", "equal"), PAIRS)
def test_two_numbers_in_the_wrong_order_are_refused_with_both(name, lower, upper, equal):
    module, _, kind = f"ldm.{name}".rpartition(".")
    make = getattr(importlib.import_module(module), kind)
    make(**{lower: 0.25, upper: 0.5})
    wrong = [(0.5, 0.25), *([] if equal else [(0.5, 0.5)])]
    for low, high in wrong:
        with pytest.raises(ConfigError, match=rf"{lower} <=? {upper}.* found {low} and {high}"):
            make(**{lower: low, upper: high})
    if equal:
        make(**{lower: 0.5, upper: 0.5})


def test_every_pair_of_a_constructor_is_listed_above():
    listed = {f"ldm.{name}" for name, *_ in PAIRS}
    for made in targets():
        names = set(inspect.signature(made).parameters)
        pairs = [name for name in names if name.endswith("_min") and name.replace("_min", "_max") in names]
        pairs += [name for name in names if name == "start" and "end" in names]
        assert not pairs or f"{made.__module__}.{made.__name__}" in listed, (made, pairs)
