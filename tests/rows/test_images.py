"""Images in folders and tables: what is read, and what is refused in one line."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmn.errors import UserError
from fmn.rows.stages import DataSettings, TaskOptions, data, definition_of
from fmn.tasks.dataset import read_split
from fmn.tasks.images import decoded
from fmn.tasks.task import load_task


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def square(colour: str = "red") -> bytes:
    return encoded(Image.new("RGB", (4, 4), colour))


def bomb() -> bytes:
    """A PNG of a few bytes that says that it has 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    size = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + rows + chunk(b"IEND", b"")


def prepare(out: Path, dataset: Path, **options: Any) -> Any:
    settings = TaskOptions(dataset=str(dataset), **{"kind": "image-classification", **options})
    return data("t", out=out, definition=definition_of("t", settings, DataSettings())).summary


def write(folder: Path, names: dict[str, bytes]) -> Path:
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows_of(out: Path, split: str) -> list[tuple[bytes, str]]:
    task = load_task(out, "t")
    rows = read_split(out, task, split).to_pylist()
    return [(row["image"], task.labels[row["label"]]) for row in rows]


def test_classes_are_folders_and_splits_are_folders_of_them(tmp_path: Path) -> None:
    names = {f"{split}/{name}/{n}.png": square(name) for split in ("train", "test")
             for name in ("red", "blue") for n in range(2)}  # fmt: skip
    names |= {"train/.DS_Store": b"x", "train/red/Thumbs.db": b"x"}
    out = tmp_path / "out"
    prepare(out, write(tmp_path / "in", names))
    wanted = [(square(name), name) for name in ("blue", "red") for _ in range(2)]
    assert rows_of(out, "train") == rows_of(out, "test") == wanted
    alone = tmp_path / "alone"
    prepare(alone, tmp_path / "in/train", validation_size=2)
    assert sorted(rows_of(alone, "train") + rows_of(alone, "validation")) == sorted(wanted)


def test_the_words_of_datasets_name_a_folder_of_images(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {f"{name}/1.png": square(name) for name in ("red", "blue")})
    path = tmp_path / "task.yaml"
    path.write_text(
        f"columns: {{image: image}}\ndataset: {{path: imagefolder, data_dir: {folder}}}"
    )
    options = TaskOptions(definition=path)
    data("t", out=tmp_path / "out", definition=definition_of("t", options, DataSettings()))
    assert len(rows_of(tmp_path / "out", "train") + rows_of(tmp_path / "out", "validation")) == 2


@pytest.mark.parametrize("is_struct", [True, False])
def test_parquet_holds_bytes_or_what_datasets_writes(is_struct: bool, tmp_path: Path) -> None:
    contents = [square(name) for name in ("red", "blue", "green")]
    images: list[Any] = [{"bytes": each, "path": "x.png"} for each in contents]
    table = pa.table({"img": images if is_struct else contents, "kind": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    columns = {"image": "img", "label": "kind", "kind": None}
    prepare(tmp_path / "out", tmp_path / "t.parquet", validation_size=1, **columns)
    task = load_task(tmp_path / "out", "t")
    assert (task.task, task.labels) == ("image-classification", ("a", "b"))
    assert len(read_split(tmp_path / "out", task, "train")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "has more than 89478485 pixels"),
        (square()[:-20], "is damaged"),
        (encoded(Image.new("RGB", (90, 90), "red"), "JPEG")[:400], "is damaged"),
        (b"GIF89a", "is (no image|damaged)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image of PNG, JPEG"),
        (encoded(Image.new("RGB", (4, 4)), "ICO"), "is no image of PNG, JPEG"),
        (encoded(Image.fromarray(np.full((4, 4), 9, np.float32)), "TIFF"), "has the mode F, not 8"),
        (b"", "is no image of PNG, JPEG"),
    ],
)
def test_hostile_images_are_refused_with_their_row(
    content: bytes, message: str, tmp_path: Path
) -> None:
    table = pa.table({"image": [square(), content, square()], "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(
        UserError, match=rf"t.parquet: column image: .* in row 1 {message}"
    ) as caught:
        prepare(tmp_path / "out", tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    folder = write(tmp_path / "in", {"a/0.png": square(), "b/1.png": content})
    with pytest.raises(UserError, match=rf"row 1 \(b/1.png\) {message}"):
        prepare(tmp_path / "out", folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a/1.png": square(), "a/2.heic": b"x"}, "a/2.heic: is not one of .png"),
        ({"a/1.png": square(), "2.png": square()}, "2.png: is in no class's folder"),
        ({"train/a/1.png": square(), "b/2.png": square()}, "train is a split, and b is none"),
        ({"1.png": square()}, "images from CLASS/NAME.png"),
    ],
)
def test_folders_that_mean_several_things_are_refused(
    names: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", write(tmp_path / "in", names))


def test_a_path_is_no_image(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": None, "path": "x.png"}] * 3
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 0 is .*x.png.*, not the bytes of an image"):
        prepare(tmp_path / "out", tmp_path / "t.parquet")


def test_images_are_upright_and_without_transparency() -> None:
    pixels = np.arange(6 * 3, dtype=np.uint8).reshape(2, 3, 3) * 9
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6  # to be turned a quarter clockwise
    turned = decoded(encoded(image, exif=exif))
    np.testing.assert_array_equal(np.array(turned), np.rot90(pixels, -1))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        assert decoded(encoded(image.convert(mode))).mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_the_upper_half_of_16_bits_is_read(format: str) -> None:
    grey = np.arange(0, 2**16, 2**12, dtype=np.uint16).reshape(4, 4)
    pixels = np.asarray(decoded(encoded(Image.fromarray(grey), format)))
    np.testing.assert_array_equal(pixels, (grey >> 8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("is_saved", [True, False])
def test_what_datasets_writes_keeps_its_names_of_classes(is_saved: bool, tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["tulip", "rose"])}
    )
    content = {"image": [{"bytes": square(), "path": None}] * 6, "label": [0, 1] * 3}
    rows = datasets.Dataset.from_dict(content, features=features)
    path = tmp_path / ("saved" if is_saved else "t.parquet")
    _ = rows.save_to_disk(str(path)) if is_saved else rows.to_parquet(str(path))
    prepare(tmp_path / "out", path, validation_size=2)
    assert load_task(tmp_path / "out", "t").labels == ("tulip", "rose")
