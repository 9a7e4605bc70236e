from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.tiny_tokenizers import word_tokenizer
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.config_files import load_config
from structlora_pyg.study.setup import check_run
from structlora_pyg.study.tasks import DataError, ModelError, Task, load_task

VIT = "test_vit"  # timm's own architecture for tests: 0.4 million parameters, 160 pixels, patches of 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "images.npz"
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(file, x_train=x, y_train=np.arange(6), x_test=x[:4], y_test=np.arange(4))
    return file


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It rained all day and the cat slept. " * 12)
    return file


def write_tsv(folder: Path, header: str, rows: list[str]) -> str:
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join([header, *rows] if header else rows))
    return str(folder)


def image_task(vit_file: Path, images: Path, size: int = 32, **changes: object) -> Task:
    model = ModelConfig(library="timm", architecture=VIT, path=str(vit_file), **changes)  # type: ignore[arg-type]
    return load_task(model, DataConfig(task="cifar100", path=str(images), image_size=size), seed=0)


def loader(task: Task, batch_size: int = 3) -> DataLoader:
    return DataLoader(task.eval_set, batch_size, collate_fn=task.collate, generator=torch.Generator())


def batch_of(task: Task, count: int = 3) -> dict[str, torch.Tensor]:
    return task.collate([task.train_set[i] for i in range(count)])


# -- sentences ----------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_longest_example_only(tiny_bert: Path, rte_folder: Path) -> None:
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    lengths = [len(task.train_set[i][0]["input_ids"]) for i in range(3)]
    assert len(set(lengths)) == 3
    batch = batch_of(task)
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].tolist() == [0, 1, 0]


def test_padding_does_not_change_what_the_model_predicts(tiny_bert: Path, rte_folder: Path) -> None:
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    model = task.model.eval()
    together = model(**{k: v for k, v in batch_of(task).items() if k != "labels"}).logits
    for i in range(3):
        single = task.collate([task.train_set[i]])
        alone = model(**{k: v for k, v in single.items() if k != "labels"}).logits
        torch.testing.assert_close(alone[0], together[i])


