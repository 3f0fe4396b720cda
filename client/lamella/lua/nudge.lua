-- Sends a job's Celery message again if it looks lost: the lease ran out, or it waits while its queue is empty.
-- A job that waits in a busy queue is nudged at doubling intervals, so a long queue does not fill with copies.
-- KEYS job, queue list, active     ARGV job_id, quiet_ms (least time between two nudges)
-- Returns nudged | waiting | held | gone
local job = redis.call('HMGET', KEYS[1], 'state', 'lease_until', 'nudged_at', 'nudges', 'message')
local state = job[1]
if not state or state == 'done' or state == 'failed' or state == 'cancelled' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  return 'gone'
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if state == 'running' and tonumber(job[2]) > now then return 'held' end
local quiet = tonumber(ARGV[2])
local since = now - tonumber(job[3])
local nudges = tonumber(job[4])
if state == 'queued' and redis.call('LLEN', KEYS[2]) > 0 then quiet = quiet * 2 ^ math.min(nudges + 3, 12) end
if state == 'running' and nudges == 0 then quiet = 0 end
if since < quiet then return 'waiting' end
redis.call('HSET', KEYS[1], 'nudged_at', now, 'nudges', nudges + 1)
redis.call('RPUSH', KEYS[2], job[5])
return 'nudged'
