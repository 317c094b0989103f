"""The prefill role: computes the KV of prompts and leaves it in the KV store."""
