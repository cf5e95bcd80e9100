"""What every script shares: flags and mistakes, files, stop signals, devices, progress, trackers, model folders."""
