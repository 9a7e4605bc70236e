"""All of GLUE, on small files with the official headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.official import MNLI_CLASSES, write_glue
from sklearn.metrics import f1_score

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import TASKS, DataError, Task, load_task
from structlora_pyg.study.tasks.sentences import LAYOUTS

CLASSES = {"mnli": 3, "stsb": 1}


def load(task: str, model: Path, folder: Path, **changes: object) -> Task:
    data = DataConfig(task=task, path=str(folder), max_length=32, **changes)  # type: ignore[arg-type]
    return load_task(ModelConfig(path=str(model)), data, seed=0)


def scores(task: Task) -> dict[str, float]:
    examples = [task.eval_set[i] for i in range(len(task.eval_set))]
    return task.evaluate(task.model, [task.collate(examples[:3]), task.collate(examples[3:])])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "boolq"])
def test_every_task_is_read_from_its_official_files_and_trains(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    task = load(name, tiny_bert, write_glue(tmp_path, name))
    assert (len(task.train_set), len(task.eval_set)) == (8, 4)
    assert task.num_labels == CLASSES.get(name, 2)
    batch = task.collate([task.train_set[i] for i in range(4)])
    assert batch["labels"].tolist() == pytest.approx(
        [0.5, 4.25] * 2 if name == "stsb" else [i % task.num_labels for i in range(4)]
    )
    loss = task.loss(task.model.train(), batch)
    loss.backward()
    assert loss.item() > 0
    found = scores(task)
    assert task.metric in found
    assert name in TASKS


@pytest.mark.parametrize(
    ("name", "primary", "others"),
    [
        ("rte", "accuracy", set()),
        ("qnli", "accuracy", set()),
        ("sst2", "accuracy", set()),
        ("qqp", "accuracy", {"f1"}),
        ("mrpc", "f1", {"accuracy"}),
        ("cola", "matthews", {"accuracy"}),
        ("mnli", "accuracy", {"accuracy_mismatched"}),
        ("stsb", "pearson", {"spearman"}),
    ],
)
def test_metrics_are_those_of_the_field(
    name: str, primary: str, others: set[str], tiny_bert: Path, tmp_path: Path
) -> None:
    task = load(name, tiny_bert, write_glue(tmp_path, name))
    assert task.metric == primary
    assert set(scores(task)) == {"loss", primary, *others}


def test_f1_of_qqp_is_that_of_scikit_learn(tiny_bert: Path, tmp_path: Path) -> None:
    task = load("qqp", tiny_bert, write_glue(tmp_path, "qqp", dev=7))
    batch = task.collate([task.eval_set[i] for i in range(7)])
    with torch.no_grad():
        predicted = task.model.eval()(**batch).logits.argmax(-1)
    assert scores(task)["f1"] == pytest.approx(f1_score(batch["labels"], predicted, zero_division=0.0))


def test_mnli_is_measured_on_the_matched_and_on_the_mismatched_genres(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mnli", dev=6)
    matched = (folder / "dev_matched.tsv").read_text()
    # The same pairs with all labels moved on: an example is right in one set at most.
    rotated = matched
    for i, name in enumerate(MNLI_CLASSES):
        rotated = rotated.replace(f"\t{name}", f"\t#{(i + 1) % 3}")
    for i, name in enumerate(MNLI_CLASSES):
        rotated = rotated.replace(f"#{i}", name)
    (folder / "dev_mismatched.tsv").write_text(rotated)
    task = load("mnli", tiny_bert, folder)
    torch.nn.init.zeros_(task.model.classifier.weight)
    task.model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.0])
    labels = [[label for _, label in part] for part in (task.eval_set, task.mismatched)]
    found = scores(task)
    assert [found["accuracy"], found["accuracy_mismatched"]] == [part.count(0) / 6 for part in labels] == [2 / 6, 2 / 6]
    (folder / "dev_mismatched.tsv").write_text(matched.replace("entailment", "neutral"))
    task = load("mnli", tiny_bert, folder)
    torch.nn.init.zeros_(task.model.classifier.weight)
    task.model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.0])
    found = scores(task)
    assert (found["accuracy"], found["accuracy_mismatched"]) == (pytest.approx(2 / 6), 0.0)


def test_the_evaluation_limit_of_mnli_holds_for_both_sets_and_validation_reads_neither(
    tiny_bert: Path, tmp_path: Path
) -> None:
    folder = write_glue(tmp_path, "mnli", train=12, dev=6)
    task = load("mnli", tiny_bert, folder, eval_limit=4)
    assert (len(task.eval_set), len(task.mismatched)) == (4, 4)
    for split in ("matched", "mismatched"):
        (folder / f"dev_{split}.tsv").unlink()
    held_out = load("mnli", tiny_bert, folder, validation_share=0.25)
    assert (len(held_out.eval_set), held_out.mismatched) == (3, [])
    with pytest.raises(DataError, match=r"dev_matched\.tsv"):
        load("mnli", tiny_bert, folder)


def test_mismatched_genres_are_needed(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv"):
        load("mnli", tiny_bert, folder)
