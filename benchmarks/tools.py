"""Tools around PEFT, run for real: is the first loss with our model that of stock LoRA, and does training go on?

    pip install trl lightning opacus diffusers
    python benchmarks/tools.py            # every tool that is installed, a line each
    python benchmarks/tools.py Lightning  # one

Every tool gets the same small model twice, adapted by `peft.get_peft_model` and by `get_structlora_model`, and trains
it for a few steps. Filter and coordinator act from the third step on, so that they have trained by the end.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from structlora_pyg import StructLoraConfig, get_structlora_model

STEPS = 6
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 30}


class Net(nn.Module):
    """A classifier of vectors, for tools that know no Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, 2) logits for `x` (n, 8)."""
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(ours: bool, base: Callable[[], nn.Module], targets: Sequence[str], **options: Any) -> Any:
    """Return a base with an adapter, the same weights on both sides."""
    torch.manual_seed(0)
    options |= {"r": 4, "target_modules": list(targets)}
    if not ours:
        return get_peft_model(base(), LoraConfig(**options))
    return get_structlora_model(base(), StructLoraConfig(**options, schedule={"warmup_steps": 2, "ramp_steps": 0}))


def language_model(ours: bool, **options: Any) -> Any:
    """Return a tiny Llama."""
    base = lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **IDS))  # noqa: E731
    return adapted(ours, base, ["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def quiet_model(ours: bool) -> Any:
    """Return the same without noise, which draws from the generator that completions are drawn from."""
    return language_model(ours, **({"filter": {"noise": 0.0}, "coordinator": {"lift": "tangent"}} if ours else {}))


def reward_model(ours: bool) -> Any:
    """Return a tiny Llama with one score."""
    base = lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **IDS, num_labels=1))  # noqa: E731
    return adapted(ours, base, ["q_proj", "v_proj"], task_type="SEQ_CLS")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class FirstLoss(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note a loss, and GRPO's reward, as its first loss is always 0."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]) + float(logs.get("reward", 0.0)))


def trl(kind: str, rows: dict[str, list], model: Callable[[bool], Any], ours: bool, **options: Any) -> list[float]:
    """Train with a trainer of TRL."""
    import trl as library

    made, seen = model(ours), FirstLoss()
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(library, f"{kind}Config")(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=1e-2,
            disable_tqdm=True,
            log_level="error",
            **{k: v for k, v in options.items() if k != "reward_funcs"},
        )
        extra = {k: v for k, v in options.items() if k == "reward_funcs"}
        data = Dataset.from_dict({key: value * 4 for key, value in rows.items()})
        getattr(library, f"{kind}Trainer")(
            model=made, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=[seen], **extra
        ).train()
    return finished(made, seen.losses)


def sft(ours: bool) -> list[float]:
    """TRL's SFTTrainer."""
    return trl("SFT", {"text": ["a b c d e f", "g h i j k l"]}, language_model, ours)


PAIRS = {"prompt": ["a b c ", "d e f "], "chosen": ["g h", "i j"], "rejected": ["k l", "m n"]}


def dpo(ours: bool) -> list[float]:
    """TRL's DPOTrainer, whose reference is a copy of the adapter."""
    return trl("DPO", PAIRS, language_model, ours)


def grpo(ours: bool) -> list[float]:
    """TRL's GRPOTrainer: the first reward, as the first loss is 0."""
    reward = lambda completions, **_: [float(c.count("a") + len(set(c)) / 10) for c in completions]  # noqa: E731
    options = {"max_completion_length": 8, "num_generations": 2, "beta": 0.1, "reward_funcs": reward}
    return trl("GRPO", {"prompt": PAIRS["prompt"]}, quiet_model, ours, **options)


def reward(ours: bool) -> list[float]:
    """TRL's RewardTrainer."""
    return trl("Reward", {k: PAIRS[k] for k in ("chosen", "rejected")}, reward_model, ours)


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (16, 8) and classes (16,)."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return x, (x.sum(1) > 0).long()


def lightning(ours: bool) -> list[float]:
    """Lightning's Trainer, with a checkpoint."""
    from lightning import LightningModule, Trainer

    losses: list[float] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(ours, Net, ["first", "second"])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            losses.append(float(loss))
            return loss + (self.model.auxiliary_loss() if ours else 0.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*vectors()), batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        module, trainer = Module(), Trainer(max_steps=STEPS, default_root_dir=folder, **silent)
        trainer.fit(module, data)
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        again = Module()
        again.load_state_dict(torch.load(f"{folder}/last.ckpt", weights_only=False)["state_dict"])
        with torch.no_grad():
            x = vectors()[0]
            torch.testing.assert_close(again.eval().model(x), module.eval().model(x))
    return finished(module.model, losses)


