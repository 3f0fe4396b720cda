-- Takes a job for one worker: a fence and a lease, or the reason why not.
-- KEYS job
-- ARGV prefix, ttl_s, job_id, worker, lease_ms, max_attempts, version, poison event JSON
-- Returns {ok, fence, attempts, seq, request, 1 if the worker that had it let its lease run out (else 0)}
--   or {missing|held|done|failed|cancelled|poison|unknown_schema}
local job_id, now = ARGV[3], now_ms()
local job, version, lease_until, cancel, seq, request, fence =
  read_job(job_id, 'v', 'lease_until', 'cancel', 'seq', 'request', 'fence')
local state = job.state
if not state then return {'missing'} end
if is_final(state) then return {state} end
if state == 'running' and number(lease_until) > now then return {'held'} end
adopt(job_id, job, now)
if not reads(version, ARGV[7]) then
  -- Parked: it is offered again from time to time, and takes no place in flight meanwhile.
  if job.place == 'sent' then
    leave_flight(job_id, job)
    redis.call('HSET', KEYS[1], 'place', 'parked')
    dispatch(job.model, AT_END, now)
  end
  return {'unknown_schema'}
end
local ended, event, answer = nil, nil, nil
if cancel then ended, event, answer = 'cancelled', CANCELLED, 'cancelled'
elseif job.deadline and job.deadline <= now then ended, event, answer = 'failed', deadline_event(), 'failed'
elseif job.attempts >= tonumber(ARGV[6]) then ended, event, answer = 'failed', ARGV[8], 'poison' end
if ended then
  finish(job_id, job, ended, event, now)
  dispatch(job.model, AT_END, now)
  return {answer}
end
if job.place == 'ready' then  -- a message of a version that knows no lines
  local kind, at = find_user(job.model, job.class, job.user)
  take(job_id, job, now, kind == 'ready' and at or nil, limits_of(job.user).weight, job.sends)
elseif job.place == 'parked' then
  join_flight(job_id, job, now)
end
fence = number(fence) + 1
redis.call('HSET', KEYS[1], 'fence', fence, 'attempts', job.attempts + 1, 'state', 'running', 'worker', ARGV[4],
  'lease_until', now + tonumber(ARGV[5]), 'nudges', 0, 'started_at', job.started_at or now)
return {'ok', fence, job.attempts + 1, tonumber(seq), request, state == 'running' and 1 or 0}
