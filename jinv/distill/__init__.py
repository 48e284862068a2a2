"""What inverted images are good for: students that never saw real data, condensed data sets."""
