"""From a head's weights back to its training images, and how well that works."""
