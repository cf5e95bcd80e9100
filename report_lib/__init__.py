"""What `report.py` is made of. Imports neither torch nor any model.

data, problem: a run and its problems. analysis, cost, value: one pass over a run. compare: runs against each other.
tables, plots, page (and assets): how it is shown. regrade: grading again.
"""
