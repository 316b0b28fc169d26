"""python -m tutelx"""

import sys

from tutelx.cli import main

if __name__ == "__main__":
    sys.exit(main())
