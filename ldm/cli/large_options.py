"""The flags of sample.py for pictures that are larger than the training pictures."""

from collections.abc import Callable
from typing import Any

from ldm.autoencoder.tiling import Tiling
from ldm.cli.options import whole_number
from ldm.errors import ConfigError
from ldm.runtime import signals


def add_tiles(add: Callable[..., Any]) -> None:
    """--tile and --overlap."""
    tile = "make large pictures in tiles of this height and width, or side, pixels: best that of the training pictures"
    add("--tile", type=whole_number, nargs="+", metavar="SIDE", help=tile)
    add("--overlap", type=whole_number, metavar="PIXELS", help="of tiles, at least (default: a quarter of --tile)")


def check_tiles(options: Any) -> None:
    """ConfigError for flags that contradict one another."""
    if options.tile is None:
        if options.overlap is not None:
            raise ConfigError(f"--overlap {options.overlap}: belongs to --tile SIDE, which is missing.")
    elif len(options.tile) > 2:
        raise ConfigError(f"--tile: expected one side, or height and width, found {len(options.tile)} numbers.")


def tiling(options: Any, factor: int) -> Tiling | None:
    """What --tile and --overlap say, for an autoencoder that divides by `factor`; None: pictures are made as a whole.

    As many tiles are denoised at once as --batch-size allows pictures, eight at most. A request to stop is heard after
    each, since a picture of many may take hours.
    """
    if options.tile is None:
        return None
    tile = options.tile[0], options.tile[-1]
    quarter = max(1, min(tile) // 4 // factor) * factor
    overlap = quarter if options.overlap is None else options.overlap
    return Tiling(tile, overlap, min(8, options.batch_size), report=lambda *_: signals.stop_if_asked())


def tile_settings(tile: Tiling | None) -> dict[str, Any]:
    """What samples.json says of it."""
    return {} if tile is None else {"tile": [*tile.tile], "overlap": tile.overlap}
