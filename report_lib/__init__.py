"""What `report.py` is made of. Imports neither torch nor any model.

data, problem: a run and its problems. analysis, cost, clones, value: one pass over a run. compare: runs against each
other. answer: what is said first.
tables, plots (plot_parts, answer_plots), page (and assets): how it is shown. regrade: grading again.
"""
