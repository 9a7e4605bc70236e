"""QLoRA (arXiv 2305.14314): adapters on a base whose weights are 4-bit NormalFloats, through bitsandbytes.

PEFT's own 4-bit LoRA layers do the work. This module makes such bases (`load_4bit`, `quantize_4bit`), keeps them
right on CPUs (`guard_4bit`), and turns them back into floating point for merging (`dequantize_4bit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Output heads: often new, hence trained in full precision, and small.
HEADS = ("lm_head", "embed_out", "classifier", "score", "head", "qa_outputs")


def load_4bit(
    auto_class: Any,
    path: str,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] = HEADS,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a Transformers model with its linear weights quantised while loading.

    Args:
        auto_class: For instance `transformers.AutoModelForCausalLM`.
        path: Local folder or hub id.
        compute_dtype: Type of the matrix products; default: that of their input.
        skip: Last names of linear layers that keep full precision.
        **kwargs: Passed to ``auto_class.from_pretrained``, for instance ``device_map`` and ``dtype``.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If the output head was quantised, or this CPU reads weights of some width wrongly.
    """
    bnb = _bitsandbytes()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(skip),
    )
    model = auto_class.from_pretrained(path, quantization_config=quantization, **kwargs)
    head = model.get_output_embeddings()
    if isinstance(head, bnb.nn.Linear4bit):
        name = next(n for n, m in model.named_modules() if m is head)
        raise ValueError(f"the output head {name} was quantised; pass skip={[*skip, name.rpartition('.')[2]]}")
    guard_4bit(model)
    return model


def quantize_4bit(
    model: nn.Module,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    skip: Sequence[str] = HEADS,
) -> nn.Module:
    """Replace the linear layers of any module (`torch.nn.Linear`, GPT-2's ``Conv1D``) by 4-bit ones, in place.

    Args:
        model: A model in floating point, without adapters.
        compute_dtype: Type of the matrix products; default: that of their input.
        double_quant: Quantise the scales of the blocks of 64 weights to 8 bit as well.
        skip: Last names of linear layers that keep full precision. The output embedding of a Transformers model keeps
            it in any case.

    Returns:
        The model.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If there is nothing to quantise, weights are not finite, or this CPU reads weights of some width
            wrongly; nothing is replaced then.
    """
    bnb = _bitsandbytes()
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    chosen = {
        name: module
        for name, module in model.named_modules()
        # Subclasses of Linear have forwards of their own, or are read past their forward.
        if type(module) in (nn.Linear, Conv1D) and module is not output and name.rpartition(".")[2] not in skip
    }
    if not chosen or any(".base_layer" in name for name in chosen):
        raise ValueError(
            "the model has adapters already; quantise the base first"
            if chosen
            else f"there is no linear layer to quantise, apart from {list(skip)}"
        )
    for name, module in chosen.items():
        weight: Any = module.weight
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinite values; reload the base model")
    _check_widths(bnb, {_weight(module).size(1) for module in chosen.values() if _weight(module).device.type == "cpu"})
    for name, module in chosen.items():
        weight = _weight(module)
        layer = bnb.nn.Linear4bit(
            weight.size(1),
            weight.size(0),
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            weight.contiguous(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4"
        ).to(weight.device)
        layer.bias = module.bias
        layer.train(module.training)
        model.set_submodule(name, layer)
    _mark(model, True)
    return guard_4bit(model)


def guard_4bit(model: nn.Module) -> nn.Module:
    """Make a model with bitsandbytes 4-bit weights safe to train and merge on CPU; call it before anything runs.

    On CPUs with AVX512-BF16 bitsandbytes repacks the weights in the first forward in eval mode, and leaves them so.
    From then on no gradient passes the layer, and merged or dequantised weights are garbage, all without an error.
    This switches repacking off, and undoes it where it has happened.

    Returns:
        The model.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If this CPU reads weights of some width wrongly.
    """
    bnb = _bitsandbytes()
    on_cpu = set()
    for _, layer in _layers_4bit(bnb, model):
        layer.support_avx512bf16_for_cpu = False
        layer.state_dict()  # unpacks
        if layer.weight.device.type == "cpu":
            on_cpu.add(layer.in_features)
    _check_widths(bnb, on_cpu)
    return model


@torch.no_grad()
def dequantize_4bit(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace 4-bit layers by `torch.nn.Linear` with the values they stand for, in place.

    To merge an adapter that was trained on a 4-bit base without losing it to rounding: export the adapter, make the
    4-bit base again, dequantise it, load the adapter with `peft.PeftModel.from_pretrained`, merge. The values are
    those the adapter was trained on, which the original weights are not.

    Args:
        model: A model from `load_4bit` or `quantize_4bit`, without adapters.
        dtype: Type of the new weights.

    Returns:
        The model.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If the model has no 4-bit layer, or has adapters.
    """
    bnb = _bitsandbytes()
    layers = list(_layers_4bit(bnb, guard_4bit(model)))
    if not layers:
        raise ValueError("the model has no 4-bit layer, so there is nothing to dequantise")
    for name, _ in layers:
        if name.endswith(".base_layer"):
            raise ValueError(
                f"{name.removesuffix('.base_layer')} has an adapter: export the adapter, make the 4-bit base again, "
                "dequantise it, and load the adapter onto it with peft.PeftModel.from_pretrained"
            )
    for name, layer in layers:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear: Any = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear.train(layer.training))
    _mark(model, False)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("4-bit weights need bitsandbytes; pip install structlora-pyg[quant]") from error
    return bitsandbytes


def _mark(model: Any, loaded_in_4bit: bool) -> None:
    """Set what PEFT asks before it takes its 4-bit layers."""
    model.is_loaded_in_4bit = loaded_in_4bit


def _layers_4bit(bnb: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield name, module


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
            "with skip=[...], or use a GPU"
        )
