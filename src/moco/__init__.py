"""MoCo Pipeline: self-supervised pretraining and classifiers from few labels."""

__version__ = "0.1.0"
