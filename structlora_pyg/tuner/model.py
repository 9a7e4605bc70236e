"""From a pretrained module to a StructLoRA model, which is a `peft.PeftModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.hetero import to_hetero_data
from structlora_pyg.tuner import checkpoint, export
from structlora_pyg.tuner.alarms import Alarms
from structlora_pyg.tuner.distributed import whole
from structlora_pyg.tuner.fingerprint import base_facts
from structlora_pyg.tuner.graph_pass import GraphPass
from structlora_pyg.tuner.hooks import PassHooks
from structlora_pyg.tuner.initialize import align_start, share_start, weight_gradients
from structlora_pyg.tuner.targets import plain_lora

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def get_structlora_model(
    base: nn.Module,
    config: StructLoraConfig,
    adapter_name: str = "default",
    train_step: Callable[[], None] | None = None,
) -> StructLoraModel:
    """Inject coordinated LoRA adapters into a module.

    Args:
        base: Transformers, timm or PyG model, or any module with linear layers (``torch.nn.Linear``, GPT-2's
            ``Conv1D``, ``torch_geometric.nn.Linear``) or ``torch.nn.MultiheadAttention``. It is changed in place, as
            by `peft.get_peft_model`.
        config: What to build.
        adapter_name: PEFT's name of the adapter.
        train_step: For ``init_lora_weights="gradient"``: runs forward and backward of `base` on some batches.

    Returns:
        A `StructLoraModel` with the forward of `base`.

    Raises:
        ConfigError: Target modules that do not exist, ranks above a layer's width, and the like; all at once.
        ValueError: A convolution that does not fit the graph, non-finite base weights.
    """
    return StructLoraModel(base, config, adapter_name, train_step)


class StructLoraModel(PeftModel):
    """A `peft.PeftModel` whose LoRA factors pass through filter and coordinator in every forward.

    Use `get_structlora_model` to make one. Outputs that carry ``.loss`` include the auxiliary loss in training mode.

    Attributes:
        structlora_config: The configuration.
        graph_pass: What turns its factors into coordinated ones.
        hooks: What runs the graph pass when it has to.
        base_facts: What exported files say about the base, where it was sharded after they were looked up; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: StructLoraConfig,
        adapter_name: str = "default",
        train_step: Callable[[], None] | None = None,
    ) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "the base model is a PeftModel already; pass model.unload(), or model.merge_and_unload() to keep its "
                "update"
            )
        lora = plain_lora(model, config)
        gradients: dict[str, Tensor] = {}
        if config.init_lora_weights == "gradient":
            if train_step is None:
                raise ConfigError(["init_lora_weights='gradient' needs get_structlora_model(..., train_step=...)"])
            gradients = weight_gradients(model, lora, train_step)
        super().__init__(model, lora, adapter_name)
        self.structlora_config = config
        self.base_facts: dict[str, str] | None = None
        base = self.get_base_model()
        adapters = AdapterSet(base, adapter_name, config.fused_slices)
        if config.init_lora_weights == "shared":
            share_start(adapters, config.seed)
        elif config.init_lora_weights == "gradient":
            align_start(adapters, gradients)
        first = next(adapters.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.graph_pass = GraphPass.from_config(adapters, config).to(first.device, dtype)
        # On the innermost module: generate() and a missing task type bypass every level above it.
        self.hooks = PassHooks(self.graph_pass, base, config.graph.refresh_every, Alarms(config.alarms))
        keep_statistics(self)

    def train(self, mode: bool = True) -> StructLoraModel:
        """Switch mode; batch normalisation stays in evaluation, except in ``modules_to_save``.

        Its running statistics belong to the base, which an exported adapter does not carry.
        """
        super().train(mode)
        keep_statistics(self)
        return self

    def adapter_graph(self) -> Data:
        """Return the current coordinated graph, detached, in eval mode; see `structlora_pyg.data.graph_builder`.

        ``graph.name`` lists the adapters (or blocks) the nodes stand for.
        """
        graph, _ = self.graph_pass.evaluated()
        graph = graph.detach().clone()
        graph.name = list(self.graph_pass.graph.node_names)
        return graph

    def hetero_adapter_graph(self) -> HeteroData:
        """Return `adapter_graph` with roles as node types and kinds of edges as edge types; see `to_hetero_data`."""
        return to_hetero_data(self.adapter_graph(), self.graph_pass.graph.node_types)

    def auxiliary_loss(self, labels: Tensor | None = None) -> Tensor:
        """Return the auxiliary loss of the last forward, for loops that compute their own task loss.

        A scalar; 0 in eval mode and during warm-up. Outputs with ``.loss`` include it already.

        Args:
            labels: (batch,) labels, needed for label terms unless the forward got them as ``labels``.

        Raises:
            RuntimeError: Before the first forward, or without labels where the label term needs them.
        """
        return self.hooks.auxiliary_loss(labels)

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss: ``auxiliary``, and ``task`` where the output carried a loss."""
        return {name: float(value) for name, value in self.hooks.losses.items()}

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        factors = {id(p) for p in self.graph_pass.adapters.parameters()}
        helpers = {id(p) for p in self.graph_pass.parameters()}
        counts = {"adapter": 0, "heads": 0, "training_only": 0}
        for name, p in self.named_parameters():
            if p.requires_grad:
                own = id(p) in factors or ".lora_" in name  # DoRA's magnitudes are exported with the factors
                kind = "adapter" if own else "training_only" if id(p) in helpers else "heads"
                counts[kind] += p.numel()
        return counts

    def export(self, folder: str | Path, ragged: bool = False) -> dict[str, float]:
        """Write a plain PEFT LoRA folder with gates and coordination folded in, and verify it.

        Args:
            folder: Where to write. Files in it are replaced at once, after verification.
            ragged: Cut closed directions out and write each layer at its own rank.

        Returns:
            ``relative_error`` of the written update against the coordinated one, ``truncation_error`` of the dense
            lift, ``open_gates`` in [0, 1], ``rank`` (the largest written).

        Raises:
            RuntimeError: If no optimizer step was seen (the adapter would be untrained without anybody noticing); if
                verification fails.
            ValueError: Non-finite factors; `ragged` with ``torch.nn.MultiheadAttention``.
        """
        with whole(self.graph_pass.adapters.parameters()):
            self.hooks.count_steps()
        export.check_trained(self.graph_pass, ragged)
        return export.write(self, self.graph_pass, Path(folder), self._facts(), ragged)

    def _facts(self) -> dict[str, str]:
        known = self.base_facts
        return base_facts(self.get_base_model(), self.structlora_config) if known is None else known

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge the coordinated update into the base weights and return the base module as it was built.

        The sum is formed in float32 (float64 for a base in float64) and cast once; the rounding error is logged.

        Args:
            progressbar: Show progress.
            safe_merge: Check for non-finite weights first. Always done; kept for PEFT's signature.
            adapter_names: Not available: one adapter is coordinated.

        Raises:
            ValueError: A quantised base, or one cut over processes; `adapter_names`; non-finite factors.
        """
        if adapter_names not in (None, [self.graph_pass.adapters.adapter_name]):
            raise ValueError(f"only {self.graph_pass.adapters.adapter_name!r} can be merged; got {adapter_names}")
        export.merge(self, self.graph_pass, progressbar)
        return self.unload()

    def unload(self) -> nn.Module:
        """Return the base module as it was built, without the adapter and the graph pass."""
        self.hooks.remove()
        tuner: Any = self.base_model
        return tuner.unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: PEFT would merge the factors without gates and coordination."""
        raise ValueError("merge_adapter() would leave gates and coordination out; use merge_and_unload() or export()")

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine other adapters into a new one, as PEFT does; not the coordinated one.

        Raises:
            ValueError: For the coordinated adapter, which PEFT would take without gates and coordination.
        """
        if self.graph_pass.adapters.adapter_name in adapters:
            raise ValueError(
                "add_weighted_adapter() would leave gates and coordination out; call export(folder), load the folder "
                "onto a base model (structlora_pyg.load_lora), and combine there"
            )
        tuner: Any = self.base_model
        tuner.add_weighted_adapter(adapters, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does; not the coordinated one, which the graph pass reads.

        Raises:
            ValueError: For the coordinated adapter.
        """
        if adapter_name == self.graph_pass.adapters.adapter_name:
            raise ValueError(
                f"{adapter_name!r} is the coordinated adapter, which this model cannot do without. To get the base "
                "model back, use merge_and_unload() or, without the adapter, unload()"
            )
        super().delete_adapter(adapter_name)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the folder that `peft.PeftModel.from_pretrained` loads, plus the state to continue training.

        Args:
            save_directory: Folder; files are replaced one by one, each at once. Other adapters are saved in folders of
                their names in it, as by PEFT.
            **kwargs: PEFT's other arguments: ``selected_adapters`` names the adapters to save (default: all);
                ``is_main_process=False`` writes nothing.

        Raises:
            ValueError: Non-finite factors; another adapter that PEFT would write over the coordinated one.
        """
        if not kwargs.get("is_main_process", True):
            return
        name = self.graph_pass.adapters.adapter_name
        selected = kwargs.pop("selected_adapters", None)
        selected = list(self.peft_config) if selected is None else selected
        others = [adapter for adapter in selected if adapter != name]
        if name in selected and "default" in others:
            raise ValueError(
                f"PEFT saves the adapter 'default' in the folder itself, where the coordinated adapter {name!r} "
                "belongs; save each in a folder of its own, with selected_adapters=['default'] and "
                f"selected_adapters=[{name!r}]"
            )
        if name in selected:
            folder = Path(save_directory)
            export.write(self, self.graph_pass, folder, self._facts())  # first: it checks that the factors are finite
            checkpoint.save_training_state(self, self.graph_pass, self.structlora_config, folder)
        if others:
            super().save_pretrained(save_directory, selected_adapters=others, **kwargs)

    def load_training_state(self, folder: str | Path) -> None:
        """Restore adapter, heads, gates, coordinator, edges and step count from `save_pretrained`, bit by bit.

        Raises:
            FileNotFoundError: If the folder holds no training state.
            ValueError: If the state does not fit this model, or the file is damaged.
        """
        checkpoint.load_training_state(self, self.graph_pass, Path(folder))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter, as PEFT does; the coordinated one continues from its training state."""
        own = adapter_name == self.graph_pass.adapters.adapter_name
        if own and (Path(model_id) / checkpoint.STATE_FILE).is_file():
            self.load_training_state(model_id)
            return None
        if own:
            raise ValueError(
                f"{model_id} holds no training state ({checkpoint.STATE_FILE}) for the coordinated adapter "
                f"{adapter_name!r}; load a finished adapter with peft.PeftModel.from_pretrained(base, folder), or "
                "under another adapter_name"
            )
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a checkpoint brings its own configuration
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        trust_remote_code: bool = False,
    ) -> StructLoraModel:
        """Return a model that continues training from a folder of `save_pretrained`.

        Args:
            model: The base model.
            model_id: The folder.
            adapter_name: PEFT's name of the adapter.
            trust_remote_code: Import what the folder's configuration names by dotted path: your own convolution, or
                whatever the folder's author has put there.

        Raises:
            FileNotFoundError: If the folder holds no training state.
            ValueError: If it is damaged, names code and `trust_remote_code` is False, or its configuration held
                objects.
        """
        config = StructLoraConfig.from_pretrained(model_id)
        if not trust_remote_code and (named := config.foreign_code()):
            raise ValueError(
                f"{model_id} asks for code to be imported: {', '.join(named)}. If you know that code, pass "
                "trust_remote_code=True"
            )
        checkpoint.check_sizes(config, Path(model_id))
        restored = cls(model, config, adapter_name)
        restored.load_training_state(model_id)
        return restored


def keep_statistics(model: nn.Module, trained: Sequence[str] = ("modules_to_save",)) -> None:
    """Put batch normalisation into evaluation, so that its running statistics stay those of the base.

    Args:
        model: Its mode has just been set.
        trained: Names of modules inside of which everything is trained.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and not any(f".{part}." in f".{name}." for part in trained):
            module.eval()