def test_overrides_change_the_model_not_its_weights(tiny_bert: Path, rte_folder: Path) -> None:
    data, path = DataConfig(task="rte", path=str(rte_folder)), str(tiny_bert)
    overrides = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    plain, changed = (load_task(ModelConfig(path=path, overrides=o), data, seed=0).model for o in ({}, overrides))
    assert any(m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout))
    assert not any(m.p for m in changed.modules() if isinstance(m, torch.nn.Dropout))
    assert changed.config._attn_implementation == "eager"
    assert plain.state_dict().keys() == changed.state_dict().keys()
    torch.testing.assert_close(plain.state_dict(), changed.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_dropout", 0.0, "has no hidden_dropout. Did you mean 'hidden_dropout_prob'"),
        ("num_labels", 3, "is set by the task or by model.dtype; remove it"),
        ("attn_implementation", "someone/kernels", "is not one of eager, sdpa"),
        ("hidden_size", 24, "or other overrides"),
        ("_commit_hash", "a", "has no _commit_hash"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(
    tiny_bert: Path, rte_folder: Path, key: str, value: object, says: str
) -> None:
    model = ModelConfig(path=str(tiny_bert), overrides={key: value})
    with pytest.raises(ModelError, match=re.escape(says)):
        load_task(model, DataConfig(task="rte", path=str(rte_folder)), seed=0)


def test_overrides_of_timm_are_arguments_of_its_model(vit_file: Path, images: Path) -> None:
    model = image_task(vit_file, images, overrides={"proj_drop_rate": 0.25}).model
    assert any(m.p == 0.25 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with pytest.raises(ModelError, match="unexpected keyword argument 'dropping'"):
        image_task(vit_file, images, overrides={"dropping": 0.25})


def test_examples_are_cut_to_max_length(tiny_bert: Path, rte_folder: Path) -> None:
    data = DataConfig(task="rte", path=str(rte_folder), max_length=9)
    task = load_task(ModelConfig(path=str(tiny_bert)), data, seed=0)
    assert batch_of(task)["input_ids"].shape == (3, 9)


@pytest.mark.parametrize(
    ("name", "header", "row", "metric"),
    [
        ("rte", "sentence1\tsentence2\tlabel", "a {}\tb\t{}", "accuracy"),
        ("mrpc", "#1 String\t#2 String\tQuality", "a {}\tb\t{}", "f1"),
        ("cola", "", "s\t{1}\t\ta {0}", "matthews"),
        ("wnli", "sentence1\tsentence2\tlabel", "a {}\tb\t{}", "accuracy"),
    ],
)
def test_classification_metrics_are_those_of_scikit_learn(
    name: str, header: str, row: str, metric: str, tiny_bert: Path, tmp_path: Path
) -> None:
    labels = [0, 1, 1, 0, 1, 1, 0]
    written = ["entailment", "not_entailment"] if name == "rte" else ["0", "1"]
    path = write_tsv(tmp_path, header, [row.format(i, written[y]) for i, y in enumerate(labels)])
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task=name, path=path), seed=4)  # type: ignore[arg-type]
    found = task.evaluate(task.model, loader(task))
    batch = task.collate([task.eval_set[i] for i in range(len(labels))])
    with torch.no_grad():
        output = task.model.eval()(**batch)
    predicted = output.logits.argmax(-1)
    expected = {
        "accuracy": (predicted == torch.tensor(labels)).float().mean().item(),
        "f1": f1_score(labels, predicted, zero_division=0.0),
        "matthews": matthews_corrcoef(labels, predicted),
    }
    assert task.metric == metric
    assert found[metric] == pytest.approx(expected[metric])
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_a_regression_is_measured_by_both_correlations(tiny_bert: Path, tmp_path: Path) -> None:
    scores = [0.0, 5.0, 2.5, 1.0, 4.2]
    rows = [f"{'a ' * (i + 1)}\tb\t{s}" for i, s in enumerate(scores)]
    path = write_tsv(tmp_path, "sentence1\tsentence2\tscore", rows)
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="stsb", path=path), seed=0)
    found = task.evaluate(task.model, loader(task))
    with torch.no_grad():
        batch = task.collate([task.eval_set[i] for i in range(5)])
        predicted = task.model.eval()(**batch).logits.squeeze(-1).double().numpy()
    assert (task.num_labels, task.metric) == (1, "pearson")
    assert found["pearson"] == pytest.approx(pearsonr(predicted, scores).statistic, abs=2e-3)
    assert found["spearman"] == pytest.approx(spearmanr(predicted, scores).statistic, abs=1e-6)
    assert task.loss(task.model.train(), batch).item() > 0


def test_a_constant_prediction_has_correlation_zero_and_no_warning(tiny_bert: Path, tmp_path: Path) -> None:
    path = write_tsv(tmp_path, "sentence1\tsentence2\tscore", ["a\tb\t1.0", "c\td\t2.0"])
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="stsb", path=path), seed=0)
    nn.init.zeros_(task.model.classifier.weight)
    assert task.evaluate(task.model, loader(task))["pearson"] == 0.0


def test_correlations_need_two_examples(tiny_bert: Path, tmp_path: Path) -> None:
    path = write_tsv(tmp_path, "sentence1\tsentence2\tscore", ["a\tb\t1.0"])
    with pytest.raises(DataError, match="one evaluation example"):
        load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="stsb", path=path), seed=0)


def test_limits_are_drawn_with_the_seed(tiny_bert: Path, rte_folder: Path) -> None:
    def drawn(seed: int) -> list[list[int]]:
        data = DataConfig(task="rte", path=str(rte_folder), train_limit=6, eval_limit=2)
        task = load_task(ModelConfig(path=str(tiny_bert)), data, seed)
        assert (len(task.train_set), len(task.eval_set)) == (6, 2)
        return [tokens["input_ids"] for tokens, _ in task.train_set]

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_a_fraction_is_taken_of_what_validation_leaves(
    share: float, count: int, tiny_bert: Path, rte_folder: Path
) -> None:
    def sets(train_fraction: float) -> tuple[list[str], list[str]]:
        data = DataConfig(
            task="rte", path=str(rte_folder), max_length=32, validation_share=0.25, train_fraction=train_fraction
        )
        task = load_task(ModelConfig(path=str(tiny_bert)), data, seed=3)
        return [str(e) for e in task.train_set], [str(e) for e in task.eval_set]

    (train, held_out), (whole, whole_held_out) = sets(share), sets(1.0)
    assert len(train) == count
    assert set(train) <= set(whole)
    assert held_out == whole_held_out


