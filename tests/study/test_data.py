"""What good files give, what bad ones say, and which examples are used."""

import gzip
import io
import json
import logging
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from helpers.official import HEADERS, write_glue, write_lines
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.config import DataConfig
from structlora_pyg.study.tasks import DataError
from structlora_pyg.study.tasks.data import not_found, resolve
from structlora_pyg.study.tasks.images import read_images
from structlora_pyg.study.tasks.language import read_text
from structlora_pyg.study.tasks.sentences import LAYOUTS, Example, read_examples
from structlora_pyg.study.tasks.splits import drawn, file_split, hold_out, own_parts, own_splits, subsample

RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROW = "0\tIt rains.\tIt is wet.\tentailment\n"
PIQA_ROW = '{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}\n'
BOOLQ_ROW = '{"question": "is it", "passage": "It is.", "answer": true}\n'
STSB_ROW = "0\tg\tf\ty\to\ts\ts\ta\tb\t"


def folder_with(tmp_path: Path, **files: str | bytes) -> str:
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path)


def images(count: int = 4, **changes: np.ndarray) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = np.arange(count * 48, dtype=np.uint8).reshape(count, 4, 4, 3)
        arrays[f"y_{split}"] = np.arange(count, dtype=np.uint8)
    return {**arrays, **changes}


@pytest.mark.parametrize(
    ("task", "path", "train", "dev"),
    [
        ("rte", "glue/RTE", [1249, 1241], [146, 131]),
        ("mrpc", "glue/MRPC", [1194, 2474], [129, 279]),
        ("cola", "glue/CoLA", [2528, 6023], [322, 721]),
        ("wnli", "glue/WNLI", [323, 312], [40, 31]),
        ("piqa", "piqa", [8053, 8060], [910, 928]),
    ],
)
def test_official_labels_are_counted_as_published(task, path, train, dev, real_data) -> None:
    splits = read_examples(task, str(real_data / path))
    assert [[sum(e.label == c for e in split) for c in (0, 1)] for split in splits] == [train, dev]
    assert [len(split) for split in splits] == [sum(train), sum(dev)]


def test_stsb_scores_have_the_published_mean(real_data: Path) -> None:
    train, dev = read_examples("stsb", str(real_data / "glue/STS-B"))
    assert [np.mean([e.label for e in part]) for part in (train, dev)] == pytest.approx([2.701, 2.364], abs=5e-4)


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("rte", '0\t"It rains.\tIt is "wet".\tentailment\n', Example('"It rains.', 'It is "wet".', 0)),
        ("rte", "0\tIt\u2028rains\x85now.\tIt's\tnot_entailment\n", Example("It\u2028rains\x85now.", "It's", 1)),
        ("cola", "gj04\t1\t\tNone\n", Example("None", None, 1)),
        ("qqp", '7\t1\t2\t"What is "it"?\tIs it "?\t1\n', Example('"What is "it"?', 'Is it "?', 1)),
    ],
)
def test_quotes_separators_and_words_for_nothing_are_text(task, row, expected, tmp_path) -> None:
    content = row * 2 if HEADERS[task] is None else f"{HEADERS[task]}\n{row * 2}"
    path = folder_with(tmp_path, train__tsv=content, dev__tsv=content)
    assert read_examples(task, path) == [[expected] * 2] * 2


def test_gzip_windows_line_ends_byte_order_mark_and_empty_lines_change_nothing(tmp_path: Path) -> None:
    windows = b"\xef\xbb\xbf" + (RTE_HEADER + "\n" + RTE_ROW).replace("\n", "\r\n").encode() + b"\r\n"
    path = folder_with(tmp_path, train__tsv=RTE_HEADER + RTE_ROW, dev__tsv__gz=gzip.compress(windows))
    train, dev = read_examples("rte", path)
    assert train == dev == [Example("It rains.", "It is wet.", 0)]


