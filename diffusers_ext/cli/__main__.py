"""`python -m diffusers_ext.cli`, for torchrun."""

from . import main

main()
