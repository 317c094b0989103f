"""Makes and trains draft models: small ones whose guesses the target verifies in one pass.

The way of a first draft (`paceline draft create`): create.py lets the target write text
(writer.py, with the engine), keeps it with what the target thought at each position (texts.py),
and distils it (train.py, losses.py) into a small decoder (decoder.py) that checkpoint.py saves.

The way of live traffic: learner_link.py starts learner_process.py, where samples become texts
(samples.py), are kept by domain (domains.py, replay.py) and are learned from in micro-steps
(learner.py); state.py keeps what was learned. compare.py sets ways of learning side by side.
"""
