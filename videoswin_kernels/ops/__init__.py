"""The contracts: one file for each operator with its public function, docstring and validation."""
