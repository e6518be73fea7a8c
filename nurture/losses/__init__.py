"""Losses: pure functions from a model (or its logprobs) and a batch to a sum and what to report about it."""
