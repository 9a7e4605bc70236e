"""Out of training: plain LoRA folders, and adapters merged into the weights of their base."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import dispatch_default
from peft.utils import CONFIG_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors.torch import load, save, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from structlora_pyg.checks import replace_file
from structlora_pyg.config import rewrites_base
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.distributed import is_cut, whole
from structlora_pyg.tuner.factor import coordinated
from structlora_pyg.tuner.fingerprint import check_base
from structlora_pyg.tuner.graph_pass import Factors, GraphPass, check_finite, evaluating, plain_factors
from structlora_pyg.tuner.layers import CUSTOM_LAYERS, Attention, own_layer

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
CARD, CARD_TITLE = "README.md", "## StructLoRA"


def check_trained(graph_pass: GraphPass) -> None:
    """Refuse an adapter that was not trained.

    Raises:
        RuntimeError: No optimizer step was seen and every update is 0 (an average of trained models has no steps).
    """
    if any(isinstance(layer, Attention) for layer in graph_pass.adapters.layers.values()):
        logger.warning(
            "the adapter is on torch.nn.MultiheadAttention; load it with structlora_pyg.load_lora: PEFT 0.21 adds the "
            "update of the output projection twice"
        )
    if graph_pass.step == 0:
        adapters = graph_pass.adapters
        if any(adapters.pair(adapter)[1].any() for adapter in adapters):
            return
        raise RuntimeError(
            "no optimizer step was seen: the adapter is untrained. Was the model never run in training mode, or the "
            "optimizer built before get_structlora_model, or given other parameters than model.parameters()?"
        )
    if not graph_pass.active:
        logger.warning(
            "training ended after %d optimizer steps, within the warm-up of %d: the adapter is a plain LoRA. Lower "
            "schedule.warmup_steps",
            graph_pass.step,
            graph_pass.warmup_steps,
        )


def write(
    model: PeftModel,
    folder: Path,
    names: Sequence[str],
    facts: dict[str, str],
    ragged: bool = False,
    rank: int | None = None,
    in_place: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Save adapters as PEFT does, coordinated ones as plain LoRA folders that are verified, also untrained ones.

    PEFT writes everything, aside. Gates, coordination and differing scalings are then folded into lora_A and lora_B.
    Every layer gets the same rank (zero-padding is exact), because serving engines drop ``rank_pattern``.

    Args:
        model: The model; it is not changed.
        folder: Where to write. Files in it are replaced at once, after verification.
        names: The adapters.
        facts: What the files say about the base, see `fingerprint.base_facts`.
        ragged: Cut closed directions out and write each layer at its own rank.
        rank: Cut every update to at most this rank.
        in_place: Write an adapter of any name into `folder` itself.
        **options: Arguments of PEFT's ``save_pretrained``.

    Returns:
        Of the last coordinated adapter, see `StructLoraModel.export`.

    Raises:
        RuntimeError: If verification fails.
        ValueError: Non-finite factors, unknown adapters, a file in the place of the folder.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give save_pretrained or export a folder")
    passes: Any = model.base_model.graph_passes
    said: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        aside = Path(temporary)
        if (card := folder / CARD).is_file():
            (aside / CARD).write_bytes(card.read_bytes())
        with whole(p for p in model.parameters() if p.requires_grad):
            PeftModel.save_pretrained(model, str(aside), selected_adapters=list(names), **options)
        for name in (n for n in names if n in passes):
            if rewrites_base(passes[name].config) or options.get("path_initial_model_for_weight_conversion"):
                if ragged or rank:
                    raise ValueError("an adapter of a rewritten base keeps its ranks; leave out ragged and rank")
                said = {"relative_error": 0.0, "truncation_error": 0.0, "open_gates": open_gates(passes[name])}
                said["rank"] = max(layer.r[name] for layer in passes[name].adapters.layers.values())
            else:
                said = _fold(model.peft_config[name], passes[name], aside / subfolder(name), facts, ragged, rank)
        for file in sorted(f for f in aside.rglob("*") if f.is_file()):
            place = file.relative_to(aside)
            replace_file(folder / (place.name if in_place else place), file.read_bytes())
    return said


def subfolder(name: str) -> str:
    """Return where PEFT saves an adapter, below the folder it was given."""
    return "" if name == "default" else name


def _fold(
    lora: PeftConfig, graph_pass: GraphPass, folder: Path, facts: dict[str, str], ragged: bool, most: int | None
) -> dict[str, float]:
    """Rewrite an adapter that PEFT has saved, at one scaling and, unless `ragged`, at one rank; verify it."""
    adapters, name = graph_pass.adapters, graph_pass.adapters.adapter_name
    factors, truncation = plain_factors(graph_pass, most)
    if truncation:
        logger.warning(
            "cut to rank %d, the updates differ from the trained ones by up to %.1f %%", most, 100 * truncation
        )
    check_finite(factors)
    # Variants of LoRA have more than the two factors, of the same rank; the two adapters of an attention have one rank.
    plain = {p: adapters.is_linear(p) and name not in layer.lora_variant for p, layer in adapters.layers.items()}
    attentions = tuple(p for p, layer in adapters.layers.items() if isinstance(layer, Attention))
    cut = {p: ragged and plain[p] and not p.startswith(attentions) for p in factors}
    written = {p: _cut(a, b) if cut[p] else (a, b) for p, (a, b) in factors.items()}
    scalings = {path: layer.scaling[name] for path, layer in adapters.layers.items()}
    common = max(scalings.values())
    written = {path: (a, b * (scalings[path] / common)) for path, (a, b) in written.items()}
    ranks = {p: a.size(0) if adapters.is_linear(p) else adapters.layers[p].r[name] for p, (a, _) in written.items()}
    rank = max(ranks.values())
    if not ragged:  # engines serve adapters of linear layers only; others keep their rank and name it
        missing = {p: (rank - ranks[p]) * plain[p] for p in written}
        written = {p: (F.pad(a, (0, 0, 0, missing[p])), F.pad(b, (0, missing[p]))) for p, (a, b) in written.items()}
    file = folder / ADAPTER_FILE
    safe = file.is_file()
    state = load_peft_weights(str(folder), device="cpu")
    for path, pair in written.items():
        for key, value, raw in zip(adapters.keys(path), pair, adapters.raw(path), strict=True):
            assert key in state, f"PEFT names no {key}"
            state[key] = value.view(value.size(0), -1, *raw.shape[2:]).to(state[key].dtype).cpu()
        if (key := f"base_model.model.{path}.lora_B.bias") in state:
            state[key] = state[key] * (scalings[path] / common)
    ranks = {p: r for p, r in ranks.items() if r != rank and (ragged or not plain[p])}
    ranks = {adapters.plain_name(p): r for p, r in ranks.items()}
    layers = adapters.layers.items()
    biases = {path: layer.lora_B[name].bias for path, layer in layers if layer.lora_bias.get(name)}
    if safe:
        content = serialise(state, facts)
        file.write_bytes(content)
        state = load(content)
    else:
        torch.save(state, folder / WEIGHTS_NAME)
    error = _verify(state, adapters, factors, biases, scalings, common)  # before anything is replaced
    values = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    values |= {key: sorted(value) for key, value in lora.to_dict().items() if isinstance(value, set)}
    alpha = common * rank
    values |= {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": common * r for path, r in ranks.items()},
    }
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), "utf-8")
    for path in (p for p, m in adapters.layers.items() if name in m.lora_variant):
        _verify_computed(path, adapters, state, ranks.get(adapters.plain_name(path), rank), common, folder)
    return {"relative_error": error, "truncation_error": truncation, "open_gates": open_gates(graph_pass), "rank": rank}


def open_gates(graph_pass: GraphPass) -> float:
    """Return the share of the adapter's directions that the filter has kept, in [0, 1]."""
    gate, exists = graph_pass.evaluated()[0].gate, graph_pass.graph.scaling != 0
    return float((gate[exists] != 0).float().mean())


