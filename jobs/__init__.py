"""This room holds what runs on the accelerators: one readable file per kind of job.

A job is a module of this room, `jobs/<name>.py`, that has five functions; `job=<name>` picks it. Two more places know
it: `conf/job/<name>.yaml` has its `job.name` and the defaults of its `trainer` section, and the type of `job.name` in
`outlast/config/run.py` has its name. `smoke.py` is the shortest example.

`check(config: Config) -> None`
    Refuse what the job would not accept, with a `ConfigError` that names the key, the value and what is valid.
    The launcher calls it first, on a machine that may have no GPU. It may convert the values of `config.trainer`,
    and leaves nothing behind: no file, no process group, no device state.

`footprint(config: Config) -> Footprint`
    Estimate the bytes that the run will write, part by part: a checkpoint, the finished model, everything else.
    The plan holds the estimate against the budget. An exception means that it can't be estimated: the plan says so, and
    the first checkpoint decides.

`changes(config: Config) -> list[tuple[str, Config]]`
    List what would make the run write less: each change as it would be typed, and the configuration with it.
    The refusal of too small a budget shows them; an empty list is a valid answer.

`training(config: Config) -> dict[str, Any]`
    Describe the training for the plan, in plain values that JSON can hold. Two keys are required: `micro_batch` (rows
    of a rank and forward pass) and `accumulation` (forward passes of an optimizer step). `hazards` is optional: a list
    of sentences, which the plan shows among its own. Any other key is shown as it is.

`main(run: Run, config: Config) -> None`
    Train, from where the run stands, to its end. Every rank calls it, with signals caught and the run's directory open.
    With a Hugging Face Trainer that is `run.train(trainer)`. A loop of its own asks `run.resume_point()`, calls
    `run.begin(step)`, then `run.step_end(...)` after each optimizer step, then `run.finish(...)`. A preempted attempt
    does not return from these calls. Returning without having finished the run is an error, and so is any exception: it
    goes to the ledger, and the attempt has failed.

The first four run on the login node for each plan and each cell of a sweep, so they must be quick; import training
libraries inside the functions that need them.
"""
