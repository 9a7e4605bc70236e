"""CIDEr of captions, by the COCO evaluation code (pycocoevalcap).

Captions are split into words by the Stanford PTB tokenizer that comes with it, which runs on Java, and weighted by how
rare their n-grams are among the references of the evaluated pictures: a score belongs to its set of pictures.
Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv 1411.5726).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

from structlora_pyg.checks import ConfigError


def check_cider() -> None:
    """Make sure that `cider` can be computed, before any training.

    Raises:
        ConfigError: If pycocoevalcap or a working Java is missing; it names the fix.
    """
    if find_spec("pycocoevalcap") is None:
        raise ConfigError(["data.task=captions needs pycocoevalcap for CIDEr: pip install structlora-pyg[caption]"])
    if shutil.which("java") is None:
        raise ConfigError(
            [
                "data.task=captions needs Java for the tokenizer of CIDEr, and there is no java on the PATH: install a "
                "Java runtime (apt-get install default-jre-headless, or conda install openjdk)"
            ]
        )
    try:
        words = _words([["A dog, running."]])
    except OSError as error:
        raise ConfigError([f"data.task=captions: the tokenizer of CIDEr cannot be run: {error}"]) from error
    if words != [["a dog running"]]:
        raise ConfigError([f"data.task=captions: java is there, but the tokenizer of CIDEr does not work: {words}"])


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return 100 times the mean CIDEr of captions, as papers give it; 0 for no word in common, about 100 for people.

    Args:
        captions: One caption a picture, two pictures or more: with one, no n-gram is rarer than another.
        references: The captions that people wrote for each picture, one or more.
    """
    from pycocoevalcap.cider.cider import Cider

    found, wanted = _words([[caption] for caption in captions]), _words(references)
    score, _ = Cider().compute_score(dict(enumerate(wanted)), dict(enumerate(found)))
    return 100.0 * float(score)


def _words(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return lower-case words without punctuation, separated by spaces."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer works by lines: a text of two would shift all that follow.
    lines = {i: [{"caption": " ".join(text.split())} for text in group] for i, group in enumerate(texts)}
    tokenized = PTBTokenizer().tokenize(lines)
    words = [tokenized.get(i, []) for i in range(len(texts))]
    if [len(group) for group in words] != [len(group) for group in texts]:
        raise OSError("the PTB tokenizer lost lines; run `java -version` to see whether Java works")
    return words
