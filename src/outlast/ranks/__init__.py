"""Several processes act as one: collectives, the control channel, step agreement, layout."""
