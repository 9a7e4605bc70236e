"""The numbers that the paper prints (StructLoRA, arXiv 2603.14228), to stand beside a comparison, never in it.

They come from other models, other data and other hardware. Nothing here is measured by this package.
"""

from __future__ import annotations

from structlora_pyg.study.report.tables import NONE, Table

DISAGREEMENT = (
    "The paper's tables disagree with each other: for StructLoRA on BoolQ at r = 8 with all data, Table 1 prints 82.1 "
    "and Tables 3, 4 and 5 print 81.3; on CIFAR-100 85.1 and 84.1, on COCO 122.9 and 122.4."
)
RANKS, SHARES = ["r 2", "r 4", "r 8", "r 16", "r 32"], ["10 %", "25 %", "50 %", "100 %"]

_TABLES: dict[str, tuple[str, list[tuple[str, ...]], str]] = {
    "table1": (
        "main results at about 0.5 to 1 % trainable parameters",
        [
            ("", "BoolQ", "PIQA", "CIFAR-100", "ImageNet-1k", "COCO CIDEr", "VQAv2"),
            ("full fine-tuning", "82.6", "85.3", "85.9", "78.8", "123.5", "76.2"),
            ("LoRA", "79.1", "82.4", "81.5", "76.2", "116.2", "73.5"),
            ("QLoRA", "80.0", "83.1", "82.7", "76.9", "119.1", "74.2"),
            ("DoRA", "80.6", "83.7", "83.2", "77.3", "120.3", "75.0"),
            ("Sensitivity-LoRA", "80.9", "84.0", "83.5", "77.5", "120.8", "75.2"),
            ("LoRA-Dropout", "80.2", "83.3", "82.5", "76.8", "118.8", "74.5"),
            ("StructLoRA", "82.1", "84.9", "85.1", "78.6", "122.9", "75.9"),
        ],
        DISAGREEMENT,
    ),
    "table2": (
        "GLUE with RoBERTa-base",
        [
            ("", "MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B", "average"),
            ("LoRA", "87.3", "93.5", "87.1", "58.8", "93.0", "90.5", "79.4", "91.0", "85.1"),
            ("AdaLoRA", "87.3", "93.6", "87.3", "59.0", "93.1", "90.6", "79.6", "91.2", "85.2"),
            ("Sensitivity-LoRA", "87.6", "94.6", "87.7", "60.2", "93.6", "90.7", "81.8", "91.3", "86.0"),
            ("StructLoRA", "88.1", "95.0", "88.5", "61.5", "94.1", "91.0", "82.3", "91.5", "86.5"),
        ],
        "",
    ),
    "table3": (
        "rank",
        [
            ("", *RANKS),
            ("BoolQ, LoRA", "75.1", "77.6", "79.1", "80.3", "81.0"),
            ("BoolQ, StructLoRA", "77.4", "79.9", "81.3", "81.7", "81.9"),
            ("CIFAR-100, LoRA", "78.3", "79.7", "81.5", "82.8", "83.4"),
            ("CIFAR-100, StructLoRA", "80.1", "82.2", "84.1", "84.3", "84.5"),
            ("COCO CIDEr, LoRA", "111.2", "113.8", "116.2", "118.1", "119.0"),
            ("COCO CIDEr, StructLoRA", "114.3", "117.0", "122.4", "123.6", "123.9"),
        ],
        DISAGREEMENT,
    ),
    "table4": (
        "share of the training data, r = 8",
        [
            ("", *SHARES),
            ("BoolQ, LoRA", "68.5", "73.2", "76.4", "79.1"),
            ("BoolQ, StructLoRA", "71.2", "76.3", "78.9", "81.3"),
            ("CIFAR-100, LoRA", "73.6", "78.0", "80.5", "81.5"),
            ("CIFAR-100, StructLoRA", "76.3", "80.5", "82.4", "84.1"),
            ("COCO CIDEr, LoRA", "100.2", "108.3", "114.0", "116.2"),
            ("COCO CIDEr, StructLoRA", "103.7", "112.4", "117.9", "122.4"),
        ],
        DISAGREEMENT,
    ),
    "table5": (
        "ablation",
        [
            ("", "BoolQ", "CIFAR-100", "COCO CIDEr"),
            ("StructLoRA", "81.3", "84.1", "122.4"),
            ("without information bottleneck", "79.4", "81.9", "117.8"),
            ("without graph network", "80.1", "82.6", "119.4"),
            ("without both (LoRA)", "79.1", "81.5", "116.2"),
            ("graph network of 1 layer", "81.3", NONE, NONE),
            ("graph network of 2 layers", "80.4", NONE, NONE),
            ("graph network of 3 layers", "79.7", NONE, NONE),
            ("edges between adjacent layers only", "80.5", NONE, NONE),
            ("edges by similarity only", "80.2", NONE, NONE),
        ],
        DISAGREEMENT,
    ),
}
NAMES = tuple(_TABLES)


def paper_table(name: str) -> Table:
    """Return a table of the paper, marked as such.

    Args:
        name: ``table1`` to ``table5``.

    Raises:
        ValueError: Another name.
    """
    if name not in _TABLES:
        raise ValueError(f"paper={name!r} is no table of the paper; use {', '.join(NAMES)} or null")
    title, (columns, *rows), remark = _TABLES[name]
    number = name.removeprefix("table")
    return Table(
        title=f"As printed in the paper, not reproduced: Table {number}, {title}",
        columns=columns,
        rows=rows,
        note=(
            f"As printed in arXiv 2603.14228, Table {number}: other models, data and hardware; not reproduced here. "
            f"{remark}"
        ).strip(),
    )
