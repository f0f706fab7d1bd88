"""The flags of sample.py for inpainting that goes back and forth."""

from collections.abc import Callable
from typing import Any

from ldm.cli.options import whole_number
from ldm.errors import ConfigError
from ldm.sampling.img2img import InitImage
from ldm.sampling.repaint import RePaint
from ldm.sampling.samplers import Sampler

JUMP = 10
"""Of the paper."""


def add_repaint(add: Callable[..., Any]) -> None:
    """--resamplings and --jump."""
    often = "with --mask: take every few steps that often, so that what is new agrees with what stays (default: 1)"
    add("--resamplings", type=whole_number, default=1, metavar="N", help=often)
    add("--jump", type=whole_number, metavar="STEPS", help=f"how many steps are taken again (default: {JUMP})")


def check_repaint(options: Any) -> None:
    """ConfigError for flags that do nothing."""
    if options.resamplings > 1 and options.mask is None:
        raise ConfigError(f"--resamplings {options.resamplings}: belongs to --mask FILE, which is missing.")
    if options.jump is not None and options.resamplings == 1:
        raise ConfigError(f"--jump {options.jump}: belongs to --resamplings N, above 1, which is missing.")


def resampled(sampler: Sampler, options: Any, init_image: InitImage | None) -> Sampler:
    """The sampler with what --resamplings and --jump say.

    Raises:
        ConfigError: the model reads the mask itself, or the steps are too few.
    """
    if options.resamplings == 1:
        return sampler
    if init_image is None or init_image.mask is None:
        raise ConfigError(f"--resamplings {options.resamplings}: this model reads the mask itself; leave it out.")
    repaint = RePaint(sampler, options.resamplings, JUMP if options.jump is None else options.jump)
    repaint.require(init_image.steps(options.steps))
    return repaint


def repaint_settings(sampler: Sampler) -> dict[str, int]:
    """What samples.json says of it."""
    if not isinstance(sampler, RePaint):
        return {}
    return {"resamplings": sampler.resamplings, "jump": sampler.jump}
