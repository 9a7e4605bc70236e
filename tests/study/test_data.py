from __future__ import annotations

import gzip
import io
import json
import logging
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from structlora_pyg.study.tasks.data import (
    DataError,
    TextExample,
    cut,
    fraction,
    read_examples,
    read_images,
    read_text,
    resolve,
    subsample,
)

RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROW = "0\tIt rains.\tIt is wet.\tentailment\n"
PIQA_ROW = '{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}\n'
BOOLQ_ROW = '{"question": "is it", "passage": "It is.", "answer": true}\n'
COLA_ROW = "gj04\t1\t\tIt rains.\n"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"


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


# -- what good files give -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "path", "train", "evaluation"),
    [
        ("rte", "glue/RTE", 2490, 277),
        ("mrpc", "glue/MRPC", 3668, 408),
        ("cola", "glue/CoLA", 8551, 1043),
        ("stsb", "glue/STS-B", 5749, 1500),
        ("wnli", "glue/WNLI", 635, 71),
        ("piqa", "piqa", 16113, 1838),
    ],
)
def test_official_files_give_every_official_row(
    task: str, path: str, train: int, evaluation: int, real_data: Path
) -> None:
    splits = read_examples(task, str(real_data / path))
    assert [len(split) for split in splits] == [train, evaluation]


@pytest.mark.parametrize(
    ("task", "path", "train", "dev"),
    [
        ("rte", "glue/RTE", [1249, 1241], [146, 131]),
        ("mrpc", "glue/MRPC", [1194, 2474], [129, 279]),
        ("cola", "glue/CoLA", [2528, 6023], [322, 721]),
        ("wnli", "glue/WNLI", [323, 312], [40, 31]),
    ],
)
def test_official_labels_are_counted_as_published(
    task: str, path: str, train: list[int], dev: list[int], real_data: Path
) -> None:
    splits = read_examples(task, str(real_data / path))
    assert [[sum(e.label == c for e in split) for c in (0, 1)] for split in splits] == [train, dev]


def test_stsb_scores_have_the_published_mean(real_data: Path) -> None:
    train, dev = read_examples("stsb", str(real_data / "glue/STS-B"))
    assert np.mean([e.label for e in train]) == pytest.approx(2.701, abs=5e-4)
    assert np.mean([e.label for e in dev]) == pytest.approx(2.364, abs=5e-4)


def test_quotes_are_text_and_never_join_columns(tmp_path: Path) -> None:
    row = '0\t"It rains.\tIt is "wet".\tentailment\n'
    path = folder_with(tmp_path, train__tsv=RTE_HEADER + row * 2, dev__tsv=RTE_HEADER + row)
    assert read_examples("rte", path)[0] == [TextExample('"It rains.', 'It is "wet".', 0)] * 2


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path: Path) -> None:
    row = "0\tIt\u2028rains\x85now.\tIt is wet.\tentailment\n"
    path = folder_with(tmp_path, train__tsv=RTE_HEADER + row, dev__tsv=RTE_HEADER + row)
    assert read_examples("rte", path)[0][0].first == "It\u2028rains\x85now."


def test_cola_has_no_header_line(tmp_path: Path) -> None:
    path = folder_with(tmp_path, train__tsv=COLA_ROW * 3, dev__tsv=COLA_ROW)
    train, dev = read_examples("cola", path)
    assert (len(train), dev) == (3, [TextExample("It rains.", None, 1)])


def test_gzip_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    plain = RTE_HEADER + RTE_ROW
    windows = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode() + b"\r\n"
    path = folder_with(tmp_path, train__tsv=plain, dev__tsv__gz=gzip.compress(windows))
    train, dev = read_examples("rte", path)
    assert train == dev


def test_boolq_uses_the_official_training_file_where_there_is_one(tmp_path: Path) -> None:
    other = BOOLQ_ROW.replace("true", "false")
    path = folder_with(tmp_path, dev__jsonl=BOOLQ_ROW, train__jsonl__gz=gzip.compress(other.encode()))
    train, dev = read_examples("boolq", path)
    assert (train[0].label, dev[0].label) == (0, 1)


