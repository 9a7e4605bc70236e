"""Write the distinct passages of BoolQ's dev split as plain text, a passage a line: text for a language model.

python benchmarks/passages.py $STRUCTLORA_DATA/boolq/dev.jsonl.gz $STRUCTLORA_DATA/passages.txt
"""

import gzip
import json
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
opened = gzip.open if source.suffix == ".gz" else open
with opened(source, "rt", encoding="utf-8") as lines:
    passages = dict.fromkeys(json.loads(line)["passage"] for line in lines)
target.write_text("\n".join(passages) + "\n", encoding="utf-8")
