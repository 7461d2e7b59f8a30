"""Tasks: what a model is trained on and judged by. `protocol` says what a run needs of one."""

from ds_zoadamu.tasks.choice_task import ChoiceTask
from ds_zoadamu.tasks.classification import ClassificationTask
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.evaluation import collected, summed
from ds_zoadamu.tasks.generation_task import GenerationTask
from ds_zoadamu.tasks.language_task import ChatTask, TextTask
from ds_zoadamu.tasks.objectives import OBJECTIVES
from ds_zoadamu.tasks.options import model_max_length, padding_id
from ds_zoadamu.tasks.prompt_task import PromptTask, label_words_from
from ds_zoadamu.tasks.prompts import EncodedExample, PromptCollator, PromptEncoder, PromptRow
from ds_zoadamu.tasks.protocol import Baseline, Evaluation, Metric, Task, TaskData, is_finite
from ds_zoadamu.tasks.registry import SST2, TASKS, load_task
from ds_zoadamu.tasks.scoring import SCORES, candidate_scores
from ds_zoadamu.tasks.splits import load_splits

__all__ = [
    "OBJECTIVES",
    "SCORES",
    "SST2",
    "TASKS",
    "Baseline",
    "ChatTask",
    "ChoiceTask",
    "ClassificationTask",
    "EncodedExample",
    "Evaluation",
    "GenerationTask",
    "InputError",
    "Metric",
    "PromptCollator",
    "PromptEncoder",
    "PromptRow",
    "PromptTask",
    "Task",
    "TaskData",
    "TextTask",
    "candidate_scores",
    "collected",
    "is_finite",
    "label_words_from",
    "load_splits",
    "load_task",
    "model_max_length",
    "padding_id",
    "summed",
]