def test_boolq_without_one_is_cut_by_passage_and_says_so(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train, evaluation = read_examples("boolq", str(real_data / "boolq"))
    assert (len(train), len(evaluation)) == (2180, 1090)
    assert not {e.second for e in train} & {e.second for e in evaluation}
    assert "cannot be compared" in caplog.text
    assert read_examples("boolq", str(real_data / "boolq"))[0] == train


def test_cifar_subset_is_read_as_published(real_data: Path) -> None:
    train, test = read_images(str(real_data / "cifar100_subset"))
    assert train.pixels.shape == test.pixels.shape == (10000, 32, 32, 3)
    assert set(np.bincount(train.labels)) == set(np.bincount(test.labels)) == {100}


def test_images_come_from_the_file_or_from_the_folder_that_holds_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **images())
    train, _ = read_images(str(tmp_path))
    same, _ = read_images(str(tmp_path / "a.npz"))
    assert np.array_equal(train.pixels, same.pixels)
    assert train.labels.dtype == np.int64


def test_text_comes_from_txt_and_jsonl_in_the_order_of_names(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        b__txt="second\nfile",
        a__jsonl='{"text": "one"}\n{"text": "two"}\n',
        c__txt__gz=gzip.compress(b"last"),
    )
    assert read_text(str(tmp_path)) == ["one", "two", "second\nfile", "last"]


# -- what bad files give ------------------------------------------------------------------------------------------

