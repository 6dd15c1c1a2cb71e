"""DGCNN, a classifier of point clouds, and its data."""
