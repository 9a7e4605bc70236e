"""Tasks of sentences, choices, text and pictures: batches, losses, metrics, models that fit, and those that do not."""

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
import transformers as hf
from helpers.official import MNLI_CLASSES, write_glue
from helpers.tiny_tokenizers import word_tokenizer
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn
from transformers import BertConfig, T5Config, ViTConfig

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.config import DataConfig, ModelConfig, load_config
from structlora_pyg.study.run import check_run
from structlora_pyg.study.tasks import DataError, ModelError, Task, load_task, register
from structlora_pyg.study.tasks.sentences import LAYOUTS

VIT = "test_vit"  # timm's own architecture for tests: 0.4 million parameters, 160 pixels, patches of 16
Batch = dict[str, torch.Tensor]


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


def load(task: str, model: Path, path: Path, seed: int = 0, overrides: dict | None = None, **changes: object) -> Task:
    data = DataConfig(task=task, path=str(path), **{"max_length": 60, **changes})  # type: ignore[arg-type]
    return load_task(ModelConfig(path=str(model), overrides=overrides or {}), data, seed)


def image_task(vit_file: Path, images: Path, size: int = 32, **changes: object) -> Task:
    model = ModelConfig(**{"library": "timm", "architecture": VIT, "path": str(vit_file), **changes})  # type: ignore[arg-type]
    return load_task(model, DataConfig(task="cifar100", path=str(images), image_size=size), seed=0)


def batch_of(task: Task, count: int = 3, training: bool = True) -> Batch:
    return task.collate((task.train_set if training else task.eval_set)[:count])


def scores(task: Task, size: int = 3) -> dict[str, float]:
    parts = range(0, len(task.eval_set), size)
    return task.evaluate(task.model, [task.collate(task.eval_set[at : at + size]) for at in parts])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("boolq", "piqa")])
def test_every_task_of_glue_trains_and_has_the_metrics_of_the_field(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    task = load(name, tiny_bert, write_glue(tmp_path, name, dev=7))
    assert (len(task.train_set), len(task.eval_set), task.num_labels) == (8, 7, {"mnli": 3, "stsb": 1}.get(name, 2))
    batch = batch_of(task, 4)
    wanted = [0.5, 4.25] * 2 if name == "stsb" else [i % task.num_labels for i in range(4)]
    assert batch["labels"].tolist() == pytest.approx(wanted)
    task.loss(task.model.train(), batch).backward()
    found, whole = scores(task), batch_of(task, 7, training=False)
    with torch.no_grad():
        output = task.model.eval()(**whole)
    labels, predicted = whole["labels"], output.logits.argmax(-1)
    expected = {
        "accuracy": (predicted == labels).double().mean().item(),
        "f1": f1_score(labels, predicted, zero_division=0.0) if task.num_labels == 2 else 0.0,
        "matthews": matthews_corrcoef(labels, predicted) if task.num_labels > 1 else 0.0,
        "pearson": pearsonr(output.logits.squeeze(-1), labels).statistic if name == "stsb" else 0.0,
        "spearman": spearmanr(output.logits.squeeze(-1), labels).statistic if name == "stsb" else 0.0,
    }
    names = {
        "mrpc": ("f1", "accuracy"), "qqp": ("accuracy", "f1"), "cola": ("matthews", "accuracy"),
        "stsb": ("pearson", "spearman"),
    }.get(name, ("accuracy",))  # fmt: skip
    assert task.metric == names[0]
    assert {key: found[key] for key in names} == pytest.approx({key: expected[key] for key in names}, abs=2e-3)
    assert set(found) == {"loss", *names, *(["accuracy_mismatched"] if name == "mnli" else [])}
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-4)


