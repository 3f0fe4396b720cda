"""Lamella beside its peers: one run that measures the machine's limits and everyone against them.

In the order data flows through them:

- `checkpoint`: the random Llama-shaped model everybody loads, or a real one exported for them.
- `coldness`: dropping the file cache, and counting what really came from the disk.
- `calibrate`: what the machine can read, copy and compute; the limits of the same run.
- `stage`: one measurement in one process, under a deadline, its results on disk as they come.
- `token_clock`, `peers`: AirLLM, accelerate and transformers. `lamella_run`: Lamella.
- `machine`, `report`: where it ran, and what follows from the figures.
- `soak`, with `soak_plan`, `soak_fleet`, `soak_client`, `soak_report`: many jobs over many kills, judged.
- `sweep`: the command that does all of it. `plot`: the picture, from the JSON alone.
- `fleet`, `fleet_sim`: the queue with a thousand simulated workers and a million jobs.
- `peer_fetch`: shards from another host's store, beside a plain copy.
"""
