-- Takes a job for one worker: a fence and a lease, or the reason why not.
-- KEYS job, stream, active
-- ARGV job_id, worker, lease_ms, max_attempts, version, channel, ttl_s, poison event JSON, cancelled event JSON
-- Returns {ok, fence, attempts, seq, request} or {missing|held|done|failed|cancelled|poison|unknown_schema}
local job = redis.call('HMGET', KEYS[1], 'state', 'v', 'lease_until', 'attempts', 'cancel', 'seq', 'request')
local state = job[1]
if not state then return {'missing'} end
if state == 'done' or state == 'failed' or state == 'cancelled' then return {state} end
if job[2] ~= ARGV[5] then return {'unknown_schema'} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if state == 'running' and tonumber(job[3]) > now then return {'held'} end
local finished, event = nil, nil
if job[5] then finished, event = 'cancelled', ARGV[9]
elseif tonumber(job[4]) >= tonumber(ARGV[4]) then finished, event = 'failed', ARGV[8] end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
if finished then
  local seq = redis.call('HINCRBY', KEYS[1], 'seq', 1)
  redis.call('XADD', KEYS[2], string.format('%d-0', seq), 'e', event)
  redis.call('HSET', KEYS[1], 'state', finished, 'finished_at', now, 'outcome', event)
  redis.call('HDEL', KEYS[1], 'message')
  redis.call('EXPIRE', KEYS[1], ARGV[7])
  redis.call('EXPIRE', KEYS[2], ARGV[7])
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('PUBLISH', ARGV[6], string.format('%d ', seq) .. event)
  return {finished == 'failed' and 'poison' or 'cancelled'}
end
local attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[2], 'lease_until', now + tonumber(ARGV[3]), 'nudges', 0)
redis.call('HSETNX', KEYS[1], 'started_at', now)
return {'ok', fence, attempts, tonumber(job[6]), job[7]}