def test_mnli_is_measured_on_the_matched_and_on_the_mismatched_genres(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mnli", train=12, dev=6)
    lines = (folder / "dev_matched.tsv").read_text().splitlines()
    kept = [line for line in lines if MNLI_CLASSES[2] not in line]
    (folder / "dev_mismatched.tsv").write_text("\n".join(kept) + "\n")
    task = load("mnli", tiny_bert, folder)
    nn.init.zeros_(task.model.classifier.weight)
    task.model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.0])
    found = scores(task)
    assert [found["accuracy"], found["accuracy_mismatched"]] == [2 / 6, 2 / 4]
    limited = load("mnli", tiny_bert, folder, eval_limit=3)
    assert (len(limited.eval_set), len(limited.mismatched)) == (3, 3)
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(DataError, match=r"dev_mismatched\.tsv"):
        load("mnli", tiny_bert, folder)
    assert not load("mnli", tiny_bert, folder, validation_share=0.25).mismatched


def test_batches_are_padded_to_their_longest_example_and_padding_changes_no_prediction(tiny_bert, rte_folder) -> None:
    task = load("rte", tiny_bert, rte_folder)
    lengths = [len(tokens["input_ids"]) for tokens, _ in task.train_set[:3]]
    batch = batch_of(task)
    assert len(set(lengths)) == 3
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    together = task.scores(task.model.eval(), batch)
    for i in range(3):
        torch.testing.assert_close(task.scores(task.model, task.collate([task.train_set[i]]))[0], together[i])
    assert batch_of(load("rte", tiny_bert, rte_folder, max_length=9))["input_ids"].shape == (3, 9)


def test_correlations_of_a_constant_are_0_and_need_two_examples(tiny_bert: Path, tmp_path: Path) -> None:
    task = load("stsb", tiny_bert, write_glue(tmp_path, "stsb"))
    nn.init.zeros_(task.model.classifier.weight)
    assert scores(task)["pearson"] == 0.0
    with pytest.raises(DataError, match="one evaluation example"):
        load("stsb", tiny_bert, tmp_path, eval_limit=1)


def test_limits_and_fractions_are_drawn_with_the_seed_of_what_validation_leaves(tiny_bert, rte_folder) -> None:
    def items(seed: int = 0, **changes: float) -> list[list[str]]:
        task = load("rte", tiny_bert, rte_folder, seed, **changes)
        return [[str(e) for e in part] for part in (task.train_set, task.eval_set)]

    assert items(train_limit=6, eval_limit=2) == items(train_limit=6, eval_limit=2) != items(1, train_limit=6)
    (whole, official), (train, held_out) = items(), items(validation_share=0.25)
    assert sorted(train + held_out) == sorted(whole)
    assert held_out != official
    assert items(1, validation_share=0.25) == [train, held_out]  # the cut is the same for every seed
    fewer = items(validation_share=0.25, train_fraction=0.25)
    assert set(fewer[0]) <= set(train)
    assert (len(train), len(fewer[0]), fewer[1]) == (16, 4, held_out)


def test_overrides_change_the_model_not_its_weights(tiny_bert: Path, rte_folder: Path) -> None:
    overrides = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    plain, changed = (load("rte", tiny_bert, rte_folder, overrides=o).model for o in ({}, overrides))
    assert any(m.p for m in plain.modules() if isinstance(m, nn.Dropout))
    assert not any(m.p for m in changed.modules() if isinstance(m, nn.Dropout))
    assert changed.config._attn_implementation == "eager"
    torch.testing.assert_close(plain.state_dict(), changed.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_dropout": 0.0}, "has no hidden_dropout. Did you mean 'hidden_dropout_prob'"),
        ({"num_labels": 3}, "is set by the task or by model.dtype; remove it"),
        ({"attn_implementation": "someone/kernels"}, "is not one of eager, sdpa"),
        ({"hidden_size": 24}, "or other overrides"),
        ({"_commit_hash": "a"}, "has no _commit_hash"),
        (129, "more than the 128 tokens"),
        (4, "needs at least 5"),
    ],
)
def test_overrides_and_lengths_that_do_not_fit_are_refused(changes, says: str, tiny_bert, rte_folder) -> None:
    options = {"overrides": changes} if isinstance(changes, dict) else {"max_length": changes}
    with pytest.raises(ModelError, match=re.escape(says)):
        load("rte", tiny_bert, rte_folder, **options)


