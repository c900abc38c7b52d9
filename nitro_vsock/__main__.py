"""Owns: `python -m nitro_vsock`. Must not know: anything else."""

import sys

from nitro_vsock.cli import main

sys.exit(main())
