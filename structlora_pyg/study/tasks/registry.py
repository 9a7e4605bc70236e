"""What is learned: a pretrained model with a head, two data sets, a loss and a metric.

`load_task` gives a `Task`, whose kinds have a file each: sentences (classification and regression), multiple choice,
text (a causal language model), pictures into classes, and words about pictures. A task works with the bare model, with
a stock PEFT model and with a StructLoRA model alike, so that every method is trained and measured by the same code.
"""

from __future__ import annotations

import torch

from structlora_pyg.checks import ConfigError, nearest
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import ModelError
from structlora_pyg.study.tasks.base import Batch, Examples, HasAuxiliaryLoss, Task
from structlora_pyg.study.tasks.choice_task import ChoiceTask, choice_task
from structlora_pyg.study.tasks.digits import digits_task
from structlora_pyg.study.tasks.graphs import graphs_task
from structlora_pyg.study.tasks.image_task import ImageFolderTask, ImageTask, cifar_task, image_folder_task
from structlora_pyg.study.tasks.sentence_task import SentenceTask, sentence_task
from structlora_pyg.study.tasks.text_task import TextTask, text_task
from structlora_pyg.study.tasks.vision_language_task import CaptionTask, QuestionTask, caption_task, question_task

__all__ = [
    "TASKS",
    "Batch",
    "CaptionTask",
    "ChoiceTask",
    "Examples",
    "HasAuxiliaryLoss",
    "ImageFolderTask",
    "ImageTask",
    "ModelError",
    "QuestionTask",
    "SentenceTask",
    "Task",
    "TextTask",
    "load_task",
]

TASKS: dict[str, str] = {
    "rte": "does the first sentence entail the second? GLUE RTE; accuracy",
    "mrpc": "do two sentences say the same? GLUE MRPC; F1, accuracy",
    "cola": "is a sentence acceptable English? GLUE CoLA; Matthews correlation",
    "stsb": "how similar are two sentences, from 0 to 5? GLUE STS-B; Pearson, Spearman",
    "wnli": "does the second sentence follow, its pronoun resolved? GLUE WNLI; accuracy",
    "sst2": "does a film review praise or blame? GLUE SST-2; accuracy",
    "qnli": "does the sentence answer the question? GLUE QNLI; accuracy",
    "qqp": "do two questions ask the same? GLUE QQP; accuracy, F1",
    "mnli": "entailment, neutral or contradiction? GLUE MNLI, matched genres; accuracy, also on the mismatched ones",
    "boolq": "yes or no, given a passage? BoolQ; accuracy",
    "piqa": "which of two solutions reaches the goal? PIQA; accuracy",
    "cifar100": "which of 100 classes does a picture show? CIFAR-100; accuracy, top-5",
    "image_folder": "which class does a picture show? train/<class>/ and val/<class>/, as ImageNet; accuracy, top-5",
    "captions": "what does a picture show, in a sentence? COCO captions, by a LLaVA-like model; CIDEr times 100",
    "vqa": "a question about a picture, by a LLaVA-like model. VQAv2, easy-VQA; VQA accuracy",
    "digits": "which of the digits 5-9, by a model that knows 0-4? For trying things out, no download; accuracy",
    "graphs": "how many cycles of length 4 run through a node? By networks of PyG, no download; accuracy",
    "text": "the next token of your own text; perplexity, lower is better",
}
LOADERS = {
    "piqa": choice_task,
    "digits": digits_task,
    "graphs": graphs_task,
    "text": text_task,
    "cifar100": cifar_task,
    "image_folder": image_folder_task,
    "captions": caption_task,
    "vqa": question_task,
}
LIBRARIES = {  # values of model.library; all others are served by Transformers alone
    "cifar100": ("transformers", "timm"),
    "image_folder": ("transformers", "timm"),
    "digits": ("timm",),
    "graphs": ("pyg",),
}


def load_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Read the data, then the pretrained weights, and put them together.

    Args:
        model: Which model; its path is looked up like that of the data, see `structlora_pyg.study.tasks.rows.resolve`.
        data: Which task and data.
        seed: Seed of the new head and of the drawn subsets.

    Raises:
        DataError: If the data are missing or malformed.
        ModelError: If model or tokenizer are missing, damaged, or not made for the task.
        ConfigError: If the task is unknown, or needs a program or package that is missing.
    """
    if data.task not in TASKS:
        raise ConfigError(
            [f"data.task={data.task!r} is unknown; allowed: {', '.join(TASKS)}.{nearest(data.task, TASKS)}"]
        )
    libraries = LIBRARIES.get(data.task, ("transformers",))
    if model.library not in libraries:
        right = " or ".join(f"model.library={name}" for name in libraries)
        raise ModelError(f"library={model.library} cannot serve task={data.task}; set {right}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LOADERS.get(data.task, sentence_task)(model, data, seed)
