"""All of GLUE, on small files with the official headers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.official import HEADERS, MNLI_CLASSES, ROWS, write_glue, write_lines
from sklearn.metrics import f1_score

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks.data import GLUE, DataError, TextExample, read_examples, read_mismatched
from structlora_pyg.study.tasks.registry import TASKS, Task, load_task

CLASSES = {"mnli": 3, "stsb": 1}


def load(task: str, model: Path, folder: Path, **changes: object) -> Task:
    data = DataConfig(task=task, path=str(folder), max_length=32, **changes)  # type: ignore[arg-type]
    return load_task(ModelConfig(path=str(model)), data, seed=0)


def scores(task: Task) -> dict[str, float]:
    examples = [task.eval_set[i] for i in range(len(task.eval_set))]
    return task.evaluate(task.model, [task.collate(examples[:3]), task.collate(examples[3:])])


@pytest.mark.parametrize("name", GLUE)
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
    labels = [[e.label for e in part.items] for part in (task.eval_set, task.mismatched)]
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
    assert (len(held_out.eval_set), held_out.mismatched) == (3, None)
    with pytest.raises(DataError, match=r"dev_matched\.tsv"):
        load("mnli", tiny_bert, folder)


def test_quotes_in_questions_are_text(tmp_path: Path) -> None:
    row = '7\t1\t2\t"What is "it"?\tIs it "?\t1'
    for split in ("train", "dev"):
        write_lines(tmp_path / f"{split}.tsv", [HEADERS["qqp"], row, row])
    assert read_examples("qqp", str(tmp_path))[0] == [TextExample('"What is "it"?', 'Is it "?', 1)] * 2


def broken_qqp(folder: Path, rows: int) -> Path:
    """Write QQP with a question that has a line break, as in the official file, and one that is empty."""
    write_glue(folder, "qqp", train=rows)
    lines = (folder / "train.tsv").read_text().splitlines()
    lines[3:3] = ["9\t1\t2\tIs it", "", "\tor not?\t0", "9\t1\t2\tis it?\t\t1"]
    write_lines(folder / "train.tsv", [*lines])
    return folder


def test_rows_of_qqp_that_fall_apart_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train, _ = read_examples("qqp", str(broken_qqp(tmp_path, 4000)))
    assert len(train) == 4000
    assert "left out 4 rows with missing fields, the first in line 4" in caplog.text


def test_more_broken_rows_than_the_official_file_has_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.tsv, line 4: found 4 of 3003 rows with missing fields"):
        read_examples("qqp", str(broken_qqp(tmp_path, 2999)))


@pytest.mark.parametrize("name", [name for name in GLUE if name != "qqp"])
def test_a_broken_row_of_any_other_task_is_an_error(name: str, tmp_path: Path) -> None:
    write_glue(tmp_path, name)
    with (tmp_path / "train.tsv").open("a") as file:
        file.write("9\n")
    with pytest.raises(DataError, match=r"train\.tsv, line \d+: found 1 fields"):
        read_examples(name, str(tmp_path))


@pytest.mark.parametrize("name", [name for name in GLUE if name != "stsb"])
def test_a_label_out_of_range_names_file_and_line(name: str, tmp_path: Path) -> None:
    write_glue(tmp_path, name)
    file = tmp_path / "train.tsv"
    lines = file.read_text().splitlines()
    label = GLUE[name].classes[1]
    place = next(i for i, line in enumerate(lines) if label in line.split("\t"))
    lines[place] = "\t".join("2" if field == label else field for field in lines[place].split("\t"))
    write_lines(file, [*lines])
    with pytest.raises(
        DataError, match=rf"train\.tsv, line {place + 1}: found {GLUE[name].label} = '2'; expected one of"
    ):
        read_examples(name, str(tmp_path))


@pytest.mark.parametrize("name", [*ROWS, "mnli"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_missing_split_is_named(name: str, split: str, tmp_path: Path) -> None:
    write_glue(tmp_path, name)
    file = "dev_matched.tsv" if (name, split) == ("mnli", "dev") else f"{split}.tsv"
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=f"expected a file {file}"):
        read_examples(name, str(tmp_path))


def test_mismatched_genres_are_needed(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv"):
        load("mnli", tiny_bert, folder)


HUB_COLUMNS = {
    "sst2": {"sentence": "a"},
    "qnli": {"question": "a", "sentence": "b"},
    "qqp": {"question1": "a", "question2": "b"},
    "mnli": {"premise": "a", "hypothesis": "b"},
    "wnli": {"sentence1": "a", "sentence2": "b"},
    "mrpc": {"sentence1": "a", "sentence2": "b"},
}


@pytest.mark.parametrize("name", HUB_COLUMNS)
def test_the_hub_has_columns_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**HUB_COLUMNS[name], "label": 1, "idx": 0}
    names = [f"validation_{kind}" for kind in ("matched", "mismatched")] if name == "mnli" else ["validation"]
    splits = {split: [row] for split in ("train", *names)}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: splits))
    train, evaluation = read_examples(name, "nyu-mll/glue")
    assert train == evaluation == [TextExample("a", "b" if len(row) == 4 else None, 1)]
    if name == "mnli":
        assert read_mismatched("nyu-mll/glue") == train
