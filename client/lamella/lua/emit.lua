-- Appends a job's next events under its fence and renews the lease; the terminal event settles the record with it.
-- With no event it only renews. Repeating a call whose answer was lost is harmless: what is stored is not stored again.
-- KEYS job, stream, active
-- ARGV job_id, fence, first_seq, lease_ms, channel, ttl_s, final state ('' while running), event JSON...
-- Returns {ok|fenced|missing|gap, cancel requested (0|1)}
local job = redis.call('HMGET', KEYS[1], 'fence', 'seq', 'cancel', 'state')
if not job[1] then return {'missing', 0} end
if job[1] ~= ARGV[2] then return {'fenced', 0} end
local cancel = job[3] and 1 or 0
local count = #ARGV - 7
local seq = tonumber(job[2])
local first = tonumber(ARGV[3])
if count > 0 and seq == first + count - 1 then return {'ok', cancel} end
if job[4] ~= 'running' then return {'fenced', 0} end
if count > 0 and seq ~= first - 1 then return {'gap', cancel} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 1, count do
  redis.call('XADD', KEYS[2], string.format('%d-0', first + i - 1), 'e', ARGV[7 + i])
end
if count > 0 then redis.call('HSET', KEYS[1], 'seq', first + count - 1) end
if ARGV[7] == '' then
  redis.call('HSET', KEYS[1], 'lease_until', now + tonumber(ARGV[4]))
else
  redis.call('HSET', KEYS[1], 'state', ARGV[7], 'finished_at', now, 'outcome', ARGV[#ARGV])
  redis.call('HDEL', KEYS[1], 'message')
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  redis.call('EXPIRE', KEYS[2], ARGV[6])
  redis.call('ZREM', KEYS[3], ARGV[1])
end
for i = 1, count do
  redis.call('PUBLISH', ARGV[5], string.format('%d ', first + i - 1) .. ARGV[7 + i])
end
return {'ok', cancel}
