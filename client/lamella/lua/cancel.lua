-- Cancels a job: at once if no live worker holds it, else by a flag the worker reads with its next emit.
-- KEYS job     ARGV prefix, ttl_s, job_id
-- Returns cancelled | requested | missing | the final state it already had
local job_id = ARGV[3]
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if is_final(state) then return state end
local now = now_ms()
if state == 'running' and number(redis.call('HGET', KEYS[1], 'lease_until')) > now then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  return 'requested'
end
local job = queued_job(job_id, now)
finish(job_id, job, 'cancelled', CANCELLED, now)
dispatch(job.model, AT_END, now)
return 'cancelled'
