-- Gives a claimed job back (drain, or an engine that had to let go); its tokens stay. It waits again where it stood
-- among its user's jobs, and what it was charged is given back. One that its worker cannot read is set aside: it is
-- parked, takes no place in flight, and is offered again from time to time.
-- KEYS job     ARGV prefix, ttl_s, job_id, fence, attempt to give back (0|1), set it aside (0|1)
-- Returns ok | fenced | missing
local job_id = ARGV[3]
local held = redis.call('HMGET', KEYS[1], 'fence', 'state', 'cancel')
if not held[1] then return 'missing' end
if held[1] ~= ARGV[4] or held[2] ~= 'running' then return 'fenced' end
local now = now_ms()
local job = queued_job(job_id, now)
redis.call('HINCRBY', KEYS[1], 'attempts', -tonumber(ARGV[5]))
redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'state', 'queued', 'lease_until', 0, 'nudges', 0, 'nudged_at', now,
  'place', ARGV[6] == '1' and 'parked' or 'ready')
leave_flight(job_id, job)
if ARGV[6] == '1' then
  dispatch(job.model, AT_END, now)
  return 'ok'
end
join_line(job_id, job)
shift_user(job.model, job.class, job.user, -job.charge)
redis.call('HDEL', KEYS[1], 'charge')
if job.deadline then redis.call('ZADD', P .. 'deadlines', job.deadline, job_id) end
job.place, job.state = 'ready', 'queued'
if held[3] then finish(job_id, job, 'cancelled', CANCELLED, now)
elseif job.deadline and job.deadline <= now then finish(job_id, job, 'failed', deadline_event(), now) end
dispatch(job.model, AT_END, now)
return 'ok'
