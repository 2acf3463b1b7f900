"""`python -m dsv3` is `dsv3`."""

import sys

from dsv3.cli.main import main

sys.exit(main())
