"""The worker: takes jobs from Celery, runs them on its engines, and tells the registry everything that happens.

In the order a job flows through them:

- `cli`, `config`, `worker_table`, `log_setup`, `device`: from a command line to settings and a pinned device, before
  torch is loaded.
- `security_table`, `server_check`: which models may be served, and a server that will never let this worker in.
- `process`, `serving`, `open_engine`, `local_host`, `worker_error`: one worker put together and taken apart, and what
  it serves now.
- `child_host`, `child_engine`, `engine_totals`, `supervisor`, `turns_watch`, `sweep_watch`, `restart_rule`,
  `engine_process`: the engines in a process of their own.
- `channel`, `engine_messages`: what the two say to each other; `engine_child`, `engine_server`, `engine_outlet`,
  `failpoints`: its side.
- `app`, `transport`, `consumer`, `subscriptions`, `tasks`: Celery's settings, its broker connection, its way back,
  which queues, and the one task, which carries a job id.
- `session`, `model_slots`, `gate`, `sequence_request`, `engine_port`: claim, resume point, entry into the engine, way
  back.
- `publisher`, `delivery`, `registry`: each sweep's tokens to Redis, under a fence, again until they are there.
- `running_job`, `job_table`: what all of these know of a job.
- `lease_keeper`, `lease`, `reconciler`: leases of jobs, leases of deliveries, and jobs that nobody works on.
- `pull_keeper`, `pull_process`, `pull_child`: models that somebody asks this worker to bring into its host's store.
- `heartbeat`, `host_facts`, `health`, `flower_info`, `monitor`, `drain`: signs of life, those who look at them, and the
  end; `remote_control`, `scripts`, `listing_sweep`, `stoppable_thread`.
- `telemetry`, `telemetry_config`, `job_watch`, `engine_sources`: who is told what happens, and where figures come from.
- `metrics_jobs`, `metrics_engine`, `metrics_server`: a worker's metrics; `metrics_cli`, `metrics_fleet`: those of all.
- `job_traces`: spans of jobs; `log_context`: what log lines are labelled with.
"""