def describe_in_card(graph_pass: GraphPass, folder: Path) -> None:
    """Say in a model card what the adapter is: method, gates, how to load it, what to cite."""
    card = ModelCard.load(folder / CARD)
    base = card.data.get("base_model") or "the base model"
    stages = [type(stage).__name__ for stage in graph_pass.stages]
    layers = graph_pass.adapters.layers.items()
    foreign = next((n for n, m in layers if isinstance(m.get_base_layer(), (pyg_nn.Linear, nn.MultiheadAttention))), "")
    kind = type(graph_pass.adapters.layers[foreign].get_base_layer()) if foreign else None
    needs, loader, call = "nothing but PEFT", "peft import PeftModel", "PeftModel.from_pretrained"
    if kind is not None:
        why = "no `torch.nn.Linear`" if issubclass(kind, pyg_nn.Linear) else "updated twice there"
        needs = f"`structlora_pyg`: PEFT alone cannot load it, because `{foreign}` ({kind.__module__.split('.')[0]}'s "
        needs += f"`{kind.__name__}`) is {why}"
        loader, call = "structlora_pyg import load_lora", "load_lora"
    section = f"""{CARD_TITLE}

A LoRA adapter for {base}, trained with StructLoRA ([arXiv 2603.14228](https://arxiv.org/abs/2603.14228)) in
`structlora_pyg`: its {len(graph_pass.adapters)} adapted layers were the nodes of a graph
({", ".join([*stages, type(graph_pass.lift).__name__])}). After {graph_pass.step} optimizer steps the filter keeps
{open_gates(graph_pass):.0%} of the rank-one directions. Gates and coordination are folded in: this is a plain LoRA,
which needs {needs}.

```python
from {loader}

model = {call}(base, "this/folder")
```

If you use it, please cite the paper, arXiv 2603.14228.
"""
    start = card.text.find(CARD_TITLE)
    card.text = (card.text if start < 0 else card.text[:start]).rstrip() + "\n\n" + section
    card.save(folder / CARD)


