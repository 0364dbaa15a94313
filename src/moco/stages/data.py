"""Stage `data`: check the dataset, decode it once, write the manifest."""

from __future__ import annotations

import os

from moco.config import DataConfig, RuntimeConfig
from moco.data.prepare import prepare
from moco.files import write_text
from moco.stages.workspace import MANIFEST, say, scratch_folder


def run(config: DataConfig, runtime: RuntimeConfig) -> None:
    """Raises UserError for whatever makes the dataset unusable."""
    # DVC runs this each time, also where nobody asked for it and only the decoded cache is there.
    manifest = prepare(config, scratch_folder(runtime.scratch), say, os.environ.get("DVC_STAGE") == "data")
    write_text(MANIFEST, manifest.to_json())
    counts = ", ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    say(
        f"data: {counts} images of {manifest.width}x{manifest.height} pixels, {len(manifest.classes)} classes "
        f"-> {MANIFEST}"
    )
    for note in manifest.notes():
        say(f"data: {note}")
