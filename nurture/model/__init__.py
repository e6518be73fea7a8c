"""The decoder: one transformer covering the Llama, SmolLM2/SmolLM3 and Qwen3 families."""
