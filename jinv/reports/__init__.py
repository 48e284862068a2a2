"""Pages and curves that people look at."""
