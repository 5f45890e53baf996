"""Pairs to groups, and the image that stays for each group."""

import numpy as np


def components(num_nodes: int, edges: np.ndarray) -> np.ndarray:
    """The smallest node of each node's connected component; int64 [num_nodes].

    edges: int [E, 2]. Vectorised union-find: every edge hooks the larger root under the smaller, then paths are halved
    until all nodes point at their root; a few rounds suffice (DINOv2 A.3 keeps one image per component).
    """
    root = np.arange(num_nodes)
    a, b = edges.reshape(-1, 2).T
    while len(a):
        np.minimum.at(root, np.maximum(root[a], root[b]), np.minimum(root[a], root[b]))
        while (root[root] != root).any():
            root = root[root]
        open_edges = root[a] != root[b]
        a, b = a[open_edges], b[open_edges]
    return root


def representatives(labels: np.ndarray, area: np.ndarray, num_bytes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each node the node that stays for its group; int64 [N].

    The best of a group has the larger area (pixels), then the more bytes per pixel (less compressed), then the smaller
    content id, then the smaller row: nothing that depends on the order of the input. labels: int [N], equal in a group.
    """
    rows = np.arange(len(labels))
    order = np.lexsort((rows, ids, -(num_bytes / np.maximum(area, 1)), -area, labels))
    first = np.ones(len(order), dtype=bool)
    first[1:] = labels[order][1:] != labels[order][:-1]
    best = np.empty(len(labels), dtype=np.int64)
    best[order] = order[first][np.cumsum(first) - 1]
    return best