def test_a_causal_model_classifies_sentences_too(tiny_llama: Path, rte_folder: Path) -> None:
    task = load_task(ModelConfig(path=str(tiny_llama)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert task.head == ("score",)
    assert math.isfinite(task.evaluate(task.model, loader(task))["loss"])


# -- the model ----------------------------------------------------------------------------------------------------


def test_the_head_follows_the_seed_and_leaves_the_global_generator_alone(tiny_bert: Path, rte_folder: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        before = torch.get_rng_state()
        task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed)
        assert torch.equal(before, torch.get_rng_state())
        return task.model.classifier.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


def test_a_head_for_another_number_of_classes_is_replaced(tiny_bert: Path, rte_folder: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(tiny_bert, num_labels=7)
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    task = load_task(ModelConfig(path=str(tmp_path)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert task.model.classifier.out_features == 2
    assert task.head == ("classifier", "bert.pooler")


def test_the_pooler_is_trained_with_the_head_whether_it_has_weights_or_not(
    tiny_bert: Path, rte_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    BertForMaskedLM(BertConfig.from_pretrained(tiny_bert)).save_pretrained(tmp_path)  # has no pooler
    task = load_task(ModelConfig(path=str(tmp_path)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert task.head == ("classifier", "bert.pooler")
    pretrained = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert pretrained.head == task.head


def test_half_precision_weights_are_loaded_in_the_asked_type(tiny_bert: Path, rte_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    BertModel.from_pretrained(tiny_bert).half().save_pretrained(tmp_path)
    data = DataConfig(task="rte", path=str(rte_folder))
    for dtype in ("float32", "bfloat16"):
        task = load_task(ModelConfig(path=str(tmp_path), dtype=dtype), data, seed=0)  # type: ignore[arg-type]
        assert {p.dtype for p in task.model.parameters()} == {getattr(torch, dtype)}


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def truncate(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def other_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    BertModel(BertConfig(**{**config, "vocab_size": 50})).save_pretrained(folder)


def fewer_layers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layer.1." not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")


def no_padding(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (remove("config.json"), "cannot be read"),
        (truncate("config.json"), "cannot be read"),
        (remove("model.safetensors"), "cannot be loaded by AutoModelForSequenceClassification"),
        (truncate("model.safetensors"), "cannot be loaded by AutoModelForSequenceClassification"),
        (remove("tokenizer.json"), "the tokenizer in"),
        (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer; expected one of tokenizer.json"),
        (truncate("tokenizer.json"), "the tokenizer in"),
        (other_vocabulary, "but the model only 50 embeddings"),
        (fewer_layers, "has no fitting weights for 16 tensors of BertForSequenceClassification"),
        (code_of_its_own, "cannot be read"),
        (no_padding, "neither a padding nor an end token"),
    ],
)
def test_a_damaged_model_folder_is_one_error_that_names_it(
    damage: Callable[[Path], None], part: str, tiny_bert: Path, rte_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    damage(folder)
    with pytest.raises(ModelError, match=part) as caught:
        load_task(ModelConfig(path=str(folder)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert str(folder) in str(caught.value)


def alphabet_of_one_letter(folder: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "so": 4}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["rte", "piqa"])
def test_a_tokenizer_that_does_not_know_the_words_is_refused(
    kind: str, tiny_bert: Path, rte_folder: Path, piqa_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    alphabet_of_one_letter(tmp_path)
    data = DataConfig(task=kind, path=str(rte_folder if kind == "rte" else piqa_folder), max_length=32)  # type: ignore[arg-type]
    with pytest.raises(
        ModelError, match=r"does not know \d+ of the first \d+ tokens; the data begin with '(it|so|to eat)"
    ):
        load_task(ModelConfig(path=str(tmp_path)), data, seed=0)


def test_some_unknown_words_are_taken(tiny_bert: Path, tmp_path: Path) -> None:
    path = write_tsv(tmp_path, "sentence\tlabel", ["it rains \u96e8\t1", "\u96e8 it snows\t0"])
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="sst2", path=path, max_length=32), seed=0)
    assert len(task.train_set) == 2


def test_an_unknown_task_names_the_nearest(tiny_bert: Path, tmp_path: Path) -> None:
    data = DataConfig(task="sst-2", path=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.task='sst-2' is unknown; .* Did you mean 'sst2'\?"):
        load_task(ModelConfig(path=str(tiny_bert)), data, seed=0)
    with pytest.raises(ConfigError, match=r"data\.task='mnly' is unknown; .* Did you mean 'mnli'\?"):
        check_run(load_config(None, ["data.task=mnly", "data.path=x", "model.path=x"]))


def test_a_missing_model_names_every_place_that_was_tried(
    rte_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for path in ("models/bert/base", "bert-missing"):
        with pytest.raises(ModelError) as caught:
            load_task(ModelConfig(path=path), DataConfig(task="rte", path=str(rte_folder)), seed=0)
        assert all(f"'{tmp_path / part / path}'" in str(caught.value) for part in ("data", ""))


def test_a_model_is_found_in_the_data_folder(
    tiny_bert: Path, rte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(tiny_bert.parent))
    task = load_task(ModelConfig(path=tiny_bert.name), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    assert task.num_labels == 2


@pytest.mark.parametrize(("length", "part"), [(129, "more than the 128 tokens"), (4, "needs at least 5")])
def test_a_length_the_model_cannot_read_is_refused(length: int, part: str, tiny_bert: Path, rte_folder: Path) -> None:
    data = DataConfig(task="rte", path=str(rte_folder), max_length=length)
    with pytest.raises(ModelError, match=part):
        load_task(ModelConfig(path=str(tiny_bert)), data, seed=0)


def test_timm_cannot_serve_sentences(rte_folder: Path) -> None:
    model = ModelConfig(library="timm", architecture=VIT, path="x")
    with pytest.raises(ConfigError, match="library=transformers"):
        load_task(model, DataConfig(task="rte", path=str(rte_folder)), seed=0)


# -- multiple choice ----------------------------------------------------------------------------------------------


def choice_task(model: Path, folder: Path, max_length: int = 60) -> Task:
    data = DataConfig(task="piqa", path=str(folder), max_length=max_length)
    return load_task(ModelConfig(path=str(model)), data, seed=0)


def test_a_causal_model_scores_a_choice_by_the_likelihood_of_its_tokens(tiny_llama: Path, piqa_folder: Path) -> None:
    task = choice_task(tiny_llama, piqa_folder)
    model, tokenizer = task.model.eval(), task.preprocessor
    scores = task.scores(model, task.collate([task.eval_set[i] for i in range(2)]))
    for i in range(2):
        for j, solution in enumerate((" cook it", " throw it far away")):
            goal = [tokenizer.bos_token_id, *tokenizer(f"to eat {i}")["input_ids"]]
            ids = goal + tokenizer(solution)["input_ids"]
            expected = 0.0
            for at in range(len(goal), len(ids)):
                logits = model(torch.tensor([ids[:at]])).logits[0, -1]
                expected += logits.log_softmax(-1)[ids[at]].item()
            assert scores[i, j].item() == pytest.approx(expected, rel=1e-4)
    assert task.head == ()


def test_the_loss_of_a_choice_is_the_cross_entropy_of_its_scores(tiny_llama: Path, piqa_folder: Path) -> None:
    task = choice_task(tiny_llama, piqa_folder)
    batch = batch_of(task, 4)
    expected = F.cross_entropy(task.scores(task.model, batch), batch["labels"])
    assert task.loss(task.model, batch).item() == pytest.approx(expected.item())


def test_a_long_choice_keeps_the_solution_and_loses_the_start_of_the_goal(tiny_llama: Path, tmp_path: Path) -> None:
    row = json.dumps({"goal": "x" * 40, "sol1": "short", "sol2": "y" * 80, "label": 0}) + "\n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(row)
    task = choice_task(tiny_llama, tmp_path, max_length=20)
    short, long = task.train_set[0].tokens
    decoded = task.preprocessor.decode(short["input_ids"])
    assert decoded == "<s>" + "x" * 13 + " short"
    assert len(long["input_ids"]) == 20
    assert task.train_set[0].borders == [14, 1]
    assert math.isfinite(task.loss(task.model, batch_of(task, 1)).item())


def test_an_encoder_scores_choices_with_a_new_head(tiny_bert: Path, piqa_folder: Path) -> None:
    task = choice_task(tiny_bert, piqa_folder)
    assert type(task.model).__name__ == "BertForMultipleChoice"
    assert task.head == ("classifier", "bert.pooler")
    batch = batch_of(task, 3)
    assert batch["input_ids"].shape[:2] == (3, 2)
    labelled = {k: v for k, v in batch.items() if k != "borders"}
    assert task.loss(task.model.eval(), batch).item() == pytest.approx(task.model(**labelled).loss.item())
    assert set(task.evaluate(task.model, loader(task))) == {"loss", "accuracy"}


def test_a_model_that_cannot_choose_is_refused(piqa_folder: Path, tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=200, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"t5 with architectures .* choose a Llama-like or a BERT-like model"):
        choice_task(tmp_path, piqa_folder)


# -- text ---------------------------------------------------------------------------------------------------------


def test_text_is_cut_into_blocks_and_its_last_tenth_is_held_out(tiny_llama: Path, text_file: Path) -> None:
    data = DataConfig(task="text", path=str(text_file), max_length=16)
    task = load_task(ModelConfig(path=str(tiny_llama)), data, seed=0)
    tokens = [1, *task.preprocessor(text_file.read_text())["input_ids"], 2]
    blocks = len(tokens) // 16
    assert (len(task.train_set), len(task.eval_set)) == (blocks - round(blocks / 10), round(blocks / 10))
    assert [t for e in [*task.train_set, *task.eval_set] for t in e["input_ids"]] == tokens[: blocks * 16]


def test_perplexity_is_the_exponential_of_the_mean_loss_of_a_token(tiny_llama: Path, text_file: Path) -> None:
    data = DataConfig(task="text", path=str(text_file), max_length=16)
    task = load_task(ModelConfig(path=str(tiny_llama)), data, seed=0)
    found = task.evaluate(task.model, loader(task, 2))
    ids = torch.tensor([e["input_ids"] for e in task.eval_set])
    logits = task.model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert not task.higher_is_better


def test_text_too_short_for_two_blocks_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="text for 0 blocks of 16 tokens"):
        load_task(ModelConfig(path=str(tiny_llama)), DataConfig(task="text", path=str(tmp_path), max_length=16), seed=0)


def test_an_encoder_that_sees_the_next_token_cannot_learn_text(tiny_bert: Path, text_file: Path) -> None:
    with pytest.raises(ModelError, match="is not a causal language model"):
        load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="text", path=str(text_file)), seed=0)


# -- images -------------------------------------------------------------------------------------------------------


def test_a_timm_model_gets_a_new_head_and_resampled_positions(vit_file: Path, images: Path) -> None:
    task = image_task(vit_file, images, size=32)
    assert task.head == ("head",)
    assert task.model.head.out_features == task.num_labels == 100
    assert task.model.pos_embed.shape[1] == (32 // 16) ** 2 + 1
    assert torch.equal(task.model.blocks[0].attn.qkv.weight, load_file(vit_file)["blocks.0.attn.qkv.weight"])
    assert math.isfinite(task.evaluate(task.model, loader(task))["loss"])


def test_pictures_are_normalised_with_the_model_s_own_mean_and_deviation(vit_file: Path, images: Path) -> None:
    task = image_task(vit_file, images)
    settings = timm.data.resolve_data_config({}, model=task.model)
    assert (task.mean, task.std) == (settings["mean"], settings["std"])
    grey = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    expected = (0.2 - torch.tensor(task.mean)) / torch.tensor(task.std)
    x = task.pixel_values(grey, mirror=False)
    assert x.shape == (1, 3, 32, 32)
    torch.testing.assert_close(x, expected.view(1, 3, 1, 1).expand_as(x))


def test_resizing_never_leaves_the_range_of_colours(vit_file: Path, images: Path) -> None:
    task = image_task(vit_file, images)
    checkers = ((torch.arange(8).view(8, 1) + torch.arange(8)) % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    x = task.pixel_values(checkers, mirror=False) * torch.tensor(task.std).view(1, 3, 1, 1)
    colours = x + torch.tensor(task.mean).view(1, 3, 1, 1)
    assert -1e-5 < colours.min() < 0.05
    assert 0.95 < colours.max() < 1 + 1e-5


def test_only_training_mirrors_pictures_and_only_some(vit_file: Path, images: Path) -> None:
    task = image_task(vit_file, images)
    pixels = batch_of(task, 6)["pixels"]
    plain = task.pixel_values(pixels, mirror=False)
    torch.manual_seed(0)
    drawn = task.pixel_values(pixels, mirror=True)
    kept = [torch.equal(a, b) for a, b in zip(drawn, plain, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(drawn, plain, strict=True)]
    assert [k != m for k, m in zip(kept, mirrored, strict=True)] == [True] * 6
    assert 0 < sum(kept) < 6

    def losses(training: bool) -> set[float]:
        task.model.train(training)
        return {task.loss(task.model, batch_of(task, 6)).item() for _ in range(4)}

    assert len(losses(training=True)) > 1
    assert len(losses(training=False)) == 1
    state = torch.get_rng_state()
    task.evaluate(task.model, loader(task))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "size", "part"),
    [
        ({"architecture": "test_vitt"}, 32, "unknown to timm. Did you mean 'test_vit'?"),
        ({"architecture": "test_resnet"}, 32, "does not load into timm's test_resnet"),
        ({}, 40, "no multiple of the 16 pixels of a patch; try 32"),
    ],
)
def test_what_does_not_fit_an_image_model_is_one_error(
    changes: dict[str, str], size: int, part: str, vit_file: Path, images: Path
) -> None:
    model = ModelConfig(**{"library": "timm", "architecture": VIT, "path": str(vit_file), **changes})
    with pytest.raises(ModelError) as caught:
        load_task(model, DataConfig(task="cifar100", path=str(images), image_size=size), seed=0)
    assert part in str(caught.value)


def test_truncated_image_weights_are_one_error(vit_file: Path, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    file.write_bytes(vit_file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"vit\.safetensors does not load"):
        image_task(file, images)
    with pytest.raises(ModelError, match="is a folder"):
        image_task(tmp_path, images)


def test_a_transformers_image_model_uses_its_preprocessor(images: Path, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    data = DataConfig(task="cifar100", path=str(images), image_size=16)
    with pytest.raises(ModelError, match="no image_mean and image_std"):
        load_task(ModelConfig(path=str(tmp_path)), data, seed=0)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    task = load_task(ModelConfig(path=str(tmp_path)), data, seed=0)
    assert (task.mean, task.head) == ((0.1, 0.2, 0.3), ("classifier",))
    assert math.isfinite(task.loss(task.model.train(), batch_of(task)).item())
    assert math.isfinite(task.evaluate(task.model, loader(task))["loss"])
    data.image_size = 32
    with pytest.raises(ModelError, match="set image_size=16"):
        load_task(ModelConfig(path=str(tmp_path)), data, seed=0)


# -- common to all ------------------------------------------------------------------------------------------------


class WithAuxiliary(nn.Module):
    """A model with an auxiliary loss of 100, as a StructLoRA model has one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> object:
        return self.network(*args, **kwargs)

    def auxiliary_loss(self, labels: torch.Tensor | None = None) -> torch.Tensor:
        self.labels = labels
        return torch.tensor(100.0)


def test_the_auxiliary_loss_counts_in_training_and_not_in_evaluation(
    tiny_llama: Path, piqa_folder: Path, vit_file: Path, images: Path
) -> None:
    for task, labels in (
        (choice_task(tiny_llama, piqa_folder), [1, 0, 0, 1, 1, 0]),
        (image_task(vit_file, images), [0, 1, 2]),
    ):
        model = WithAuxiliary(task.model)
        batch = batch_of(task)
        torch.manual_seed(0)
        bare = task.loss(task.model.train(), batch).item()
        torch.manual_seed(0)
        assert task.loss(model.train(), batch).item() == pytest.approx(bare + 100, rel=1e-5)
        assert model.labels.tolist() == labels
        assert task.loss(model.eval(), batch).item() < 90


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_and_leaves_no_gradient(training: bool, tiny_bert: Path, rte_folder: Path) -> None:
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    task.model.train(training)
    assert task.evaluate(task.model, loader(task, 1)) == pytest.approx(task.evaluate(task.model, loader(task, 4)))
    assert task.model.training is training
    assert all(p.grad is None for p in task.model.parameters())


def test_an_output_that_is_not_finite_is_an_error_and_no_score(
    tiny_bert: Path, rte_folder: Path, tiny_llama: Path, text_file: Path
) -> None:
    sentences = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    text = DataConfig(task="text", path=str(text_file), max_length=16)
    for task in (sentences, load_task(ModelConfig(path=str(tiny_llama)), text, seed=0)):
        for parameter in task.model.parameters():
            nn.init.constant_(parameter, math.nan)
        with pytest.raises(FloatingPointError, match=r"is not finite|loss is nan"):
            task.evaluate(task.model, loader(task))


def test_the_tokenizer_is_saved_with_the_adapter(tiny_bert: Path, rte_folder: Path, tmp_path: Path) -> None:
    task = load_task(ModelConfig(path=str(tiny_bert)), DataConfig(task="rte", path=str(rte_folder)), seed=0)
    task.save_extras(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


def test_image_settings_are_saved_with_the_adapter(vit_file: Path, images: Path, tmp_path: Path) -> None:
    task = image_task(vit_file, images)
    task.save_extras(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["size"], tuple(saved["image_mean"])) == ({"height": 32, "width": 32}, task.mean)


def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_bert: Path, rte_folder: Path, vit_file: Path, images: Path
) -> None:
    def gradients(make: Callable[[], Task], recompute: bool) -> list[torch.Tensor]:
        task = make()
        if recompute:
            task.enable_gradient_checkpointing()
        torch.manual_seed(0)
        task.loss(task.model.train(), batch_of(task)).backward()
        return [p.grad for p in task.model.parameters()]

    data = DataConfig(task="rte", path=str(rte_folder))
    for make in (
        lambda: load_task(ModelConfig(path=str(tiny_bert)), data, seed=0),
        lambda: image_task(vit_file, images),
    ):
        for a, b in zip(gradients(make, False), gradients(make, True), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["rte", "text"])
def test_a_validation_share_is_the_same_for_every_seed_and_shrinks_training(
    kind: str, tiny_bert: Path, tiny_llama: Path, rte_folder: Path, text_file: Path
) -> None:
    model = ModelConfig(path=str(tiny_bert if kind == "rte" else tiny_llama))
    path, length = (rte_folder, 32) if kind == "rte" else (text_file, 16)

    def items(share: float, seed: int) -> list[list[str]]:
        task = load_task(
            model,
            DataConfig(task=kind, path=str(path), max_length=length, validation_share=share),  # type: ignore[arg-type]
            seed,
        )
        return [[str(examples[i]) for i in range(len(examples))] for examples in (task.train_set, task.eval_set)]

    (whole, official), (train, held_out) = items(0.0, 0), items(0.25, 0)
    assert items(0.25, 1) == [train, held_out]
    assert len(held_out) == round(len(whole) * 0.25)
    assert sorted(train + held_out) == sorted(whole)
    assert held_out != official