def test_boolq_without_one_is_cut_by_passage_and_says_so(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train, evaluation = read_examples("boolq", str(real_data / "boolq"))
    assert (len(train), len(evaluation)) == (2180, 1090)
    assert not {e.second for e in train} & {e.second for e in evaluation}
    assert "cannot be compared" in caplog.text
    kept, held_out = read_examples("boolq", str(real_data / "boolq"), 0.3)
    assert sorted(kept + held_out) == sorted(train)


@pytest.mark.slow
def test_cifar_is_read_from_the_folder_that_holds_its_file(real_data: Path) -> None:
    (x, y), (x_test, y_test) = (read_images(str(real_data / "cifar100_subset"), part) for part in (0, 1))
    assert x.shape == x_test.shape == (10000, 32, 32, 3)
    assert set(np.bincount(y)) == set(np.bincount(y_test)) == {100}


def test_text_comes_from_txt_and_jsonl_in_the_order_of_names(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n{"text": "two"}\n'
    folder_with(tmp_path, b__txt="second\nfile", a__jsonl=lines, c__txt__gz=gzip.compress(b"last"))
    assert read_text(str(tmp_path)) == ["one", "two", "second\nfile", "last"]


def test_rows_of_qqp_that_fall_apart_are_left_out_counted_and_few(tmp_path, caplog) -> None:
    for count in (4000, 2999):
        write_glue(tmp_path, "qqp", train=count)
        lines = (tmp_path / "train.tsv").read_text().splitlines()
        lines[3:3] = ["9\t1\t2\tIs it", "", "\tor not?\t0", "9\t1\t2\tis it?\t\t1", "9\t1\t2\tis it?\tis it?\t7"]
        write_lines(tmp_path / "train.tsv", [*lines])
        if count == 4000:
            assert len(read_examples("qqp", str(tmp_path))[0]) == count
            assert "left out 4 wrong rows, the first in line 4" in caplog.text
        else:
            with pytest.raises(DataError, match=r"train\.tsv, line 4: found 4 of 3003 rows with wrong fields"):
                read_examples("qqp", str(tmp_path))


TABLE = pd.DataFrame(
    {"text": ['It rains, "now".', "None", "a\nb", "x"], "label": [1, 0, 1, 0], "score": [0.5, 1, 2, 3]}
)


@pytest.mark.parametrize("end", ["csv", "csv.gz", "tsv", "jsonl", "json", "parquet"])
def test_a_table_gives_the_same_rows_in_every_format(end: str, tmp_path: Path) -> None:
    file = tmp_path / f"train.{end}"
    table = TABLE.assign(text=TABLE["text"].str.replace("\n", " ")) if end == "tsv" else TABLE
    if end == "parquet":
        table.to_parquet(file)
    elif "json" in end:
        table.to_json(file, orient="records", lines=end == "jsonl")
    else:
        table.to_csv(file, index=False, sep="\t" if end == "tsv" else ",", quoting=3 if end == "tsv" else 0)
    texts = [(row.text("text"), row.number("score")) for row in file_split(file).rows()]
    assert texts == list(zip(table["text"], table["score"], strict=True))


def test_a_tenth_is_held_out_of_a_single_file_and_a_folder_or_the_hub_may_have_a_part_for_it(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(40)]})

    def sizes(path: Path, **changes: float) -> list[int]:
        data = DataConfig(task="sft", path=str(path), **changes)  # type: ignore[arg-type]
        parts = [split.examples(lambda row: row.text("text")) for split in own_splits(data)]
        return [len(part) for part in own_parts(parts, data, seed=0)]

    frame.to_csv(tmp_path / "train.csv", index=False)
    assert sizes(tmp_path / "train.csv") == sizes(tmp_path) == [36, 4]
    frame[:7].to_json(tmp_path / "validation.jsonl", orient="records", lines=True)
    assert sizes(tmp_path) == [40, 7]
    assert sizes(tmp_path, validation_share=0.25) == [30, 10]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        frame.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert sizes(tmp_path / "hub") == [40, 40]
    with pytest.raises(DataError, match=r"notes\.txt: found another kind of file; expected one of \.tsv, \.csv"):
        sizes(Path(folder_with(tmp_path, notes__txt="x")) / "notes.txt")


