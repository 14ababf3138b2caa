"""Decodes pictures to 8-bit grey or RGB, as image viewers show them, or gives a reason why that is impossible."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from raysweep.tasks.records import Unreadable

if TYPE_CHECKING:
    from PIL import Image

# Raster formats alone: Pillow passes some others to external programs, such as PostScript to Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".j2k", ".avif",
)  # fmt: skip
UNREAD = (
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".nef", ".arw", ".tga", ".pcx",
)  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
MOST_PIXELS = 178_956_970  # half a gigabyte in RGB; Pillow's own limit against decompression bombs
ORIENTATION = 0x0112  # the EXIF tag
DARK = 8192  # of 65535: a 16-bit picture with no brighter pixel may hold 12-bit data


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns the exceptions that Pillow raises on damaged bytes into Unreadable."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on large pictures and odd metadata
            yield
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(f"a picture of more than {MOST_PIXELS / 1e6:.0f} million pixels") from error
    except Image.UnidentifiedImageError as error:
        raise Unreadable(f"not a picture in a format that is read ({', '.join(_formats())})") from error
    except Exception as error:  # its parsers raise struct.error, IndexError, KeyError, ... on bytes that make no sense
        raise Unreadable(f"a damaged or incomplete picture ({type(error).__name__})") from error


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def opened(content: bytes) -> Image.Image:
    """Decodes the first frame of a picture; raises Unreadable."""
    from PIL import Image

    if not content:
        raise Unreadable("an empty file")
    if content.startswith(LFS):
        raise Unreadable("a Git LFS pointer instead of the file (run `git lfs pull`)")
    with _damage():
        image = Image.open(io.BytesIO(content), formats=_formats())
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        frames = getattr(image, "n_frames", 1)  # before load(): counting seeks through the frames
        image.load()
        image.info["frames"] = frames
    return image


def flat(image: Image.Image, channels: int, note: Callable[[str], None]) -> Image.Image:
    """Converts a picture to 8-bit grey (1 channel) or RGB, upright and opaque; `note` is called with each change made.

    16-bit greys are scaled by 1/257. Raises Unreadable for 32-bit pixels, whose white level is not defined.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _damage():
        frames, is_scaled = image.info.get("frames", 1), image.format in ("PNG", "PPM")
        if frames > 1:
            note("several frames or pages, of which the first is used")
        if image.getexif().get(ORIENTATION, 1) in range(2, 9):
            note("turned upright as the orientation tag says")
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and is_scaled):
            values = np.asarray(image).astype(np.float32)
            note("16-bit grey scaled to 8 bit" + (" (nearly black: 12-bit data?)" if values.max() < DARK else ""))
            image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise Unreadable("32-bit pixels, whose white is not fixed (save it with 8 or 16 bits)")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            if np.asarray(rgba)[..., 3].min() < 255:
                note("transparency laid on white")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("L" if channels == 1 else "RGB")
