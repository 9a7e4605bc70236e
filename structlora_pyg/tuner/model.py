"""From a pretrained module to a StructLoRA model, which is a `peft.PeftModel`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.hetero import to_hetero_data
from structlora_pyg.tuner import checkpoint, export
from structlora_pyg.tuner.base import (
    NetworkFirst,
    as_it_was_if_it_fails,
    check_base_and_kind,
    keep_statistics,
    prepared,
    without_adapters,
)
from structlora_pyg.tuner.distributed import whole
from structlora_pyg.tuner.fingerprint import base_facts
from structlora_pyg.tuner.graph_pass import GraphPass
from structlora_pyg.tuner.hooks import PassHooks
from structlora_pyg.tuner.lora_model import CoordinatedLoraModel, holding
from structlora_pyg.tuner.teaching import teach


def get_structlora_model(
    base: nn.Module,
    config: StructLoraConfig,
    adapter_name: str = "default",
    train_step: Callable[[], None] | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> StructLoraModel:
    """Inject coordinated LoRA adapters into a module.

    Args:
        base: Transformers, timm or PyG model, or any module with linear layers (``torch.nn.Linear``, GPT-2's
            ``Conv1D``, ``torch_geometric.nn.Linear``) or ``torch.nn.MultiheadAttention``. It is changed in place, as
            by `peft.get_peft_model`; if this function raises, it is as it was.
        config: What to build. Its ``task_type`` gives the model the methods of PEFT's class for that task.
        adapter_name: PEFT's name of the adapter.
        train_step: For ``init_lora_weights="gradient"``: runs forward and backward of `base` on some batches.
        autocast_adapter_dtype: Keep the adapter in float32 on a base in half precision.
        revision: Revision of the base model, for ``adapter_config.json``.
        low_cpu_mem_usage: For PEFT's signature; the graph pass needs adapters with weights, which are small.

    Returns:
        A `StructLoraModel` with the forward of `base`.

    Raises:
        ConfigError: Target modules that do not exist, ranks above a layer's width, and the like; all at once.
        TypeError: Another kind of configuration.
        ValueError: A base that has adapters, a convolution that does not fit the graph, non-finite base weights.
    """
    check_base_and_kind(base, config)
    kind = FOR_TASK.get(config.task_type, StructLoraModel)
    model = kind(base, config, adapter_name, train_step, autocast_adapter_dtype=autocast_adapter_dtype)
    lora = model.peft_config[adapter_name]
    lora.revision = lora.revision if revision is None else revision
    return model


class StructLoraModel(NetworkFirst, PeftModel):
    """A `peft.PeftModel` whose LoRA factors pass through filter and coordinator in every forward.

    Use `get_structlora_model` to make one. Outputs that carry ``.loss`` include the auxiliary loss in training mode.
    PEFT's functions, of this model, of its ``base_model`` and of its layers, see the coordinated factors.

    Attributes:
        structlora_config: The configuration of the coordinated adapter: the active one, else the first.
        graph_pass: What turns its factors into coordinated ones.
        hooks: What runs the graph pass when it has to.
        base_facts: What exported files say about the base, where it was sharded after they were looked up; else None.
    """

    base_model: CoordinatedLoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: StructLoraConfig,
        adapter_name: str = "default",
        train_step: Callable[[], None] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        check_base_and_kind(model, peft_config)
        if adapter_name in "lora_":  # which PEFT's functions cut out of names
            warnings.warn(f"Adapter name '{adapter_name}' should not be contained in the prefix 'lora_'.", stacklevel=2)
        with as_it_was_if_it_fails(model, peft_config):
            lora, starts = prepared(model, peft_config, train_step)
            super().__init__(model, lora, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
            CoordinatedLoraModel.of(self.base_model)
            self.base_facts: dict[str, str] | None = None
            self._coordinate(adapter_name, peft_config, starts)

    def _coordinate(self, name: str, config: StructLoraConfig, starts: Any = None) -> None:
        lora: Any = self.peft_config[name]
        if lora.modules_to_save is not None:
            lora.modules_to_save = list(dict.fromkeys(lora.modules_to_save))  # PEFT adds heads that are named already
        self.base_model.coordinate(name, config, starts)
        keep_statistics(self)

    def _coordinated(self) -> str:
        """Return the name of the coordinated adapter that is active, or of the first."""
        passes = self.base_model.graph_passes
        if not passes:
            raise LookupError("this model has no coordinated adapter any more; add one with add_adapter(name, config)")
        active = [name for name in self.base_model.active_adapters if name in passes]
        return [*active, *passes][0]

    @property
    def graph_pass(self) -> GraphPass:
        """What turns the factors of the coordinated adapter into coordinated ones."""
        return self.base_model.graph_passes[self._coordinated()]

    @property
    def hooks(self) -> PassHooks:
        """What runs the graph pass when it has to."""
        return self.base_model.pass_hooks[self._coordinated()]

    @property
    def structlora_config(self) -> StructLoraConfig:
        """The configuration of the coordinated adapter."""
        config = self.graph_pass.config
        assert config is not None
        return config

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does: a plain one, or with a `StructLoraConfig` one with a graph pass of its own.

        The configuration object of a coordinated adapter, ``model.peft_config[name]``, gives a copy of that adapter's
        graph pass, as TRL's reference adapters need.

        Raises:
            ConfigError: As in `get_structlora_model`.
        """
        passes = self.base_model.graph_passes
        like = next((n for n in passes if self.peft_config[n] is peft_config), None)
        with as_it_was_if_it_fails(self, peft_config):
            if isinstance(peft_config, StructLoraConfig):
                with without_adapters(self.get_base_model()) as base:
                    lora, _ = prepared(base, peft_config, None)
                super().add_adapter(adapter_name, lora, *args, **kwargs)
                self._coordinate(adapter_name, peft_config)
            else:
                super().add_adapter(adapter_name, peft_config, *args, **kwargs)
                if like is not None:
                    self._coordinate(adapter_name, passes[like].config)
                    passes[adapter_name].load_state_dict(passes[like].state_dict())

    def train(self, mode: bool = True) -> StructLoraModel:
        """Switch mode; batch normalisation stays in evaluation, except in ``modules_to_save``: the base has it."""
        super().train(mode)
        keep_statistics(self)
        return self

    def adapter_graph(self) -> Data:
        """Return the current coordinated graph, detached, in eval mode; see `structlora_pyg.data.graph_builder`.

        ``graph.name`` lists the adapters (or blocks) the nodes stand for.
        """
        graph = self.graph_pass.evaluated()[0].detach().clone()
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

    teach = teach

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss: ``auxiliary``, and ``task`` where the output carried a loss."""
        return {name: float(value) for name, value in self.hooks.losses.items()}

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        factors = {id(p) for p in self.graph_pass.adapters.parameters()}
        helpers = {id(p) for p in self.graph_pass.parameters()}
        counts, taught = {"adapter": 0, "heads": 0, "training_only": 0}, {id(p) for p in self.graph_pass.taught()}
        for name, p in self.named_parameters():
            if p.requires_grad or id(p) in taught:
                own = id(p) in factors or ".lora_" in name  # DoRA's magnitudes are exported with the factors
                kind = "adapter" if own else "training_only" if id(p) in helpers else "heads"
                counts[kind] += p.numel()
        return counts

    def export(self, folder: str | Path, ragged: bool = False, rank: int | None = None) -> dict[str, float]:
        """Write a plain PEFT LoRA folder with gates and coordination folded in, and verify it.

        Args:
            folder: Where to write. Files in it are replaced at once, after verification.
            ragged: Cut closed directions out and write each layer at its own rank (torch's attentions stay whole).
            rank: Cut every update to this rank by SVD; default: the whole, whose rank the ``dense`` lift raises.

        Returns:
            ``relative_error`` of the written update, ``truncation_error``, ``open_gates`` in [0, 1], largest ``rank``.

        Raises:
            RuntimeError: If no optimizer step was seen (the adapter would be untrained without anybody noticing); if
                verification fails.
            ValueError: Non-finite factors.
        """
        with whole(self.graph_pass.adapters.parameters()):
            self.hooks.finish()
        export.check_trained(self.graph_pass)
        return export.write(self, Path(folder), [self._coordinated()], self._facts(), ragged, rank, in_place=True)

    def _facts(self) -> dict[str, str]:
        return self.base_facts or base_facts(self.get_base_model(), self.structlora_config)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the folder that `peft.PeftModel.from_pretrained` loads, plus the state to continue training.

        Args:
            save_directory: Folder; files are replaced one by one, each at once. Adapters that are not named
                ``default`` are saved in folders of their names in it, as by PEFT.
            safe_serialization: Write the adapter as safetensors; else with `torch.save`.
            selected_adapters: Adapters to save (default: all).
            **kwargs: PEFT's other arguments: ``save_embedding_layers``, ``state_dict`` (a state dict of this model to
                save in the place of its own), ``is_main_process=False`` writes nothing.

        Raises:
            ValueError: Non-finite factors; unknown adapters.
        """
        if not kwargs.get("is_main_process", True):
            return
        folder, passes = Path(save_directory), self.base_model.graph_passes
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        with holding(self, kwargs.get("state_dict") or {}):
            facts = self._facts() if passes else {}
            export.write(self, folder, names, facts, safe_serialization=safe_serialization, **kwargs)
            for name in (n for n in names if n in passes):
                checkpoint.save_training_state(self, passes[name], folder / export.subfolder(name))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write PEFT's model card, and what a reader has to know of this adapter."""
        super().create_or_update_model_card(output_dir)
        if self.base_model.graph_passes:
            export.describe_in_card(self.graph_pass, Path(output_dir))

    def load_training_state(self, folder: str | Path) -> None:
        """Restore adapter, heads, gates, coordinator, edges and step count from `save_pretrained`, bit by bit.

        Raises:
            FileNotFoundError: If the folder holds no training state.
            ValueError: If the state does not fit this model, or the file is damaged.
        """
        checkpoint.load_training_state(self, self.graph_pass, Path(folder))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter, as PEFT does; a coordinated one continues from its training state."""
        if adapter_name not in self.base_model.graph_passes:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if not (Path(model_id) / checkpoint.STATE_FILE).is_file():
            raise ValueError(
                f"{model_id} holds no training state ({checkpoint.STATE_FILE}) for the coordinated adapter "
                f"{adapter_name!r}; load a finished adapter with peft.PeftModel.from_pretrained(base, folder), or "
                "under another adapter_name"
            )
        checkpoint.load_training_state(self, self.base_model.graph_passes[adapter_name], Path(model_id))
        return None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a checkpoint brings its own configuration
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = True,
        config: StructLoraConfig | None = None,
        *,
        trust_remote_code: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        revision: str | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> StructLoraModel:
        """Return a model that continues training from a folder of `save_pretrained`.

        Args:
            model: The base model.
            model_id: The folder.
            adapter_name: PEFT's name of the adapter.
            is_trainable: Whether to go on training; False freezes adapter, filter and coordinator, in eval mode.
            config: In the place of the folder's configuration; it has to give tensors of the same sizes.
            trust_remote_code: Import what the folder's configuration names by dotted path: your own convolution, or
                whatever the folder's author has put there.
            torch_device: Where to put the model; default: where `model` is.
            autocast_adapter_dtype: Keep the adapter in float32 on a base in half precision.
            revision: Revision of the base model, for ``adapter_config.json``.
            low_cpu_mem_usage: For PEFT's signature; see `get_structlora_model`.

        Raises:
            FileNotFoundError: If the folder holds no training state.
            ValueError: If it is damaged, names code and `trust_remote_code` is False, or its configuration held
                objects.
        """
        if config is None:
            config = StructLoraConfig.from_pretrained(model_id)
            if not trust_remote_code and (named := config.foreign_code()):
                told = f"{model_id} asks for code to be imported: {', '.join(named)}. If you know that code, pass "
                raise ValueError(told + "trust_remote_code=True")
        checkpoint.check_sizes(config, Path(model_id))
        with as_it_was_if_it_fails(model, config):
            options: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype, "revision": revision}
            restored = get_structlora_model(model, config, adapter_name, **options)
            restored.load_training_state(model_id)
            restored.set_requires_grad(adapter_name, is_trainable)
        if torch_device is not None:
            restored.to(torch_device)
        return restored if is_trainable else restored.eval()


FOR_TASK: dict[Any, type[StructLoraModel]] = {
    task: type(f"StructLora{kind.__name__.removeprefix('Peft')}", (StructLoraModel, kind), {"__module__": __name__})
    for task, kind in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()
}
globals().update({kind.__name__: kind for kind in FOR_TASK.values()})  # pickle looks for them here
