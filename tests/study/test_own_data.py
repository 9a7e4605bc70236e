"""Tables, instructions and conversations that people bring themselves."""

import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.official import save_llama
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import DataError, ModelError, Task, load_task

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


SAID = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def load(task: str, model: Path, path: Path, **changes: object) -> Task:
    data = DataConfig(task=task, path=str(path), **{"max_length": 64, **changes})  # type: ignore[arg-type]
    return load_task(ModelConfig(path=str(model)), data, seed=0)


def write(folder: Path, rows: list[dict[str, object]], name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def chat(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return the folder of a Llama with a chat template."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "chat"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["spam", "ham", "eggs"], ("eggs", "ham", "spam")),
        ([10, 2, 1], ("1", "2", "10")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_the_classes_of_a_table_are_its_labels_in_rising_order(labels, classes, tiny_bert, tmp_path) -> None:
    rows = [{"review": f"it is {i}", "kind": labels[i % 3]} for i in range(12)]
    write(write(tmp_path, rows), rows[:6], "validation.jsonl")
    task = load("classification", tiny_bert, tmp_path, text="review", label="kind")
    assert (task.classes, task.num_labels, task.model.classifier.out_features) == (classes, *[len(classes)] * 2)
    assert [label for _, label in task.train_set] == [classes.index(str(row["kind"])) for row in rows]
    batch = task.collate(task.eval_set)
    with torch.no_grad():
        predicted = task.model.eval()(**batch).logits.argmax(-1)
    found = task.evaluate(task.model, [batch])
    assert found["f1_macro"] == pytest.approx(f1_score(batch["labels"], predicted, average="macro", zero_division=0.0))
    task.save_extras(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(classes)


def test_pairs_from_a_csv_with_quotes_become_a_regression(tiny_bert: Path, tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [f'it, "so" {i}' for i in range(20)], "b": "wet", "score": [i / 7 for i in range(20)]})
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    columns = {"text": "a", "text_pair": "b", "label": "score"}
    task = load("regression", tiny_bert, tmp_path / "pairs.csv", **columns)
    assert (len(task.train_set), len(task.eval_set), task.num_labels) == (18, 2, 1)
    first = task.preprocessor.decode(task.train_set[0][0]["input_ids"]).replace(" ", "").replace("##", "")
    assert re.fullmatch(r'\[CLS\]it,"so"\d+\[SEP\]wet\[SEP\]', first)
    batch = task.collate(task.train_set)
    with torch.no_grad():
        scores = task.model.eval()(**batch).logits.squeeze(-1)
    found = task.evaluate(task.model, [batch])
    assert found["pearson"] == pytest.approx(pearsonr(scores, batch["labels"]).statistic, abs=1e-3)


@pytest.mark.parametrize(
    ("task", "rows", "part"),
    [
        ("classification", [{"text": "a", "kind": 1}], "line 1: found only text, kind; expected a column 'label'"),
        ("classification", [{"sentence": "a", "label": 1}], "line 1: found only sentence, label; expected a column"),
        ("classification", [{"text": "a", "label": None}], "line 1: found label = None"),
        ("classification", [{"text": "a", "label": 1}], "found the class 1; expected two or more in 'label'"),
        ("regression", [{"text": "a", "label": "high"}], "line 1: found label = 'high'; expected a number"),
        ("regression", [{"text": " ", "label": 1}], "line 1: found text = ' '"),
        ("sft", [{"question": "a"}], "line 1: found only question; expected a column 'messages'"),
        ("sft", [{"prompt": "a"}], "line 1: found only prompt; expected a column 'completion'"),
        ("sft", [{"instruction": "a", "output": ""}], "line 1: found output = ''"),
        ("sft", [{"messages": SAID[:1]}], "found messages of 1 turns; expected two or more, the last of the assistant"),
        ("sft", [{"messages": [*SAID, SAID[0]]}], "expected two or more, the last of the assistant"),
        ("sft", [{"messages": ["hello", "you"]}], "found messages with 'hello'; expected turns with a role"),
    ],
)
def test_what_does_not_fit_names_file_column_found_and_expected(task, rows, part, tiny_bert, tiny_llama, tmp_path):
    write(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        load(task, tiny_llama if task == "sft" else tiny_bert, tmp_path)
    assert str(tmp_path / "train.jsonl") in str(caught.value)
    assert part in str(caught.value), caught.value


def test_classes_that_training_lacks_and_columns_that_a_task_does_not_read_are_errors(tiny_bert, rte_folder, tmp_path):
    write(tmp_path, [{"text": f"{i}", "label": i % 2 + 1} for i in range(4)])
    write(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 0}], "test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: found label = '0'; expected one of the classes 1, 2"):
        load("classification", tiny_bert, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.text has no effect with data\.task=rte; it belongs to"):
        load("rte", tiny_bert, rte_folder, text="a")


MORE = [{"role": "system", "content": "Add."}, *SAID, {"role": "user", "content": "+1?"}, {**SAID[1], "content": "5"}]
ONE_TURN = "<s>[user]2+2?</s>[assistant]4</s>"
FORMATS: dict[str, tuple[dict[str, object], str, str]] = {
    "messages": ({"messages": SAID}, ONE_TURN, "4</s>"),
    "every answer counts": (
        {"messages": MORE},
        "<s>[system]Add.</s>[user]2+2?</s>[assistant]4</s>[user]+1?</s>[assistant]5</s>",
        "4</s>5</s>",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, ONE_TURN, "4</s>"
    ),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, ONE_TURN, "4</s>"),
    "prompt and completion of turns": ({"prompt": SAID[:1], "completion": SAID[1:]}, ONE_TURN, "4</s>"),
    "Alpaca without input": ({"instruction": "2+2?", "input": "", "output": "4"}, ONE_TURN, "4</s>"),
    "Alpaca": (
        {"instruction": "Add.", "input": "2+2", "output": "4"}, "<s>[user]Add.\n\n2+2</s>[assistant]4</s>", "4</s>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_the_chat_template_goes_around_every_format_and_only_answers_count(kind, chat, tmp_path) -> None:
    row, text, counted = FORMATS[kind]
    task = load("sft", chat, write(tmp_path / "data", [row] * 12), max_length=100)
    assert (len(task.train_set), len(task.eval_set)) == (10, 2)
    batch = task.collate(task.train_set[:2])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert task.preprocessor.decode(ids) == text
    assert task.preprocessor.decode(labels[labels != -100]) == counted
    assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_a_template_that_rewrites_earlier_answers_teaches_the_last_one(chat: Path, tmp_path: Path) -> None:
    config = json.loads((chat / "tokenizer_config.json").read_text())
    drops = TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] != 'assistant' else '' }}"
    )
    (chat / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": drops}))
    task = load("sft", chat, write(tmp_path / "data", [{"messages": MORE}] * 2), max_length=100)
    labels = torch.tensor(task.train_set[0]["labels"])
    assert task.preprocessor.decode(labels[labels != -100]) == "5</s>"


def test_without_a_template_texts_are_plain_and_conversations_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")

    def text(row: dict[str, object]) -> tuple[str, str]:
        task = load("sft", llama, write(tmp_path / "data", [row] * 2), max_length=400)
        ids, labels = (torch.tensor(task.train_set[0][name]) for name in ("input_ids", "labels"))
        return tuple(task.preprocessor.decode(part) for part in (ids, labels[labels != -100]))  # type: ignore[return-value]

    assert text({"prompt": "2+2=", "completion": "4"}) == ("<s>2+2= 4</s>", "4</s>")
    assert text({"instruction": "Add.", "output": "4"})[0].endswith("### Instruction:\nAdd.\n\n### Response:\n4</s>")
    with pytest.raises(ModelError, match="no chat template, which conversations need"):
        text({"messages": SAID})


def test_long_answers_lose_their_end_and_prompts_that_fill_all_are_left_out(tiny_llama, tmp_path, caplog) -> None:
    rows = [{"prompt": "a", "completion": "b" * 90}, {"prompt": "a" * 90, "completion": "b"}] * 10
    task = load("sft", tiny_llama, write(tmp_path, rows), max_length=20)
    assert {len(e["input_ids"]) for e in task.train_set} == {20}
    assert all(sum(label != -100 for label in e["labels"]) == 17 for e in task.train_set)
    assert "examples, whose prompts fill data.max_length" in caplog.text
    with pytest.raises(DataError, match=r"20 tokens; expected a larger data\.max_length"):
        load("sft", tiny_llama, write(tmp_path, rows[1:2] * 2), max_length=20)


def test_the_loss_is_that_of_the_answers_and_padding_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"q": "2+2=" * (i + 1), "a": "4" * (3 - i)} for i in range(3)]
    task = load("sft", tiny_llama, write(tmp_path, [*rows, *rows]), text="q", label="a")
    examples = [*task.train_set, *task.eval_set][:3]
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            likelihood = task.model.eval()(ids).logits[0, :-1].log_softmax(-1)
        for at, label in enumerate(example["labels"][1:]):
            if label != -100:
                total, count = total - likelihood[at, label].item(), count + 1
    found = task.evaluate(task.model, [task.collate(examples)])
    assert found == pytest.approx({"loss": total / count, "perplexity": math.exp(total / count)}, rel=1e-4)
    assert task.loss(task.model, task.collate(examples)).item() == pytest.approx(total / count, rel=1e-4)
