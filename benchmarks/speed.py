"""Training steps of StructLoRA against stock PEFT, measured side by side in one process.

    python benchmarks/speed.py --check
    python benchmarks/speed.py --targets q_proj,v_proj all-linear --layers 2 --rounds 7 --merged \
        --json benchmarks/results/peers.json --page docs/evidence/speed.md

Every combination of the settings given is one table. Systems take turns on equal work, step by step; a figure is the
median over rounds of the ratio to PEFT's LoRA in the same round, with the quartiles beside it. With one thread on a
CPU the clock is the processor time of that thread, which other work on the machine hardly moves; with more threads, and
on a GPU, it is the wall clock. On a CPU only ratios mean anything; the device's name is in the output.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from timing import Clock, default_device, peak_bytes, threads, write_result
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, ViTConfig, ViTModel

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.quantization import quantize_4bit

PLAIN = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}
CONVS = ("GCNConv", "SAGEConv", "GATv2Conv", "TransformerConv")
REFERENCE = "PEFT LoRA"
# The guard: the most that may be asked of `--check`, as ratios to stock LoRA, with room for noise. What was measured
# when they were set is in docs/evidence/speed.md.
MESSAGES = "StructLoRA, messages of GCNConv"
GRADIENT = "StructLoRA, gradient edges"
REFRESH = "a step that refreshes gradient edges, in other steps"
LIMITS = {"fused LoRA": 1.03, "StructLoRA": 1.03, MESSAGES: 1.07}
DROPOUT = "PEFT LoRA, dropout"
DROPOUT_LIMITS = {"fused LoRA, dropout": 0.97, "StructLoRA": 0.92}  # the same to stock LoRA with dropout
MEMORY_LIMIT = 1.001  # of the default, in float32
# Graph pass and hooks, forward and backward, of a step of 512 tokens; the least of each over the rounds.
SHARE_LIMITS = {"StructLoRA": 0.004, MESSAGES: 0.045}
CHECK = ["--width", "512", "--layers", "4", "--tokens", "512", "--targets", "all-linear", "--rounds", "15"]


def makers(setting: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each system; all start from one seed."""
    targets = setting["targets"] if setting["targets"] == "all-linear" else setting["targets"].split(",")
    adapter = {"r": setting["r"], "lora_alpha": 2 * setting["r"], "target_modules": targets}
    shared: dict[str, Tensor] = {}  # frozen weights, in memory once

    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        width, vit = setting["width"], setting.get("model") == "vit"
        shape = {
            "hidden_size": width,
            "num_hidden_layers": setting["layers"],
            "num_attention_heads": max(width // 64, 1),
        }
        shape["intermediate_size"] = setting.get("intermediate") or width * 8 // 3
        text = {"vocab_size": 256, "max_position_embeddings": setting["tokens"]}
        kind, config = (ViTModel, ViTConfig(**shape)) if vit else (LlamaModel, LlamaConfig(**shape, **text))
        with torch.device(setting["device"]):
            model = kind(config).to(getattr(torch, setting["dtype"]))
        for name, p in model.named_parameters():
            p.data = shared.setdefault(name, p.data)
        if setting["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return quantize_4bit(model) if setting.get("quantized") else model

    def frozen() -> nn.Module:
        """A gradient begins where the first adapter would need one: the least that any adapter can cost."""
        model = base().requires_grad_(False)
        first = model.layers[0]
        for name, module in first.named_modules():
            if isinstance(module, nn.Linear) and (targets == "all-linear" or name.rpartition(".")[2] in targets):
                module.register_forward_hook(lambda m, args, y: y if y.requires_grad else y.requires_grad_(True))
        return model

    def by_hand(kind: type[nn.Module]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            model = base().requires_grad_(False)
            for name, module in list(model.layers.named_modules()):
                if isinstance(module, nn.Linear) and (targets == "all-linear" or name.rpartition(".")[2] in targets):
                    parent = model.layers.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], kind(module, setting["r"], 2.0))
            return model

        return make

    def struct(**parts: Any) -> Callable[[], nn.Module]:
        return lambda: get_structlora_model(base(), StructLoraConfig(**adapter, schedule={"warmup_steps": 0}, **parts))

    ada = {**adapter, "init_r": setting["r"] * 3 // 2, "target_r": setting["r"], "tinit": 1, "tfinal": 1}
    return {
        "frozen base": frozen,
        REFERENCE: lambda: get_peft_model(base(), LoraConfig(**adapter)),
        DROPOUT: lambda: get_peft_model(base(), LoraConfig(lora_dropout=0.1, **adapter)),
        "PEFT DoRA": lambda: get_peft_model(base(), LoraConfig(use_dora=True, **adapter)),
        "PEFT AdaLoRA": lambda: get_peft_model(base(), AdaLoraConfig(total_step=10_000, **ada)),
        "fused LoRA": lambda: get_structlora_model(base(), StructLoraConfig(**adapter, **PLAIN)),
        "LoRA as torchtune writes it": by_hand(AddedLora),
        "LoRA as for timm, by hand": by_hand(MergedLora),
        "fused LoRA, dropout": lambda: get_structlora_model(
            base(), StructLoraConfig(lora_dropout=0.1, **adapter, **PLAIN)
        ),
        "StructLoRA": struct(),
        "StructLoRA, gates": struct(filter={"kind": "hard_concrete"}, coordinator={"lift": "tangent"}),
        **{
            f"StructLoRA, messages of {conv}": struct(
                filter={"kind": "none"}, coordinator={"conv": conv, "lift": "tangent"}
            )
            for conv in CONVS
        },
        GRADIENT: struct(graph={"edges": "hybrid"}),
    }


class AddedLora(nn.Module):
    """The base's output plus scaled factors, as torchtune's ``LoRALinear`` has it."""

    def __init__(self, base: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a = nn.Linear(base.in_features, r, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        self.b = nn.Linear(r, base.out_features, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.b(self.a(x))


class MergedLora(AddedLora):
    """One layer on W + s B A, as hand-written LoRA for timm's models often has it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.addmm(self.base.weight, self.b.weight, self.a.weight, alpha=self.scaling)
        return nn.functional.linear(x, weight, self.base.bias)


class System:
    """A model with its optimizer; `step` returns the seconds of forward, backward and optimizer."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], clock: Clock, compiled: bool = False) -> None:
        self.model, self.inputs, self.clock = model.train(), inputs, clock
        self.struct = hasattr(model, "graph_pass")
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.graph: torch.cuda.CUDAGraph | None = None
        if compiled:
            for layer in next(m for m in model.modules() if isinstance(m, (LlamaModel, ViTModel))).layers:
                layer.compile()
        self.steps = 0

    def loss(self) -> Tensor:
        loss = self.model(**self.inputs).last_hidden_state.float().square().mean()
        return loss + self.model.auxiliary_loss() if self.struct else loss

    def record(self) -> None:
        """Make forward and backward one CUDA graph, which every later step replays."""
        for _ in range(3):  # what looks for gradients that do not come has seen them, as has whoever allocates
            self.step()
        self.model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss().backward()
        self.graph = graph

    def step(self) -> dict[str, float]:
        clock, model = self.clock, self.model
        at = [clock()]
        if self.graph is not None:
            self.graph.replay()
            at.append(at[0])
        else:
            loss = self.loss()
            at.append(clock())
            loss.backward()
        at.append(clock())
        if self.optimizer is not None:
            self.optimizer.step()
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(self.steps)
        if self.graph is None:  # which writes its gradients anew
            model.zero_grad()
        at.append(clock())
        self.steps += 1
        return dict(zip(("forward", "backward", "optimizer"), (b - a for a, b in itertools.pairwise(at)), strict=True))

    def graph_pass(self) -> float:
        """Return the seconds of one graph pass with the Python around it, there and back."""
        graph_pass = self.model.graph_pass
        self.model.train()
        began = self.clock()
        self.model.hooks.before_forward(self.model.get_base_model(), (), {})
        there = self.clock() - began
        self.model.hooks.in_forward = False
        name = graph_pass.adapters.adapter_name
        layers = graph_pass.adapters.layers.values()
        lifted = [side[name].effective for layer in layers for side in (layer.lora_A, layer.lora_B)]
        lifted = [t for t in lifted if t is not None and t.requires_grad]  # parameters need no pass
        given = [torch.ones_like(t) for t in lifted]
        began = self.clock()
        torch.autograd.backward(lifted, given)
        self.model.hooks.after_step(self.optimizer)
        back = self.clock() - began
        self.model.zero_grad()
        return there + back

    def lesson(self) -> float:
        """Return the seconds of teaching the noise levels once."""
        began = self.clock()
        self.model.teach(self.loss, self.loss)
        return self.clock() - began

    def refresh(self, least: bool = False) -> float:
        """Return the seconds of a step that makes gradient edges anew by what the one before it has seen.

        The `least` that it can take: every weight gradient is formed, and nothing is done with it.
        """
        self.model.hooks.refresh_every = 1
        add = (lambda sketch, i, left, right: left.mT @ right) if least else GradientSketch.add
        with mock.patch.object(GradientSketch, "add", add):
            self.step()
            seconds = sum(self.step().values())
        self.model.hooks.refresh_every = 2**30
        self.step()
        return seconds

    def peak(self) -> int:
        """Return the most memory of a step, weights included, in bytes."""
        weights = list(self.model.parameters())
        return peak_bytes(self.step, self.clock.cuda, without=weights) + sum(p.nbytes for p in weights)


def measure(setting: dict[str, Any], wanted: list[str] | None, rounds: int) -> dict[str, Any]:
    """Return the table of one setting."""
    clock = Clock(setting["device"], setting["threads"])
    made = makers(setting)
    names = [n for n in made if wanted is None or n in wanted or n == REFERENCE]
    with threads(setting["threads"]):
        inputs = {"input_ids": torch.randint(0, 256, (setting["batch"], setting["tokens"]), device=setting["device"])}
        if setting.get("model") == "vit":
            pixels = torch.randn(setting["batch"], 3, 224, 224, device=setting["device"])
            inputs = {"pixel_values": pixels.to(getattr(torch, setting["dtype"]))}
        systems = {n: System(made[n](), inputs, clock, setting["compile"]) for n in names}
        for n in names if setting.get("graphs") else ():
            systems[n].record()
        taken: dict[str, list[dict[str, float]]] = {n: [] for n in names}
        passes: dict[str, list[float]] = {n: [] for n in names if systems[n].struct and not setting.get("graphs")}
        for k in range(rounds + 2):  # two to warm up
            for n in names[k % len(names) :] + names[: k % len(names)]:  # nobody always comes after the same one
                parts = systems[n].step()
                if k > 1:
                    taken[n].append(parts)
            for n in passes if k > 1 else ():
                passes[n].append(systems[n].graph_pass())
        taught = [n for n in names if n == "StructLoRA" and not setting.get("graphs")]
        lessons = {n: [systems[n].lesson() for _ in range(3)] for n in taught}
        edged = [n for n in names if n == GRADIENT]
        refreshed = {n: [[systems[n].refresh(least) for least in (False, True)] for _ in range(rounds)] for n in edged}
        for n in lessons:
            systems[n].step()  # the first after a lesson takes a pass, those that follow do not
        memory = {n: None if setting["compile"] and not clock.cuda else systems[n].peak() for n in names}
    result = {}
    whole = {n: [sum(parts.values()) for parts in taken[n]] for n in names}
    for n in names:
        row: dict[str, Any] = quartiles([a / b for a, b in zip(whole[n], whole[REFERENCE], strict=True)])
        row["least"] = round(min(whole[n]) / min(whole[REFERENCE]), 4)  # other work on the machine only adds
        step = statistics.median(whole[n])
        row["parts"] = {
            part: round(statistics.median(parts[part] for parts in taken[n]) / step, 4) for part in taken[n][0]
        }
        if n in passes:
            row["graph_pass"] = round(statistics.median(passes[n]) / step, 5)
            row["least_graph_pass"] = round(min(passes[n]) / min(whole[n]), 5)
            row["graph_pass_ms"] = round(1000 * min(passes[n]), 3)
        if n in lessons:
            row["lesson"] = round(min(lessons[n]) / min(whole[n]), 2)  # in steps
        if n in refreshed:
            sketched, formed = (min(seconds) / min(whole[n]) for seconds in zip(*refreshed[n], strict=True))
            row["refresh"], row["least_refresh"] = round(sketched, 2), round(formed, 2)  # in steps
        reference = memory[REFERENCE]
        if reference:
            row["memory"] = round(memory[n] / reference, 4)
        if clock.cuda:
            row |= {"seconds": round(step, 5), "tokens_per_second": round(setting["batch"] * setting["tokens"] / step)}
            row["peak_bytes"] = memory[n]
        result[n] = row
    return {"setting": setting, "clock": clock.name, "rounds": rounds, "systems": result}


def merged_inference(setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Compare the base with a model that an adapter was merged into: the same modules, the same time."""
    clock = Clock(setting["device"], setting["threads"])
    with threads(setting["threads"]), torch.no_grad():
        made = makers({**setting, "checkpointing": False})
        base = made["frozen base"]()
        first = base.layers[0]
        for module in first.modules():
            module._forward_hooks.clear()
        model = made["StructLoRA"]()
        merged = model.merge_and_unload()
        alike = [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in merged.named_modules()]
        tokens = torch.randint(0, 256, (setting["batch"], setting["tokens"]), device=setting["device"])
        ratios = []
        for k in range(2 * rounds + 2):
            seconds = {}
            for name, m in (("base", base), ("merged", merged))[:: 1 if k % 2 else -1]:
                began = clock()
                m(input_ids=tokens)
                seconds[name] = clock() - began
            ratios += [seconds["merged"] / seconds["base"]] if k > 1 else []
    return {**quartiles(ratios), "same_modules": alike}


def quartiles(ratios: list[float]) -> dict[str, Any]:
    """Return the median ``ratio`` and the ``quartiles`` around it."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def show(table: dict[str, Any]) -> None:
    s, systems = table["setting"], table["systems"]
    extras = [name for name in ("compile", "checkpointing") if s[name]]
    print(
        f"\n{s['targets']}, width {s['width']}, {s['layers']} layers, {s['batch']} x {s['tokens']} tokens, {s['dtype']}"
        f"{''.join(', ' + e for e in extras)}; {table['clock']}, ratio to {REFERENCE}: median [quartiles]"
    )
    width = max(len(name) for name in systems)
    for name, row in systems.items():
        notes = [f"memory {row['memory']:.3f}"] if "memory" in row else []
        notes += [f"graph pass {100 * row['graph_pass']:.2f} % of its step"] if "graph_pass" in row else []
        notes += [f"{row['tokens_per_second']} tokens/s"] if "tokens_per_second" in row else []
        low, high = row["quartiles"]
        print(f"{name:<{width}}  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]   {'   '.join(notes)}")
    if "merged" in table:
        print(f"{'inference, merged : base':<{width}}  {table['merged']['ratio']:.3f}")


def check(table: dict[str, Any]) -> list[str]:
    """Return which limits a table breaks."""
    systems = table["systems"]
    wrong = [
        f"{name}: {systems[name]['least']:.3f} of a step of stock LoRA, at most {most} is allowed"
        for name, most in LIMITS.items()
        if systems[name]["least"] > most
    ]
    for name, most in DROPOUT_LIMITS.items():
        ratio = systems[name]["least"] / systems[DROPOUT]["least"]
        if ratio > most:
            wrong.append(f"{name}: {ratio:.3f} of a step of stock LoRA with dropout, at most {most} is allowed")
    if (memory := systems["StructLoRA"]["memory"]) > MEMORY_LIMIT:
        wrong.append(f"StructLoRA: {memory:.4f} of the memory of stock LoRA, at most {MEMORY_LIMIT} is allowed")
    for name, most in SHARE_LIMITS.items():
        if (share := systems[name]["least_graph_pass"]) > most:
            wrong.append(f"{name}: its graph pass takes {share:.4f} of a step, at most {most} is allowed")
    return wrong


def marks(name: str) -> tuple[str, str]:
    """Return what stands around a table of a page; `name` is that of the file of results."""
    return f"<!-- {name} -->\n", f"<!-- end of {name} -->"


def page_table(tables: list[dict[str, Any]]) -> str:
    """Return the tables as one in Markdown: least step and memory as ratios to stock LoRA's; empty without any."""
    if not tables:
        return ""
    settings = [t["setting"] for t in tables]
    heads = [f"{s['targets']}, width {s['width']}, {s['dtype']}".replace("_proj", "") for s in settings]
    heads = [h.replace("q,v", "q and v").replace("all-linear", "all linear") for h in heads]
    lines = ["| step (memory) | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name in tables[0]["systems"]:
        rows = [t["systems"][name] for t in tables]
        cells = [f"{row['least']:.2f} ({row['memory']:.3f})" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lesson = [f"{t['systems']['StructLoRA']['lesson']:.1f}" for t in tables]
    passed = [f"{t['systems']['StructLoRA']['graph_pass_ms']:.2f}" for t in tables]
    lines.append("| a lesson of StructLoRA, in its steps | " + " | ".join(lesson) + " |")
    if all("refresh" in t["systems"].get(GRADIENT, {}) for t in tables):
        for key, name in {"refresh": REFRESH, "least_refresh": f"{REFRESH}, if it only formed the gradients"}.items():
            cells = [f"{t['systems'][GRADIENT][key]:.2f}" for t in tables]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| its graph pass and hooks between lessons, ms | " + " | ".join(passed) + " |")
    if all("merged" in t for t in tables):
        merged = [f"{t['merged']['ratio']:.2f}" for t in tables]
        lines.append("| inference after merging, ratio to the base | " + " | ".join(merged) + " |")
    return "\n".join(lines) + "\n"


def fill(page: Path, name: str, tables: list[dict[str, Any]]) -> None:
    """Put the tables between their marks in a page."""
    begin, end = marks(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(before + begin + page_table(tables) + end + rest.partition(end)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["q_proj,v_proj"], help="names with commas, or all-linear")
    parser.add_argument("--width", type=int, nargs="+", default=[768])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--systems", nargs="+", help="these alone, and PEFT LoRA; default: all")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every decoder layer")
    parser.add_argument("--checkpointing", action="store_true", help="non-reentrant gradient checkpointing")
    parser.add_argument("--merged", action="store_true", help="inference after merge_and_unload, too")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--page", type=Path, help="page of the documents to put the tables into")
    parser.add_argument("--check", action="store_true", help="fail if StructLoRA has become slower; for CI")
    arguments = parser.parse_args()
    if arguments.page and not arguments.json:
        parser.error("--page puts the table where --json names it: give both")
    if arguments.check:
        arguments = parser.parse_args(
            [*CHECK, "--device", "cpu", "--check", "--systems", *LIMITS, *DROPOUT_LIMITS, DROPOUT]
        )
    warnings.filterwarnings("ignore")
    known = makers({"targets": "all-linear", "r": 1})
    if unknown := [name for name in arguments.systems or () if name not in known]:
        parser.error(f"--systems {unknown[0]!r} is unknown; there are {', '.join(map(repr, known))}")
    tables = []
    for targets, width, dtype, tokens in itertools.product(
        arguments.targets, arguments.width, arguments.dtype, arguments.tokens
    ):
        setting = {"targets": targets, "width": width, "dtype": dtype, "tokens": tokens}
        setting |= {n: getattr(arguments, n) for n in ("layers", "batch", "r", "compile", "checkpointing", "threads")}
        setting["device"] = arguments.device
        tables.append(measure(setting, arguments.systems, arguments.rounds))
        if arguments.merged:
            tables[-1]["merged"] = merged_inference(setting, arguments.rounds)
        show(tables[-1])
        sys.stdout.flush()
        if arguments.json:
            write_result(arguments.json, arguments.device, arguments.threads, tables=tables)
    if arguments.page:
        fill(arguments.page, arguments.json.stem, tables)
    if arguments.check and (wrong := check(tables[0])):
        for _ in range(2):  # a machine that others use can be slow once; what became slower is slow each time
            wrong = wrong and check(measure(setting, arguments.systems, arguments.rounds))
        if wrong:
            sys.exit("slower than allowed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
