-- Takes a job for one worker: a fence and a lease, or the reason why not.
-- KEYS job
-- ARGV prefix, ttl_s, job_id, worker, lease_ms, max_attempts, version, poison event JSON
-- Returns {ok, fence, attempts, seq, request, 1 if the worker that had it let its lease run out (else 0)}
--   or {missing|held|done|failed|cancelled|poison|unknown_schema}
local job_id, now = ARGV[3], now_ms()
local held = redis.call('HMGET', KEYS[1], 'state', 'v', 'lease_until', 'cancel', 'seq', 'request')
local state = held[1]
if not state then return {'missing'} end
if is_final(state) then return {state} end
if state == 'running' and number(held[3]) > now then return {'held'} end
local job = queued_job(job_id, now)
if not reads(held[2], ARGV[7]) then
  -- Parked: it is offered again from time to time, and takes no place in flight meanwhile.
  if job.place == 'sent' then
    leave_flight(job_id, job)
    redis.call('HSET', KEYS[1], 'place', 'parked')
    dispatch(job.model, AT_END, now)
  end
  return {'unknown_schema'}
end
local ended, event, answer = nil, nil, nil
if held[4] then ended, event, answer = 'cancelled', CANCELLED, 'cancelled'
elseif job.deadline and job.deadline <= now then ended, event, answer = 'failed', DEADLINE, 'failed'
elseif job.attempts >= tonumber(ARGV[6]) then ended, event, answer = 'failed', ARGV[8], 'poison' end
if ended then
  finish(job_id, job, ended, event, now)
  dispatch(job.model, AT_END, now)
  return {answer}
end
if job.place == 'ready' then  -- a message of a version that knows no lines
  local kind, at = find_user(job.model, job.class, job.user)
  take(job_id, job, now, kind == 'ready' and at or nil, limits_of(job.user).weight)
elseif job.place == 'parked' then
  enter_flight(job_id, job, now)
  redis.call('HSET', KEYS[1], 'place', 'sent')
end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
local attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[4], 'lease_until', now + tonumber(ARGV[5]), 'nudges', 0)
redis.call('HSETNX', KEYS[1], 'started_at', now)
return {'ok', fence, attempts, tonumber(held[5]), held[6], state == 'running' and 1 or 0}
