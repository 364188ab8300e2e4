"""Trackers (TensorBoard, Weights & Biases, MLflow, Trackio) see one run, however many attempts it has."""
