"""What train_classifier.py and collect_rollouts.py are made of: data, order, packing, checkpoints, the loop."""
