"""Captions and questions about pictures, with a tiny LLaVA."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.official import picture, save_llava, write_coco, write_easy_vqa, write_lines, write_vqa
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from structlora_pyg.study.tasks import DataError, ModelError, Task, load_task, task_problems
from structlora_pyg.study.tasks.picture_texts import PictureText, read_captions, read_questions
from structlora_pyg.study.tasks.vision_language import cider
from structlora_pyg.study.train import train

with_cider = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="CIDEr needs Java and pycocoevalcap: pip install structlora-pyg[caption]",
)
QV = r".*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vqa(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def load(model: Path, folder: Path, kind: str = "vqa", **changes: object) -> Task:
    data = DataConfig(task=kind, path=str(folder), **{"max_length": 256, **changes})  # type: ignore[arg-type]
    return load_task(ModelConfig(path=str(model)), data, seed=0)


def batch_of(task: Task, count: int = 3, training: bool = True) -> dict[str, torch.Tensor]:
    examples = task.train_set if training else task.eval_set
    return task.collate([examples[i] for i in range(count)])


def decoded(task: Task, ids: torch.Tensor) -> str:
    return task.preprocessor.tokenizer.decode(ids)


def test_only_the_answer_and_the_end_token_count_in_the_loss(llava: Path, vqa: Path) -> None:
    task = load(llava, vqa)
    batch = batch_of(task)
    for i in range(3):
        ids, labels = (batch[name][i][batch["attention_mask"][i].bool()] for name in ("input_ids", "labels"))
        question = f"Is it {i}?\nAnswer the question using a single word or phrase."
        assert decoded(task, ids) == f"USER: {'<image>' * 4}\n{question} ASSISTANT: yes</s>"
        assert decoded(task, labels[labels != -100]) == " yes</s>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["number"].tolist() == [0, 1, 2]


def test_the_chat_template_of_the_processor_goes_around_the_prompt(vqa: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[model]\n{% endif %}"
    )
    task = load(save_llava(tmp_path, template), vqa, prompt="Q: {question}")
    ids = batch_of(task, 1)["input_ids"][0]
    assert decoded(task, ids) == f"<s>[user]{'<image>' * 4}Q: Is it 0?[model]\nyes</s>"


@with_cider
def test_a_long_answer_loses_its_end_and_a_long_prompt_is_refused(llava: Path, coco: Path) -> None:
    task = load(llava, coco, "captions", max_length=90)
    batch = batch_of(task)
    assert batch["input_ids"].shape[1] <= 90
    prompt = int((batch["labels"][0] == -100).sum())
    assert decoded(task, batch["labels"][0][prompt:]) == " A cat on a mat 5."[: 90 - prompt]
    assert 5 < 90 - prompt < 18
    with pytest.raises(ModelError, match=r"leaves no room for an answer: the longest prompt has \d+ tokens, 4 of them"):
        load(llava, coco, "captions", max_length=60)


@with_cider
def test_a_validation_share_keeps_the_captions_and_the_questions_of_a_picture_together(llava, coco, vqa) -> None:
    task = load(llava, coco, "captions", validation_share=0.5)
    assert (len(task.train_set), len(task.eval_set)) == (4, 2)
    assert not {e.picture for e in task.train_set} & {e.picture for e in task.eval_set}
    assert all(e.picture.startswith("train2017/") for e in task.eval_set)
    task = load(llava, vqa, validation_share=0.5, train_fraction=0.5)
    assert (len(task.train_set), len(task.eval_set)) == (1, 2)


@with_cider
def test_every_caption_is_a_training_example_and_every_picture_an_evaluation_example(llava, coco, tmp_path) -> None:
    task = load(llava, coco, "captions")
    assert [(e.picture, e.answer) for e in task.train_set][:3] == [
        ("train2017/000000000005.jpg", "A cat on a mat 5."),
        ("train2017/000000000005.jpg", "Cat 5."),
        ("train2017/000000000012.jpg", "A cat on a mat 12."),
    ]
    assert [e.references for e in task.eval_set] == [(f"A cat on a mat {i}.", f"Cat {i}.") for i in (5, 12, 19)]
    with pytest.raises(DataError, match="one evaluation picture"):
        load(llava, write_coco(tmp_path, val=1), "captions")


@pytest.mark.parametrize("java", [None, "#!/bin/sh\nexit 1\n"])
def test_a_java_that_is_missing_or_broken_is_noticed_before_any_weight_is_loaded(
    java: str | None, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", str(tmp_path) if java is None else f"{tmp_path}:/bin:/usr/bin")
    if java is not None:
        (tmp_path / "java").write_text(java)
        (tmp_path / "java").chmod(0o755)
    with pytest.raises(ConfigError, match=r"the tokenizer of CIDEr does not work .* Java \(apt-get install"):
        load(Path("no/weights"), coco, "captions")


def lively(task: Task) -> Task:
    """Return the task with a model whose output depends on its input: fresh weights are too small for that."""
    for parameter in task.model.parameters():
        parameter.data.mul_(6)
    task.model.eval()
    return task


def with_different_lengths(task: Task) -> list[PictureText]:
    return [e._replace(prompt=e.prompt.replace("it", "it" + " or not" * i)) for i, e in enumerate(task.eval_set)]


def test_writing_is_greedy_and_neither_padding_nor_company_changes_it(llava: Path, vqa: Path) -> None:
    task = lively(load(llava, vqa))
    questions = with_different_lengths(task)
    with torch.no_grad():
        together = task.write(task.model, task.collate(questions))
        for example, text in zip(questions, together, strict=True):
            single = task.collate([example])
            ids = single["input_ids"][:, : int((single["labels"][0] != -100).long().argmax())]
            start = ids.shape[1]
            for _ in range(task.max_new_tokens):
                following = task.model(input_ids=ids, pixel_values=single["pixel_values"]).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], 1)
                if following.item() == task.preprocessor.tokenizer.eos_token_id:
                    break
            assert text == task.preprocessor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert len(set(together)) == 3


def test_the_evaluation_loss_is_that_of_the_model_and_all_batches_count(llava: Path, vqa: Path) -> None:
    task = load(llava, vqa)
    batches = [task.collate(task.eval_set[:1]), task.collate(task.eval_set[1:])]
    found = task.evaluate(task.model, batches)
    with torch.no_grad():
        expected = task.loss(task.model.eval(), batch_of(task, 3, training=False)).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(task.evaluate(task.model, batches[::-1]))
    assert (task.metric, task.higher_is_better) == ("vqa_accuracy", True)
    nn.init.constant_(task.model.get_input_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="the evaluation loss is nan"):
        task.evaluate(task.model, batches)


def test_a_task_learns_answers_of_different_lengths(llava: Path, vqa: Path) -> None:
    task = load(llava, vqa)
    answers = ["yes", "no", "yes, it is"]
    asked = [e._replace(answer=answers[i]) for i, e in enumerate(task.train_set[:3])]
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    value = torch.tensor(1.0)
    for _ in range(120):
        if value < 0.02:
            break
        optimizer.zero_grad()
        value = task.loss(task.model.train(), task.collate(asked))
        value.backward()
        optimizer.step()
    with torch.no_grad():
        assert task.write(task.model.eval(), task.collate(asked)) == answers  # each stops at its own end token
    assert task.evaluate(task.model, [task.collate(asked)])["vqa_accuracy"] == pytest.approx((1.0 + 0.9) / 3)


@with_cider
def test_cider_is_that_of_the_formula_and_1000_for_the_only_reference() -> None:
    references = [["a red bus on a street"], ["two dogs run on the beach"]]
    assert cider(["A red bus, on a street.", "Two dogs run on the beach!"], references) == pytest.approx(1000.0)
    # One word of two in common; only unigrams (idf log 2 for each word) and a length that is equal in bigrams.
    found = cider(["red cat", "dog"], [["red bus"], ["house"]])
    unigrams = 1 / 2  # cosine of {red, cat} and {red, bus} with equal weights
    assert found == pytest.approx(100 * 10 * (unigrams / 4) / 2)
    # Texts of no word or several lines stay with their picture.
    references = [["a red bus"], ["two dogs"], ["a boat on a lake"]]
    whole = cider(["", "two\ndogs", ""], references)
    assert whole == pytest.approx(cider(["x", "two dogs", "y"], references))
    assert whole > 0


def test_a_task_trains_to_an_adapter_that_plain_peft_loads(llava: Path, vqa: Path, tmp_path: Path) -> None:
    settings = TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, batch_size=2, eval_batch_size=2, gradient_checkpointing=True
    )
    adapter = StructLoraConfig(r=2, lora_alpha=4, target_modules=QV, schedule={"warmup_steps": 1})  # type: ignore[arg-type]
    data = DataConfig(task="vqa", path=str(vqa), max_length=300)
    results = train(RunConfig(model=ModelConfig(path=str(llava)), data=data, adapter=adapter, train=settings))
    assert math.isfinite(results["metrics"]["loss"])
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # A and B of q and v in two layers: none of the vision tower's
    assert all("language_model" in name for name in weights)
    base = LlavaForConditionalGeneration.from_pretrained(llava)
    network = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    inputs = AutoProcessor.from_pretrained(tmp_path / "run" / "adapter")(
        text="USER: <image>\nSo? ASSISTANT:", images=[picture(1)], return_tensors="pt"
    )
    assert network.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_real_pictures_are_read_with_their_texts(llava: Path, real_data: Path) -> None:
    root, (training, evaluation) = read_captions(str(real_data / "coco_mini_captions"))
    assert (len(training), len(evaluation)) == (26, 25)
    assert all(len(item.references) == 5 for item in (*training, *evaluation))
    assert Image.open((root / training[0].picture).open("rb")).size[0] > 100
    task = load(llava, real_data / "easy_vqa")
    assert (len(task.train_set), len(task.eval_set)) == (38575, 9673)
    assert sum(item.answer == "yes" for item in task.eval_set) == 3611
    assert math.isfinite(task.evaluate(task.model, [batch_of(task, 4, training=False)])["vqa_accuracy"])


@pytest.mark.slow
@with_cider
def test_people_s_captions_of_real_pictures_score_like_people(real_data: Path) -> None:
    _, (training, evaluation) = read_captions(str(real_data / "coco_mini_captions"))
    items = [*training, *evaluation]
    people = cider([item.references[0] for item in items], [item.references[1:] for item in items])
    shuffled = cider([item.references[0] for item in items[1:] + items[:1]], [item.references[1:] for item in items])
    assert 60 < people < 130
    assert shuffled < people / 5


def test_both_layouts_of_captions_give_the_same(coco: Path, tmp_path: Path) -> None:
    _, (training, evaluation) = read_captions(str(coco))
    assert evaluation[1] == PictureText(
        "val2017/000000000012.jpg", "", "A cat on a mat 12.", ("A cat on a mat 12.", "Cat 12.")
    )
    rows = [
        {"split": split, "file": item.picture, "captions": list(item.references)}
        for split, part in (("train", training), ("val", evaluation))
        for item in part
    ]
    write_lines(tmp_path / "captions.jsonl", [json.dumps(row) for row in rows])
    shutil.make_archive(str(tmp_path / "images"), "zip", coco)
    root, parts = read_captions(str(tmp_path))
    assert parts == [training, evaluation]
    assert (root / training[0].picture).read_bytes() == (coco / training[0].picture).read_bytes()


def test_questions_are_joined_with_their_annotations_by_id_and_stay_with_their_picture(vqa, tmp_path) -> None:
    _, (training, evaluation) = read_questions(str(vqa))
    assert len(training) == 4
    said = ("yes",) * 7 + ("no",) * 3
    assert evaluation[2] == PictureText("val2014/COCO_val2014_000000000007.jpg", "Is it 2?", "yes", said)
    write_easy_vqa(tmp_path)
    write_lines(tmp_path / "train_questions.json", [json.dumps([[f"what {i}?", "red", i % 4] for i in range(40)])])
    _, (training, held_out) = read_questions(str(tmp_path), validation_share=0.25)
    assert (len(training), len({item.picture for item in held_out})) == (30, 1)


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


COCO_FILE = "annotations/captions_val2017.json"
BAD_CAPTIONS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no validation file": (lambda f: (f / COCO_FILE).unlink(), [COCO_FILE]),
    "no folder": (lambda f: shutil.rmtree(f / "annotations"), ["captions.jsonl", "annotations/captions_train2017"]),
    "broken JSON": (lambda f: (f / COCO_FILE).write_text('{"images": ['), [COCO_FILE, "broken JSON"]),
    "no list": (edit(COCO_FILE, lambda c: c.pop("images")), [COCO_FILE, "a list 'images'"]),
    "unknown image": (edit(COCO_FILE, lambda c: c["annotations"][3].update(image_id=1)), ["annotations[3]", "= 1"]),
    "empty caption": (edit(COCO_FILE, lambda c: c["annotations"][2].update(caption=" ")), ["annotations[2]", "capt"]),
    "image without caption": (edit(COCO_FILE, lambda c: c["annotations"].__delitem__(slice(2))), ["image 5"]),
    "no picture": (lambda f: (f / "val2017/000000000012.jpg").unlink(), ["no picture val2017/000000000012.jpg"]),
}


QUESTIONS, ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
BAD_QUESTIONS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no questions": (lambda f: (f / QUESTIONS).unlink(), [QUESTIONS]),
    "no annotations": (lambda f: (f / ANSWERS).unlink(), [ANSWERS]),
    "unanswered question": (
        edit(ANSWERS, lambda c: c["annotations"].pop()), [QUESTIONS, "questions[0]", "question_id = 0", ANSWERS]
    ),
    "empty answers": (
        edit(ANSWERS, lambda c: c["annotations"][1].update(answers=[])), ["annotations[1]", "answers = []"]
    ),
    "answers as texts": (
        edit(ANSWERS, lambda c: c["annotations"][1].update(answers=["yes"])), ["annotations[1]", "a list of objects"]
    ),
    "image as text": (edit(QUESTIONS, lambda c: c["questions"][1].update(image_id="7")), ["questions[1]", "'7'"]),
    "missing picture": (
        lambda f: (f / "val2014/COCO_val2014_000000000001.jpg").unlink(), ["val2014/COCO_val2014_000000000001.jpg"]
    ),
    "other folder": (lambda f: [p.unlink() for p in f.glob("*train*.json")], ["train_questions.json", "v2_OpenEnded"]),
}  # fmt: skip


EASY = {
    '{"a": 1}': "a JSON dict; expected a JSON list", '[["what?", "red"]]': "[question, answer, picture]",
    '[["what?", "", 0]]': "answer = ''", '[["what?", "red", -1]]': "an integer >= 0",
    '[["what?", "red", 99]]': "no picture train/99.png", "[]": "no examples",
}  # fmt: skip
BAD = [(write_coco, read_captions, *case) for case in BAD_CAPTIONS.values()]
BAD += [(write_vqa, read_questions, *case) for case in BAD_QUESTIONS.values()]
BAD += [
    (write_easy_vqa, read_questions, lambda f, text=text: write_lines(f / "train_questions.json", [text]), [part])
    for text, part in EASY.items()
]


@pytest.mark.parametrize(("write", "read", "damage", "parts"), BAD, ids=[*BAD_CAPTIONS, *BAD_QUESTIONS, *EASY])
def test_bad_captions_and_questions_are_one_error_that_names_the_place(write, read, damage, parts, tmp_path) -> None:
    damage(write(tmp_path))
    with pytest.raises(DataError) as caught:
        read(str(tmp_path))
    assert all(part in str(caught.value) for part in [str(tmp_path), *parts]), caught.value


def test_a_damaged_picture_or_archive_names_its_file(llava: Path, tmp_path: Path) -> None:
    folder = write_easy_vqa(tmp_path / "data")
    (folder / "train" / "1.png").write_bytes(b"no picture")
    task = load(llava, folder)
    with pytest.raises(DataError, match=r"train/1\.png: found an unreadable picture"):
        batch_of(task)
    (folder / "images.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"images\.zip: found an unreadable archive"):
        load(llava, folder)
    (folder / "images.zip").unlink()
    shutil.make_archive(str(tmp_path / "images"), "zip", folder)
    shutil.move(tmp_path / "images.zip", folder / "images.zip")
    with pytest.raises(DataError, match=r"images\.zip/train/1\.png: found an unreadable picture"):
        batch_of(load(llava, folder))


@pytest.mark.parametrize(
    ("task", "prompt", "part"),
    [
        ("rte", "Look.", "data.prompt has no effect with data.task=rte; it belongs to captions, vqa"),
        ("vqa", "Look.", "needs {question} where the question goes"),
        ("captions", "{question}", "has no {question}"),
    ],
)
def test_a_prompt_that_does_not_fit_is_a_problem(task: str, prompt: str, part: str) -> None:
    (problem,) = task_problems(ModelConfig(path="x"), DataConfig(task=task, path="x", prompt=prompt))
    assert part in problem


def test_a_model_that_cannot_see_or_whose_processor_does_not_fit_is_refused(tiny_llama, llava, vqa, tmp_path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded by AutoModelForImageTextToText"):
        load(tiny_llama, vqa)
    shutil.copytree(llava, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 99
    small = LlavaForConditionalGeneration.config_class.from_dict(config)
    LlavaForConditionalGeneration(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has token 260, but the model only 99 embeddings"):
        load(tmp_path, vqa)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="processor"):
        load(tmp_path, vqa)
    with pytest.raises(DataError, match="no local folder"):
        load(llava, Path("lmms-lab/VQAv2"))
