"""TRL's trainers with zeroth-order steps. Checked against TRL 1.16."""

try:
    from trl import DPOTrainer, SFTTrainer
except ImportError as error:
    raise ImportError(f"ZOSFTTrainer and ZODPOTrainer need TRL: pip install 'ds_zoadamu[trl]' ({error})") from error

from .trainer import ZOTrainerMixin


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with zeroth-order steps; see ``ZOTrainerMixin``."""


class ZODPOTrainer(ZOTrainerMixin, DPOTrainer):
    """``trl.DPOTrainer`` with zeroth-order steps; see ``ZOTrainerMixin``. With ``precompute_ref_log_probs=True`` the reference
    model is evaluated once and not in every pass."""
