"""How long work is run: configs, folders, checkpoints, progress, studies, command lines."""
