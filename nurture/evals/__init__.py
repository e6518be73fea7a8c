"""Evaluation: what a model knows, can do and does wrong, each as a number with an interval."""
