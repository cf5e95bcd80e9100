"""How a run is judged: grading in worker processes, votes, intervals, calibration, and the table of a run."""
