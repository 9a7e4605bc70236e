"""``python -m structlora_pyg`` is the command ``structlora``."""

import sys

from structlora_pyg.cli import main

sys.exit(main())
