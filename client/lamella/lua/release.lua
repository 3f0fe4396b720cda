-- Gives a claimed job back to the queue's truth (drain, or an engine that had to let go); its tokens stay.
-- KEYS job     ARGV fence, attempt to give back (0|1)
-- Returns ok | fenced | missing
local job = redis.call('HMGET', KEYS[1], 'fence', 'state')
if not job[1] then return 'missing' end
if job[1] ~= ARGV[1] or job[2] ~= 'running' then return 'fenced' end
local time = redis.call('TIME')
redis.call('HINCRBY', KEYS[1], 'attempts', -tonumber(ARGV[2]))
redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'state', 'queued', 'lease_until', 0, 'nudges', 0,
  'nudged_at', time[1] * 1000 + math.floor(time[2] / 1000))
return 'ok'
