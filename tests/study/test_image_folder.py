"""Folders of pictures, as ImageNet."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers.official import picture, save_picture, write_image_folder
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from structlora_pyg.study.methods import make_method
from structlora_pyg.study.tasks import DataError, Task, load_task
from structlora_pyg.study.train import train

VIT = "test_vit"  # timm's own architecture for tests


def load(vit_file: Path, folder: Path, seed: int = 0, **changes: object) -> Task:
    model = ModelConfig(library="timm", architecture=VIT, path=str(vit_file))
    data = DataConfig(task="image_folder", path=str(folder), image_size=32, **changes)  # type: ignore[arg-type]
    return load_task(model, data, seed)


def all_of(examples: object, task: Task) -> dict[str, torch.Tensor]:
    return task.collate([examples[i] for i in range(len(examples))])  # type: ignore[index, arg-type]


def test_classes_are_the_sorted_names_of_the_folders(vit_file: Path, tmp_path: Path) -> None:
    for name in ("zebra", "ant", "cat 2"):
        for split in ("train", "val"):
            save_picture(tmp_path / split / name / "1.jpg")
    task = load(vit_file, tmp_path)
    assert task.classes == ("ant", "cat 2", "zebra")
    assert task.num_labels == task.model.head.out_features == 3
    assert sorted(Path(e.file).parent.name + str(e.label) for e in task.train_set) == ["ant0", "cat 21", "zebra2"]


def test_files_are_read_when_their_batch_is_made_and_not_before(vit_file: Path, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    task = load(vit_file, folder)
    damaged = next(i for i, e in enumerate(task.train_set) if e.file.endswith(".png"))
    with pytest.raises(DataError, match=r"\.png: found an unreadable picture") as caught:
        task.collate([task.train_set[damaged]])
    assert task.train_set[damaged].file in str(caught.value)


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "CMYK"])
def test_every_kind_of_picture_becomes_three_colours(mode: str, vit_file: Path, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path)
    file = folder / "train" / "n00" / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    picture(1, (40, 25)).convert(mode).save(file)
    task = load(vit_file, folder)
    (example,) = [e for e in task.train_set if e.file == str(file)]
    assert task.collate([example])["pixels"].shape == (1, 3, 32, 32)


def test_evaluation_sees_the_centre_as_timm_cuts_it(vit_file: Path, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path)
    noise = Image.merge("RGB", [Image.effect_noise((90, 61), 80) for _ in range(3)])
    noise.save(folder / "val" / "n00" / "0.png")
    task = load(vit_file, folder)
    settings = timm.data.resolve_data_config({}, model=task.model)
    assert task.crop_pct == settings["crop_pct"] < 1
    timms = timm.data.create_transform(
        32, is_training=False, interpolation="bicubic", mean=task.mean, std=task.std, crop_pct=task.crop_pct
    )
    example = task.eval_set[0]
    assert example.file.endswith("n00/0.png")
    found = task.pixel_values(task.collate([example])["pixels"], mirror=False)
    torch.testing.assert_close(found[0], timms(noise))


def test_training_sees_random_parts_that_follow_the_generator_and_evaluation_draws_nothing(vit_file, tmp_path) -> None:
    folder = write_image_folder(tmp_path)
    for i, file in enumerate(sorted(folder.rglob("*.*"))):
        Image.linear_gradient("L").rotate(10 * i).resize((60, 40)).save(file)
    task = load(vit_file, folder)

    def pixels(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return all_of(task.train_set, task)["pixels"]

    assert torch.equal(pixels(0), pixels(0))
    assert not torch.equal(pixels(0), pixels(1))
    state = torch.get_rng_state()
    assert torch.equal(all_of(task.eval_set, task)["pixels"], all_of(task.eval_set, task)["pixels"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("classes", [3, 7])
def test_top5_is_reported_where_there_are_more_than_five_classes(classes: int, vit_file: Path, tmp_path: Path) -> None:
    task = load(vit_file, write_image_folder(tmp_path, classes, val=4))
    batch = all_of(task.eval_set, task)
    found = task.evaluate(task.model, [batch])
    with torch.no_grad():
        logits = task.model.eval()(task.pixel_values(batch["pixels"], mirror=False))
    ranks = [row.tolist().index(y) for row, y in zip(logits.argsort(-1, descending=True), batch["labels"], strict=True)]
    assert found["accuracy"] == pytest.approx(sum(rank == 0 for rank in ranks) / len(ranks))
    if classes > 5:
        assert found["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / len(ranks))
        assert found["top5"] > found["accuracy"]
    else:
        assert set(found) == {"loss", "accuracy"}


def test_a_validation_share_and_a_fraction_come_from_the_training_files_alone(vit_file: Path, tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path, train=8)
    for file in sorted((folder / "val").rglob("*.*")):
        file.unlink()
    task = load(vit_file, folder, validation_share=0.25, train_fraction=0.5)
    assert (len(task.train_set), len(task.eval_set)) == (9, 6)
    task.save_extras(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["crop_size"] == {"height": 32, "width": 32}
    assert saved["size"] == {"shortest_edge": math.floor(32 / task.crop_pct)}
    assert json.loads((tmp_path / "classes.json").read_text()) == ["n00", "n01", "n02"]
    assert not {e.file for e in task.train_set} & {e.file for e in task.eval_set}
    assert [e.random for e in (task.train_set[0], task.eval_set[0])] == [True, False]


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no train": (lambda f: (f / "train").rename(f / "training"), "train: found [Errno 2] No such file"),
    "no val": (lambda f: (f / "val").rename(f / "test"), "val: found [Errno 2] No such file"),
    "unknown class": (lambda f: save_picture(f / "val" / "n09" / "1.png"), "n09: found a class that train lacks"),
    "empty class": (lambda f: (f / "train" / "n05").mkdir(), "no valid file for the classes n05"),
    "empty class in val": (lambda f: [p.unlink() for p in (f / "val" / "n01").iterdir()], "for the classes n01"),
    "flat val": (
        lambda f: [shutil.rmtree(f / "val"), save_picture(f / "val" / "ILSVRC2012_val_00000001.JPEG")],
        "find any class folder",
    ),
    "one class": (lambda f: [(f / "train" / n).rename(f / n) for n in ("n01", "n02")], "expected two classes or more"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_error_before_any_weight_is_loaded(case: str, tmp_path: Path) -> None:
    damage, part = BAD_FOLDERS[case]
    damage(write_image_folder(tmp_path))
    with pytest.raises(DataError) as caught:
        load(Path("no/weights/here"), tmp_path)
    assert part in str(caught.value), caught.value
    assert str(tmp_path) in str(caught.value)


def test_running_statistics_stay_those_of_the_base_so_that_the_adapter_is_what_was_scored(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("mobilevit_xxs").state_dict(), file)
    config = RunConfig(
        model=ModelConfig(library="timm", architecture="mobilevit_xxs", path=str(file)),
        data=DataConfig(task="image_folder", path=str(write_image_folder(tmp_path / "pictures")), image_size=64),
        adapter=StructLoraConfig(r=2, lora_alpha=4, target_modules=["qkv"]),
        method=MethodConfig(name="lora"),
        train=TrainConfig(output_dir=str(tmp_path / "run"), max_steps=3, batch_size=4, lr=1e-2),
    )
    reported = train(config, progress=False)["metrics"]["loss"]
    task = load_task(config.model, config.data, 0)
    model = PeftModel.from_pretrained(task.model, str(tmp_path / "run" / "adapter")).eval()
    with torch.no_grad():
        loss = task.loss(model, all_of(task.eval_set, task))
    assert float(loss) == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize(("name", "moves"), [("full", {"0", "2.1"}), ("head", {"2.1"}), ("lora", {"2.1"})])
def test_batch_normalisation_moves_where_everything_is_trained(name: str, moves: set[str]) -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), head)
    adapter = StructLoraConfig(r=2, target_modules=["1"], modules_to_save=["2"])
    method = make_method(adapter, MethodConfig(name=name), total_steps=1)  # type: ignore[arg-type]
    method.adapt(base, lambda: None, lambda: None).train()
    method.keep_statistics()
    found = {n for n, m in method.model.named_modules() if isinstance(m, nn.BatchNorm1d) and m.training}
    assert {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in found} == moves