BAD_TABLES: dict[str, tuple[str, dict[str, str | bytes], list[str]]] = {
    "missing split": ("rte", {"train__tsv": RTE_HEADER + RTE_ROW}, ["dev.tsv or dev.tsv.gz", "train.tsv"]),
    "empty folder": ("rte", {}, ["an empty folder", "train.tsv"]),
    "empty file": ("rte", {"train__tsv": "", "dev__tsv": ""}, ["train.tsv", "empty file"]),
    "header only": ("rte", {"train__tsv": RTE_HEADER, "dev__tsv": RTE_HEADER}, ["train.tsv", "no examples"]),
    "missing column": ("rte", {"train__tsv": "index\tsentence1\tlabel\n", "dev__tsv": ""}, ["line 1", "'sentence2'"]),
    "no header": ("rte", {"train__tsv": RTE_ROW, "dev__tsv": RTE_ROW}, ["line 1", "'sentence1'"]),
    "too few fields": (
        "rte",
        {"train__tsv": RTE_HEADER + RTE_ROW + "1\tIt rains.\tentailment\n", "dev__tsv": ""},
        ["train.tsv, line 3", "3 fields", "4 (index, sentence1, sentence2, label)"],
    ),
    "too many fields": (
        "rte",
        {"train__tsv": RTE_HEADER + "0\ta\tb\tc\tentailment\n", "dev__tsv": ""},
        ["train.tsv, line 2", "5 fields"],
    ),
    "unknown label": (
        "rte",
        {"train__tsv": RTE_HEADER + RTE_ROW.replace("entailment", "maybe"), "dev__tsv": ""},
        ["line 2", "label = 'maybe'", "entailment, not_entailment"],
    ),
    "label out of range": (
        "cola",
        {"train__tsv": COLA_ROW.replace("1", "2"), "dev__tsv": ""},
        ["line 1", "'2'", "0, 1"],
    ),
    "empty sentence": (
        "rte",
        {"train__tsv": RTE_HEADER + RTE_ROW.replace("It rains.", " "), "dev__tsv": ""},
        ["line 2", "sentence1 = ' '"],
    ),
    "blank line": (
        "rte",
        {"train__tsv": RTE_HEADER + RTE_ROW + "\n" + RTE_ROW, "dev__tsv": ""},
        ["line 3", "an empty line"],
    ),
    "score above five": (
        "stsb",
        {"train__tsv": STSB_HEADER + "0\tg\tf\ty\to\ts\ts\ta\tb\t7.5\n", "dev__tsv": ""},
        ["line 2", "score = '7.5'", "0 to 5"],
    ),
    "score that is no number": (
        "stsb",
        {"train__tsv": STSB_HEADER + "0\tg\tf\ty\to\ts\ts\ta\tb\tnan\n", "dev__tsv": ""},
        ["score = 'nan'"],
    ),
    "truncated gzip": (
        "rte",
        {"train__tsv__gz": gzip.compress((RTE_HEADER + RTE_ROW * 9999).encode())[:-40], "dev__tsv": ""},
        ["train.tsv.gz, line", "truncated gzip"],
    ),
    "gzip in name only": ("rte", {"train__tsv__gz": RTE_HEADER, "dev__tsv": ""}, ["train.tsv.gz", "damaged"]),
    "not utf-8": (
        "rte",
        {"train__tsv": (RTE_HEADER + RTE_ROW).encode() + b"1\t\xff\xfe\tb\tentailment\n", "dev__tsv": ""},
        ["train.tsv, line 3", "UTF-8"],
    ),
    "binary file": ("rte", {"train__tsv": bytes(range(256)) * 9, "dev__tsv": ""}, ["train.tsv"]),
    "broken json": ("piqa", {"train__jsonl": PIQA_ROW + PIQA_ROW[:20], "valid__jsonl": ""}, ["line 2", "broken JSON"]),
    "deeply nested json": ("piqa", {"train__jsonl": "[" * 99999, "valid__jsonl": ""}, ["line 1", "broken JSON"]),
    "json list": ("piqa", {"train__jsonl": "[1, 2]\n", "valid__jsonl": ""}, ["line 1", "JSON list"]),
    "missing key": (
        "piqa",
        {"train__jsonl": '{"goal": "g", "sol1": "a", "label": 0}\n', "valid__jsonl": ""},
        ["line 1", "'sol2'", "goal, sol1, label"],
    ),
    "choice out of range": (
        "piqa",
        {"train__jsonl": PIQA_ROW.replace("1}", "2}"), "valid__jsonl": ""},
        ["line 1", "label = 2", "0 to 1"],
    ),
    "choice as boolean": (
        "piqa",
        {"train__jsonl": PIQA_ROW.replace("1}", "true}"), "valid__jsonl": ""},
        ["label = True", "an integer"],
    ),
    "answer as text": (
        "boolq",
        {"dev__jsonl": BOOLQ_ROW.replace("true", '"yes"')},
        ["answer = 'yes'", "true or false"],
    ),
    "questions without passages": (
        "boolq",
        {"dev__jsonl": BOOLQ_ROW, "train__jsonl": '{"question": "is it", "answer": true}\n'},
        ["train.jsonl, line 1", "'passage'"],
    ),
    "boolq with one passage": ("boolq", {"dev__jsonl": BOOLQ_ROW * 3}, ["a single passage"]),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_file_stops_with_one_error_that_names_it(case: str, tmp_path: Path) -> None:
    task, files, parts = BAD_TABLES[case]
    path = folder_with(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        read_examples(task, path)
    message = str(caught.value)
    assert message.startswith(path)
    assert all(part in message for part in parts), message
    assert "; expected " in message
    assert "\n" not in message


def test_a_file_where_a_folder_belongs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "RTE").write_text("x")
    with pytest.raises(DataError, match="expected the folder of rte"):
        read_examples("rte", str(tmp_path / "RTE"))


def claims(file: Path, shape: tuple[int, ...]) -> None:
    """Write an archive whose pictures say that they need terabytes."""
    np.savez_compressed(file, **images())
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    header = io.BytesIO()
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
    "negative label": (lambda p: np.savez(p, **images(y_train=np.array([0, -1, 2, 3]))), ["y_train[1] = -1"]),
    "pickled objects": (lambda p: np.savez(p, **images(y_test=np.array([{}] * 4, dtype=object))), ["unreadable"]),
    "one array": (lambda p: np.save(p.open("wb"), np.zeros(3)), ["a single array"]),
    "shape beyond its bytes": (
        lambda p: claims(p, (10**6, 1000, 1000, 3)),
        ["x_train.npy", "(1000000, 1000, 1000, 3)"],
    ),
    "empty file": (lambda p: p.write_bytes(b""), ["unreadable"]),
    "no archive": (lambda p: p.write_bytes(b"hello" * 99), ["unreadable"]),
    "truncated": (lambda p: (np.savez_compressed(p, **images()), p.write_bytes(p.read_bytes()[:-300])), ["unreadable"]),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_file_stops_with_one_error_that_names_it(case: str, tmp_path: Path) -> None:
    write, parts = BAD_IMAGES[case]
    write(tmp_path / "images.npz")
    with pytest.raises(DataError) as caught:
        read_images(str(tmp_path))
    assert all(part in str(caught.value) for part in ["images.npz", *parts]), caught.value


def test_two_image_files_in_a_folder_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, **images())
    with pytest.raises(DataError, match=r"a\.npz, b\.npz; expected exactly one"):
        read_images(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a__txt", " \n\n ", "no text"),
        ("a__txt", "", "empty file"),
        ("a__csv", "x", "another kind of file"),
        ("a__jsonl", '{"story": "x"}\n', "a column 'text'"),
        ("a__jsonl", '{"text": 3}\n', "text = 3"),
        ("a__txt__gz", gzip.compress(b"hello world" * 999, mtime=0)[:-9], "truncated gzip"),
    ],
)
def test_a_bad_text_stops_with_one_error_that_names_it(
    name: str, content: str | bytes, part: str, tmp_path: Path
) -> None:
    path = folder_with(tmp_path, **{name: content})
    with pytest.raises(DataError, match=part) as caught:
        read_text(path)
    assert name.replace("__", ".") in str(caught.value)


