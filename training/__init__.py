"""What surrounds the loops of fgm.py: the run in a folder, checkpoints, flags, progress, the GAN."""
