"""Where you type: the commands of the login node."""
