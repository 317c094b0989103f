"""Measurements of the engine in this process: no network, no store, one model.

`python -m paceline.engine.bench NAME OPTIONS_JSON` runs one; `paceline bench` starts it, with
the thread count in the environment, where numeric libraries read it before they load. Every
bench prints one JSON object as its last line.
"""
