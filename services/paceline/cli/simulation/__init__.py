"""Discrete-event simulation of a fleet under a recorded load; no process, no clock, no torch.

What decides is the shipped code: step costs (domain/cost.py), routing (gateway/routing), the pace
of prompt chunks (engine/chunking.py), eviction (kvstore/policy) and the scaling policy. What it
decides about is modelled: engine.py a worker's steps, fleet.py replicas that start and drain,
gateway.py a request's way, meters.py what Prometheus would say. simulation.py runs one load
against one policy; `paceline simulate` and `paceline bench autoscale` call it. What is left out
or simplified stands in the docstring of the module that does it.
"""
