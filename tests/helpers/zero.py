"""Four steps under DeepSpeed, in two processes of one CPU: ``python -m helpers.zero STAGE BASE FOLDER``.

BASE is a folder that every process loads the base from. A fourth argument ``loaded-cut`` has Transformers cut the base
under ZeRO-3 while it loads it, as it does where the whole one has no room; ``trainer`` has `transformers.Trainer` train
it.
"""

import os
import sys
from pathlib import Path


def train(rank: int, stage: int, base: str, folder: str, how: str) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import comm

    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # Accelerate asks for the one of a GPU
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # however small
        "zero_allow_untested_optimizer": True,
    }
    if how == "trainer":
        return let_trainer_train(settings, base, folder, rank)
    plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=how == "loaded-cut")
    accelerator = Accelerator(deepspeed_plugin=plugin)
    inner, optimizer, batches = start(base)
    model, optimizer = accelerator.prepare(inner, optimizer)
    model.train()
    for batch in batches:
        mine = {name: value[rank : rank + 1] for name, value in batch.items()}
        accelerator.backward(model(**mine).loss)
        inner.adapter_graph()  # looking changes nothing
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for _ in range(2):  # in the first one DeepSpeed keeps the base for a backward pass, as in the steps before
            model(**mine)
    tell(inner, folder, rank)


def let_trainer_train(settings, base, folder, rank):
    from transformers import Trainer, TrainingArguments

    options = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "ddp_backend": "gloo"}
    arguments = TrainingArguments(
        f"{folder}/trainer", deepspeed=settings, max_steps=4, per_device_train_batch_size=1,
        learning_rate=1e-2, weight_decay=0.01, lr_scheduler_type="constant", max_grad_norm=1.0, **options,
    )  # fmt: skip
    model, _, (batch, *_) = start(base)  # under DeepSpeed it makes its own optimizer
    examples = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    Trainer(model, arguments, train_dataset=examples).train()
    tell(model, folder, rank)


def tell(model, folder, rank):
    """Export, and write down how many frozen numbers this process holds; where it is none, why it cannot merge."""
    model.export(f"{folder}/{rank}")
    whole = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    Path(folder, f"frozen-{rank}.txt").write_text(str(whole))
    if not whole:
        write_why_not_merged(model, Path(folder, f"merge-{rank}.txt"))


def write_why_not_merged(model, file):
    """Try to merge into a base that is cut, and write down what is said."""
    try:
        model.merge_and_unload()
    except ValueError as error:
        file.write_text(str(error))


def train_alone(folder, base=None):
    """Export what one process trains."""
    import torch

    model, optimizer, batches = start(base)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.export(folder)
    assert model.graph_pass.active


def start(base=None):
    """Return model, optimizer and batches, the same in every process."""
    import torch
    from helpers.tiny import ARCHITECTURES
    from transformers import LlamaForCausalLM

    from structlora_pyg import StructLoraConfig, get_structlora_model

    config = StructLoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], schedule={"warmup_steps": 1, "ramp_steps": 1},
        filter={"kind": "hard_concrete", "noise": 0.0, "init_logit": 0.5}, graph={"refresh_every": 2},
        coordinator={"hidden_channels": 8, "lift": "tangent"},
    )  # fmt: skip
    torch.manual_seed(0)
    network = ARCHITECTURES["llama"].model() if base is None else LlamaForCausalLM.from_pretrained(base)
    model = get_structlora_model(network, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, [ARCHITECTURES["llama"].batch()] * 4


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import torch
    from helpers.two_processes import forked

    import structlora_pyg.tuner.model  # noqa: F401

    torch.set_num_threads(1)
    stage, base, folder, *rest = sys.argv[1:]
    sys.exit(forked(train, 2, int(stage), base, folder, "".join(rest)))
