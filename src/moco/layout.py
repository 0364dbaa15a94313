"""Where a project has its files, all relative to its folder."""

from __future__ import annotations

from pathlib import Path

MANIFEST = Path("models/manifest.json")
ENCODER = Path("models/encoder.pth")
CLASSIFIER = Path("models/classifier")
CLASSIFIER_EXTRA = Path("models/classifier_extra")
FINETUNED = Path("models/finetuned")
REQUEST = Path("models/request")
FORM = REQUEST / "request.csv"
LABELS = Path("labels")  # files that people make; DVC looks for changes in it
REPORTS = Path("reports")
RUNS = Path("runs")
PRODUCED_BY = {CLASSIFIER: "train", CLASSIFIER_EXTRA: "train_extra", FINETUNED: "finetune"}  # which stage writes which
