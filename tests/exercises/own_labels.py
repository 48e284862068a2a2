"""A label-restoring method of one's own: all images have the class of the lowest gradient."""

import numpy as np

from jinv.federated import labels


def loudest(head: labels.Head) -> np.ndarray:
    counts = np.zeros(head.classes, int)
    counts[np.argmin(head.signal)] = head.images
    return counts


labels.register("loudest", loudest)
