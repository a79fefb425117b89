"""`python -m gradaug_kernels` is the command `gradaug`."""

import sys

from .train.cli import main

sys.exit(main())
