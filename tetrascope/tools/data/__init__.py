"""`tetrascope data`: index, inspect and plan what a run trains on."""
