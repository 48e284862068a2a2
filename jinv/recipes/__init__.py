"""The commands, one file each: config -> loaded -> run -> files and summary."""
