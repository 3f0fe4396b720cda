-- Cancels a job: at once if no live worker holds it, else by a flag the worker reads with its next emit.
-- KEYS job, stream, active     ARGV job_id, channel, ttl_s, cancelled event JSON
-- Returns cancelled | requested | missing | the final state it already had
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'missing' end
if state == 'done' or state == 'failed' or state == 'cancelled' then return state end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if state == 'running' and tonumber(redis.call('HGET', KEYS[1], 'lease_until')) > now then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  return 'requested'
end
local seq = redis.call('HINCRBY', KEYS[1], 'seq', 1)
redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('XADD', KEYS[2], string.format('%d-0', seq), 'e', ARGV[4])
redis.call('HSET', KEYS[1], 'state', 'cancelled', 'finished_at', now, 'outcome', ARGV[4])
redis.call('HDEL', KEYS[1], 'message')
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('PUBLISH', ARGV[2], string.format('%d ', seq) .. ARGV[4])
return 'cancelled'
