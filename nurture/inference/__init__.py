"""Part IV, acting: draw tokens from a model, for rollouts, evaluation and chat."""
