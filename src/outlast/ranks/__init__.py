"""Several processes act as one: collectives, the control channel, step collectives, layout."""
