-- Appends a job's next events under its fence and renews the lease; the terminal event settles the record with it.
-- With no event it only renews. Repeating a call whose answer was lost is harmless: what is stored is not stored again.
-- Two scripts are made of this file: only the one for terminal events has the queue's parts before it.
-- KEYS job, stream
-- ARGV prefix, ttl_s, job_id, fence, first_seq, lease_ms, final state ('' while running), tokens in these events,
--   tokens used by the whole job ('' = not known), event JSON...
-- Returns {ok|fenced|missing|gap, stop (0 no, 1 cancel requested, 2 deadline passed)}
local FIXED = 9
local job_id = ARGV[3]
local held = redis.call('HMGET', KEYS[1], 'fence', 'seq', 'cancel', 'state', 'deadline')
if not held[1] then return {'missing', 0} end
if held[1] ~= ARGV[4] then return {'fenced', 0} end
local now = now_ms()
local stop = 0
if held[3] then stop = 1 elseif held[5] and tonumber(held[5]) <= now then stop = 2 end
local events = #ARGV - FIXED
local seq, first = tonumber(held[2]), tonumber(ARGV[5])
if events > 0 and seq == first + events - 1 then return {'ok', stop} end
if held[4] ~= 'running' then return {'fenced', 0} end
if events > 0 and seq ~= first - 1 then return {'gap', stop} end
for i = 1, events do
  redis.call('XADD', KEYS[2], string.format('%d-0', first + i - 1), 'e', ARGV[FIXED + i])
end
if events > 0 then redis.call('HSET', KEYS[1], 'seq', first + events - 1) end
if ARGV[8] ~= '0' then redis.call('HINCRBY', KEYS[1], 'tokens', ARGV[8]) end
if ARGV[7] == '' then
  redis.call('HSET', KEYS[1], 'lease_until', now + tonumber(ARGV[6]))
else
  local job = queued_job(job_id, now)
  settle(job_id, job, ARGV[9] ~= '' and tonumber(ARGV[9]) or nil, now)
  close_record(job_id, ARGV[7], ARGV[#ARGV], now)
  dispatch(job.model, AT_END, now)
end
for i = 1, events do
  redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', first + i - 1) .. ARGV[FIXED + i])
end
return {'ok', stop}
