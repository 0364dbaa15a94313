"""Reading squashfs without a mount, beside what mksquashfs packed, and images that lie."""

from __future__ import annotations

import lzma
import os
import random
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import pytest
from data_helpers import data_config, need, silent

from conftest import write_dataset
from moco.data.prepare import prepare
from moco.data.squashfs import opened
from moco.data.squashfs_reader import (
    LARGEST_FILE,
    DamagedImageError,
    SquashfsImage,
    SquashfsPath,
    UnknownCompressionError,
    unpacking,
)
from moco.errors import UserError

FLIPS = 300


def pack(folder: Path, image: Path, *options: str) -> Path:
    need("mksquashfs")
    command = ["mksquashfs", str(folder), str(image), "-noappend", "-quiet", "-no-progress", *options]
    subprocess.run(command, check=True, capture_output=True)
    return image


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every size that the format treats in its own way, and more names than one header of a folder holds."""
    folder, chance = tmp_path_factory.mktemp("tree"), random.Random(1)
    for number in range(700):
        (folder / "many").mkdir(exist_ok=True)
        (folder / "many" / f"{number}.png").write_bytes(chance.randbytes(chance.randrange(300)))
    (folder / "a b" / "ü\n").mkdir(parents=True)
    for name, size in (("empty", 0), ("one", 1), ("block", 4096), ("more", 4097), ("large", 1_300_000)):
        (folder / "a b" / "ü\n" / name).write_bytes(chance.randbytes(size))
    (folder / "text").write_text("much the same\n" * 50_000)
    with (folder / "holes").open("wb") as file:
        file.write(b"begin")
        file.seek(3 << 20)
        file.write(b"end")
    os.link(folder / "text", folder / "linked")
    (folder / "leads out").symlink_to("/etc/passwd")
    (folder / "nothing").mkdir()
    return folder


def content(root: SquashfsPath, name: str = "") -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for entry in root.iterdir():
        if entry.name == "leads out":  # a link
            continue
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            found |= {path: None} | content(entry, path)
        else:
            found[path] = entry.read_bytes()
    return found


@pytest.mark.parametrize(
    "options",
    [(), ("-comp", "xz"), ("-noI", "-noD", "-noF"), ("-b", "4096"), ("-b", "1M", "-no-fragments"),
     ("-always-use-fragments", "-no-duplicates"), ("-no-sparse", "-no-exports"), ("-all-root", "-keep-as-directory")],
)  # fmt: skip
def test_everything_is_read_as_it_was_packed(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    wanted = {
        f"/{path.relative_to(tree)}": path.read_bytes() if path.is_file() else None
        for path in tree.rglob("*") if not path.is_symlink()
    }  # fmt: skip
    with SquashfsImage(pack(tree, tmp_path / "an image.sqsh", *options)) as image:
        root = SquashfsPath(image)
        assert content(root / tree.name if "-keep-as-directory" in options else root) == wanted


def test_links_are_not_followed_and_what_is_missing_is_told(tree: Path, tmp_path: Path) -> None:
    with SquashfsImage(pack(tree, tmp_path / "image.sqsh")) as image:
        root = SquashfsPath(image)
        link, missing = root / "leads out", root / "absent" / "deeper"
        assert not missing.is_dir() and not missing.is_file()
        for follow in (link.is_file, link.is_dir):
            with pytest.raises(DamagedImageError, match="leads out is a link, which is not followed"):
                follow()
        with pytest.raises(DamagedImageError, match="not a regular file"):
            link.read_bytes()
        with pytest.raises(FileNotFoundError, match=r"image\.sqsh/absent/deeper"):
            missing.read_bytes()
        assert (root / ".." / "etc").is_dir() is False


@pytest.mark.parametrize("method", ["zstd", "lz4"])
def test_other_compressions_are_opened_by_other_means(tmp_path: Path, method: str) -> None:
    write_dataset(tmp_path / "dataset", unlabeled=6, train=4, val=4, classes=2)
    image = pack(tmp_path / "dataset", tmp_path / "other.sqsh", "-comp", method)
    try:
        SquashfsImage(image).close()
    except UnknownCompressionError as error:
        assert method in str(error)
    said: list[str] = []
    found = prepare(data_config(image, "squashfs"), tmp_path / "scratch", said.append)
    plain = pack(tmp_path / "dataset", tmp_path / "plain.sqsh")
    assert found.digest == prepare(data_config(plain, "squashfs"), tmp_path / "scratch", silent).digest


@pytest.mark.fault("damaged-squashfs", 300)
@pytest.mark.parametrize("options", [(), ("-comp", "xz"), ("-noI", "-noD", "-noF", "-noX")])
def test_flipped_bytes_are_one_error_and_end_soon(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Anywhere, most often in the tables, which are at the end, and in the superblock."""
    whole = pack(tree, tmp_path / "image.sqsh", *options).read_bytes()
    chance, refused = random.Random(2), 0
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        first, last = chance.choice(((0, 96), (0, len(whole)), (len(whole) - 20_000, len(whole))))
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(first, last)] ^= chance.randrange(1, 256)
        (tmp_path / "image.sqsh").write_bytes(damaged)
        try:
            with SquashfsImage(tmp_path / "image.sqsh") as image:
                content(SquashfsPath(image))
        except (DamagedImageError, UnknownCompressionError):
            refused += 1
        except OSError as error:
            pytest.fail(f"{type(error).__name__} {error}")
    assert refused > FLIPS / 4


@pytest.mark.fault("bad-images")
def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    for method, bomb in ((1, zlib.compress(bytes(1 << 26))), (4, lzma.compress(bytes(1 << 26)))):
        assert unpacking(method)(bomb, 1 << 26) == bytes(1 << 26)
        tracemalloc.start()
        with pytest.raises(DamagedImageError, match="does not end"):
            unpacking(method)(bomb, 8192)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24, "it was not unpacked whole"
        tracemalloc.stop()
    (tmp_path / "bomb").mkdir()
    with (tmp_path / "bomb" / "0.png").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    packed = pack(tmp_path / "bomb", tmp_path / "bomb.sqsh")
    with SquashfsImage(packed) as image, pytest.raises(DamagedImageError, match="declares 256 MiB"):
        (SquashfsPath(image) / "0.png").read_bytes()


def test_an_image_cut_short_is_refused_in_one_line(tree: Path, tmp_path: Path) -> None:
    image = pack(tree, tmp_path / "image.sqsh")
    whole = image.read_bytes()
    for keep in (50, 200, len(whole) // 2, len(whole) - 5000):
        image.write_bytes(whole[:keep])
        refusal = pytest.raises((UserError, DamagedImageError), match="ends too early")
        with refusal, opened(image, tmp_path, silent) as root:
            assert isinstance(root, SquashfsPath)
            content(root)
