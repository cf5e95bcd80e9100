"""What eval_utils and stats_utils are made of: grading in worker processes, intervals, calibration."""