def _verify(
    state: dict[str, Tensor],
    adapters: AdapterSet,
    factors: Factors,
    biases: dict[str, Tensor],
    scalings: dict[str, float],
    common: float,
) -> float:
    """Compare every update as it will be read with the trained one, on random inputs; return the largest error."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters:
        path = adapter.layer
        read = [state[key].flatten(1) for key in adapters.keys(path)]
        x = torch.randn(adapter.in_features, 4, generator=generator, dtype=torch.float64)
        # A ragged layer has other ranks than its adapters: it is compared as a whole.
        pairs = [p if adapters.is_linear(path) else adapters.part(adapter, *p) for p in (factors[path], read)]
        want, got = (b.cpu().double() @ (a.cpu().double() @ x) for a, b in pairs)
        if path in biases:
            rows = slice(None) if adapters.is_linear(path) else adapter.rows
            want = want + biases[path].detach().cpu().double()[rows, None]
            got = got + state[adapters.keys(path)[1].replace(".weight", ".bias")].double()[rows, None]
        want, got = scalings[path] * want, common * got
        worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-30)))
    limit = 0.02 if read[0].element_size() < 4 else 1e-5
    if worst > limit:
        raise RuntimeError(f"the exported adapter differs from the trained one by {worst:.2e} (limit {limit:g})")
    return worst


@torch.no_grad()
def _verify_computed(
    path: str, adapters: AdapterSet, state: dict[str, Tensor], rank: int, scaling: float, folder: Path
) -> None:
    """Run a layer beside the one that PEFT builds from the folder; factors alone do not tell what it computes."""
    layer, name, prefix = adapters.layers[path], adapters.adapter_name, f"base_model.model.{path}."
    base, config = layer.get_base_layer(), LoraConfig.from_pretrained(str(folder))
    if is_cut(base.weight) or isinstance(base.weight, DTensor) or not base.weight.is_floating_point():
        return  # no process has the whole weight; every kind of quantised weight has a layer of its own in PEFT
    base = copy.deepcopy(base)  # KaSA changes it
    options: Any = {"r": rank, "lora_alpha": scaling * rank, "target_name": path}
    with torch.random.fork_rng():
        twin = dispatch_default(base, name, config, **options) or own_layer(base, name, config, **options)
    assert twin is not None
    twin.eval()
    for key in (k.removeprefix(prefix) for k in state if k.startswith(f"{prefix}lora_")):
        side, _, end = key.partition(".")
        place = next(k for k in twin.state_dict() if k.startswith(f"{side}.{name}") and k.endswith(end))
        twin.state_dict()[place].copy_(state[prefix + key])
    if isinstance(base, nn.Embedding):
        x = torch.arange(min(4, base.num_embeddings), device=base.weight.device)
    else:
        size = getattr(base, "kernel_size", ())
        x = torch.linspace(-1, 1, 2 * layer.in_features * math.prod(size)).view(2, -1, *size).to(base.weight)
    with evaluating(layer), coordinated(layer):  # also in the middle of training, where gates are noisy
        want, got = layer(x).double(), twin(x).double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    if error > (0.02 if base.weight.element_size() < 4 else 1e-4):
        raise RuntimeError(f"PEFT's {type(twin).__name__}, made from the export of {path}, is off by {error:.2e}")


def _cut(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Drop directions that add nothing; at least one stays, because PEFT has no rank 0."""
    keep = (b != 0).any(0) & (a != 0).any(1)
    keep[0] |= not bool(keep.any())
    return a[keep], b[:, keep]


def serialise(state: dict[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file, the same for the same tensors and facts."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = save(tensors, metadata={"format": "pt", **(facts or {})})
    # The library writes metadata in any order; the same adapter should be the same file.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(start - 8) + content[start:]


def load_lora(base: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load a LoRA folder onto a base model with stock PEFT and our fused layers.

    `peft.PeftModel.from_pretrained` loads exported folders too; this adds what PEFT refuses by itself,
    ``torch_geometric.nn.Linear``, the fused forward, and ``torch.nn.MultiheadAttention``, see
    `structlora_pyg.tuner.layers.Attention`.

    Args:
        base: The base model the adapter was trained on.
        folder: A folder written by `StructLoraModel.export` or by PEFT.
        adapter_name: Name to load it under.

    Warns:
        AlarmWarning: If the folder says that it was trained on other base weights.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config._register_custom_module(CUSTOM_LAYERS)
    if (file := Path(folder) / ADAPTER_FILE).is_file():
        check_base(base, config, file)
    return PeftModel.from_pretrained(base, str(folder), adapter_name=adapter_name, config=config)


def save_base(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model without adapters: a Transformers folder, or ``model.safetensors`` of others."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
