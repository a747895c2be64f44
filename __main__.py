"""`python -m twinmesh`: the command `twinmesh`, for where it is not on the path."""

import sys

from .scripts.entry import main

if __name__ == "__main__":
    sys.exit(main())
