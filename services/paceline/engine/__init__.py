"""The inference engine: scheduling, paged KV, model execution and sampling.

Synchronous and owned by one thread; knows nothing of gRPC, Redis, HTTP or Kubernetes.
engine.py is the page to read first.
"""
