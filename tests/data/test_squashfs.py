"""Real squashfs images, opened by every means there is, and nothing left of it afterwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_helpers import data_config, hide_all_but, left_behind, mounts_below, need, silent, try_mount

from conftest import write_dataset
from moco.data.generated import pack
from moco.data.prepare import prepare
from moco.data.sources import open_dataset
from moco.data.squashfs import local_copy, open_squashfs
from moco.errors import UserError
from moco.files import sha256

MEANS = ("squashfuse", "kernel mount", "unsquashfs")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose root holds `dataset`, with a space in its path."""
    need("mksquashfs")
    folder = tmp_path_factory.mktemp("packed data")
    write_dataset(folder / "dataset", unlabeled=6, train=4, val=4, classes=2)
    pack(folder / "dataset", folder / "student_dataset.sqsh")
    return folder / "student_dataset.sqsh"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


Only = Callable[[str], None]


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Path) -> Only:
    """Leaves one means of opening images on PATH; skips where this machine does not have or permit it."""

    def choose(means: str) -> None:
        if means == "unsquashfs":
            need("unsquashfs")
            return hide_all_but(("unsquashfs",), tmp_path / "bin", monkeypatch)
        folder = tmp_path / "trial"
        folder.mkdir()
        if means == "squashfuse":
            need("squashfuse")
            unmounters = [tool for tool in ("fusermount3", "fusermount", "umount") if shutil.which(tool)]
            try_mount(["squashfuse", "-o", "ro", str(packed), str(folder)])
            tools = ("squashfuse", *unmounters)
        else:
            try_mount(["mount", "-t", "squashfs", "-o", "ro,loop", str(packed), str(folder)])
            tools = ("mount", "umount", "unsquashfs")
        try_mount(["umount", str(folder)])
        return hide_all_but(tools, tmp_path / "bin", monkeypatch)

    return choose


@pytest.mark.parametrize("means", MEANS)
def test_image_is_opened_and_everything_is_undone(packed: Path, scratch: Path, only: Only, means: str) -> None:
    only(means)
    before, said = sha256(packed), []
    with open_squashfs(packed, scratch, said.append) as root:
        assert sorted(path.name for path in (root / "dataset").iterdir()) == [
            "train", "train_label_tensor.pt", "unlabeled", "val", "val_label_tensor.pt",
        ]  # fmt: skip
        source = packed.parent / "dataset" / "unlabeled" / "5.png"
        assert (root / "dataset" / "unlabeled" / "5.png").read_bytes() == source.read_bytes()
        assert os.path.ismount(root) == (means != "unsquashfs")
        if means != "unsquashfs":
            with pytest.raises(OSError, match="Read-only"):
                (root / "dataset" / "new").touch()
    assert list(scratch.iterdir()) == []
    assert mounts_below(scratch) == []
    assert sha256(packed) == before
    wanted = f"unpacked to {root}" if means == "unsquashfs" else f"opened with {means} at {root}"
    assert len(said) == 1
    assert wanted in said[0]


@pytest.mark.parametrize("means", MEANS)
def test_an_error_while_it_is_open_undoes_everything_too(packed: Path, scratch: Path, only: Only, means: str) -> None:
    only(means)
    with pytest.raises(ZeroDivisionError), open_squashfs(packed, scratch, silent) as root:
        assert (root / "dataset").is_dir()
        raise ZeroDivisionError
    assert list(scratch.iterdir()) == []
    assert mounts_below(scratch) == []


def test_squashfuse_comes_first_where_all_are_there(packed: Path, scratch: Path) -> None:
    need("squashfuse")
    (scratch / "trial").mkdir()
    try_mount(["squashfuse", "-o", "ro", str(packed), str(scratch / "trial")])
    try_mount(["umount", str(scratch / "trial")])
    said: list[str] = []
    with open_squashfs(packed, scratch, said.append):
        pass
    assert "opened with squashfuse" in said[0]


def test_unpacking_says_why_nothing_was_mounted(packed: Path, scratch: Path, only: Only) -> None:
    only("unsquashfs")
    said: list[str] = []
    with open_squashfs(packed, scratch, said.append):
        pass
    assert "squashfuse: squashfuse is not installed; kernel mount: mount is not installed" in said[0]


def test_without_any_tool_the_message_says_what_to_install(
    packed: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_all_but((), tmp_path / "bin", monkeypatch)
    with (
        pytest.raises(UserError, match="install squashfuse or squashfs-tools"),
        open_squashfs(packed, scratch, silent),
    ):
        pass
    assert list(scratch.iterdir()) == []


def test_scratch_is_made_where_it_is_missing(packed: Path, tmp_path: Path) -> None:
    with open_squashfs(packed, tmp_path / "not" / "yet", silent) as root:
        assert (root / "dataset").is_dir()


def test_other_files_are_refused_before_anything_is_tried(tmp_path: Path, scratch: Path) -> None:
    wrong = tmp_path / "wrong.sqsh"
    wrong.write_bytes(b"PK\x03\x04 a zip archive")
    for path, words in (
        (wrong, r"wrong\.sqsh: not a squashfs image \(it begins with b'PK"),
        (tmp_path / "absent.sqsh", r"absent\.sqsh: dataset image not found; set data\.path"),
        (scratch, "a folder, not a dataset image"),
    ):
        with pytest.raises(UserError, match=words), open_squashfs(path, scratch, silent):
            pass
    assert list(scratch.iterdir()) == []


@pytest.mark.fault("damaged-squashfs")
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated_image_is_refused(packed: Path, scratch: Path, tmp_path: Path, keep: float) -> None:
    content = packed.read_bytes()
    damaged = tmp_path / "damaged.sqsh"
    damaged.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError) as caught, open_squashfs(damaged, scratch, silent):
        pass
    assert str(caught.value).startswith(f"{damaged}: cannot be opened (squashfuse: ")
    assert "\n" not in str(caught.value)
    assert list(scratch.iterdir()) == []


