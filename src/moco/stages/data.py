"""Stage `data`: check the dataset, decode it once, write the manifest."""

from __future__ import annotations

import os

from moco.data.prepare import prepare
from moco.errors import say
from moco.files import scratch_folder, write_text
from moco.layout import MANIFEST
from moco.runs.identity import Start
from moco.runs.outputs import locked_outputs
from moco.settings.schema import Config


def run(config: Config, start: Start | None = None) -> None:
    """Prepare the dataset and write its manifest.

    Raises UserError for whatever makes the dataset unusable, and where settings or code change meanwhile.
    """
    with locked_outputs("data", say):
        making = (start or Start.of("data")).making(config)
        # DVC runs this each time, also where nobody asked for it and only the decoded cache is there.
        by_dvc = os.environ.get("DVC_STAGE") == "data"
        manifest = prepare(config.data, scratch_folder(config.runtime.scratch), say, by_dvc)
        making.refuse_changes("what was decoded is kept; run the same command again")
        write_text(MANIFEST, manifest.to_json())
    counts = ", ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    say(
        f"data: {counts} images of {manifest.width}x{manifest.height} pixels, {len(manifest.classes)} classes "
        f"-> {MANIFEST}"
    )
    for note in manifest.notes():
        say(f"data: {note}")
