"""Decoding image files of every kind, and the image folder."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.images import ImageFolder, Subset, hold_out, read_image
from ldm.errors import DataError

RED = (200, 30, 40)


def write(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), RED)).save(path, **options)
    return path


def corner(path: Path, **options) -> tuple:
    image = read_image(path, **options)
    return image.mode, image.getpixel((0, 0))


class TestReadImage:
    def test_upright(self, tmp_path):
        pixels = np.zeros((2, 3, 3), dtype=np.uint8)
        pixels[0, 0] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        image = read_image(write(tmp_path / "a.png", Image.fromarray(pixels), exif=exif))
        assert image.size == (2, 3)
        assert np.argwhere(np.asarray(image)[..., 0] == 255).tolist() == [[0, 1]]

    def test_grey_stays_grey(self, tmp_path):
        assert corner(write(tmp_path / "a.png", Image.new("L", (4, 4), 77))) == ("L", 77)
        assert corner(write(tmp_path / "b.png", Image.new("1", (4, 4), 1))) == ("L", 255)

    def test_sixteen_bits_are_scaled(self, tmp_path):
        for value, expected in ((0, 0), (257 * 99, 99), (65535, 255)):
            wide = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
            assert corner(write(tmp_path / f"{value}.png", wide)) == ("L", expected)

    def test_alpha_is_over_white(self, tmp_path):
        assert corner(write(tmp_path / "a.png", Image.new("RGBA", (4, 4), (*RED, 0)))) == ("RGB", (255, 255, 255))
        assert corner(write(tmp_path / "b.png", Image.new("RGBA", (4, 4), (*RED, 255)))) == ("RGB", RED)
        assert corner(write(tmp_path / "c.png", Image.new("LA", (4, 4), (0, 0)))) == ("RGB", (255, 255, 255))
        mode, half = corner(write(tmp_path / "d.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
        assert mode == "RGB"
        assert abs(half[0] - 127) <= 1

    def test_palette(self, tmp_path):
        palette = Image.new("RGB", (4, 4), RED).convert("P", palette=Image.Palette.ADAPTIVE)
        assert corner(write(tmp_path / "a.png", palette)) == ("RGB", RED)
        index = palette.getpixel((0, 0))
        assert corner(write(tmp_path / "b.png", palette, transparency=index)) == ("RGB", (255, 255, 255))

    def test_cmyk(self, tmp_path):
        assert corner(write(tmp_path / "a.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))) == ("RGB", (255, 0, 0))

    def test_animation_gives_its_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
        path = write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
        mode, pixel = corner(path)
        assert mode == "RGB"
        assert np.abs(np.subtract(pixel, RED)).max() <= 8

    def test_pixel_limit_is_read_from_the_header(self, tmp_path):
        path = write(tmp_path / "bomb.png", Image.new("L", (300, 300)))
        # Without its data the file has nothing but a header to decide by.
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=r"bomb\.png: 300 x 300 pixels, more than the limit of 89999"):
            read_image(path, max_pixels=89_999)

    def test_a_huge_image_is_refused_without_a_warning(self, tmp_path):
        path = write(tmp_path / "huge.png", Image.new("1", (10_000, 9_500)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DataError, match=r"huge\.png: 10000 x 9500"):
                read_image(path)

    @pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.99])
    @pytest.mark.parametrize("kind", ["jpg", "png"])
    def test_truncated_files_are_named(self, tmp_path, kind, kept):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        path = write(tmp_path / f"cut.{kind}", Image.fromarray(noise))
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(DataError, match=rf"cut\.{kind}: cannot be read"):
            read_image(path)

    def test_not_an_image(self, tmp_path):
        path = tmp_path / "page.jpg"
        path.write_text("<html>404</html>")
        with pytest.raises(DataError, match=r"page\.jpg"):
            read_image(path)
        with pytest.raises(DataError, match=r"gone\.jpg"):
            read_image(tmp_path / "gone.jpg")

    def test_pixels_without_a_known_range_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="no known range"):
            read_image(write(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32))))


class TestImageFolder:
    def test_classes_are_subfolders_in_natural_order(self, tmp_path):
        for name in ("class10/a.png", "class2/deep/x10.png", "class2/deep/x9.PNG", "class1/b.JPeG"):
            write(tmp_path / name)
        folder = ImageFolder(tmp_path)
        assert folder.class_names == ["class1", "class2", "class10"]
        assert folder.num_classes == 3
        assert folder.files == ["class1/b.JPeG", "class2/deep/x9.PNG", "class2/deep/x10.png", "class10/a.png"]
        assert [folder[i]["class_label"] for i in range(4)] == [0, 1, 1, 2]
        assert "caption" not in folder[0]

    def test_flat(self, tmp_path):
        write(tmp_path / "a.png")
        write(tmp_path / "b.png")
        folder = ImageFolder(tmp_path)
        assert folder.num_classes is None
        assert folder.class_names is None
        assert set(folder[0]) == {"image"}

    def test_subfolders_need_not_be_classes(self, tmp_path):
        write(tmp_path / "a.png")
        write(tmp_path / "x" / "b.png")
        with pytest.raises(DataError, match="classes: false"):
            ImageFolder(tmp_path)
        with pytest.raises(DataError, match=r"a\.png: lies in no class folder"):
            ImageFolder(tmp_path, classes=True)
        assert ImageFolder(tmp_path, classes=False).files == ["a.png", "x/b.png"]

    def test_hidden_and_other_files_are_left_out(self, tmp_path):
        for name in ("c/a.png", "c/.b.png", ".ipynb_checkpoints/c.png"):
            write(tmp_path / name)
        (tmp_path / "c" / "notes.md").write_text("x")
        assert ImageFolder(tmp_path).files == ["c/a.png"]

    def test_links(self, tmp_path):
        write(tmp_path / "elsewhere" / "a.png")
        root = tmp_path / "root"
        write(root / "real" / "b.png")
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "real" / "circle").symlink_to(root)
        (root / "real" / "dangling.png").symlink_to(tmp_path / "nothing.png")
        folder = ImageFolder(root)
        assert folder.files == ["linked/a.png", "real/b.png", "real/dangling.png"]
        assert folder.fingerprint()
        with pytest.raises(DataError, match=r"dangling\.png"):
            folder[2]

    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            ImageFolder(tmp_path / "typo")
        with pytest.raises(DataError, match="0 images found"):
            ImageFolder(tmp_path)

    def test_captions_beside_images(self, tmp_path):
        write(tmp_path / "a.png")
        write(tmp_path / "b.png")
        (tmp_path / "a.txt").write_text("a red square\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"b\.png: has no caption, like 1 of 2"):
            ImageFolder(tmp_path)
        (tmp_path / "b.txt").write_text("übermalt")
        folder = ImageFolder(tmp_path)
        assert [folder[i]["caption"] for i in range(2)] == ["a red square", "übermalt"]

    def test_unrelated_text_is_no_caption(self, tmp_path):
        write(tmp_path / "a.png")
        (tmp_path / "LICENSE.txt").write_text("free")
        assert "caption" not in ImageFolder(tmp_path)[0]

    def test_captions_from_jsonl(self, tmp_path):
        write(tmp_path / "x" / "a.png")
        write(tmp_path / "x" / "b.png")
        lines = [{"file_name": "x/a.png", "caption": "one"}, {"file_name": "x/b.png", "text": "two"}]
        listing = tmp_path / "captions.jsonl"
        listing.write_text("\n".join(map(json.dumps, lines)))
        folder = ImageFolder(tmp_path, captions=listing)
        assert [folder[i]["caption"] for i in range(2)] == ["one", "two"]
        listing.write_text(json.dumps(lines[0]))
        with pytest.raises(DataError, match=r"b\.png: has no caption"):
            ImageFolder(tmp_path, captions=listing)
        listing.write_text(json.dumps(lines[0]) + "\n{broken")
        with pytest.raises(DataError, match=r"captions\.jsonl:2"):
            ImageFolder(tmp_path, captions=listing)
        with pytest.raises(DataError, match=r"gone\.jsonl"):
            ImageFolder(tmp_path, captions=tmp_path / "gone.jsonl")

    def test_fingerprint(self, tmp_path):
        path = write(tmp_path / "c" / "a.png")
        seen = {ImageFolder(tmp_path).fingerprint()}
        assert ImageFolder(tmp_path).fingerprint() in seen
        assert ImageFolder(tmp_path, classes=False).fingerprint() not in seen
        path.write_bytes(path.read_bytes() + b"x")
        seen.add(ImageFolder(tmp_path).fingerprint())
        write(tmp_path / "c" / "b.png")
        seen.add(ImageFolder(tmp_path).fingerprint())
        os.rename(tmp_path / "c", tmp_path / "d")
        seen.add(ImageFolder(tmp_path).fingerprint())
        assert len(seen) == 4

    def test_fingerprint_does_not_depend_on_the_place(self, tmp_path):
        for root in ("one", "two"):
            write(tmp_path / root / "c" / "a.png")
        assert ImageFolder(tmp_path / "one").fingerprint() == ImageFolder(tmp_path / "two").fingerprint()


class TestSubset:
    def test_hold_out_is_a_partition_and_always_the_same(self, image_folder):
        folder = ImageFolder(image_folder)
        rest, held_out = hold_out(folder, 6)
        assert len(held_out) == 6
        assert sorted(rest.indices + held_out.indices) == list(range(20))
        assert held_out.indices != list(range(14, 20))
        assert hold_out(folder, 6)[1].indices == held_out.indices
        # A larger part contains the smaller one: what was validated on is not trained on later.
        assert set(held_out.indices) < set(hold_out(folder, 9)[1].indices)

    @pytest.mark.parametrize("number", [-1, 0, 20, 21])
    def test_impossible_parts(self, image_folder, number):
        with pytest.raises(DataError, match="num_validation"):
            hold_out(ImageFolder(image_folder), number)

    def test_passes_on_what_it_stands_for(self, image_folder):
        folder = ImageFolder(image_folder)
        subset = Subset(folder, [7, 3])
        assert (subset.num_classes, subset.class_names, len(subset)) == (2, ["cats", "dogs"], 2)
        assert subset.path(1) == folder.path(3)
        assert subset[0]["image"].tobytes() == folder[7]["image"].tobytes()
        assert subset.fingerprint() != Subset(folder, [3, 7]).fingerprint()