@pytest.mark.fault("damaged-squashfs")
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.97, 0.98, 0.99])
def test_damage_within_an_image_is_one_error_or_harmless(
    packed: Path, scratch: Path, tmp_path: Path, place: float
) -> None:
    """Data or tables overwritten: whatever the file system answers, it never becomes another dataset."""
    content = bytearray(packed.read_bytes())
    first = int(place * len(content))
    content[first : first + 64] = bytes(byte ^ 0x5A for byte in content[first : first + 64])
    damaged = tmp_path / "damaged.sqsh"
    damaged.write_bytes(content)
    try:
        found = prepare(data_config(damaged, "squashfs"), scratch, silent)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found.digest == prepare(data_config(packed, "squashfs"), scratch, silent).digest
    assert mounts_below(scratch) == []
    assert left_behind(scratch) == []


def test_a_copy_lives_as_long_as_it_is_needed(packed: Path, scratch: Path) -> None:
    with local_copy(packed, scratch, silent) as copy:
        assert copy.parent.parent == scratch
        assert copy.read_bytes() == packed.read_bytes()
    assert list(scratch.iterdir()) == []
    with pytest.raises(ZeroDivisionError), local_copy(packed, scratch, silent):
        raise ZeroDivisionError
    assert list(scratch.iterdir()) == []


@pytest.mark.fault("damaged-squashfs", 100)
def test_a_flipped_byte_anywhere_never_makes_another_dataset(packed: Path, scratch: Path, tmp_path: Path) -> None:
    whole, chance, refused = packed.read_bytes(), random.Random(3), 0
    digest = prepare(data_config(packed, "squashfs"), scratch, silent).digest
    for _ in range(100):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        (tmp_path / "damaged.sqsh").write_bytes(content)
        try:
            assert prepare(data_config(tmp_path / "damaged.sqsh", "squashfs"), scratch, silent).digest == digest
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20
    assert left_behind(scratch) == []


@pytest.mark.fault("full-disk")
def test_a_disk_that_fills_up_while_copying_is_one_line(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a quota, which nobody sees before."""
    small = tmp_path / "small"
    small.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    try:
        refusal = pytest.raises(UserError, match=r"cannot be copied: No space left on device; set runtime\.scratch")
        with refusal, local_copy(packed, small, silent):
            pass
        assert list(small.iterdir()) == []
    finally:
        try_mount(["umount", str(small)])


@pytest.mark.fault("full-disk")
def test_unpacking_onto_a_full_disk_is_one_line(packed: Path, tmp_path: Path, only: Only) -> None:
    small = tmp_path / "small"
    small.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(small)])
    umount = shutil.which("umount") or "umount"
    try:
        only("unsquashfs")
        with pytest.raises(UserError, match="unsquashfs: ") as caught, open_squashfs(packed, small, silent):
            pass
        assert "\n" not in str(caught.value)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run([umount, str(small)], check=True)


@pytest.mark.fault("full-disk")
def test_copying_needs_room(packed: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)])
    try:
        with (
            pytest.raises(UserError, match=r"student_dataset\.sqsh needs .* data\.copy_to_scratch to false"),
            local_copy(packed, small, silent),
        ):
            pass
        assert list(small.iterdir()) == []
    finally:
        try_mount(["umount", str(small)])


def test_with_copy_to_scratch_the_copy_is_opened(packed: Path, scratch: Path) -> None:
    said: list[str] = []
    with open_dataset(data_config(packed, "squashfs", copy_to_scratch=True), scratch, said.append) as found:
        assert [len(split) for split in found.splits.values()] == [6, 4, 4]
        assert found.origin == {"kind": "squashfs", "name": "student_dataset.sqsh", "sha256": sha256(packed)}
        copies = list(scratch.glob("moco-copy-*/student_dataset.sqsh"))
        assert len(copies) == 1
    assert said[0] == f"copying {packed} to {copies[0].parent}"
    assert f"dataset: {copies[0]} " in said[1]
    assert list(scratch.iterdir()) == []


def test_images_without_the_inner_folder_are_read_from_their_root(packed: Path, scratch: Path) -> None:
    bare = scratch / "bare.sqsh"
    subprocess.run(
        ["mksquashfs", str(packed.parent / "dataset"), str(bare), "-quiet", "-no-progress"], check=True,
        capture_output=True,
    )  # fmt: skip
    with open_dataset(data_config(bare, "squashfs"), scratch, silent) as found:
        assert [len(split) for split in found.splits.values()] == [6, 4, 4]


def test_failed_packing_is_one_error(tmp_path: Path) -> None:
    need("mksquashfs")
    with pytest.raises(UserError, match="mksquashfs failed"):
        pack(tmp_path / "absent", tmp_path / "image.sqsh")
