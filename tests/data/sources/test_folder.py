"""Decoding image files of every kind, and the image folder."""

import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import decoding, fingerprint
from ldm.data.dataset import Subset, class_labels, columns, sizes, texts
from ldm.data.decoding import image_size, read_image
from ldm.data.fingerprint import comparable
from ldm.data.held_out import hold_out
from ldm.data.sources.arrays import ArrayImages
from ldm.data.sources.folder import ImageFolder
from ldm.errors import ConfigError, DataError

RED = (200, 30, 40)


def write(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), RED)).save(path, **options)
    return path


def agree(one: str, other: str) -> bool:
    """Whether two fingerprints may describe the same items."""
    ours, theirs = comparable(one, other)
    return ours == theirs


def wide_colors(path: Path, value: int) -> Path:
    """A PNG of 4 x 4 RGB pixels of 16 bits, which Pillow cannot write."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress((b"\0" + struct.pack(">H", value) * 12) * 4)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
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
        frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 255))]
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

    def test_sixteen_bits_without_a_range_are_as_ever(self, tmp_path):
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        expected = (values.astype(np.uint32) + 128) // 257
        assert np.array_equal(read_image(write(tmp_path / "a.png", Image.fromarray(values))), expected)

    def test_a_value_range_is_linear_and_cut_off(self, tmp_path):
        values = np.array([[0, 100, 2148, 4195, 5000, 65535]], dtype=np.uint16)
        for suffix in ("png", "tif"):
            path = write(tmp_path / f"a.{suffix}", Image.fromarray(values))
            # 255 (v - 100) / 4095: 2148 is 127.53.
            assert np.asarray(read_image(path, value_range=(100, 4195))).tolist() == [[0, 0, 128, 255, 255, 255]]

    def test_a_value_range_opens_what_has_none_of_its_own(self, tmp_path):
        floats = write(tmp_path / "f.tif", Image.fromarray(np.array([[-1, 0, 0.5, 2]], dtype=np.float32)))
        assert np.asarray(read_image(floats, value_range=(0, 1))).tolist() == [[0, 0, 128, 255]]
        signed = write(tmp_path / "i.tif", Image.fromarray(np.array([[-1024, 38, 3000]], dtype=np.int32)))
        assert np.asarray(read_image(signed, value_range=(-160, 240))).tolist() == [[0, 126, 255]]
        nothing = write(tmp_path / "n.tif", Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))
        with pytest.raises(DataError, match=r"n\.tif.*NaN"):
            read_image(nothing, value_range=(0, 1))

    def test_a_value_range_leaves_eight_bits_alone_and_refuses_wide_colors(self, tmp_path):
        assert corner(write(tmp_path / "a.png", Image.new("L", (4, 4), 77)), value_range=(0, 4095)) == ("L", 77)
        assert corner(write(tmp_path / "b.png"), value_range=(0, 4095)) == ("RGB", RED)
        wide = wide_colors(tmp_path / "c.png", 4000)
        assert corner(wide) == ("RGB", (15, 15, 15))
        with pytest.raises(DataError, match=r"c\.png: value_range is for gray images"):
            read_image(wide, value_range=(0, 4095))

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
        with pytest.raises(DataError, match=r"a\.png: is in no class folder"):
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
        with pytest.raises(DataError, match=r"b\.png: has no caption \(b\.txt\); 1 of 2 images"):
            ImageFolder(tmp_path, captions=True)
        (tmp_path / "b.txt").write_text("übermalt")
        folder = ImageFolder(tmp_path)
        assert [folder[i]["caption"] for i in range(2)] == ["a red square", "übermalt"]

    def test_a_stray_text_does_not_make_a_folder_unusable(self, tmp_path, caplog):
        for name in ("a.png", "b.png", "c.png"):
            write(tmp_path / name)
        (tmp_path / "b.txt").write_text("my notes")
        folder = ImageFolder(tmp_path)
        assert all("caption" not in folder[index] for index in range(3))
        assert "2 of 3 images have no caption beside them, such as a.png" in caplog.text
        assert "the other 1, such as b.txt" in caplog.text
        caplog.clear()
        assert "caption" not in ImageFolder(tmp_path, captions=False)[1]
        assert "have no caption" not in caplog.text
        assert "left out: 1 .txt" in caplog.text

    def test_captions_can_be_asked_for_or_left(self, tmp_path):
        write(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: has no caption \(a\.txt\); 1 of 1"):
            ImageFolder(tmp_path, captions=True)
        (tmp_path / "a.TXT").write_text("shouted")
        assert ImageFolder(tmp_path)[0]["caption"] == "shouted"
        assert ImageFolder(tmp_path, captions=True)[0]["caption"] == "shouted"
        assert "caption" not in ImageFolder(tmp_path, captions=False)[0]

    def test_lines_of_a_jsonl_that_are_of_no_use_are_named(self, tmp_path, caplog):
        write(tmp_path / "a.png")
        names = ("a.png", "gone.png", "a.png")
        lines = [json.dumps({"file_name": name, "caption": str(number)}) for number, name in enumerate(names)]
        (tmp_path / "c.jsonl").write_text("\n".join(lines))
        assert ImageFolder(tmp_path, captions=tmp_path / "c.jsonl")[0]["caption"] == "2"
        assert "captions of 1 images that do not exist (gone.png)" in caplog.text
        assert "1 captions of images that have another one further down (a.png)" in caplog.text

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

    def test_a_replaced_picture_changes_the_fingerprint(self, tmp_path):
        """Of equal name, size and time, whichever it is, beside any others, and its caption likewise."""
        random = np.random.default_rng(0)
        for number in range(5):
            write(tmp_path / f"{number}.bmp", Image.fromarray(random.integers(0, 256, (200, 200, 3), dtype=np.uint8)))
            (tmp_path / f"{number}.txt").write_text("a cat")
        before = ImageFolder(tmp_path).fingerprint()
        other = Image.fromarray(random.integers(0, 256, (200, 200, 3), dtype=np.uint8))
        for name in [f"{number}.{kind}" for number in range(5) for kind in ("bmp", "txt")]:
            path = tmp_path / name
            old, state = path.read_bytes(), path.stat()
            write(path, other) if name.endswith("bmp") else path.write_text("a dog")
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            assert path.stat().st_size == state.st_size
            assert not agree(ImageFolder(tmp_path).fingerprint(), before)
            path.write_bytes(old)
            assert ImageFolder(tmp_path).fingerprint() == before, "times alone change nothing"

    def test_the_fingerprint_of_names_and_sizes_is_still_its_first_part(self, tmp_path):
        """As it was written into caches and runs before contents were sampled."""
        for name, length in (("cats/a.png", 7), ("dogs/b.png", 8)):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(bytes(length))
        (tmp_path / "cats" / "a.txt").write_text("x")
        (tmp_path / "dogs" / "b.txt").write_text("xyz")
        rows = ('[["cats", "dogs"], null]', '["cats/a.png", 7, 1]', '["dogs/b.png", 8, 3]')
        old = hashlib.sha256("".join(rows).encode()).hexdigest()
        folder = ImageFolder(tmp_path)
        assert folder.fingerprint().startswith(f"{old}:contents:")
        assert agree(folder.fingerprint(), old)
        part = hashlib.sha256(old.encode() + np.array([1, 0]).tobytes()).hexdigest()
        assert Subset(folder, [1, 0]).fingerprint() == part + folder.fingerprint().removeprefix(old)
        rows = ('[["cats", "dogs"], null]', '["cats/a.png", 7, -1]', '["dogs/b.png", 8, -1]')
        plain = hashlib.sha256("".join(rows).encode()).hexdigest()
        assert agree(ImageFolder(tmp_path, captions=False).fingerprint(), plain)
        ranged = ImageFolder(tmp_path, captions=False, value_range=[0, 4095]).fingerprint()
        assert not agree(ranged, plain)
        assert ranged != ImageFolder(tmp_path, captions=False, value_range=[0, 1023]).fingerprint()

    @pytest.mark.parametrize("value_range", [[0], [1, 1], [4095, 0], [0, float("nan")], [0, 1, 2]])
    def test_a_value_range_that_is_none(self, image_folder, value_range):
        with pytest.raises(ConfigError, match=r"value_range: expected .*two increasing numbers"):
            ImageFolder(image_folder, value_range=value_range)

    def test_the_value_range_reaches_the_pixels(self, tmp_path):
        write(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 4095, dtype=np.uint16)))
        assert ImageFolder(tmp_path)[0]["image"].getpixel((0, 0)) == 16
        assert ImageFolder(tmp_path, value_range=[0, 4095])[0]["image"].getpixel((0, 0)) == 255

    def test_names_that_are_not_utf_8(self, tmp_path):
        """Read, labelled, hashed, and named where they are broken."""
        name = os.fsdecode(b"caf\xe9")
        write(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}_.jpg").write_text("no picture")
        folder = ImageFolder(tmp_path)
        assert folder.class_names == [name]
        assert folder[0]["class_label"] == 0
        assert folder.fingerprint() == ImageFolder(tmp_path).fingerprint()
        with pytest.raises(DataError, match="cannot be read as an image"):
            folder[1]
        (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": folder.files[0], "caption": "one"}))
        with pytest.raises(DataError, match=r"has no caption in .*c\.jsonl, like 1 of 2"):
            ImageFolder(tmp_path, captions=tmp_path / "c.jsonl")

    def test_left_out_files_are_counted_once_in_a_line(self, tmp_path, caplog):
        for name in ("c/a.png", "c/.b.png", ".cache/c.png"):
            write(tmp_path / name)
        for name in ("c/1.json", "c/2.JSON", "readme"):
            (tmp_path / name).write_text("{}")
        ImageFolder(tmp_path)
        assert caplog.messages == [f"{tmp_path}: left out: 2 .json, 2 hidden, 1 without extension"]

    def test_other_ranks_are_silent(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        write(tmp_path / "a.png")
        (tmp_path / "readme").write_text("")
        ImageFolder(tmp_path)
        assert not caplog.messages

    def test_classes_without_images_are_named(self, tmp_path, caplog):
        write(tmp_path / "cats" / "a.png")
        write(tmp_path / "hidden" / "deep" / ".a.png")
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.json").write_text("{}")
        assert ImageFolder(tmp_path).class_names == ["cats"]
        expected = "folders without images do not become classes: empty (empty), hidden (1 hidden), notes (1 .json)"
        assert expected in caplog.text
        caplog.clear()
        ImageFolder(tmp_path, classes=False)
        assert "no class" not in caplog.text

    @pytest.mark.parametrize("kind", ["heic", "DCM", "cr2", "jxl"])
    def test_a_class_of_pictures_that_cannot_be_read_is_an_error(self, tmp_path, kind):
        write(tmp_path / "cats" / "a.png")
        (tmp_path / "dogs" / "deep").mkdir(parents=True)
        (tmp_path / "dogs" / "deep" / f"b.{kind}").write_bytes(b"x")
        with pytest.raises(DataError, match=rf"dogs: holds 0 images that can be read, but 1 \.{kind.lower()}"):
            ImageFolder(tmp_path)
        assert ImageFolder(tmp_path, classes=False).files == ["cats/a.png"]

    def test_nothing_but_others(self, tmp_path):
        (tmp_path / "a.heic").write_bytes(b"x")
        with pytest.raises(DataError, match=r"0 images found \(1 \.heic; looked for .*\.jfif"):
            ImageFolder(tmp_path)


CAPTIONED = ("beside", "jsonl")


@pytest.fixture(params=CAPTIONED)
def captioned(request, tmp_path):
    """A function that makes a folder of three pictures, whose captions lie beside them or in a file."""
    for name in "abc":
        write(tmp_path / "pictures" / f"{name}.png", Image.new("RGB", (4, 6)))

    def make(*captions: str) -> ImageFolder:
        if request.param == "beside":
            for name, caption in zip("abc", captions, strict=True):
                (tmp_path / "pictures" / f"{name}.txt").write_text(caption)
            return ImageFolder(tmp_path / "pictures")
        lines = [
            json.dumps({"file_name": f"{name}.png", "caption": caption})
            for name, caption in zip("abc", captions, strict=True)
        ]
        (tmp_path / "c.jsonl").write_text("\n".join(lines))
        return ImageFolder(tmp_path / "pictures", captions=tmp_path / "c.jsonl")

    return make


def fingerprints(dataset) -> tuple[str, str, str]:
    """Of all, of the captions, of the pictures."""
    return dataset.fingerprint(), dataset.captions_fingerprint(), dataset.pictures_fingerprint()


class TestTexts:
    def test_captions_without_pictures(self, captioned):
        folder = captioned("one", "two", "three")
        assert [list(folder.captions(index)) for index in range(3)] == [["one"], ["two"], ["three"]]
        part = Subset(Subset(folder, [0, 2]), [1])
        assert texts(part) is part
        assert list(part.captions(0)) == ["three"]

    def test_three_fingerprints(self, captioned, tmp_path):
        """Each changes with what it covers and with nothing else."""
        whole, texts, pictures = fingerprints(captioned("one", "two", "three"))
        assert pictures == ImageFolder(tmp_path / "pictures", captions=False).fingerprint() != whole
        assert fingerprints(captioned("one", "two", "three")) == (whole, texts, pictures)
        other = fingerprints(captioned("one", "2", "three"))
        assert other[2] == pictures
        assert not {whole, texts} & set(other)
        write(tmp_path / "pictures" / "b.png", Image.new("RGB", (4, 7)))
        repainted = fingerprints(captioned("one", "2", "three"))
        assert repainted[1] == other[1]
        assert not {other[0], pictures} & set(repainted)

    def test_parts_have_three_fingerprints_too(self, captioned):
        whole, texts, pictures = fingerprints(Subset(captioned("one", "two", "three"), [2, 1]))
        assert fingerprints(Subset(captioned("one", "two", "three"), [2, 1])) == (whole, texts, pictures)
        assert not {whole, texts, pictures} & set(fingerprints(Subset(captioned("one", "two", "three"), [1, 2])))
        other = fingerprints(Subset(captioned("one", "2", "three"), [2, 1]))
        assert other[2] == pictures
        assert not {whole, texts} & set(other)

    def test_the_source_of_captions_does_not_matter(self, tmp_path):
        write(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("a long story\n" * 10_000)
        beside = ImageFolder(tmp_path)
        (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": beside[0]["caption"]}))
        table = ImageFolder(tmp_path, captions=tmp_path / "c.jsonl")
        assert table.captions_fingerprint() == beside.captions_fingerprint()

    def test_a_word_of_a_long_caption_matters(self, tmp_path):
        write(tmp_path / "a.png")
        words = ["word"] * 50_000
        (tmp_path / "a.txt").write_text(" ".join(words))
        first = ImageFolder(tmp_path).captions_fingerprint()
        words[4_321] = "WORD"
        (tmp_path / "a.txt").write_text(" ".join(words))
        assert ImageFolder(tmp_path).captions_fingerprint() != first

    def test_data_without_captions_has_no_texts(self, image_folder):
        folder = ImageFolder(image_folder)
        assert texts(folder) is None
        assert texts(Subset(folder, [0])) is None
        with pytest.raises(DataError, match="no captions"):
            Subset(folder, [0]).captions(0)

    def test_the_fingerprint_of_a_folder_is_what_it_was(self, tmp_path):
        """As computed by the first version that looked into files; caches are named by it."""
        for name in ("x/a.pgm", "y/b.pgm"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"P5 1 1 255\n" + name.encode()[:1])
            (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
        (tmp_path / "c.jsonl").write_text(
            "\n".join(json.dumps({"file_name": name, "text": "é"}) for name in ("y/b.pgm", "x/a.pgm", "gone.pgm"))
        )
        beside, table = ImageFolder(tmp_path), ImageFolder(tmp_path, captions=tmp_path / "c.jsonl")
        assert hashlib.sha256(beside.fingerprint().encode()).hexdigest()[:16] == "2600f2679743ea07"
        assert hashlib.sha256(table.fingerprint().encode()).hexdigest()[:16] == "6577863101771a52"
        assert hashlib.sha256(table.pictures_fingerprint().encode()).hexdigest()[:16] == "dc5b5b087023a90c"


class TestSizes:
    @pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif", "bmp"])
    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_as_decoded(self, tmp_path, kind, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if kind in ("gif", "bmp") else {"exif": exif}
        path = write(tmp_path / f"a.{kind}", Image.new("RGB", (4, 6)), **options)
        width, height = read_image(path).size
        assert ImageFolder(tmp_path).sizes().tolist() == [[height, width]]
        assert image_size(path) == (height, width)
        assert image_size("within", io.BytesIO(path.read_bytes())) == (height, width)

    def test_an_orientation_after_the_pixels_of_a_png(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = write(tmp_path / "a.png", Image.new("RGB", (4, 6)), exif=exif)
        content = path.read_bytes()
        place = content.index(b"eXIf") - 4
        length = int.from_bytes(content[place : place + 4], "big") + 12
        chunk, rest = content[place : place + length], content[:place] + content[place + length :]
        end = rest.index(b"IEND") - 4
        path.write_bytes(rest[:end] + chunk + rest[end:])
        assert read_image(path).size == (6, 4)
        assert image_size(path) == (4, 6)

    def test_headers_alone_are_read(self, tmp_path):
        path = write(tmp_path / "a.png", Image.new("L", (300, 200)))
        path.write_bytes(path.read_bytes()[:60])
        assert ImageFolder(tmp_path).sizes().tolist() == [[200, 300]]

    def test_what_cannot_be_read_has_none(self, tmp_path):
        write(tmp_path / "a.png")
        (tmp_path / "b.png").write_text("no picture")
        write(tmp_path / "c.png", Image.new("L", (300, 300)))
        folder = ImageFolder(tmp_path, max_pixels=89_999)
        assert folder.sizes().tolist() == [[4, 4], [0, 0], [0, 0]]
        assert sizes(Subset(folder, [1, 0])).tolist() == [[0, 0], [4, 4]]

    def test_they_are_remembered(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(fingerprint, "INDEX_FROM", 1)
        monkeypatch.setattr(fingerprint, "_SETTLED", -(10**9))
        write(tmp_path / "pictures" / "a.png")
        first = ImageFolder(tmp_path / "pictures").sizes()
        monkeypatch.setattr(decoding, "image_size", None)
        assert np.array_equal(ImageFolder(tmp_path / "pictures").sizes(), first)

    def test_a_data_set_may_not_know_them(self):
        pixels = ArrayImages("ours", np.zeros((2, 4, 4), np.uint8))
        assert sizes(pixels) is sizes(Subset(pixels, [0])) is None
        assert columns(Subset(pixels, [0])) == {}


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

    def test_labels_are_known_without_decoding(self, image_folder):
        for part in (ImageFolder(image_folder), *hold_out(ImageFolder(image_folder), 6)):
            found = [part[index]["class_label"] for index in range(len(part))]
            assert class_labels(part).tolist() == found
        assert class_labels(ImageFolder(image_folder, classes=False)) is None

    @pytest.mark.parametrize("number", [-1, 0])
    def test_impossible_parts(self, image_folder, number):
        with pytest.raises(DataError, match="num_validation"):
            hold_out(ImageFolder(image_folder), number)

    @pytest.mark.parametrize("number", [20, 21, 5000])
    def test_a_small_folder_holds_out_a_tenth_and_says_so(self, image_folder, number, caplog):
        rest, held_out = hold_out(ImageFolder(image_folder), number)
        assert (len(rest), len(held_out)) == (18, 2)
        assert f"num_validation: {number} of 20 items would leave none to train on; a tenth, 2" in caplog.text

    def test_passes_on_what_it_stands_for(self, image_folder):
        folder = ImageFolder(image_folder)
        subset = Subset(folder, [7, 3])
        assert (subset.num_classes, subset.class_names, len(subset)) == (2, ["cats", "dogs"], 2)
        assert subset.path(1) == folder.path(3)
        assert subset[0]["image"].tobytes() == folder[7]["image"].tobytes()
        assert subset.fingerprint() != Subset(folder, [3, 7]).fingerprint()
