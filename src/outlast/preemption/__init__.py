"""From the signal to the requeue. What happens on SIGUSR1: `signals`, `attempt/steps`, `attempt/saving`, `shutdown`."""
