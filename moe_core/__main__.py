"""``python -m moe_core`` is ``moe``."""

import sys

from moe_core.cli import main

sys.exit(main())