# -- where files are looked for -----------------------------------------------------------------------------------


def test_a_relative_path_is_found_in_the_data_folder_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("data", "here"):
        (tmp_path / place / "glue").mkdir(parents=True)
    monkeypatch.setenv("STRUCTLORA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("glue") == tmp_path / "data" / "glue"
    monkeypatch.delenv("STRUCTLORA_DATA")
    assert resolve("glue") == tmp_path / "here" / "glue"
    assert resolve(str(tmp_path)) == tmp_path


def test_a_missing_path_names_every_place_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_text("a/b/c.txt")
    assert all(f"'{tmp_path / part}'" in str(caught.value) for part in ("data/a/b/c.txt", "a/b/c.txt"))
    monkeypatch.delenv("STRUCTLORA_DATA")
    with pytest.raises(DataError, match="STRUCTLORA_DATA is not set"):
        read_text("a/b/c.txt")


@pytest.mark.parametrize("path", ["missing.txt", "a/b/c", "/nowhere/at/all", "../up", "images.npz", "my data"])
def test_what_cannot_be_a_hub_id_never_reaches_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: pytest.fail("asked the hub")))
    with pytest.raises(DataError, match="nothing at"):
        read_text(path)


def test_a_hub_id_without_the_optional_package_names_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail, as if it were not installed
    with pytest.raises(DataError, match=r"pip install structlora-pyg\[data\]") as caught:
        read_examples("rte", "nyu-mll/glue")
    assert str(tmp_path / "nyu-mll/glue") in str(caught.value)


HUB_ROWS = {
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
    "cola": {"sentence": "a", "label": 1, "idx": 0},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0},
    "boolq": json.loads(BOOLQ_ROW),
    "piqa": json.loads(PIQA_ROW),
}


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub_become_the_same_examples(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None) -> dict[str, list[dict[str, object]]]:
        asked.append((path, config))
        return {"train": [HUB_ROWS[task]] * 2, "validation": [HUB_ROWS[task]]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, evaluation = read_examples(task, "nyu-mll/glue")
    assert asked == [("nyu-mll/glue", task)]
    assert train == evaluation * 2


def test_a_bad_row_of_the_hub_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": [HUB_ROWS["rte"], {**HUB_ROWS["rte"], "label": -1}], "validation": [HUB_ROWS["rte"]]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: splits))
    with pytest.raises(DataError, match=r"some/set \(hub, train\), line 2: found label = -1"):
        read_examples("rte", "some/set")


def test_a_failing_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="the hub said: no network"):
        read_text("some/set")


