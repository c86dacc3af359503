"""python -m profiling: measured figures beside the bounds that they have to keep. Exit status 1 if one is broken."""

import sys

from profiling import bounds

sys.exit(bounds.main())
