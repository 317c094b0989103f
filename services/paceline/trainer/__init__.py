"""Makes and trains draft models: small ones whose guesses the target verifies in one pass.

The way of a first draft (`paceline draft create`): create.py lets the target write text
(writer.py, with the engine), keeps it with what the target thought at each position (texts.py),
and distils it (train.py, losses.py) into a small decoder (decoder.py) that checkpoint.py saves.

The trainer's own process (__main__.py) has no torch: server.py hears workers and operators,
attendants.py books who attends and what all hear, desk.py is the way to the registry
(registry.py), and conductor.py decides.
"""