def test_the_head_follows_the_seed_and_leaves_the_global_generator_alone(tiny_bert: Path, rte_folder: Path) -> None:
    before = torch.get_rng_state()
    first, same, other = (load("rte", tiny_bert, rte_folder, seed).model.classifier.weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", [hf.BertForSequenceClassification, hf.BertForMaskedLM])
def test_head_and_pooler_are_trained_whatever_the_checkpoint_has_of_them(kind, tiny_bert, rte_folder, tmp_path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    kind(BertConfig.from_pretrained(tiny_bert, num_labels=7)).half().save_pretrained(tmp_path)
    task = load("rte", tmp_path, rte_folder)
    assert task.model.classifier.out_features == 2
    assert task.head == ("classifier", "bert.pooler")
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def other_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    hf.BertModel(BertConfig(**{**config, "vocab_size": 50})).save_pretrained(folder)


def fewer_layers(folder: Path) -> None:
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1." not in k}
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
def test_a_damaged_model_folder_is_one_error_that_names_it(damage, part, tiny_bert, rte_folder, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelError, match=part) as caught:
        load("rte", folder, rte_folder)
    assert str(folder) in str(caught.value)


def test_an_unknown_task_names_the_nearest_and_a_name_is_taken_once(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.task='sst-2' is unknown; .* Did you mean 'sst2'\?"):
        load("sst-2", tiny_bert, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.task='mnly' is unknown; .* Did you mean 'mnli'\?"):
        check_run(load_config(None, ["data.task=mnly", "data.path=x", "model.path=x"]))
    with pytest.raises(ConfigError, match=r"model\.library=timm cannot serve data\.task=rte; set model\.library=trans"):
        load_task(ModelConfig(library="timm", path="x"), DataConfig(task="rte", path="x"), seed=0)
    with pytest.raises(ValueError, match="'rte' is registered already"):
        register("rte", "again")


def test_a_model_is_looked_up_like_data_and_a_missing_one_names_every_place(
    tiny_bert: Path, rte_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STRUCTLORA_DATA", str(tiny_bert.parent))
    assert load("rte", Path(tiny_bert.name), rte_folder).num_labels == 2
    for path in ("models/bert/base", "bert-missing"):
        with pytest.raises(ModelError) as caught:
            load("rte", Path(path), rte_folder)
        assert all(f"'{part / path}'" in str(caught.value) for part in (tiny_bert.parent, tmp_path))


def test_a_causal_model_scores_a_choice_by_the_likelihood_of_its_tokens(tiny_llama: Path, piqa_folder: Path) -> None:
    task = load("piqa", tiny_llama, piqa_folder)
    model, tokenizer = task.model.eval(), task.preprocessor
    batch = batch_of(task, 2, training=False)
    found = task.scores(model, batch)
    for i in range(2):
        for j, solution in enumerate((" cook it", " throw it far away")):
            goal = [tokenizer.bos_token_id, *tokenizer(f"to eat {i}")["input_ids"]]
            ids = goal + tokenizer(solution)["input_ids"]
            likelihood = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(likelihood[at - 1, ids[at]].item() for at in range(len(goal), len(ids)))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4)
    assert task.loss(model, batch).item() == pytest.approx(F.cross_entropy(found, batch["labels"]).item())
    assert task.head == ()


def test_a_long_choice_keeps_the_solution_and_loses_the_start_of_the_goal(tiny_llama: Path, tmp_path: Path) -> None:
    row = json.dumps({"goal": "x" * 40, "sol1": "short", "sol2": "y" * 80, "label": 0}) + "\n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(row)
    task = load("piqa", tiny_llama, tmp_path, max_length=20)
    short, long = task.train_set[0].tokens
    assert task.preprocessor.decode(short["input_ids"]) == "<s>" + "x" * 13 + " short"
    assert len(long["input_ids"]) == 20
    assert task.train_set[0].borders == [14, 1]
    assert math.isfinite(task.loss(task.model, batch_of(task, 1)).item())


def test_an_encoder_scores_choices_with_a_new_head(tiny_bert: Path, piqa_folder: Path, tmp_path: Path) -> None:
    task = load("piqa", tiny_bert, piqa_folder)
    assert (type(task.model).__name__, task.head) == ("BertForMultipleChoice", ("classifier", "bert.pooler"))
    batch = batch_of(task)
    assert batch["input_ids"].shape[:2] == (3, 2)
    expected = task.model.eval()(**{k: v for k, v in batch.items() if k != "borders"}).loss.item()
    assert task.loss(task.model, batch).item() == pytest.approx(expected)
    assert set(scores(task)) == {"loss", "accuracy"}
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=200, decoder_start_token_id=0)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded by AutoModelForMultipleChoice: Unrecognized"):
        load("piqa", tmp_path, piqa_folder)


def test_text_is_cut_into_blocks_whose_end_is_held_out(tiny_llama, tiny_bert, text_file, tmp_path) -> None:
    task = load("text", tiny_llama, text_file, max_length=16)
    tokens = [1, *task.preprocessor(text_file.read_text())["input_ids"], 2]
    blocks = len(tokens) // 16
    assert (len(task.train_set), len(task.eval_set)) == (blocks - round(blocks / 10), round(blocks / 10))
    assert [t for e in [*task.train_set, *task.eval_set] for t in e["input_ids"]] == tokens[: blocks * 16]
    ids = torch.tensor([e["input_ids"] for e in task.eval_set])
    expected = F.cross_entropy(task.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert scores(task, 2) == pytest.approx({"loss": expected, "perplexity": math.exp(expected)}, rel=1e-5)
    assert not task.higher_is_better
    held_out = load("text", tiny_llama, text_file, max_length=16, validation_share=0.25)
    assert [*held_out.train_set, *held_out.eval_set] == task.train_set
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="text for 0 blocks of 16 tokens"):
        load("text", tiny_llama, tmp_path, max_length=16)
    with pytest.raises(ModelError, match="is not a causal language model"):
        load("text", tiny_bert, text_file)


def test_a_timm_model_gets_a_new_head_and_resampled_positions(vit_file: Path, images: Path) -> None:
    task = image_task(vit_file, images, overrides={"proj_drop_rate": 0.25})
    assert task.head == ("head",)
    assert task.model.head.out_features == task.num_labels == 100
    assert task.model.pos_embed.shape[1] == (32 // 16) ** 2 + 1
    assert torch.equal(task.model.blocks[0].attn.qkv.weight, load_file(vit_file)["blocks.0.attn.qkv.weight"])
    assert any(m.p == 0.25 for m in task.model.modules() if isinstance(m, nn.Dropout))
    assert set(scores(task)) == {"loss", "accuracy", "top5"}


def test_pictures_are_normalised_as_the_model_knows_them_and_stay_in_the_range_of_colours(
    vit_file: Path, images: Path, tmp_path: Path
) -> None:
    task = image_task(vit_file, images)
    settings = timm.data.resolve_data_config({}, model=task.model)
    assert (task.mean, task.std) == (settings["mean"], settings["std"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (task.mean, task.std))
    grey = task.pixel_values(torch.full((1, 3, 8, 8), 51, dtype=torch.uint8), mirror=False)
    torch.testing.assert_close(grey, ((0.2 - mean) / std).expand(1, 3, 32, 32))
    checkers = ((torch.arange(8).view(8, 1) + torch.arange(8)) % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    colours = task.pixel_values(checkers, mirror=False) * std + mean
    assert -1e-5 < colours.min() < 0.05
    assert 0.95 < colours.max() < 1 + 1e-5
    task.save_extras(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["size"], tuple(saved["image_mean"])) == ({"height": 32, "width": 32}, task.mean)


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
    for training, most in ((True, 4), (False, 1)):
        task.model.train(training)
        losses = {task.loss(task.model, batch_of(task, 6)).item() for _ in range(4)}
        assert 1 < len(losses) <= most if training else len(losses) == 1
    state = torch.get_rng_state()
    scores(task)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "size", "part"),
    [
        ({"architecture": "test_vitt"}, 32, "unknown to timm. Did you mean 'test_vit'?"),
        ({"architecture": "test_resnet"}, 32, "does not load into timm's test_resnet"),
        ({"overrides": {"dropping": 0.25}}, 32, "unexpected keyword argument 'dropping'"),
        ({}, 40, "no multiple of the 16 pixels of a patch; try 32"),
        ({"path": "{folder}"}, 32, "is a folder"),
        ({"path": "{folder}/truncated.safetensors"}, 32, "truncated.safetensors does not load"),
    ],
)
def test_what_does_not_fit_an_image_model_is_one_error(changes, size, part, vit_file, images, tmp_path) -> None:
    (tmp_path / "truncated.safetensors").write_bytes(vit_file.read_bytes()[:5000])
    if "path" in changes:
        changes = {"path": changes["path"].format(folder=tmp_path)}
    with pytest.raises(ModelError, match=re.escape(part)):
        image_task(vit_file, images, size, **changes)


def test_a_transformers_image_model_uses_its_preprocessor(images: Path, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no image_mean and image_std"):
        load("cifar100", tmp_path, images, image_size=16)
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    task = load("cifar100", tmp_path, images, image_size=16)
    assert (task.mean, task.head) == ((0.1, 0.2, 0.3), ("classifier",))
    assert math.isfinite(task.loss(task.model.train(), batch_of(task)).item())
    assert math.isfinite(scores(task)["loss"])
    with pytest.raises(ModelError, match="set image_size=16"):
        load("cifar100", tmp_path, images, image_size=32)


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


def test_the_auxiliary_loss_counts_in_training_and_not_in_evaluation(tiny_llama, piqa_folder, vit_file, images) -> None:
    for task, labels in (
        (load("piqa", tiny_llama, piqa_folder), [1, 0, 0, 1, 1, 0]),
        (image_task(vit_file, images), [0, 1, 2]),
    ):
        model, batch = WithAuxiliary(task.model), batch_of(task)
        torch.manual_seed(0)
        bare = task.loss(task.model.train(), batch).item()
        torch.manual_seed(0)
        assert task.loss(model.train(), batch).item() == pytest.approx(bare + 100, rel=1e-5)
        assert model.labels.tolist() == labels
        assert task.loss(model.eval(), batch).item() < 90


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_leaves_no_gradient_and_refuses_what_is_not_finite(
    training: bool, tiny_bert: Path, rte_folder: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    causal = load("rte", tiny_llama, rte_folder)
    assert causal.head == ("score",)
    for task in (causal, load("rte", tiny_bert, rte_folder), load("text", tiny_llama, text_file, max_length=16)):
        task.model.train(training)
        assert scores(task, 1) == pytest.approx(scores(task, 4))
        assert task.model.training is training
        assert all(p.grad is None for p in task.model.parameters())
        task.save_extras(tmp_path / task.metric)
        assert (tmp_path / task.metric / "tokenizer.json").is_file()
        for parameter in task.model.parameters():
            nn.init.constant_(parameter, math.nan)
        with pytest.raises(FloatingPointError, match=r"is not finite|loss is nan"):
            scores(task)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_bert, rte_folder, vit_file, images) -> None:
    def gradients(make: Callable[[], Task], recompute: bool) -> list[torch.Tensor]:
        task = make()
        if recompute:
            task.enable_gradient_checkpointing()
        torch.manual_seed(0)
        task.loss(task.model.train(), batch_of(task)).backward()
        return [p.grad for p in task.model.parameters()]

    for make in (lambda: load("rte", tiny_bert, rte_folder), lambda: image_task(vit_file, images)):
        torch.testing.assert_close(gradients(make, False), gradients(make, True))
