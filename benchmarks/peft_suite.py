"""PEFT's own tests of LoRA, run with our configuration and our models: what a user of PEFT would notice.

    pip install diffusers parameterized   # which the tests import
    python benchmarks/peft_suite.py tests/test_custom_models.py -k "Vanilla"
    python benchmarks/peft_suite.py --active

The tests are those of the source distribution of the installed version, which is fetched from the package index.
In the tests, ``LoraConfig`` is our configuration and ``get_peft_model`` our function; loading stays PEFT's, so that
what we write has to load there. The filter draws no noise, as the tests have no dropout where they compare training
forwards. A case is applicable if it makes such a configuration and passes on ours or on stock PEFT, which is asked
about those that ours does not pass, unless `NOT_ABOUT_USE` says why not. A refusal is an error that this library
raised, a failure anything else. ``--active`` lets filter and coordinator act from the first step. Results are kept in
``--results`` and only what is selected is run anew (stock PEFT: only what it was never asked); the table is about all
that is kept for the files selected. No hub is asked: in the place of the tiny models that the tests load from it stand
others of the same classes, with random weights and without tokenizers (`STAND_INS`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# What is about the inside of PEFT, by the names of its tests, and why ours has to be another.
NOT_ABOUT_USE = {
    r"test_save_pretrained(_selected_adapters)?(_pickle)?\[|test_parameters_after_loading_model|test_prefixes_select_correct"
    r"|test_nb_params_|TestDynamicDispatch::test_saving|test_dora_save_and_load_remapping": (
        "compares the whole state dict, or the count of all parameters, with a plain LoRA's; ours hold filter and "
        "coordinator, which training goes on from. What a loaded folder computes is compared by other tests"
    ),
    r"test_repr_lora_|test_adapter_model_type|test_module_type|test_model_status_with|test_lora_with_bias_argument"
    r"|test_(model_)?target_parameters(_and_target_modules)?$|without_in_features|hotswap_scalings_are"
    r"|test_training_custom_models|test_training(_(encoder_)?decoders)?(_layer_indexing)?\["
    r"|test_training_(\w+_)?gradient_checkpointing\[False|test_only_params_are_updated|TestRequiresGrad|test_lora_plus_embedding_lr"
    r"|test_lora_mica_freezes_B_when": (
        "names the classes of layers and models, or walks over all modules and parameters; ours has subclasses and more"
    ),
    r"TestDisableInputDtypeCasting": "expects an error where weights have another type than inputs; ours computes",
    r"test_hotswap_missing_key_works": "saves a state dict that lacks weights, which ours refuses to verify",
    r"all_linear_lora\[all-linear\]": "PEFT ignores ensure_weight_tying under all-linear, with a warning; ours ties",
    r"warns_for_unsharded": "warns, and writes a file that cannot be loaded; ours writes none, and says why",
    r"test_lora_conversion\[": "reads what PEFT wrote into the configuration; ours stays as it was given",
    r"TestLowCpuMemUsage::test_get_peft_model": "expects adapters without weights, which a graph pass cannot read",
    r"test_config\.py": "reads adapter_config.json into the configuration; ours has a file of its own beside it",
    r"MHA \d LoRA|test_mha_gradients": (
        "PEFT adds the update of an attention's output projection twice, ours once, as structlora_pyg.load_lora does"
    ),
    r"test_mixed|test_mapping|PeftMixedModel|mixed_model|without_mutation\[True|LowLevelFunctional"
    r"|test_no_infinite_recursion|direct_injection|TestInjectAdapterFromStateDict"
    r"|kasa_deferred_truncation|test_load_model_low_cpu_mem_usage": (
        "PeftMixedModel, inject_adapter_in_model and PEFT's classes called by hand make no graph"
    ),
}
WORDING = "PEFT's words of an error that ours has in its own"

STAND_INS = [
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
    "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "hf-internal-testing/tiny-random-MistralForCausalLM",
    "hf-internal-testing/tiny-random-gpt2",
    "peft-internal-testing/opt-125m",
    "peft-internal-testing/tiny-dummy-qwen2",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration",
    "peft-internal-testing/tiny-random-BertForSequenceClassification",
    "peft-internal-testing/tiny-random-BertModel",
    "peft-internal-testing/tiny-random-BloomForCausalLM",
    "peft-internal-testing/tiny-random-DebertaModel",
    "peft-internal-testing/tiny-random-DebertaV2Model",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-GPTJForCausalLM",
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM",
    "peft-internal-testing/tiny-random-LlamaForCausalLM",
    "peft-internal-testing/tiny-random-OPTForCausalLM",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
    "peft-internal-testing/tiny-random-RobertaModel",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
    "peft-internal-testing/tiny-random-gpt2",
    "peft-internal-testing/tiny-random-t5",
    "trl-internal-testing/tiny-GptOssForCausalLM",
    "trl-internal-testing/tiny-Llama4ForCausalLM",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
    "trl-internal-testing/tiny-Qwen3ForCausalLM",
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
]
CLASSES = {  # where no id names it
    "gpt2": "GPT2LMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "opt-": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration",
}
FILES = [
    *("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier"),
    *("token_classification_qa", "initialization", "target_parameters", "tuners_utils", "lora_variants", "lora_ga"),
    *("lorafa", "loraplus", "low_level_api", "velora", "bdlora", "trainable_tokens", "helpers", "hub_features"),
    *("lora_conversion", "lora_intruders", "other", "integrations"),
]
SIZES = (  # by all names that configurations have for them
    {"vocab_size": 1024, "max_position_embeddings": 512, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    | {"decoder_start_token_id": 2, "num_key_value_heads": 2, "num_local_experts": 4, "rotary_dim": 4}
    | dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 32)
    | dict.fromkeys(("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("head_dim", "d_kv"), 8)
    | dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "d_ff", "ffn_dim"), 64)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
)

MADE: list[str] = []  # configurations of LoRA made since the current test began
PACKAGE = str(Path(__file__).resolve().parents[1] / "structlora_pyg") + os.sep


def replace_peft(active: bool) -> None:
    """Put our configuration and our function in the place of PEFT's, before tests import them."""
    import peft

    import structlora_pyg.tuner.model  # whole, so that the names it takes from PEFT are PEFT's own

    schedule = {"warmup_steps": 0} if active else {}

    @dataclasses.dataclass
    class LoraConfig(structlora_pyg.StructLoraConfig):
        alarms: Any = "off"
        schedule: Any = dataclasses.field(default_factory=lambda: dict(schedule))
        coordinator: Any = dataclasses.field(default_factory=lambda: {"lift": "tangent"})
        filter: Any = dataclasses.field(default_factory=lambda: {"noise": 0.0})

        def __post_init__(self) -> None:
            MADE.append("")
            super().__post_init__()

    stock = peft.get_peft_model

    def get_peft_model(model: Any, peft_config: Any, *args: Any, mixed: bool = False, **kwargs: Any) -> Any:
        ours = isinstance(peft_config, LoraConfig) and not mixed
        return (structlora_pyg.get_structlora_model if ours else stock)(
            model, peft_config, *args, **kwargs, **({"mixed": True} if mixed else {})
        )

    peft.LoraConfig, peft.get_peft_model = LoraConfig, get_peft_model  # type: ignore[misc]