BAD_TABLES: dict[str, tuple[str, dict[str, str | bytes], list[str]]] = {
    "missing split": ("rte", {"train__tsv": RTE_HEADER + RTE_ROW}, ["dev.tsv or dev.tsv.gz", "train.tsv"]),
    "empty folder": ("rte", {}, ["an empty folder", "train.tsv"]),
    "empty file": ("rte", {"train__tsv": ""}, ["train.tsv", "empty file"]),
    "header only": ("rte", {"train__tsv": RTE_HEADER}, ["train.tsv", "no examples"]),
    "missing column": (
        "rte", {"train__tsv": "index\tsentence1\tlabel\n0\ta\t1\n"},
        ["line 2", "only index, sentence1, label", "a column 'sentence2'"],
    ),
    "too few fields": (
        "rte", {"train__tsv": RTE_HEADER + RTE_ROW + "1\tIt rains.\tentailment\n"},
        ["train.tsv, line 3", "3 fields", "4 (index, sentence1, sentence2, label)"],
    ),
    "too many fields": ("rte", {"train__tsv": RTE_HEADER + "0\ta\tb\tc\tentailment\n"}, ["line 2", "5 fields"]),
    "unknown label": (
        "rte", {"train__tsv": RTE_HEADER + RTE_ROW.replace("entailment", "maybe")},
        ["line 2", "label = 'maybe'", "entailment, not_entailment"],
    ),
    "label out of range": ("cola", {"train__tsv": "gj04\t2\t\tIt rains.\n"}, ["line 1", "'2'", "0, 1"]),
    "empty sentence": (
        "rte", {"train__tsv": RTE_HEADER + RTE_ROW.replace("It rains.", " ")},
        ["line 2", "sentence1 = ' '"],
    ),
    "score above five": (
        "stsb", {"train__tsv": f"{HEADERS['stsb']}\n{STSB_ROW}7.5\n"},
        ["line 2", "score = '7.5'", "0 to 5"],
    ),
    "score that is no number": ("stsb", {"train__tsv": f"{HEADERS['stsb']}\n{STSB_ROW}nan\n"}, ["score = 'nan'"]),
    "truncated gzip": (
        "rte", {"train__tsv__gz": gzip.compress((RTE_HEADER + RTE_ROW * 9999).encode())[:-40]},
        ["train.tsv.gz, line", "truncated gzip"],
    ),
    "gzip in name only": ("rte", {"train__tsv__gz": RTE_HEADER}, ["train.tsv.gz", "damaged"]),
    "not utf-8": (
        "rte", {"train__tsv": (RTE_HEADER + RTE_ROW).encode() + b"1\t\xff\tb\tentailment\n"},
        ["train.tsv, line 3", "UTF-8"],
    ),
    "broken json": ("piqa", {"train__jsonl": PIQA_ROW + PIQA_ROW[:20]}, ["line 2", "broken JSON"]),
    "deeply nested json": ("piqa", {"train__jsonl": "[" * 99999}, ["line 1", "broken JSON"]),
    "json list": ("piqa", {"train__jsonl": "[1, 2]\n"}, ["line 1", "JSON list"]),
    "missing key": (
        "piqa", {"train__jsonl": PIQA_ROW.replace("sol2", "sol3")},
        ["line 1", "'sol2'", "goal, sol1, sol3, label"],
    ),
    "choice out of range": ("piqa", {"train__jsonl": PIQA_ROW.replace("1}", "2}")}, ["line 1", "label = 2", "0, 1"]),
    "choice as boolean": ("piqa", {"train__jsonl": PIQA_ROW.replace("1}", "true}")}, ["label = True"]),
    "answer as text": ("boolq", {"dev__jsonl": BOOLQ_ROW.replace("true", '"yes"')}, ["answer = 'yes'", "False, True"]),
    "boolq with one passage": ("boolq", {"dev__jsonl": BOOLQ_ROW * 3}, ["3 training examples in 1 groups"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_file_stops_with_one_error_that_names_it(case: str, tmp_path: Path) -> None:
    task, files, parts = BAD_TABLES[case]
    path = folder_with(tmp_path, **files)
    if case != "missing split" and task != "boolq" and files:
        folder_with(tmp_path, valid__jsonl="", dev__tsv="")  # not reached
    with pytest.raises(DataError) as caught:
        read_examples(task, path)
    message = str(caught.value)
    assert message.startswith(path)
    assert all(part in message for part in [*parts, "; expected "]), message
    assert "\n" not in message


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("qqp", "boolq", "piqa")])
def test_a_broken_row_or_a_label_out_of_range_names_file_and_line_in_every_task_of_glue(name, tmp_path) -> None:
    write_glue(tmp_path, name)
    file, whole = tmp_path / "train.tsv", (tmp_path / "train.tsv").read_text()
    file.write_text(f"{whole}9\n")
    with pytest.raises(DataError, match=rf"train\.tsv, line {whole.count(chr(10)) + 1}: found 1 fields"):
        read_examples(name, str(tmp_path))
    label = (LAYOUTS[name].classes or ("", "4.250"))[1]
    file.write_text(
        whole.replace(f"{label}\n", "9\n").replace(f"\t{label}\t", "\t9\t").replace(f"\n{label}\t", "\n9\t")
    )
    with pytest.raises(DataError, match=rf"train\.tsv, line \d: found {LAYOUTS[name].label} = '9'; expected"):
        read_examples(name, str(tmp_path))


def archive_of_terabytes(file: Path) -> None:
    np.savez_compressed(file, **images())
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    header = io.BytesIO()
    shape = (10**6, 1000, 1000, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**content, "x_train.npy": header.getvalue() + bytes(1000)}.items():
            archive.writestr(name, data)


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing array": (lambda p: np.savez(p, **{k: v for k, v in images().items() if k != "y_test"}), ["y_test"]),
    "floating pixels": (lambda p: np.savez(p, **images(x_test=np.zeros((4, 4, 4, 3)))), ["x_test", "float64", "uint8"]),
    "no colours": (lambda p: np.savez(p, **images(x_train=np.zeros((4, 4, 4), np.uint8))), ["(4, 4, 4)"]),
    "no pictures": (lambda p: np.savez(p, **images(0)), ["(0, 4, 4, 3)"]),
    "too few labels": (lambda p: np.savez(p, **images(y_train=np.zeros(3, int))), ["y_train", "(3,)", "(4,)"]),
    "label out of range": (lambda p: np.savez(p, **images(y_test=np.array([0, 1, 100, 3]))), ["y_test[2] = 100", "99"]),
    "pickled objects": (lambda p: np.savez(p, **images(y_test=np.array([{}] * 4, dtype=object))), ["unreadable"]),
    "one array": (lambda p: np.save(p.open("wb"), np.zeros(3)), ["a whole .npz file"]),
    "shape beyond its bytes": (archive_of_terabytes, ["unreadable", "2.73 TiB"]),
    "no archive": (lambda p: p.write_bytes(b"hello" * 99), ["unreadable"]),
    "truncated": (lambda p: (np.savez_compressed(p, **images()), p.write_bytes(p.read_bytes()[:-300])), ["unreadable"]),
    "two files": (lambda p: (np.savez(p, **images()), np.savez(p.with_name("b.npz"))), ["b.npz, ", "exactly one"]),
}