def opacus(ours: bool) -> list[float]:
    """Opacus' PrivacyEngine: gradients of single examples, clipped; its noise is off so that losses compare.

    Its hooks see one layer at a time, and a coordinated factor depends on the parameters of all: ``torch.func`` gives
    the gradients of ours, and Opacus clips them.
    """
    from opacus import PrivacyEngine
    from torch.func import functional_call, grad, vmap

    model = adapted(ours, Net, ["first", "second"]).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*vectors()), batch_size=8)
    private, optimizer, data = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=1.0,
        poisson_sampling=False, grad_sample_mode="no_op" if ours else "hooks",
    )  # fmt: skip

    def of_one(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    losses = []
    for _ in range(STEPS // 2):
        for x, y in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(private(x), y)
            if ours:
                values = {name: p.detach() for name, p in trained.items()}
                found = vmap(grad(of_one), (None, 0, 0), randomness="different")(values, x, y)
                for name, p in trained.items():
                    p.grad_sample = found[name]  # type: ignore[attr-defined]
            else:
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return finished(model, losses)


def diffusers(ours: bool) -> list[float]:
    """A UNet of diffusers that predicts noise; what is exported is loaded by PEFT."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    def base() -> nn.Module:
        torch.manual_seed(2)
        return UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    targets = ["to_k", "to_q", "to_v", "to_out.0", "conv1"]
    model = adapted(ours, base, targets).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, scheduler, losses = torch.Generator().manual_seed(1), DDPMScheduler(), []
    for _ in range(STEPS):
        clean, noise = torch.randn(2, 2, 4, 8, 8, generator=generator).unbind()
        times = torch.randint(0, 1000, (2,), generator=generator)
        text = torch.randn(2, 3, 8, generator=generator)
        noisy = scheduler.add_noise(clean, noise, times)  # type: ignore[arg-type]
        loss = (model(noisy, times, encoder_hidden_states=text).sample - noise).square().mean()
        (loss + (model.auxiliary_loss() if ours else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save_pretrained(folder)
        again = PeftModel.from_pretrained(base(), folder).eval()
        given = {"sample": noisy, "timestep": times, "encoder_hidden_states": text}
        torch.testing.assert_close(again(**given).sample, model(**given).sample, atol=1e-4, rtol=1e-4)
    return finished(model, losses)


def finished(model: Any, losses: list[float]) -> list[float]:
    """Return the losses of a training, in which all steps have to have been seen."""
    if isinstance(getattr(model, "base_model", None), nn.Module) and hasattr(model, "graph_pass"):
        model.hooks.finish()
        assert model.graph_pass.step == STEPS, f"{model.graph_pass.step} optimizer steps were seen, not {STEPS}"
        assert not model.hooks.alarms.given, model.hooks.alarms.given
    return losses


TOOLS: dict[str, tuple[str, Callable[[bool], list[float]]]] = {
    "TRL, SFTTrainer": ("trl", sft),
    "TRL, DPOTrainer": ("trl", dpo),
    "TRL, GRPOTrainer (reward)": ("trl", grpo),
    "TRL, RewardTrainer": ("trl", reward),
    "Lightning": ("lightning", lightning),
    "opacus": ("opacus", opacus),
    "diffusers, UNet": ("diffusers", diffusers),
}


def main() -> None:
    """Run the tools and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help="beginnings of their names (default: all)")
    chosen = parser.parse_args().tools
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        "| tool | version | first loss, stock | ours | last, stock | ours |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (library, run) in TOOLS.items():
        if chosen and not name.startswith(tuple(chosen)):
            continue
        try:
            version = importlib.import_module(library).__version__
        except ImportError:
            lines.append(f"| {name} | not installed | | | | |")
            continue
        found = []
        for ours in (False, True):
            try:
                torch.manual_seed(0)
                losses = run(ours)
                found.append((f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
            except Exception as error:  # noqa: BLE001  # whatever the tool says
                traceback.print_exc()
                found.append((f"{type(error).__name__}: {str(error)[:80]}", ""))
        (first, last), (own_first, own_last) = found
        lines.append(f"| {name} | {version} | {first} | {own_first} | {last} | {own_last} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
