"""Grafana dashboards as code; `python -m deploy.grafana.dashboards` writes deploy/grafana/json/.

One file per dashboard (training.py is a part of speculation.py's) says what it shows in the words
of queries.py and panels.py; board.py puts panels on the grid and adds what all dashboards share.
"""
