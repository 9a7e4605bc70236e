"""The systems of the paper's tables behind one small interface: ``method.name=<name>``.

A `Method` adapts a base model, says what a training step minimises and does, and exports. Everything else (data, loss
of the task, schedule, evaluation) is the training loop's and the same for all. A method is a class with
``@register("name")``; one in a file of this package is found without being named anywhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

from structlora_pyg.checks import ConfigError, not_one_of
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods.base import METHODS, Method, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "make_method", "method_problems", "register"]


def make_method(adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> Method:
    """Return the method that `options.name` names.

    Args:
        adapter: Rank, scaling, targets; for StructLoRA graph, filter and coordinator too.
        options: The name, and what single methods need besides.
        total_steps: Optimizer steps of the run.

    Raises:
        ConfigError: An unknown name; settings of the adapter that the method cannot follow.
    """
    if options.name not in METHODS:
        raise ConfigError([not_one_of("method.name", options.name, METHODS)])
    return METHODS[options.name](adapter, options, total_steps)


def method_problems(adapter: StructLoraConfig, options: MethodConfig) -> list[str]:
    """Return an unknown name, options of other methods, and what `make_method` would raise; empty if all is well."""
    found = []
    for field in dataclasses.fields(MethodConfig):
        users = [name for name, method in METHODS.items() if field.name in method.own_options]
        changed = field.name != "name" and getattr(options, field.name) != field.default
        if changed and options.name in METHODS and options.name not in users:
            belongs = f"it belongs to {', '.join(users)}"
            found.append(f"method.{field.name} has no effect with method.name={options.name}; {belongs}")
    try:
        make_method(adapter, options, total_steps=1)
    except ConfigError as error:
        found += error.problems
    return found
