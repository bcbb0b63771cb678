"""Trains the networks as the paper did: ``python -m fastalex.train``, or :class:`Trainer` from Python."""

from fastalex.train.errors import Interrupted, TrainingError
from fastalex.train.options import Options
from fastalex.train.recipe import PaperSGD
from fastalex.train.trainer import Trainer

__all__ = ["Interrupted", "Options", "PaperSGD", "Trainer", "TrainingError"]
