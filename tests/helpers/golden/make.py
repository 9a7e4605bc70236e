"""Write the golden files of a release: what it exports has to load in every later one.

python tests/helpers/golden/make.py     # once per release; writes golden/<version>/, which is never changed again
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from structlora_pyg import StructLoraConfig, __version__, get_structlora_model, load_lora


class Base(nn.Module):
    """Four small layers of two roles; nothing in it depends on a library that might change it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 6) for (batch, 6)."""
        for layer in self.layers:
            x = x + torch.tanh(layer["down"](torch.tanh(layer["up"](x))))
        return x


def main() -> None:
    """Train a little, and keep base, adapter, checkpoint and outputs."""
    folder = Path(__file__).parent / __version__
    torch.manual_seed(0)
    base = Base()
    save_file({n: p.detach().clone() for n, p in base.named_parameters()}, folder.parent / "base.safetensors")
    config = StructLoraConfig(
        r=2, lora_alpha=4, target_modules=["up", "down"], encoding={"size": 3}, filter={"kind": "hard_concrete"},
        coordinator={"hidden_channels": 8, "lift": "tangent"}, graph={"refresh_every": 2, "edges": "hybrid"},
        schedule={"warmup_steps": 1, "ramp_steps": 2},
    )  # fmt: skip
    model = get_structlora_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    for _ in range(12):
        (torch.nn.functional.mse_loss(model(x), y) + model.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.export(folder / "adapter")
    model.save_pretrained(str(folder / "checkpoint"))
    fresh = Base()
    fresh.load_state_dict({n.replace(".base_layer", ""): p for n, p in base.state_dict().items() if "lora_" not in n})
    outputs = {"input": x, "coordinated": model(x), "exported": load_lora(fresh, folder / "adapter").eval()(x)}
    save_file({n: t.detach().contiguous() for n, t in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main()
