"""``python -m pystage``: see :mod:`pystage.cli`."""

import sys

from .cli import main

sys.exit(main())
