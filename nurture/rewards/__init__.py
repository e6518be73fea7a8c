"""What a rollout is worth: verifiable rewards (math, code), learned ones, and judges."""
