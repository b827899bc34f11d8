"""Timed comparisons of the operators, run as scripts from the checkout."""
