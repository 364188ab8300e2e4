"""From overrides to a plan, a value that can be printed; nothing here writes."""
