"""Decode images, and convert them to a model's inputs."""

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fmn.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Modes of 8 bits a channel; Pillow would clip the values of others.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}


def decoded(content: bytes) -> "Image":
    """Decode the first image in a file's bytes, upright and in RGB.

    Raises:
        ValueError: the bytes are not an image, or the image is damaged or larger than Pillow's
            limit. The message completes a sentence that begins with the image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # the message here says what is wrong
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                mode = image.mode
                if mode.startswith("I;16"):  # as Pillow does with 16 bits a channel of colours
                    upright = np.asarray(ImageOps.exif_transpose(image))
                    return Image.fromarray((upright >> 8).astype(np.uint8)).convert("RGB")
                if mode in _MODES:
                    return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"is no image of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:  # Pillow raises anything on a broken file
        raise ValueError(f"is damaged ({' '.join(str(error).split()):.80})") from error
    raise ValueError(f"has the mode {mode}, not 8 or 16 bits a channel")


@dataclass(frozen=True)
class ImageReader:
    """A checkpoint's image processor.

    Attributes:
        processor: the image processor of Transformers.
        tokens: the number of tokens of an image in the model.
    """

    processor: Any
    tokens: int

    def __call__(self, image: "Image") -> np.ndarray:
        """The pixels that the model reads, float32 [channels, height, width]."""
        pixels: np.ndarray = self.processor(images=image, return_tensors="np")["pixel_values"][0]
        return pixels

    def save_pretrained(self, folder: Path) -> None:
        """Write the processor's settings into a checkpoint's folder."""
        self.processor.save_pretrained(folder)


class Pixels(Sequence[np.ndarray]):
    """A sequence of images' pixels that decodes an image when it is read, to save memory.

    Args:
        reader: converts an image to pixels.
        contents: the bytes of the images' files.
        rows: their row numbers, for messages.
        place: the name of the rows, for messages.
    """

    def __init__(
        self, reader: ImageReader, contents: Sequence[bytes], rows: Sequence[int], place: str
    ) -> None:
        self._reader, self._contents, self._rows, self._place = reader, contents, rows, place

    def __len__(self) -> int:
        return len(self._contents)

    @overload
    def __getitem__(self, item: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, item: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(item, slice):
            return self.take(np.arange(len(self))[item])
        try:
            return self._reader(decoded(self._contents[item]))
        except ValueError as error:
            place = f"{self._place}: the image in row {self._rows[item]}"
            raise UserError(f"{place} {error}; write the rows again") from error

    def take(self, rows: np.ndarray) -> "Pixels":
        """The pixels at `rows`, in that order."""
        contents, numbers = (
            [values[row] for row in rows] for values in (self._contents, self._rows)
        )
        return Pixels(self._reader, contents, numbers, self._place)