BAD_TEXTS: dict[str, tuple[str, str, str]] = {
    "blank text": ("a.txt", " \n\n ", "a text that is not empty"),
    "empty text": ("a.txt", "", "empty file"),
    "text of another kind": ("a.csv", "x", "another kind of file"),
    "text in no column": ("a.jsonl", '{"story": "x"}\n', "a column 'text'"),
    "text that is a number": ("a.jsonl", '{"text": 3}\n', "text = 3"),
}


@pytest.mark.parametrize("case", [*BAD_IMAGES, *BAD_TEXTS])
def test_bad_images_and_texts_stop_with_one_error_that_names_the_file(case: str, tmp_path: Path) -> None:
    if case in BAD_TEXTS:
        name, content, part = BAD_TEXTS[case]
        (tmp_path / name).write_text(content)
        read, parts = lambda: read_text(str(tmp_path)), [name, part]
    else:
        write, parts = BAD_IMAGES[case]
        write(tmp_path / "images.npz")
        read, parts = lambda: [read_images(str(tmp_path), part) for part in (0, 1)], ["images.npz", *parts]
    with pytest.raises(DataError) as caught:
        read()
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_relative_path_is_found_in_the_data_folder_before_the_working_directory(tmp_path, monkeypatch) -> None:
    for place in ("data", "here"):
        (tmp_path / place / "glue").mkdir(parents=True)
    monkeypatch.setenv("STRUCTLORA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("glue") == tmp_path / "data" / "glue"
    with pytest.raises(DataError) as caught:
        read_text("a/b/c.txt")
    assert all(f"'{tmp_path / part}'" in str(caught.value) for part in ("data/a/b/c.txt", "here/a/b/c.txt"))
    monkeypatch.delenv("STRUCTLORA_DATA")
    assert resolve("glue") == tmp_path / "here" / "glue"
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="STRUCTLORA_DATA is not set"):
        read_text("a/b/c.txt")
    assert not_found("glue/RTE").endswith("; on the hub it is nyu-mll/glue")
    assert not_found("piqa").endswith("; get it from https://yonatanbisk.com/piqa")
    (tmp_path / "here" / "RTE").write_text("x")
    with pytest.raises(DataError, match=r"RTE: found a file; expected a folder with train\.tsv"):
        read_examples("rte", "RTE")


@pytest.mark.parametrize("path", ["missing.txt", "a/b/c", "/nowhere/at/all", "../up", "images.npz", "my data"])
def test_what_cannot_be_a_hub_id_never_reaches_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="nothing at"):
        read_text(path)


