"""The decode role: generates tokens from KV that it loads or computes."""
