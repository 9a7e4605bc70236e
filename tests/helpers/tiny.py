"""Tiny random-weight instances of real architectures, with inputs that produce a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
import transformers as hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, RobertaConfig, T5Config, ViTConfig, YolosConfig

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


class GraphTransformer(nn.Module):
    """A PyG graph transformer for graph classification; its layers use `torch_geometric.nn.Linear`."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.embed = pyg_nn.Linear(5, width)
        self.convs = nn.ModuleList(pyg_nn.TransformerConv(width, width) for _ in range(layers))
        self.head = pyg_nn.Linear(width, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.embed(x)
        for conv in self.convs:
            h = h + torch.tanh(conv(h, edge_index))
        return self.head(pyg_nn.global_mean_pool(h, batch))


class GPS(nn.Module):
    """A stack of PyG's GPS layers: message passing, torch's attention and a perceptron in each."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = pyg_nn.Linear(5, width)
        self.convs = nn.ModuleList(
            pyg_nn.GPSConv(width, pyg_nn.GINConv(pyg_nn.MLP([width, width], norm=None)), heads=2) for _ in range(layers)
        )
        self.head = pyg_nn.Linear(width, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.embed(x)
        for conv in self.convs:
            h = conv(h, edge_index, batch)
        return self.head(pyg_nn.global_mean_pool(h, batch))


class HGT(nn.Module):
    """Two layers of PyG's heterogeneous graph transformer; every type has linear layers of its own."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        metadata = ["paper", "author"], [("author", "writes", "paper"), ("paper", "by", "author")]
        self.embed = pyg_nn.HeteroDictLinear({"paper": 5, "author": 3}, width)
        self.convs = nn.ModuleList(pyg_nn.HGTConv(width, width, metadata, heads=2) for _ in range(layers))
        self.head = pyg_nn.Linear(2 * width, 2)

    def forward(self, paper: Tensor, author: Tensor, writes: Tensor) -> Tensor:
        h = self.embed({"paper": paper, "author": author})
        edges = {("author", "writes", "paper"): writes, ("paper", "by", "author"): writes.flip(0)}
        for conv in self.convs:
            h = conv(h, edges)
        return self.head(torch.cat([h["paper"], h["author"]], dim=1))


@dataclass(frozen=True)
class Tiny:
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: list[str]
    slices: list[str] | None = None
    stock: bool = True  # whether PEFT alone loads the exported folder
    classes: int = 2

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.inputs()


def _tokens(high: int = 64, length: int = 9) -> Tensor:
    return torch.randint(4, high, (2, length))


def _lm() -> dict[str, Tensor]:
    ids = _tokens()
    return {"input_ids": ids, "labels": ids}


def _llava() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = hf.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**LLAMA), image_token_index=63)
    return hf.LlavaForConditionalGeneration(config)


def _llava_inputs() -> dict[str, Tensor]:
    ids = torch.cat([torch.full((2, 4), 63), _tokens(60, 6)], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": ids.clone()}


def _graphs() -> dict[str, Tensor]:
    # Two triangles, both ways: attention over a single neighbour would have no gradient for its query.
    edge_index = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2, 0, 4, 5, 3], [1, 2, 0, 4, 5, 3, 0, 1, 2, 3, 4, 5]])
    return {"x": torch.randn(6, 5), "edge_index": edge_index, "batch": torch.tensor([0, 0, 0, 1, 1, 1])}


def _authors() -> dict[str, Tensor]:
    writes = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 1, 0]])
    return {"paper": torch.randn(2, 5), "author": torch.randn(2, 3), "writes": writes}


def _vit() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=2)


SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = ViTConfig(**SIZES, num_hidden_layers=3, image_size=8, patch_size=4)
ROBERTA = RobertaConfig(**SIZES, **PLAIN, num_hidden_layers=3, vocab_size=64, max_position_embeddings=32)
YOLOS = YolosConfig(
    **SIZES, num_hidden_layers=2, image_size=[16, 16], patch_size=8, num_detection_tokens=4, num_labels=3
)
T5 = T5Config(
    d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, vocab_size=64, dropout_rate=0.0, decoder_start_token_id=0
)
GPT2 = GPT2Config(
    n_embd=24, n_layer=3, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)


def query_and_value(model: nn.Module) -> list[str]:
    """Return the names of two projections; older versions of Transformers name them as BERT does."""
    return ["q_proj", "v_proj"] if "q_proj" in str(model) else ["query", "value"]


def _pixels() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _boxes() -> dict[str, Any]:
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])} for _ in range(2)]
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}


ARCHITECTURES: dict[str, Tiny] = {
    "llama": Tiny(lambda: hf.LlamaForCausalLM(LlamaConfig(**LLAMA)), _lm, ["q_proj", "v_proj"]),
    "roberta": Tiny(
        lambda: hf.RobertaForSequenceClassification(ROBERTA),
        lambda: {"input_ids": _tokens(), "labels": torch.tensor([0, 1])},
        ["query", "value"],
    ),
    "vit": Tiny(
        lambda: hf.ViTForImageClassification(VIT),
        lambda: {"pixel_values": _pixels(), "labels": torch.tensor([0, 1])},
        query_and_value(hf.ViTForImageClassification(VIT)),
    ),
    "timm_vit": Tiny(_vit, lambda: {"x": _pixels()}, ["qkv"]),
    "timm_vit_slices": Tiny(_vit, lambda: {"x": _pixels()}, ["qkv"], ["q", "v"]),
    "llava": Tiny(_llava, _llava_inputs, ["q_proj", "v_proj"]),
    "gpt2": Tiny(lambda: hf.GPT2LMHeadModel(GPT2), _lm, ["c_attn"]),
    "gpt2_slices": Tiny(lambda: hf.GPT2LMHeadModel(GPT2), _lm, ["c_attn"], ["q", "v"]),
    "t5": Tiny(
        lambda: hf.T5ForConditionalGeneration(T5), lambda: {"input_ids": _tokens(), "labels": _tokens()}, ["q", "v"]
    ),
    "pyg_transformer": Tiny(GraphTransformer, _graphs, ["lin_query", "lin_value"], stock=False),
    "pyg_gps": Tiny(GPS, _graphs, ["attn", "mlp.0", "mlp.3"], stock=False),
    "pyg_hgt": Tiny(HGT, _authors, ["kqv_lin", "out_lin"], stock=False),
}

# Not one of the architectures above: its labels are a list of dictionaries, which has no batch dimension.
DETECTOR = Tiny(
    lambda: hf.YolosForObjectDetection(YOLOS),
    _boxes,
    query_and_value(hf.YolosForObjectDetection(YOLOS)),
)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the model's prediction for a batch."""
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the training loss, with the auxiliary part, whatever the model's output is."""
    output = model(**batch)
    if isinstance(output, Tensor):
        return F.cross_entropy(output.float(), torch.tensor([0, 1])) + model.auxiliary_loss()
    return output.loss
