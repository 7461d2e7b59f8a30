"""Axolotl's trainer with zeroth-order steps; imported when it is built, for Axolotl's trainers take seconds."""

from axolotl.core.trainers import AxolotlTrainer

from ..hf.trainer import ZOTrainerMixin


class ZOAxolotlTrainer(ZOTrainerMixin, AxolotlTrainer):
    """``AxolotlTrainer`` with zeroth-order steps; see ``ZOTrainerMixin``."""
