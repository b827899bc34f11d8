"""Training, evaluation and the data they read; imports `model`, is imported by nothing else."""
