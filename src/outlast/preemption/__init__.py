"""From the signal to the requeue: signals, deadline, cause, watchdog, shutdown, policy."""
