"""Which files are images: by their names, else by how they begin. Imports no torch: workers that decode use it."""

from __future__ import annotations

import re

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif",
    ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
# Images that cannot be read here by any means: what has such a name is listed, so that it is refused with its reason.
UNREAD_SUFFIXES = (
    ".heics", ".heifs", ".hif", ".avifs", ".avci", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".psd", ".psb",
    ".svg", ".svgz", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef",
    ".srw", ".exr", ".dcm", ".dicom", ".fits", ".tga", ".xcf", ".dds", ".jng", ".qoi", ".pcx",
)  # fmt: skip
# What operating systems, network storages and browsers of files leave in folders; names that begin with a dot as well.
LITTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
HEAD = 32  # bytes that tell
BOX = re.compile(rb"....ftyp(....)", re.DOTALL)  # of the family of MP4, with the brand
READ = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM....\0\0\0\0|RIFF....WEBP|P[1-6]\s|II\*\0|MM\0\*|II\+\0|MM\0\+", re.DOTALL
)
CONVERT = "convert it to PNG or JPEG"
OTHERS = {
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"\0\0\0\x0cJXL |\xff\x0a": "JPEG XL",
    rb"8BPS": "a Photoshop file",
    rb"%PDF": "a PDF",
    rb"\s*<(\?xml|svg|!DOCTYPE svg)": "SVG or XML",
    rb"\x93NUMPY": "a NumPy array",
    rb"\x89HDF": "HDF5",
    rb"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the image)",
}


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name belongs to the system, not to the dataset."""
    return name.startswith(".") or name.lower() in LITTER


def has_suffix(name: str) -> bool:
    """Return whether a name says what kind of file it is.

    `a.txt` does, `a`, `17`, `scan.0001` and `Mr. Smith` do not.
    """
    return re.search(r"[^.]\.[A-Za-z]\w{0,7}$", name) is not None


def is_image_name(name: str) -> bool:
    """Return whether the name has the suffix of an image, of a kind that is read or not."""
    return name.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES))


def is_image(head: bytes) -> bool:
    """Return whether a file that begins so is an image of a kind that is read, HEIC and AVIF included."""
    return READ.match(head) is not None or is_heic(head) or _brand(head).startswith("avi")


def is_heic(head: bytes) -> bool:
    """Return whether a file that begins so is HEIC, as phones write it."""
    return _brand(head) in ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")


def _brand(head: bytes) -> str:
    found = BOX.match(head)
    return found[1].decode("latin-1") if found else ""


def why_not_read(head: bytes) -> str:
    """Say why Pillow did not recognise a file that begins so, and what to do."""
    if is_heic(head):
        return f"HEIC: pip install pillow-heif, or {CONVERT}"
    if _brand(head).startswith("avi"):
        return f"AVIF: pip install 'pillow>=11.3', or {CONVERT}"
    for pattern, name in OTHERS.items():
        if re.match(pattern, head):
            return f"{name} is not read; {CONVERT}"
    if READ.match(head):
        return f"damaged, or of a kind that Pillow does not read; {CONVERT}"
    return "not an image"
