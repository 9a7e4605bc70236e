"""What StructLoRA costs at 7, 70 and 405 billion parameters, counted from the shapes; nothing is run.

    python benchmarks/scale.py

Counted for bfloat16 weights, adapters and Adam in float32, gradient checkpointing, the default graph (sketch of side
16, one GCN layer of 64 channels, tangent lift), 80 GB devices, 8 of them in a machine. The tests
compare the formulas with a small model that is built and run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GB, GPUS_A_MACHINE, DEVICE, HOST = 1e9, 8, 80e9, 2000e9  # bytes
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder in the form of Llama."""

    layers: int
    width: int
    inner: int
    kv_width: int
    vocabulary: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of the linear maps of a layer."""
        d, kv, inner = self.width, self.kv_width, self.inner
        sizes = ((d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d))
        return dict(zip(LINEAR, sizes, strict=True))

    def block(self) -> int:
        """Return the parameters of a layer."""
        return sum(a * b for a, b in self.linear().values()) + 2 * self.width

    def parameters(self) -> int:
        """Return the parameters of the model; embeddings and head are not tied."""
        return self.layers * self.block() + 2 * self.vocabulary * self.width + self.width


SHAPES = {
    "Llama-2 7B": Shape(layers=32, width=4096, inner=11008, kv_width=4096, vocabulary=32000),
    "Llama-3 70B": Shape(layers=80, width=8192, inner=28672, kv_width=1024, vocabulary=128256),
    "Llama-3 405B": Shape(layers=126, width=16384, inner=53248, kv_width=1024, vocabulary=128256),
}


def count(
    shape: Shape, targets: tuple[str, ...], r: int = 16, devices: int = 8, tokens: int = 4096, side: int = 16,
    hidden: int = 64, length: int = 4096,
) -> dict[str, Any]:  # fmt: skip
    """Return the counts of one setting.

    Args:
        shape: The base model.
        targets: Adapted linear maps.
        r: Rank.
        devices: Processes of data parallelism.
        tokens: Tokens a device sees an optimizer step, in one forward.
        side: Side p of the codes.
        hidden: Hidden channels of the coordinator.
        length: Tokens of a sequence.
    """
    sizes = [shape.linear()[name] for name in targets]
    nodes, code = shape.layers * len(targets), side * side
    ends = shape.layers * sum(a + b for a, b in sizes)
    adapter = r * ends
    coordinator = 2 * code * hidden + hidden * hidden + 2 * hidden + code + 1
    trained = adapter + nodes * r + coordinator
    base = shape.parameters()
    # A forward: every factor meets P or Q three times, in its code and twice in the lift.
    graph = 6 * r * side * ends + 8 * nodes * r * code + 2 * nodes * (2 * code * hidden + hidden * hidden)
    attention = 4 * shape.layers * shape.width * length * tokens
    once = 2 * base * tokens + attention
    step = 3 * once  # forward, its repetition under checkpointing, gradients of the activations: the base is frozen
    ring = 2 * (devices - 1) / devices
    gathered = ring * 2 * base  # in the forward and in the backward pass, each once around the ring
    activations = 2 * shape.layers * tokens * shape.width + 10 * tokens * shape.vocabulary
    helpers = 16 * trained + 10 * adapter + 8 * nodes * code  # Adam and gradient; factors as lifted; sketches
    whole = 2 * base + helpers + activations
    cut = 2 * base / devices + 4 * max(shape.block(), shape.vocabulary * shape.width) + helpers + activations
    return {
        "devices": devices,
        "tokens": tokens,
        "nodes": nodes,
        "chain_edges": 2 * (shape.layers - 1) * len(targets),
        "gradient_edges_most": 2 * 3 * nodes,
        "base_parameters": base,
        "adapter_parameters": adapter,
        "training_only_parameters": nodes * r + coordinator,
        "code_bytes": 4 * (nodes * code + 2 * nodes * r * side),
        "graph_flops_forward": graph,
        "graph_share_of_step": 3 * graph / step,
        "allreduce_bytes": ring * 4 * trained,
        "base_gather_bytes": gathered,
        "adapter_share_of_traffic": ring * 4 * trained / (ring * 4 * trained + gathered),
        "sketch_bytes_every_50_steps": ring * 4 * nodes * code,
        "trained_memory_bytes": helpers,
        "device_bytes_ddp": whole,
        "device_bytes_fsdp": cut,
        "host_bytes_while_loading": min(devices, GPUS_A_MACHINE) * 2 * base,
        "breaks": breaks(whole, cut, min(devices, GPUS_A_MACHINE) * 2 * base),
    }


def breaks(whole: float, cut: float, host: float) -> list[str]:
    """Return what does not fit, worst first."""
    found = []
    if cut > DEVICE:
        found.append("device memory, even with FSDP2")
    if host > HOST:
        found.append("host memory while loading")
    if whole > DEVICE and not found:
        found.append("device memory with DDP")
    return found


def rows() -> list[dict[str, Any]]:
    """Return the counts of all settings."""
    settings = [("Llama-2 7B", 8), ("Llama-3 70B", 8), ("Llama-3 70B", 64), ("Llama-3 405B", 16), ("Llama-3 405B", 64)]
    targets = {"q, v": ("q_proj", "v_proj"), "all linear": LINEAR}
    return [
        {"model": name, "targets": label, **count(SHAPES[name], chosen, devices=devices)}
        for name, devices in settings
        for label, chosen in targets.items()
    ]


def table() -> str:
    """Return the counts as a Markdown table."""
    head = (
        "| model | targets | devices | nodes | trained, M | graph pass, % of a step's FLOPs | all-reduce, GB a step "
        "| base gathered, GB a step | a device with DDP, GB | with FSDP2, GB | does not fit |"
    )
    lines = [head, "| --- " * 2 + "| ---: " * 8 + "| --- |"]
    for row in rows():
        trained = row["adapter_parameters"] + row["training_only_parameters"]
        lines.append(
            f"| {row['model']} | {row['targets']} | {row['devices']} | {row['nodes']} | {trained / 1e6:.0f} "
            f"| {100 * row['graph_share_of_step']:.4f} | {row['allreduce_bytes'] / GB:.2f} "
            f"| {row['base_gather_bytes'] / GB:.0f} | {row['device_bytes_ddp'] / GB:.0f} "
            f"| {row['device_bytes_fsdp'] / GB:.0f} | {'; '.join(row['breaks']) or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