def test_a_hub_id_without_the_package_names_the_command_to_install_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'structlora-pyg\[study\]'"):
        read_examples("rte", "nyu-mll/glue")


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_hub_id_answers_in_seconds_with_its_exact_name_where_there_is_no_network(offline, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline == "1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^nyu-mll/no-such-set: found nothing at .*; expected .*id of a data set"):
        read_examples("rte", "nyu-mll/no-such-set")
    assert time.monotonic() - began < 15


HUB_ROWS = {
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
    "cola": {"sentence": "a", "label": 1, "idx": 0},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0}, "sst2": {"sentence": "a", "label": 1},
    "qnli": {"question": "a", "sentence": "b", "label": 1}, "qqp": {"question1": "a", "question2": "b", "label": 1},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 1}, "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "boolq": json.loads(BOOLQ_ROW), "piqa": json.loads(PIQA_ROW),
}  # fmt: skip


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub_become_the_same_examples(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, row = [], HUB_ROWS[task]
    part = datasets.Dataset.from_list([row])
    names = ("train", "validation_matched" if task == "mnli" else "validation")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or dict.fromkeys(names, part))
    train, evaluation = read_examples(task, "nyu-mll/glue")
    assert set(asked) == {("nyu-mll/glue", task)}
    assert train == evaluation
    assert train[0].label == (2.5 if task == "stsb" else 1)
    bad = datasets.Dataset.from_list([row, {**row, "answer": None} if task == "boolq" else {**row, "label": -1}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: dict.fromkeys(names, bad))
    with pytest.raises(
        DataError, match=r"nyu-mll/glue \(hub, train\), line 2: found (label = -1|answer = None|1 of 2 rows)"
    ):
        read_examples(task, "nyu-mll/glue")


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_what_is_drawn_depends_on_the_seed_alone_and_a_smaller_fraction_is_a_part_of_a_larger_one(
    count: int, seed: int, a: float, b: float
) -> None:
    items = range(count)
    small, large = (drawn((items, items), DataConfig(train_fraction=share), seed)[0] for share in sorted((a, b)))
    assert set(small) <= set(large)
    assert len(small) == len(set(small)) == max(1, round(count * min(a, b)))
    assert small == sorted(small) == subsample(count, len(small), seed)
    assert drawn((items, items), DataConfig(), seed) == [list(items)] * 2
    assert subsample(1000, 10, seed) != subsample(1000, 10, seed + 1)
    assert subsample(count, count + 1, seed) == list(items)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.05, 0.95))
def test_what_is_held_out_keeps_groups_whole_and_is_at_least_the_share(groups: list[int], share: float) -> None:
    items = list(range(len(groups)))
    try:
        train, held_out = hold_out(items, share, "x", groups.__getitem__)
    except DataError:  # a part would be empty
        assume(False)
    assert sorted(train + held_out) == items
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert len(held_out) >= len(groups) * share - 1e-5
    assert hold_out(items, share, "x", groups.__getitem__) == [train, held_out]


def test_a_validation_share_comes_from_the_training_part_alone(rte_folder: Path, tmp_path: Path) -> None:
    whole, _ = read_examples("rte", str(rte_folder))
    (tmp_path / "train.tsv").write_text((rte_folder / "train.tsv").read_text())  # there is no dev.tsv
    train, held_out = read_examples("rte", str(tmp_path), validation_share=0.25)
    assert (len(train), len(held_out)) == (16, 6)
    assert sorted(train + held_out) == sorted(whole)
    with pytest.raises(DataError, match=r"dev\.tsv"):
        read_examples("rte", str(tmp_path))
    with pytest.raises(DataError, match=r"enough to hold out 0\.999 of them \(data\.validation_share\)"):
        read_examples("rte", str(rte_folder), validation_share=0.999)


def test_a_validation_share_of_boolq_keeps_passages_apart_and_comes_from_the_official_file(tmp_path: Path) -> None:
    row = '{{"question": "is it {i}", "passage": "about {p}", "answer": true}}\n'
    content = "".join(row.format(i=i, p=i // 3) for i in range(30)).encode()
    path = folder_with(tmp_path, dev__jsonl=BOOLQ_ROW.replace("true", "false"), train__jsonl__gz=gzip.compress(content))
    assert [part[0].label for part in read_examples("boolq", path)] == [1, 0]
    train, held_out = read_examples("boolq", path, validation_share=0.3)
    assert len(train) + len(held_out) == 30
    assert not {e.second for e in train} & {e.second for e in held_out}
