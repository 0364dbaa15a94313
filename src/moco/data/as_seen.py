"""What a person sees in an image file: upright, 8 bits a channel, in RGB, on white.

The same rules for all images of every dataset. `submission.py` carries a copy of what follows the imports, so this
module knows numpy and Pillow alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# EXIF's orientation: how the stored picture has to be turned.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTED_BY = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow keeps EXIF and XMP
PHOTOMETRIC = 262  # TIFF's tag; 0: the largest value is black
BACKGROUND = "white"  # under transparent pixels, as viewers show them


def as_seen(image: Image.Image) -> Image.Image:
    """Return an opened image as a viewer shows it, in RGB. Raises ValueError, with the reason, where that is open."""
    return adjusted(image)[0]


def adjusted(image: Image.Image) -> tuple[Image.Image, set[str]]:
    """Return the image in RGB, and what had to be done to it.

    oriented: turned or mirrored as its EXIF or XMP says. composited: had transparent pixels, which lie on white now.
    rescaled: had more than 8 bits a channel. Of 16 bits the upper 8 are taken, of 12 in a TIFF the upper 8 of 12, and
    floats are from 0 (black) to 1 (white). Raises ValueError for other values.
    """
    raw, done = _raw_mode(image), set()
    before = _orientation(image)  # Pillow turns a TIFF on loading
    image.load()
    orientation = _orientation(image)
    if orientation != 1 or before != 1:
        done.add("oriented")
    if image.mode[0] in "IF":
        image = _eight_bits(image, raw)
        done.add("rescaled")
    elif "16" in raw:
        if "transparency" in image.info:
            raise ValueError("16 bits a channel and a transparent colour; save it with 8 bits or an alpha channel")
        done.add("rescaled")
    elif raw in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= 85 if raw == "L;2" else 17  # Pillow spreads the pixels to 8 bits, and not this
    image, transparent = _on_background(image)
    if transparent:
        done.add("composited")
    return (image.transpose(TURNS[orientation]) if orientation != 1 else image), done


def _raw_mode(image: Image.Image) -> str:
    """Return how pixels lie in the file, such as RGB;16B; empty where that is not known."""
    tiles = getattr(image, "tile", None)  # of a file that is not loaded yet
    if not tiles:
        return ""
    arguments = tiles[0][3] if isinstance(tiles[0][3], tuple) else (tiles[0][3],)
    if image.format == "PPM" and any(isinstance(a, int) and a > 255 for a in arguments):
        return "16"  # the largest value
    if image.format == "BMP":
        return ""  # there it is 16 bits a pixel
    return next((a for a in arguments if isinstance(a, str) and ";" in a), "")


def _orientation(image: Image.Image) -> int:
    """Return the number that EXIF or XMP has, 1 where there is none, or none that means anything."""
    if not ORIENTED_BY & image.info.keys() and not hasattr(image, "tag_v2"):
        return 1
    try:
        found = image.getexif().get(274, 1)
    except MemoryError:
        raise
    except Exception:  # a damaged block, in which viewers see nothing either
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def _eight_bits(image: Image.Image, raw: str) -> Image.Image:
    """Return an image of one channel of integers or floats as one of 8 bits, by the rule of `adjusted`."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode[0] == "F":
        if not (low >= 0 and high <= 1):  # NaN as well
            raise ValueError(f"floats from {low:g} to {high:g}; 0 to 1 is expected; scale all images alike")
        gray = np.rint(values * 255).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"values from {low} to {high}; 0 to 65535 is expected; scale all images alike")
        gray = (values >> (4 if raw == "I;12" else 8)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        gray = 255 - gray
    key = image.info.get("transparency")
    if key is None:
        return Image.fromarray(gray)
    return Image.fromarray(np.dstack([gray, np.where(values == key, 0, 255).astype(np.uint8)]))


def _on_background(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return the image in RGB, and whether any pixel of it was transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, False
    if image.mode in ("La", "RGBa"):  # colours that were multiplied with their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    palette = image.palette.mode if image.palette else ""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info and not palette.endswith("A"):
        return image.convert("RGB"), False
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return layer.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB"), True
