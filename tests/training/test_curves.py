"""curves.png of a run that went wrong."""

from ds_zoadamu.tasks import ClassificationTask
from ds_zoadamu.training.curves import draw_curves


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    steps = [{"kind": "step", "step": t, "loss": loss, "grad_norm": loss} for t, loss in ((1, 0.5), (2, None), (3, None))]
    evals = [{"kind": "eval", "split": "dev", "step": t, "loss": loss, "accuracy": 0.5} for t, loss in ((0, 0.7), (3, None))]
    for records in (steps + evals, steps[1:] + evals):
        assert draw_curves(records, tmp_path / "curves.png", "diverged", ClassificationTask.main_metric, 0.5)
        assert (tmp_path / "curves.png").stat().st_size > 0
