"""`python -m nitro_rt` is `nitro-rt`."""

import sys

from nitro_rt.cli import main

sys.exit(main())
