"""4-bit bases (QLoRA, arXiv 2305.14314) through bitsandbytes: made, kept right on CPUs, and turned back for merging.

PEFT's own 4-bit LoRA layers do the work. A Transformers model can be quantised while it loads, with
``from_pretrained(..., quantization_config=NF4)``; give it to `guard_4bit` before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structlora_pyg.checks import require

# Output heads: often new, hence trained in full precision, and small.
HEADS = ("lm_head", "embed_out", "classifier", "score", "head", "qa_outputs")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    llm_int8_skip_modules=list(HEADS),  # it holds for 4 bit as well
)


def quantize_4bit(model: nn.Module, config: BitsAndBytesConfig = NF4, keep: Sequence[str] = ()) -> nn.Module:
    """Replace the linear layers of any module (`torch.nn.Linear`, GPT-2's ``Conv1D``) by 4-bit ones, in place.

    Args:
        model: A model in floating point, without adapters.
        config: Type of the numbers, of the products and of the scales.
        keep: Names of modules that keep full precision, besides ``llm_int8_skip_modules`` of `config` and the output
            embedding of a Transformers model.

    Returns:
        The model.

    Raises:
        ConfigError: If bitsandbytes is not installed.
        ValueError: If there is nothing to quantise, weights are not finite, or this CPU reads weights of some width
            wrongly; nothing is replaced then.
    """
    bnb = require("bitsandbytes", "quant")
    keep = [*keep, *(config.llm_int8_skip_modules or ())]
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    chosen: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        # Subclasses of Linear have forwards of their own, or are read past their forward.
        if type(module) in (nn.Linear, Conv1D) and module is not output
        if not any(f".{part}." in f".{name}." for part in keep)
    }
    if any(".base_layer" in name for name in chosen):
        raise ValueError("the model has adapters already; quantise the base first")
    if not chosen:
        raise ValueError(f"there is no linear layer to quantise, apart from {keep}")
    for name, module in chosen.items():
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinite values; reload the base model")
    _check_widths(bnb, {_weight(m).size(1) for m in chosen.values() if m.weight.device.type == "cpu"})
    for name, module in chosen.items():
        weight = _weight(module)
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(weight.size(1), weight.size(0), compute_dtype=config.bnb_4bit_compute_dtype)
        layer.weight = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        ).to(weight.device)
        layer.bias = module.bias
        model.set_submodule(name, layer.train(module.training))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks before it takes its 4-bit layers
    return guard_4bit(model)


def guard_4bit(model: nn.Module) -> nn.Module:
    """Make a model with bitsandbytes 4-bit weights safe to train and merge on CPU; call it before anything runs.

    On CPUs with AVX512-BF16 bitsandbytes repacks the weights in the first forward in eval mode, and leaves them so.
    From then on no gradient passes the layer, and merged or dequantised weights are garbage, all without an error.
    This switches repacking off, and undoes it where it has happened.

    Returns:
        The model.

    Raises:
        ConfigError: If bitsandbytes is not installed.
        ValueError: If this CPU reads weights of some width wrongly.
    """
    bnb = require("bitsandbytes", "quant")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # unpacks
    _check_widths(bnb, {layer.in_features for layer in layers if layer.weight.device.type == "cpu"})
    return model


@torch.no_grad()
def dequantize_4bit(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace 4-bit layers by `torch.nn.Linear` with the values they stand for, in place.

    To merge an adapter that was trained on a 4-bit base without losing it to rounding: export the adapter, make the
    4-bit base again, dequantise it, load the adapter with `peft.PeftModel.from_pretrained`, merge. The values are
    those the adapter was trained on, which the original weights are not.

    Args:
        model: A model with 4-bit layers, without adapters.
        dtype: Type of the new weights.

    Returns:
        The model.

    Raises:
        ConfigError: If bitsandbytes is not installed.
        ValueError: If the model has no 4-bit layer, or has adapters.
    """
    bnb = require("bitsandbytes", "quant")
    layers = {n: m for n, m in guard_4bit(model).named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    if not layers:
        raise ValueError("the model has no 4-bit layer, so there is nothing to dequantise")
    if adapted := [name for name in layers if name.endswith(".base_layer")]:
        raise ValueError(
            f"{adapted[0].removesuffix('.base_layer')} has an adapter: export the adapter, make the 4-bit base again, "
            "dequantise it, and load the adapter onto it with peft.PeftModel.from_pretrained"
        )
    for name, layer in layers.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear.train(layer.training))
    model.is_loaded_in_4bit = False  # type: ignore[assignment]
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)
    return model


def _weight(module: nn.Module) -> Tensor:
    """Return the weight as (d_out, d_in)."""
    weight: Any = module.weight
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _check_widths(bnb: Any, widths: set[int]) -> None:
    """Try whether the CPU kernel reads weights (d_out, d_in) of these d_in as it should.

    With AVX512, bitsandbytes 0.50 takes the scale of a wrong block where d_in is a multiple of 16 but not of the block
    size 64. The weights themselves are stored right: read as rows of 64 they come out as they should.

    Raises:
        ValueError: If it does not.
    """
    wrong = []
    for width in sorted(widths):
        sample = torch.randn(64 * width, generator=torch.Generator().manual_seed(0))
        read = [
            bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(sample.view(rows, -1), quant_type="nf4"))
            for rows in (64, width)
        ]
        if not torch.equal(read[0].flatten(), read[1].flatten()):
            wrong.append(width)
    if wrong:
        raise ValueError(
            f"bitsandbytes {bnb.__version__} reads 4-bit weights with {', '.join(map(str, wrong))} input features "
            "wrongly on this CPU (widths that are a multiple of 16 but not of 64). Keep such layers in full precision "
            "with keep=[...], or use a GPU"
        )
