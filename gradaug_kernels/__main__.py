"""`python -m gradaug_kernels` is the command `gradaug`."""

import sys

from .cli.main import main

sys.exit(main())
