"""Tasks: what a model is trained on and judged by. `protocol` says what a run needs of one."""

from ds_zoadamu.tasks.classification import ClassificationTask, candidate_scores
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.evaluation import summed
from ds_zoadamu.tasks.prompt_task import SST2, TASKS, PromptTask, label_words_from, load_task
from ds_zoadamu.tasks.prompts import EncodedExample, PromptCollator, PromptEncoder, PromptRow, model_max_length, padding_id
from ds_zoadamu.tasks.protocol import Baseline, Evaluation, Metric, Task, TaskData, is_finite
from ds_zoadamu.tasks.splits import load_splits

__all__ = [
    "SST2",
    "TASKS",
    "Baseline",
    "ClassificationTask",
    "EncodedExample",
    "Evaluation",
    "InputError",
    "Metric",
    "PromptCollator",
    "PromptEncoder",
    "PromptRow",
    "PromptTask",
    "Task",
    "TaskData",
    "candidate_scores",
    "is_finite",
    "label_words_from",
    "load_splits",
    "load_task",
    "model_max_length",
    "padding_id",
    "summed",
]
