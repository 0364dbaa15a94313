"""Stage `data`: check the dataset, decode it once, write the manifest."""

from __future__ import annotations

from moco.config import DataConfig, RuntimeConfig
from moco.data.prepare import prepare
from moco.files import write_text
from moco.stages.workspace import MANIFEST, say, scratch_folder


def run(config: DataConfig, runtime: RuntimeConfig) -> None:
    """Raises UserError for whatever makes the dataset unusable."""
    manifest = prepare(config, scratch_folder(runtime.scratch), say)
    write_text(MANIFEST, manifest.to_json())
    counts = ", ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    say(
        f"data: {counts} images of {manifest.width}x{manifest.height} pixels, {len(manifest.classes)} classes "
        f"-> {MANIFEST}"
    )
