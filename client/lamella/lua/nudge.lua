-- Sends a job's Celery message again if it looks lost: the lease ran out, or it was sent while its queue is empty.
-- A job that waits in a busy queue is nudged at doubling intervals, so a long queue does not fill with copies.
-- A job that waits in its line is left there; one that is in no line is put back.
-- KEYS job     ARGV prefix, ttl_s, job_id, model, quiet_ms (least time between two nudges)
-- Returns nudged | waiting | held | gone
local job_id, model, now = ARGV[3], ARGV[4], now_ms()
local held = redis.call('HMGET', KEYS[1], 'state', 'lease_until', 'nudged_at', 'nudges', 'cancel')
local state = held[1]
local job = queued_job(job_id, now)
if not state or is_final(state) then
  job.model = job.model or model
  if not state and redis.call('ZSCORE', flight(model), job_id) then job.place = 'sent' end
  forget(job_id, job, now)
  dispatch(job.model, AT_END, now)
  return 'gone'
end
if state == 'running' and number(held[2]) > now then return 'held' end
local ended, event = nil, nil
if held[5] then ended, event = 'cancelled', CANCELLED
elseif job.deadline and job.deadline <= now then ended, event = 'failed', deadline_event() end
if ended then
  finish(job_id, job, ended, event, now)
  dispatch(job.model, AT_END, now)
  return 'gone'
end
if job.place == 'ready' then
  if not redis.call('ZSCORE', line(job.model, job.class, job.user), job_id) then join_line(job_id, job) end
  return 'waiting'
end
local quiet, nudges = tonumber(ARGV[5]), number(held[4])
local is_busy = redis.call('LLEN', P .. 'generate.' .. job.model) > 0 or job.place == 'parked'
if state == 'queued' and is_busy then quiet = quiet * 2 ^ math.min(nudges + 3, 12) end
if state == 'running' and nudges == 0 then quiet = 0 end
if now - number(held[3]) < quiet then return 'waiting' end
redis.call('HSET', KEYS[1], 'nudged_at', now, 'nudges', nudges + 1, 'sends', job.sends + 1)
push(job_id, job, job.sends + 1, true)
return 'nudged'