# -- subsets ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 2**31), st.data())
def test_a_drawn_subset_has_its_size_no_repeats_and_depends_on_the_seed_alone(
    count: int, seed: int, data: st.DataObject
) -> None:
    limit = data.draw(st.integers(1, count))
    drawn = subsample(count, limit, seed)
    assert len(set(drawn)) == limit
    assert drawn == sorted(drawn) == subsample(count, limit, seed)
    assert set(drawn) <= set(range(count))


def test_another_seed_draws_another_subset() -> None:
    assert subsample(1000, 10, 0) != subsample(1000, 10, 1)


def test_a_limit_without_effect_is_an_error() -> None:
    assert subsample(3, 3, 0) == [0, 1, 2]
    with pytest.raises(DataError, match=r"data\.train_limit: found 4; expected at most the 3 examples"):
        subsample(3, 4, 0, "data.train_limit")


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_smaller_fraction_is_a_part_of_a_larger_one(count: int, seed: int, a: float, b: float) -> None:
    small, large = (fraction(count, share, seed) for share in sorted((a, b)))
    assert set(small) <= set(large)
    assert len(small) == max(1, round(count * min(a, b)))
    assert fraction(count, 1.0, seed) == list(range(count))


# -- a validation share ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_a_cut_keeps_groups_whole_and_holds_out_at_least_the_share(groups: list[int], share: float) -> None:
    train, held_out = cut(groups, share)
    assert sorted(train + held_out) == list(range(len(groups)))
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert len(held_out) >= len(groups) * share - 1e-5
    assert cut(groups, share) == (train, held_out)


def test_a_validation_share_comes_from_the_training_file_alone(rte_folder: Path, tmp_path: Path) -> None:
    whole, _ = read_examples("rte", str(rte_folder))
    (tmp_path / "train.tsv").write_text((rte_folder / "train.tsv").read_text())  # there is no dev.tsv
    train, held_out = read_examples("rte", str(tmp_path), validation_share=0.25)
    assert (len(train), len(held_out)) == (16, 6)
    assert sorted(train + held_out) == sorted(whole)
    with pytest.raises(DataError, match=r"dev\.tsv"):
        read_examples("rte", str(tmp_path))


def test_a_validation_share_of_boolq_keeps_passages_apart(tmp_path: Path) -> None:
    row = '{{"question": "is it {i}", "passage": "about {p}", "answer": true}}\n'
    (tmp_path / "train.jsonl").write_text("".join(row.format(i=i, p=i // 3) for i in range(30)))
    train, held_out = read_examples("boolq", str(tmp_path), validation_share=0.3)
    assert len(train) + len(held_out) == 30
    assert not {e.second for e in train} & {e.second for e in held_out}


def test_a_validation_share_of_boolq_cut_from_dev_leaves_the_evaluation_third_alone(tmp_path: Path) -> None:
    row = '{{"question": "is it {i}", "passage": "about {p}", "answer": true}}\n'
    (tmp_path / "dev.jsonl").write_text("".join(row.format(i=i, p=i // 3) for i in range(30)))
    training, evaluation = read_examples("boolq", str(tmp_path))
    train, held_out = read_examples("boolq", str(tmp_path), validation_share=0.3)
    assert sorted(train + held_out) == sorted(training)
    assert not set(train + held_out) & set(evaluation)


def test_a_validation_share_of_pictures_comes_from_the_training_arrays(tmp_path: Path) -> None:
    x = np.arange(10 * 4 * 4 * 3, dtype=np.uint16).astype(np.uint8).reshape(10, 4, 4, 3)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(10))  # there is no test split
    train, held_out = read_images(str(tmp_path / "x.npz"), validation_share=0.2)
    assert len(held_out.labels) == 2
    assert sorted([*train.labels, *held_out.labels]) == list(range(10))
    assert np.array_equal(train.pixels, x[train.labels])


def test_a_share_that_leaves_nothing_is_an_error(rte_folder: Path) -> None:
    with pytest.raises(DataError, match=r"enough to cut validation_share=0\.999 from"):
        read_examples("rte", str(rte_folder), validation_share=0.999)
