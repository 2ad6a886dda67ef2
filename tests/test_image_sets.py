"""Folders, zips and .npz files of images read alike, in batches; damaged and foreign ones are named."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.evaluation import open_images

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", **options) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def names(count):
    return [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(count)]


def write_folder(path, images):
    for name, image in zip(names(len(images)), images, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(image))
    return path


def write_zip(path, images):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in reversed(list(zip(names(len(images)), images, strict=True))):
            archive.writestr(name, encoded(image))
    return path


def read(path, batch_size=3):
    return np.concatenate(list(open_images(path).batches(batch_size)))


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_folder_zip_and_npz_hold_the_same_images(tmp_path, images):
    order = np.argsort(names(len(images)))
    expected = images[order].reshape(*images.shape[:3], -1)
    np.savez(tmp_path / "plain.npz", images[order], np.arange(7))
    np.savez_compressed(tmp_path / "small.npz", images[order])
    sets = [write_folder(tmp_path / "folder", images), write_zip(tmp_path / "images.zip", images)]
    for path in [*sets, tmp_path / "plain.npz", tmp_path / "small.npz"]:
        assert len(open_images(path)) == 7
        for batch_size in (1, 3, 7, 50):
            batches = list(open_images(path).batches(batch_size))
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (7 // batch_size - (7 % batch_size == 0))
            assert all(batch.dtype == np.uint8 for batch in batches)
            np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_sets_are_read_again_and_again(tmp_path):
    for path in (write_folder(tmp_path / "folder", GREY), write_zip(tmp_path / "images.zip", GREY)):
        images = open_images(path)
        np.testing.assert_array_equal(next(iter(images.batches(2))), next(iter(images.batches(2))))
        assert images.content_hash() == images.content_hash()


def test_npz_is_read_in_pieces(tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", COLOUR)
    sizes, plain = [], zipfile.ZipExtFile.read

    def counted(self, n=-1):
        sizes.append(n)
        return plain(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    monkeypatch.setattr("diffusers_ext.evaluation.images.CHUNK", 64)
    read(tmp_path / "images.npz", batch_size=2)
    open_images(tmp_path / "images.npz").content_hash()
    assert min(sizes) >= 0 and max(sizes) <= 2 * 6 * 5 * 3


def test_hash_is_of_the_content(tmp_path):
    folder = write_folder(tmp_path / "folder", COLOUR)
    first = open_images(folder).content_hash()
    assert open_images(write_zip(tmp_path / "images.zip", COLOUR)).content_hash() == first
    (folder / "settings.json").write_text("{}")
    (folder / "a/000.png").rename(folder / "a/001.png")
    assert open_images(folder).content_hash() == first
    changed = COLOUR.copy()
    changed[3, 0, 0, 0] ^= 1
    assert open_images(write_folder(tmp_path / "changed", changed)).content_hash() != first
    assert open_images(write_folder(tmp_path / "swapped", COLOUR[::-1])).content_hash() != first


def test_hash_knows_where_a_file_ends(tmp_path):
    hashes = set()
    for folder, contents in {"one": (b"ab", b"c"), "two": (b"a", b"bc")}.items():
        (tmp_path / folder).mkdir()
        for i, data in enumerate(contents):
            (tmp_path / folder / f"{i}.png").write_bytes(data)
        hashes.add(open_images(tmp_path / folder).content_hash())
    assert len(hashes) == 2


def test_hash_of_an_array_is_of_shape_and_pixels(tmp_path):
    hashes = []
    for name, array in {"a": COLOUR, "b": COLOUR, "c": COLOUR.transpose(0, 2, 1, 3).copy()}.items():
        array = array.reshape(7, 5, 6, 3) if name == "b" else array
        np.savez(tmp_path / f"{name}.npz", array)
        hashes.append(open_images(tmp_path / f"{name}.npz").content_hash())
    np.savez(tmp_path / "d.npz", COLOUR, labels=np.arange(7))
    assert len(set(hashes)) == 3
    assert open_images(tmp_path / "d.npz").content_hash() == hashes[0]


def test_a_batch_ends_where_the_shape_changes(tmp_path):
    shapes = [(4, 4), (4, 4), (5, 4), (4, 4, 3), (4, 4, 3), (4, 4, 3)]
    for i, shape in enumerate(shapes):
        (tmp_path / f"{i}.png").write_bytes(encoded(np.full(shape, i, np.uint8)))
    batches = list(open_images(tmp_path).batches(2))
    assert [batch.shape for batch in batches] == [(2, 4, 4, 1), (1, 5, 4, 1), (2, 4, 4, 3), (1, 4, 4, 3)]
    assert [int(image.flat[0]) for batch in batches for image in batch] == list(range(6))


def test_formats_and_modes(tmp_path):
    flat = np.full((8, 8, 3), 90, np.uint8)
    palette = Image.fromarray(COLOUR[0]).quantize(4)
    cases = {
        "a.JPG": (encoded(flat, "JPEG", quality=100), flat),
        "b.webp": (encoded(COLOUR[0], "WEBP", lossless=True), COLOUR[0]),
        "c.bmp": (encoded(COLOUR[0], "BMP"), COLOUR[0]),
        "d.tiff": (encoded(COLOUR[0], "TIFF"), COLOUR[0]),
        "e.png": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "f.png": (encoded(Image.fromarray(COLOUR[0]).convert("RGBA")), COLOUR[0]),
        "g.png": (encoded(Image.fromarray(GREY[0]).convert("LA")), GREY[0][..., None]),
        "h.png": (encoded(Image.fromarray(GREY[0] > 127)), (GREY[0] > 127)[..., None] * 255),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    batches = open_images(tmp_path).batches(1)
    for (name, (_, expected)), batch in zip(sorted(cases.items()), batches, strict=True):
        np.testing.assert_array_equal(batch[0], expected, err_msg=name)


def test_other_files_are_left_out(tmp_path):
    folder = write_folder(tmp_path / "folder", GREY)
    for name in ("settings.json", ".hidden.png", "a/._000.png"):
        (folder / name).write_text("no image")
    (folder / ".cache").mkdir()
    (folder / ".cache/000.png").write_text("no image")
    path = write_zip(tmp_path / "images.zip", GREY)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._000.png", "no image")
        archive.writestr("labels.txt", "no image")
        archive.mkdir("c.png") if hasattr(archive, "mkdir") else archive.writestr("c.png/", "")
    assert len(open_images(folder)) == len(open_images(path)) == len(read(path)) == 7


def broken_copies(tmp_path):
    """(what is wrong, a path, the message) for every file that cannot be read."""
    good = encoded(COLOUR[0])
    deep = Image.fromarray(np.full((4, 4), 3000, np.uint16))
    clear = Image.fromarray(np.dstack([COLOUR[0], np.full((6, 5), 254, np.uint8)]))
    moving = encoded(Image.fromarray(GREY[0]), "WEBP", save_all=True, append_images=[Image.fromarray(GREY[1])])
    for name, data, message in [
        ("text.png", b"not a picture", "text.png is no image that can be read"),
        ("short.png", good[:-40], "short.png is no image that can be read"),
        ("empty.jpg", b"", "empty.jpg is no image that can be read"),
        ("deep.png", encoded(deep), r"deep.png has pixels of mode 'I.*; need 8-bit grey or RGB"),
        ("clear.png", encoded(clear), "clear.png is transparent in places; lay it on a background first"),
        ("key.png", encoded(COLOUR[0], transparency=tuple(map(int, COLOUR[0, 0, 0]))), "key.png is transparent"),
        ("moving.webp", moving, "moving.webp holds several pictures; need one a file"),
    ]:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(data)
        yield folder, message
    whole = write_zip(tmp_path / "whole.zip", COLOUR).read_bytes()
    damaged = bytearray(whole)
    damaged[100] ^= 255
    for name, data, message in [
        ("cut.zip", whole[:-30], "cut.zip' cannot be read as zip"),
        ("damaged.zip", bytes(damaged), "damaged.zip' cannot be read as zip: Bad CRC-32|damaged.zip.* no image"),
        ("text.zip", b"not a zip", "text.zip' cannot be read as zip"),
        ("text.npz", b"not a zip", "text.npz' cannot be read as zip"),
        ("image.png", good, "neither a folder of images, nor a zip of images, nor an .npz"),
    ]:
        (tmp_path / name).write_bytes(data)
        yield tmp_path / name, message


def test_what_cannot_be_read_is_named(tmp_path):
    cases = list(broken_copies(tmp_path))
    assert len(cases) == 12
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GREY / 255, "arr_0 must be uint8 with values 0 to 255, got float64; round it"),
        (GREY.astype(np.int64), "must be uint8 .*, got int64"),
        (np.array([{"a": 1}], dtype=object), "must be uint8 .*, got object"),
        (GREY[0], r"arr_0 must have shape \(count, height, width\), .* got \(6, 5\)"),
        (COLOUR.transpose(0, 3, 1, 2).copy(), r"1 or 3 channels last, got \(7, 3, 6, 5\)"),
        (COLOUR[:0], r"arr_0 holds no images, its shape is \(0, 6, 5, 3\)"),
        (np.asfortranarray(COLOUR), "Fortran order"),
    ],
)
def test_arrays_that_are_no_images_are_named(tmp_path, array, message):
    np.savez(tmp_path / "images.npz", array)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "images.npz")


def test_arrays_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    np.savez(tmp_path / "images.npz", np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="object"):
        open_images(tmp_path / "images.npz")
    assert not (tmp_path / "exploded").exists()


def test_a_short_array_is_named(tmp_path):
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (7, 6, 5)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + GREY[:4].tobytes())
    with pytest.raises(ValueError, match="arr_0 ends before image 4"):
        read(tmp_path / "short.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    with pytest.raises(ValueError, match="arr_0 cannot be read"):
        open_images(tmp_path / "text.npz")


def test_sets_without_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images at .*missing.*no such file or folder"):
        open_images(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty'; looked for \.png"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty/samples.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in .*; it holds samples\.npz; looked for"):
        open_images(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="no images in"):
        open_images(tmp_path / "empty.zip")
    np.savez(tmp_path / "other.npz", images=GREY)
    with pytest.raises(ValueError, match="has no arr_0, the array of images; it holds images"):
        open_images(tmp_path / "other.npz")


def test_a_zip_with_one_name_twice_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.png", encoded(GREY[0]))
        archive.writestr("a.png", encoded(GREY[1]))
    with pytest.raises(ValueError, match="several files of one name"):
        open_images(tmp_path / "twice.zip")


def test_batch_size_is_checked(tmp_path):
    np.savez(tmp_path / "images.npz", GREY)
    for path in (tmp_path / "images.npz", write_folder(tmp_path / "folder", GREY)):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            next(iter(open_images(path).batches(0)))
