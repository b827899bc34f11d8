"""Getting videos ready for training: `python -m train.prepare`, a command a file."""
