"""Small data sets in the official layouts, and folders of tiny models, for tests of tasks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from helpers.tiny_tokenizers import byte_tokenizer, word_tokenizer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

# Header lines as they stand in the official files; CoLA has none.
MNLI_START = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    "\tsentence1\tsentence2\t"
)
HEADERS = {
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "cola": None,
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "sst2": "sentence\tlabel",
    "qnli": "index\tquestion\tsentence\tlabel",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
}
BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rte": ("{i}\tit rains {i}\tit is wet\t{y}", ENTAILMENT),
    "wnli": ("{i}\tit rains {i}\tit is wet\t{y}", BINARY),
    "mrpc": ("{y}\t1{i}\t2{i}\tit rains {i}\tit is wet", BINARY),
    "cola": ("gj04\t{y}\t\tit rains {i}", BINARY),
    "stsb": ("{i}\tnews\tMSRpar\t2012\t0{i}\tnone\tnone\tit rains {i}\tit is wet\t{y}", ("0.500", "4.250")),
    "sst2": ("it rains {i} \t{y}", BINARY),
    "qnli": ("{i}\tdoes it rain {i}?\tit is wet\t{y}", ENTAILMENT),
    "qqp": ("{i}\t1{i}\t2{i}\tdoes it rain {i}?\tis it wet?\t{y}", BINARY),
}
MNLI_CLASSES = ("entailment", "neutral", "contradiction")
MNLI_ROW = "{i}\t1{i}\t1{i}n\tfiction\t( it )\t( it )\t(ROOT (it))\t(ROOT (it))\tit rains {i}\tit is wet\t"


def write_lines(file: Path, lines: list[str | None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines if line is not None), encoding="utf-8")


def write_glue(folder: Path, task: str, train: int = 8, dev: int = 4) -> Path:
    """Write both splits of a GLUE task; the labels take turns."""
    if task == "mnli":
        for split, count in (("train", train), ("dev_matched", dev), ("dev_mismatched", dev)):
            more = 1 if split == "train" else 5
            header = MNLI_START + "\t".join(f"label{k + 1}" for k in range(more)) + "\tgold_label"
            labels = [MNLI_CLASSES[i % 3] for i in range(count)]
            rows = [MNLI_ROW.format(i=i) + "\t".join([y] * (more + 1)) for i, y in enumerate(labels)]
            write_lines(folder / f"{split}.tsv", [header, *rows])
        return folder
    row, labels = ROWS[task]
    for split, count in (("train", train), ("dev", dev)):
        rows = [row.format(i=i, y=labels[i % len(labels)]) for i in range(count)]
        write_lines(folder / f"{split}.tsv", [HEADERS[task], *rows])
    return folder


def write_boolq(folder: Path) -> Path:
    row = '{{"question": "does it rain {i}", "title": "rain", "answer": {y}, "passage": "it is wet {i}."}}'
    for split, count in (("train", 8), ("dev", 4)):
        write_lines(folder / f"{split}.jsonl", [row.format(i=i, y="true" if i % 2 else "false") for i in range(count)])
    return folder


def write_piqa(folder: Path) -> Path:
    row = '{{"goal": "to eat {i}", "sol1": "cook it", "sol2": "throw it far away", "label": {y}}}'
    for split, count in (("train", 8), ("valid", 4)):
        write_lines(folder / f"{split}.jsonl", [row.format(i=i, y=i % 2) for i in range(count)])
    return folder


def write_cifar(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "cifar.npz", x_train=x, y_train=np.arange(8), x_test=x[:4], y_test=np.arange(4))
    return folder


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Return a picture of one colour."""
    return Image.new("RGB", size, tuple((number * k) % 256 for k in (37, 91, 53)))


def save_picture(file: Path, number: int = 0, size: tuple[int, int] = (20, 16)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(number, size).save(file)


def write_image_folder(folder: Path, classes: int = 3, train: int = 3, val: int = 2) -> Path:
    for c in range(classes):
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                save_picture(folder / split / f"n0{c}" / f"{i}.{'JPEG' if i % 2 else 'png'}", 10 * c + i)
    return folder


def write_coco(folder: Path, train: int = 4, val: int = 3) -> Path:
    """Write COCO captions, two a picture."""
    for split, count in (("train2017", train), ("val2017", val)):
        images = [{"id": 7 * i + 5, "file_name": f"{7 * i + 5:012d}.jpg", "license": 1} for i in range(count)]
        texts = [(image["id"], f"{text} {image['id']}.\n") for image in images for text in ("A cat on a mat", "Cat")]
        annotations = [{"id": k, "image_id": key, "caption": text} for k, (key, text) in enumerate(texts)]
        write_lines(
            folder / "annotations" / f"captions_{split}.json",
            [json.dumps({"info": {}, "images": images, "annotations": annotations})],
        )
        for i, image in enumerate(images):
            save_picture(folder / split / str(image["file_name"]), i)
    return folder


def write_vqa(folder: Path, train: int = 4, val: int = 3) -> Path:
    """Write VQAv2 questions with ten answers each, two different ones."""
    for split, count in (("train2014", train), ("val2014", val)):
        questions, annotations = [], []
        for i in range(count):
            key, said = {"image_id": 3 * i + 1, "question_id": 10 * i}, ["yes"] * 7 + ["no"] * 3
            answers = [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1} for k, a in enumerate(said)]
            questions.append({**key, "question": f"Is it {i}?"})
            kind = {"question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": "yes"}
            annotations.append({**key, **kind, "answers": answers})
            save_picture(folder / split / f"COCO_{split}_{3 * i + 1:012d}.jpg", i)
        for name, content in (
            (f"v2_OpenEnded_mscoco_{split}_questions", {"questions": questions}),
            (f"v2_mscoco_{split}_annotations", {"annotations": annotations[::-1]}),
        ):
            write_lines(folder / f"{name}.json", [json.dumps(content)])
    return folder


def write_easy_vqa(folder: Path, train: int = 4, test: int = 2) -> Path:
    for split, count in (("train", train), ("test", test)):
        write_lines(
            folder / f"{split}_questions.json", [json.dumps([[f"what colour is {i}?", "red", i] for i in range(count)])]
        )
        for i in range(count):
            save_picture(folder / split / f"{i}.png", i)
    return folder


def _save(folder: Path, build: Callable[[], nn.Module], *others: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in (build(), *others):
            part.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def save_bert(folder: Path, width: int = 16, inner: int = 24) -> Path:
    """Save a random BERT without a head, but with a pooler."""
    tokenizer = word_tokenizer()
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=inner, max_position_embeddings=128,
    )  # fmt: skip
    return _save(folder, lambda: hf.BertModel(config), tokenizer)


def save_roberta(folder: Path) -> Path:
    """Save a random RoBERTa without a head."""
    tokenizer = word_tokenizer()
    config = hf.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=130, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return _save(folder, lambda: hf.RobertaModel(config, add_pooling_layer=False), tokenizer)


def save_llama(folder: Path, max_position_embeddings: int = 512, **changes: int) -> Path:
    """Save a random Llama without grouped queries, as the first LLaMA-7B, or with `changes` of its configuration."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = max_position_embeddings
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=max_position_embeddings, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return _save(folder, lambda: hf.LlamaForCausalLM(config), tokenizer)


def save_llava(folder: Path, chat_template: str | None = None) -> Path:
    """Save a random LLaVA over bytes, whose pictures have 16 pixels a side and become 4 tokens, with its processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *alphabet]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<image>"])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=1024,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    return _save(folder, lambda: hf.LlavaForConditionalGeneration(config), processor)
