"""Prompt tasks: data, prompts, loss and accuracy."""

from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.examples import Example, Splits, load_examples, load_splits, majority_accuracy
from ds_zoadamu.tasks.metrics import Evaluation, candidate_scores, evaluate, prompt_loss
from ds_zoadamu.tasks.prompts import EncodedExample, PromptCollator, PromptEncoder, encoded_sha256, model_max_length, padding_id
from ds_zoadamu.tasks.task import SST2, TASKS, Task, label_words_from, load_task

__all__ = [
    "SST2",
    "TASKS",
    "EncodedExample",
    "Evaluation",
    "Example",
    "InputError",
    "PromptCollator",
    "PromptEncoder",
    "Splits",
    "Task",
    "candidate_scores",
    "encoded_sha256",
    "evaluate",
    "label_words_from",
    "load_examples",
    "load_splits",
    "load_task",
    "majority_accuracy",
    "model_max_length",
    "padding_id",
    "prompt_loss",
]