class Offline(Counter[str]):
    """What PEFT's tests note of the models they have asked the hub for: all, so that they ask for none."""

    def __contains__(self, model: object) -> bool:
        return True


class Recorder:
    """A plugin of pytest: deselects what is about other methods, and notes outcome and reason of every test."""

    def __init__(self, file: Path, only: set[str] | None, every: int) -> None:
        self.file, self.only, self.every = file, only, every
        self.found = json.loads(file.read_text()) if file.is_file() else {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep tests without a configuration class among their parameters, and those of LoRA's."""
        if utilities := sys.modules.get("tests.testing_utils"):
            utilities._HUB_MODEL_ACCESSES = Offline()  # type: ignore[attr-defined]
        kept = []
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            classes = [v.__name__ for v in values if isinstance(v, type) and v.__name__.endswith("Config")]
            lora = all(name == "LoraConfig" for name in classes)
            if lora and (self.only is None or item.nodeid in self.only):
                kept.append(item)
        kept = kept[:: self.every]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_runtest_setup(self, item: Any) -> None:
        """Forget the configurations of the test before."""
        MADE.clear()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note outcome and reason."""
        report = (yield).get_result()
        if report.when != "call" and report.passed:
            return
        entry = {"outcome": report.outcome, "lora": bool(MADE)}
        if call.excinfo is not None and report.failed:
            entry |= self._reason(call.excinfo)
        self.found[item.nodeid] = entry
        if len(self.found) % 50 == 0:
            self.pytest_sessionfinish()

    def _reason(self, info: Any) -> dict[str, str]:
        last = str(info.traceback[-1].path)
        lines = str(info.value).strip().split("\n")
        text = lines[1] if lines[0].startswith("the configuration has") and len(lines) > 1 else lines[0]
        raised = last.startswith(PACKAGE) and isinstance(info.value, (ValueError, RuntimeError, NotImplementedError))
        kind = "refused" if raised else "failed"
        place = f"{Path(last).name}:{info.traceback[-1].lineno + 1}"
        return {"outcome": kind, "reason": f"{info.typename}: {text.strip(' -')[:200]}", "place": place}

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        self.file.write_text(json.dumps(self.found, indent=0, sort_keys=True))


def fill_cache(cache: Path) -> None:
    """Put tiny models with random weights where the hub's client looks for those that it has fetched."""
    import torch
    import transformers

    for repository in STAND_INS:
        named = re.search(r"[A-Z]\w+(?:Model|LM|Generation|Classification)", repository.split("/")[1])
        kind = named[0] if named else next(kind for part, kind in CLASSES.items() if part in repository)
        model = getattr(transformers, kind)
        config = model.config_class
        sizes = {config.attribute_map.get(name, name): size for name, size in SIZES.items()}
        torch.manual_seed(0)
        folder = cache / f"models--{repository.replace('/', '--')}"
        known = config().to_dict()
        model(config(**{k: v for k, v in sizes.items() if k in known})).save_pretrained(folder / "snapshots" / "0")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0")


def fetched(folder: Path) -> Path:
    """Return PEFT's source distribution of the installed version, tests included."""
    version = metadata.version("peft")
    source = folder.resolve() / f"peft-{version}"
    if not source.is_dir():
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"peft=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as packed:
            packed.extractall(folder, filter="data")
        (source / "tests" / "__init__.py").touch()  # which is not in it
    return source


def run(system: str, options: argparse.Namespace, only: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the selected tests on ``stock``, ``ours`` or ``active`` in a process of its own; return all that is known."""
    file = options.results.resolve() / f"{system}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    names = file.with_name("only.json")
    names.write_text(json.dumps(only))
    own = ["--system", system, "--into", str(file), "--names", str(names), "--every", str(1 if only else options.every)]
    cache = file.parent / "hub"
    if not cache.is_dir():
        fill_cache(cache)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": f"{PACKAGE}/..:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--peft", ".", *own, "-k", options.k, *options.tests]
    subprocess.run(command, cwd=options.peft, env=environment, check=False)
    return json.loads(file.read_text()) if file.is_file() else {}


def table(known: dict[str, dict[str, Any]], stock: dict[str, dict[str, Any]], tests: list[str]) -> str:
    """Return the table of outcomes, and the reasons grouped."""
    applicable, left_out = {}, Counter[str]()
    for name, entry in known.items():
        passed = entry["outcome"] == "passed"
        if not entry["lora"] or not any(name.startswith(t) for t in tests):
            continue
        if not passed and stock.get(name, {}).get("outcome") != "passed":
            continue
        why = None if passed else next((why for part, why in NOT_ABOUT_USE.items() if re.search(part, name)), None)
        if "Regex pattern did not match" in entry.get("reason", ""):
            why = WORDING
        if why is None:
            applicable[name] = entry
        else:
            left_out[why] += 1
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in applicable.items():
        for place in (name.partition("::")[0], "all"):
            counts[place][entry["outcome"]] += 1
        if entry["outcome"] in ("refused", "failed"):
            general = re.sub(r"'[^']*'|/tmp/\S+|\d[\d.e+-]*|\S+\.\S+(?= )", "…", entry["reason"])[:110]
            reasons[entry["outcome"], f"{general} ({entry['place']})"].append(name)
    lines = ["| tests | passed | refused | failed | passed, % |", "| --- | ---: | ---: | ---: | ---: |"]
    for place, count in counts.items():
        share = 100 * count["passed"] / count.total()
        lines.append(f"| {place} | {count['passed']} | {count['refused']} | {count['failed']} | {share:.1f} |")
    lines += ["", *(f"Left out: {count} ({why})." for why, count in left_out.most_common())]
    lines += ["", "| | cases | reason | for instance |", "| --- | ---: | --- | --- |"]
    for (kind, reason), names in sorted(reasons.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"| {kind} | {len(names)} | {reason} | {names[0].partition('::')[2]} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line; run the tests, or, in a process of its own, one system's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=[f"tests/test_{name}.py" for name in FILES], help="files of PEFT")
    parser.add_argument("--peft", type=Path, help="a checkout of PEFT, in the place of what is fetched")
    parser.add_argument("--check", action="store_true", help="fail if a case fails")
    parser.add_argument("--active", action="store_true", help="filter and coordinator act from the first step")
    parser.add_argument("-k", default="", help="pytest's selection by name")
    parser.add_argument("--every", type=int, default=1, help="run the first of every so many cases alone")
    parser.add_argument("--results", type=Path, default=Path("build/peft_suite"), help="where results are kept")
    for hidden in ("--system", "--into", "--names"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        import torch

        torch.set_num_threads(1)
        replace_peft(options.system == "active") if options.system != "stock" else None
        only = json.loads(Path(options.names).read_text())
        recorder = Recorder(Path(options.into), None if only is None else set(only), options.every)
        quiet = [
            "-q",
            "--no-header",
            "--tb=no",
            "--show-capture=no",
            "-rE",
            "-n0",
            "-o",
            "addopts=",
            "--continue-on-collection-errors",
        ]
        without = ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "no:warnings", "-k", options.k]
        raise SystemExit(pytest.main([*quiet, *without, *options.tests], plugins=[recorder]))
    options.results.mkdir(parents=True, exist_ok=True)
    options.peft = options.peft or fetched(options.results)
    known = run("active" if options.active else "ours", options)
    stock_file = options.results / "stock.json"
    stock = json.loads(stock_file.read_text()) if stock_file.is_file() else {}
    unknown = [n for n, e in known.items() if e["lora"] and e["outcome"] != "passed" and n not in stock]
    stock = run("stock", options, unknown) if unknown else stock
    print(told := table(known, stock, options.tests))
    if options.check and "\n| failed |" in told:
        sys.exit("cases fail")


if __name__ == "__main__":
    main()
