"""Where the accelerators are: one readable file per kind of job."""
