"""`vs_trl_worker.py` as Tether's command line starts: Tether is imported before torch, so that threads wait briefly."""

import tether  # noqa: F401

# isort: split
from vs_trl_worker import main

if __name__ == "__main__":
    main()
