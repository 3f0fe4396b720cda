-- Appends a job's next events under its fence and renews the lease; the terminal event settles the record with it.
-- With no event it only renews. Repeating a call whose answer was lost is harmless: what is stored is not stored again.
-- Two scripts are made of this file: only the one for terminal events has the queue's parts before it.
-- KEYS job, stream
-- ARGV prefix, ttl_s, job_id, fence, first_seq, lease_ms, final state ('' while running), tokens in these events,
--   tokens used by the whole job ('' = not known), event JSON...
-- Returns {ok|fenced|missing|gap, stop (0 no, 1 cancel requested, 2 deadline passed)}
local FIXED = 9
local job_id = ARGV[3]
local is_end, job = ARGV[7] ~= '', nil
local fence, stored, cancel, state, deadline, tokens
if is_end then
  job, fence, stored, cancel = read_job(job_id, 'fence', 'seq', 'cancel')
  state, deadline = job.state, job.deadline
else
  local held = redis.call('HMGET', KEYS[1], 'fence', 'seq', 'cancel', 'state', 'deadline', 'tokens')
  fence, stored, cancel, state, deadline, tokens = held[1], held[2], held[3], held[4], tonumber(held[5] or nil), held[6]
end
if not fence then return {'missing', 0} end
if fence ~= ARGV[4] then return {'fenced', 0} end
local now = now_ms()
local stop = 0
if cancel then stop = 1 elseif deadline and deadline <= now then stop = 2 end
local events = #ARGV - FIXED
local seq, first = tonumber(stored), tonumber(ARGV[5])
if events > 0 and seq == first + events - 1 then return {'ok', stop} end
if state ~= 'running' then return {'fenced', 0} end
if events > 0 and seq ~= first - 1 then return {'gap', stop} end
for i = 1, events do
  redis.call('XADD', KEYS[2], string.format('%d-0', first + i - 1), 'e', ARGV[FIXED + i])
end
if events > 0 then seq = first + events - 1 end
if is_end then
  adopt(job_id, job, now)
  job.tokens = job.tokens + tonumber(ARGV[8])
  settle(job_id, job, ARGV[9] ~= '' and tonumber(ARGV[9]) or nil, now)
  close_record(job_id, ARGV[7], ARGV[#ARGV], now, 'seq', seq, 'tokens', job.tokens)
  dispatch(job.model, AT_END, now)
else
  redis.call('HSET', KEYS[1], 'lease_until', now + tonumber(ARGV[6]), 'seq', seq,
    'tokens', number(tokens) + tonumber(ARGV[8]))
end
for i = 1, events do
  redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', first + i - 1) .. ARGV[FIXED + i])
end
return {'ok', stop}
