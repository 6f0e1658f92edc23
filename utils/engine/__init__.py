"""What carries a training: sessions, epochs, seeds, processes, devices, checkpoints, run folders."""
