"""Rules of one's own, as a user would bring them with --import: one-sided evaluations, state tensors of two dtypes."""

from dataclasses import dataclass

import torch

import ds_zoadamu
from ds_zoadamu.rules import Evaluation, MeZO, MeZOConfig, Storage
from ds_zoadamu.rules.options import choice, option


@ds_zoadamu.register
class OneSided(MeZO):
    """The loss at the weight itself, then at one side of each direction; a mean that evaluations read, and votes."""

    def state(self, weight_dtype):
        return {"mean": torch.float32, "votes": torch.int8}

    def reads(self, evaluation):
        return ("mean",)

    def evaluations(self, step):
        sides = (Evaluation(index, 1.0) for index in range(self.config.num_perturbations))
        return (Evaluation(None, 0.0), *sides)

    def projected_grads(self, losses):
        return tuple((loss - losses[0]) / self.config.zo_eps for loss in losses[1:])

    def perturb_(self, out, weight, state, elements, direction, evaluation):
        assert state.keys() == {"mean"}
        super().perturb_(out, weight, state, elements, direction, evaluation)

    def update_(self, weight, state, elements, update):
        super().update_(weight, state, elements, update)
        state["mean"].mul_(0.5).add_(weight)
        state["votes"].add_(1)


@dataclass(frozen=True, kw_only=True)
class KeptConfig(MeZOConfig):
    kept: str = option(choice("mean", "votes"), default="mean")


@ds_zoadamu.register
class Kept(OneSided):
    """One of the two tensors, as the option says."""

    config_class = KeptConfig

    def state(self, weight_dtype):
        return {name: dtype for name, dtype in super().state(weight_dtype).items() if name == self.config.kept}

    def storage(self, weight_dtype):
        return self.config.kept

    def storages(self):
        return {
            "mean": Storage({"kept": "mean"}),
            "both": Storage({"kept": "both"}, obstacle="nobody wrote it"),
            "votes": Storage({"kept": "votes"}, note="votes are coarse"),
        }

    def remark(self):
        return "kept by hand"
